// Activations as the weights of one instruction set meet them.
#ifndef G3N_OPERAND_H
#define G3N_OPERAND_H

#include "g3n.h"
#include "lanes.h"

#if defined(__AVX512BF16__)
#define PAIRS 1  // bfloat16 is multiplied in pairs
#else
#define PAIRS 0
#endif

typedef enum { NATURAL, PLANES, NATURAL_PAIRS, PLANE_PAIRS } Layout;

// Activations [rows, columns] as a kind of weight meets them, and their sums by group.
typedef struct {
    Layout layout;
    int bits, group;    // of the weights that it is laid out for; 0 where that does not matter
    long stride;        // from row to row, in entries of the layout
    long sums_stride;
    void *values;       // float32 or bfloat16 [rows, stride]
    float *sums;        // [rows, sums_stride], zeros behind the groups
} Operand;

INLINE int planes_of(int bits) { return bits == 2 || bits == 4 || bits == 8 ? 32 / bits : 0; }

INLINE Layout layout_for(const Matrix *m, int rounded) {
    if (m->bits == 16) return PAIRS && rounded ? NATURAL_PAIRS : NATURAL;
    if (m->bits == 4 && PAIRS && rounded) return PLANE_PAIRS;
    return planes_of(m->bits) ? PLANES : NATURAL;
}

INLINE long groups_of(const Matrix *m) { return m->bits < 16 ? m->columns / m->group : 0; }

// An operand as a weight needs it.
static inline Operand operand_for(const Matrix *m, int rounds, void *values, float *sums) {
    Layout layout = layout_for(m, rounds);
    int bits = layout == PLANES ? m->bits : 0;
    int group = m->bits < 16 && layout != NATURAL ? m->group : 0;
    return (Operand){layout, bits, group, operand_width(m->columns), m->columns / 32 + 64, values, sums};
}

static inline int same_layout(const Operand *a, const Operand *b) {
    return a->layout == b->layout && a->bits == b->bits && (a->group == b->group || !b->group);
}

// One row of an operand, as an operand.
static inline Operand row_of(const Operand *o, long row) {
    Operand one = *o;
    int pairs = o->layout == NATURAL_PAIRS || o->layout == PLANE_PAIRS;
    one.values = (char *)o->values + row * o->stride * (pairs ? 2 : 4);
    one.sums = o->sums + row * o->sums_stride;
    return one;
}

typedef struct {
    const Matrix *matrix;
    const Operand *operand;
    float *out;
    long out_stride;  // from row to row of the activations
} Product;

#endif
