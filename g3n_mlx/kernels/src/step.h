// What a step holds between its calls. Rows are apart by padded widths, with zeros behind what they hold.
#ifndef G3N_STEP_H
#define G3N_STEP_H

#include "g3n.h"

#define MAX_PRODUCTS 12  // with one input
#define PARTIAL_HEAD 64  // largest score and sum of weights stand before what a chunk of keys adds up to

struct Step {
    Model model;
    int rows;
    int32_t positions[MAX_ROWS];
    long width, query_width, kv_width, ffn_width, ple_width, inputs_width, projected_width, rope_width;
    float *streams, *predictions;  // [T, A, D]
    float *x, *attended, *laurel, *residual, *down, *update;  // [T, D]
    float *laurel_low;             // [T, rank]
    float *queries, *attention;    // [T, N * H]
    float *new_keys, *new_values;  // [T, K * H]
    void *keys, *values;           // [T, K, H], in the dtype of the cache
    float *gate, *up, *unit_values;  // [T, F]
    int32_t *units;                  // [T, F], the chosen ones
    int32_t unit_counts[MAX_ROWS];
    float *ple_gate;                 // [T, P]
    float *projected;                // [T, L * P]
    float *per_layer_inputs;         // [T, L, P]
    float *cos[2], *sin[2];          // [T, H / 2], of every kind of attention
    float *partials;                 // [T, N, chunks, H]
    long partial_chunks, partial_room;
    void *operand_values[MAX_PRODUCTS + 1];
    float *operand_sums[MAX_PRODUCTS + 1];
};

static inline float *partial_at(const Step *s, long row, long head, long chunk) {
    return s->partials + ((row * s->model.heads + head) * s->partial_chunks + chunk) * (PARTIAL_HEAD + s->model.head_dim);
}

// Whether a row adds the chosen units of down_proj alone: few enough that this reads less.
static inline int reads_units(const Step *s, const Layer *l, long row) {
    return l->units.codes && s->unit_counts[row] * 4 <= l->gate_proj.rows;
}

#endif
