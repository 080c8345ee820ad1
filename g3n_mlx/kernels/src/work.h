// What the calls of g3n.c hand to every thread.
#ifndef G3N_WORK_H
#define G3N_WORK_H

#include "g3n.h"

typedef struct {
    const Matrix *matrix;
    const float *x;
    int rounded, rows;
    void *values;  // [rows, operand_width], room for what the layout makes of x
    float *sums;   // [rows, columns / 32 + 64]
    float *y;
} ProductWork;

typedef struct {
    const Matrix *matrix;
    int64_t start, stop;
    int rounded;
    void *out;
} DequantizeWork;

typedef struct {
    const Matrix *matrix;
    uint8_t *codes;
    uint16_t *scales, *biases;
} UnitsWork;

typedef struct {
    const Matrix *matrix;
    const void *x;  // [rows, columns]
    int rounded;    // x and y are bfloat16, else float32
    int64_t rows;
    int8_t *codes;         // [rows, columns], room for x in 8 bits
    float *scales, *sums;  // [rows, columns / group]
    void *y;               // [rows, matrix->rows]
} Int8Work;

typedef struct {
    const void *x;       // [rows, columns]
    const void *weight;  // [columns]; NULL: none
    int halves;          // all are bfloat16, else float32
    int64_t rows, columns;
    float eps;
    void *out;
} NormWork;

typedef struct {
    void *gate;  // [rows, columns]
    const void *up;
    int halves;
    int64_t rows, columns;
    int sparse;
    float cutoff;
} GateWork;

typedef struct {
    const void *queries;  // [rows, heads, head_dim], the last `rows` of `length` positions
    const void *keys, *values;  // [kv_heads, length, head_dim], heads apart by the strides
    int64_t key_head_stride, value_head_stride;
    int64_t rows, length, heads, kv_heads, head_dim;
    int64_t window;  // tokens that a row sees; 0: all
    void *out;  // [rows, heads, head_dim]
} AttentionWork;

#endif
