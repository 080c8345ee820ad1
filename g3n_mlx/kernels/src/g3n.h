// The interface of the kernels: what Python fills in (g3n_mlx/kernels/library.py mirrors every struct) and calls.
//
// T rows at once, 1 to MAX_ROWS. Activations cross as float32; with `rounded` they are bfloat16 wherever the published
// model has them so: at the input of every product, in the KV cache and in RoPE's tables. Sums are float32 always.
#ifndef G3N_H
#define G3N_H

#include <stdint.h>

#define MAX_ROWS 16
#define MAX_INPUTS 8  // AltUp streams

#if defined(__GNUC__)
#define EXPORT __attribute__((visibility("default")))
#else
#define EXPORT
#endif

// A weight W [rows, columns] as the checkpoint stores it: y = x W^T.
typedef struct {
    const void *codes;   // packed codes, MLX's packing; a dense weight where bits is 16 (bfloat16) or 32 (float32)
    const void *scales;  // [rows, columns / group]
    const void *biases;
    int64_t code_stride;   // bytes from one row's codes to the next
    int64_t scale_stride;  // entries from one row's scales to the next
    int32_t rows, columns;
    int32_t bits, group;
    int32_t scale_bits;  // 16: bfloat16, 32: float32
} Matrix;

// down_proj [D, F] of a layer with activation sparsity once more, unit by unit: what one unit adds lies side by side.
typedef struct {
    const uint8_t *codes;    // [F, D / 2], 4 bits; byte i of 16 holds the columns i and 16 + i of 32
    const uint16_t *scales;  // [F / group, D], bfloat16
    const uint16_t *biases;
} Units;

typedef struct {
    Matrix q_proj, k_proj, v_proj, o_proj;  // k_proj and v_proj without rows where the layer shares another's
    Matrix linear_left, linear_right;
    Matrix gate_proj, up_proj, down_proj;
    Matrix modality_router, prediction_coefs, correction_coefs;
    Matrix per_layer_input_gate, per_layer_projection;
    // Weights of norms, float32, padded with zeros to whole vectors.
    const float *input_layernorm, *post_attention_layernorm, *pre_feedforward_layernorm, *post_feedforward_layernorm;
    const float *post_laurel_norm, *router_norm, *post_per_layer_input_norm, *q_norm, *k_norm;
    const float *correct_output_scale;  // NULL: none
    Units units;                        // codes NULL: down_proj is read whole
    float cutoff;                       // of activation sparsity, in standard deviations
    int32_t sparse;
    int32_t window;  // tokens that sliding attention sees; 0: all
    int32_t rope;    // which table of frequencies
} Layer;

typedef struct {
    Matrix altup_projections[MAX_INPUTS - 1], altup_unembed_projections[MAX_INPUTS - 1];
    Matrix per_layer_model_projection, head;
    const float *per_layer_projection_norm, *norm;
    const float *inverse_frequencies[2];  // [head_dim / 2]
    int32_t hidden, layers, inputs, active, heads, kv_heads, head_dim, per_layer, widest;  // widest FFN
    int32_t rounded;  // activations are bfloat16
    float eps, softcap;  // softcap 0: none
} Model;

// Keys and values of one sequence in one layer, with the rows that read them: the last `rows` positions.
typedef struct {
    const void *keys, *values;  // bfloat16 where activations are, else float32
    int64_t key_head_stride, value_head_stride;  // entries from one head to the next; rows are head_dim apart
    int32_t length;      // positions in view
    int32_t rows, first; // of the call
} Sequence;

typedef struct Step Step;

EXPORT const char *g3n_instructions(void);
EXPORT int g3n_use(const char *instructions);
EXPORT void g3n_threads(int count);
EXPORT void g3n_share(void *parallel, void *thread, void *threads);
EXPORT void g3n_product(const Matrix *matrix, const float *x, int rounded, int rows, float *y);
// The widest codes that g3n_int8_product takes with these instructions; 0: none.
EXPORT int g3n_int8_bits(void);
EXPORT void g3n_int8_product(const Matrix *matrix, const void *x, int rounded, int64_t rows, void *y);
EXPORT void g3n_dequantize(const Matrix *matrix, int64_t start, int64_t stop, int rounded, void *out);
EXPORT void g3n_embed(const Matrix *matrix, const int64_t *ids, int count, float *out);
EXPORT void g3n_units(const Matrix *matrix, uint8_t *codes, uint16_t *scales, uint16_t *biases);
// Of many rows, bfloat16 (`halves`) or float32, behind each other. RMSNorm; weight NULL: none.
EXPORT void g3n_norm(const void *x, const void *weight, int halves, int64_t rows, int64_t columns, float eps, void *out);
// gelu(gate) * up in the gate's place; `sparse`: of what the gate has above mean + cutoff * std of its row.
EXPORT void g3n_gate(void *gate, const void *up, int halves, int64_t rows, int64_t columns, int sparse, float cutoff);
// Whether these instructions have g3n_attend: attention of many rows in bfloat16, queries and out [rows, heads, head_dim],
// over one sequence. head_dim is a multiple of 32 up to 512, and at most 96 heads share keys and values.
EXPORT int g3n_attends(void);
EXPORT void g3n_attend(const Sequence *sequence, const void *queries, int heads, int kv_heads, int head_dim, int window, void *out);
EXPORT Step *g3n_step_new(const Model *model);
EXPORT void g3n_step_free(Step *step);
// The streams [T, A, D] with rows padded to whole blocks of 256, for a look between two layers.
EXPORT float *g3n_step_streams(Step *step);
EXPORT void *g3n_step_keys(Step *step);
EXPORT void *g3n_step_values(Step *step);
EXPORT void g3n_start(Step *step, const float *embeddings, const float *per_layer_rows, const int32_t *positions, int rows);
EXPORT void g3n_queries(Step *step, const Layer *layer);
EXPORT void g3n_layer(Step *step, const Layer *layer, int layer_idx, const Sequence *sequences, int count);
EXPORT void g3n_keep(Step *step, const int32_t *kept, int count);
EXPORT void g3n_logits(Step *step, float *logits);

#endif
