// The calls of the interface: which instruction set serves, and what a step holds.

#include "g3n.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "instructions.h"
#include "lanes.h"
#include "layer_call.h"
#include "step.h"
#include "work.h"

extern const Instructions instructions_plain;
#if defined(__x86_64__)
extern const Instructions instructions_avx2, instructions_avx512, instructions_avx512bf16;
#elif defined(__aarch64__)
extern const Instructions instructions_neon;
#endif

static const Instructions *chosen;

static int has(const Instructions *set) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (set == &instructions_avx2) return avx2;
    if (set == &instructions_avx512) return avx512;
    if (set == &instructions_avx512bf16) return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
    (void)set;
    return 1;
}

// The sets of this kind of processor, best first; plain C is taken by name alone.
static const Instructions *const sets[] = {
#if defined(__x86_64__)
    &instructions_avx512bf16, &instructions_avx512, &instructions_avx2,
#elif defined(__aarch64__)
    &instructions_neon,
#endif
    &instructions_plain,
};
#define SETS (int)(sizeof sets / sizeof *sets)

const char *g3n_instructions(void) {
    for (int i = 0; !chosen && i < SETS - 1; i++)
        if (has(sets[i])) chosen = sets[i];
    return chosen ? chosen->name : NULL;
}

int g3n_use(const char *name) {
    for (int i = 0; i < SETS; i++)
        if (!strcmp(sets[i]->name, name) && has(sets[i])) {
            chosen = sets[i];
            return 1;
        }
    return 0;
}

void g3n_threads(int count) { pool_threads(count); }

void g3n_share(void *parallel, void *thread, void *threads) {
    OpenMP openmp;
    memcpy(&openmp.parallel, &parallel, sizeof parallel);
    memcpy(&openmp.thread, &thread, sizeof thread);
    memcpy(&openmp.threads, &threads, sizeof threads);
    pool_share(&openmp);
}

// Zeros on a border of 64 bytes: a vector that reaches over two lines of the cache takes twice as long to load.
static void *zeros(size_t bytes) {
    size_t room = (bytes / 64 + 1) * 64;
    void *p = aligned_alloc(64, room);
    if (!p) abort();  // a few MB at the start of a model
    return memset(p, 0, room);
}

static float *floats(long rows, long width) { return zeros(rows * width * sizeof(float)); }

// ---- Weights ----

void g3n_product(const Matrix *matrix, const float *x, int rounded, int rows, float *y) {
    void *values = floats(rows, operand_width(matrix->columns));
    float *sums = floats(rows, matrix->columns / 32 + 64);
    ProductWork work = {matrix, x, rounded, rows, values, sums, y};
    pool_run(chosen->product, &work);
    free(values);
    free(sums);
}

void g3n_dequantize(const Matrix *matrix, int64_t start, int64_t stop, int rounded, void *out) {
    DequantizeWork work = {matrix, start, stop, rounded, out};
    pool_run(chosen->dequantize, &work);
}

void g3n_embed(const Matrix *matrix, const int64_t *ids, int count, float *out) {
    for (int i = 0; i < count; i++) g3n_dequantize(matrix, ids[i], ids[i] + 1, 0, out + (long)i * matrix->columns);
}

// Asks for large pages where a buffer covers whole ones: its units are read here and there, and each small page costs a
// look into the page table.
static void use_large_pages(void *p, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21, first = ((uintptr_t)p + page - 1) / page * page, end = ((uintptr_t)p + bytes) / page * page;
    if (end > first) madvise((void *)first, end - first, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

void g3n_units(const Matrix *matrix, uint8_t *codes, uint16_t *scales, uint16_t *biases) {
    use_large_pages(codes, (size_t)matrix->columns * matrix->rows / 2);
    UnitsWork work = {matrix, codes, scales, biases};
    pool_run(chosen->units, &work);
}

int g3n_int8_bits(void) { return chosen->int8_bits; }

void g3n_int8_product(const Matrix *matrix, const void *x, int rounded, int64_t rows, void *y) {
    long groups = matrix->columns / matrix->group;
    Int8Work work = {matrix, x, rounded, rows, .y = y};
    work.codes = zeros(rows * matrix->columns);
    work.scales = floats(rows, groups);
    work.sums = floats(rows, groups);
    pool_run(chosen->int8, &work);
    free(work.codes);
    free(work.scales);
    free(work.sums);
}

// ---- Many rows ----

void g3n_norm(const void *x, const void *weight, int halves, int64_t rows, int64_t columns, float eps, void *out) {
    NormWork work = {x, weight, halves, rows, columns, eps, out};
    pool_run(chosen->norm, &work);
}

void g3n_gate(void *gate, const void *up, int halves, int64_t rows, int64_t columns, int sparse, float cutoff) {
    GateWork work = {gate, up, halves, rows, columns, sparse, cutoff};
    pool_run(chosen->gate, &work);
}

int g3n_attends(void) { return chosen->attention != NULL; }

void g3n_attend(const Sequence *sequence, const void *queries, int heads, int kv_heads, int head_dim, int window, void *out) {
    const Sequence *s = sequence;
    AttentionWork work = {queries, s->keys, s->values, s->key_head_stride, s->value_head_stride,
                          s->rows, s->length, heads, kv_heads, head_dim, window, out};
    pool_run(chosen->attention, &work);
}

// ---- Steps ----

Step *g3n_step_new(const Model *model) {
    Step *s = zeros(sizeof *s);
    s->model = *model;
    const Model *m = &s->model;
    const int rows = MAX_ROWS;
    s->width = padded(m->hidden);
    s->query_width = padded(m->heads * m->head_dim);
    s->kv_width = padded(m->kv_heads * m->head_dim);
    s->ffn_width = padded(m->widest);
    s->ple_width = padded(m->per_layer);
    s->inputs_width = m->layers * s->ple_width;
    s->projected_width = padded(m->layers * m->per_layer);
    s->rope_width = padded(m->head_dim / 2);
    s->streams = floats(rows, m->inputs * s->width);
    s->predictions = floats(rows, m->inputs * s->width);
    float **hidden[] = {&s->x, &s->attended, &s->laurel, &s->residual, &s->down, &s->update, &s->laurel_low};
    for (size_t i = 0; i < sizeof hidden / sizeof *hidden; i++) *hidden[i] = floats(rows, s->width);
    s->queries = floats(rows, s->query_width);
    s->attention = floats(rows, s->query_width);
    s->new_keys = floats(rows, s->kv_width);
    s->new_values = floats(rows, s->kv_width);
    s->keys = floats(rows, s->kv_width);
    s->values = floats(rows, s->kv_width);
    s->gate = floats(rows, s->ffn_width);
    s->up = floats(rows, s->ffn_width);
    s->unit_values = floats(rows, s->ffn_width);
    s->units = zeros(rows * s->ffn_width * sizeof *s->units);
    s->ple_gate = floats(rows, s->ple_width);
    s->projected = floats(rows, s->projected_width);
    s->per_layer_inputs = floats(rows, s->inputs_width);
    for (int kind = 0; kind < 2; kind++) {
        s->cos[kind] = floats(rows, s->rope_width);
        s->sin[kind] = floats(rows, s->rope_width);
    }
    long widest = s->width > s->ffn_width ? s->width : s->ffn_width;
    if (s->query_width > widest) widest = s->query_width;
    for (int i = 0; i <= MAX_PRODUCTS; i++) {
        s->operand_values[i] = floats(rows, operand_width(widest));
        s->operand_sums[i] = floats(rows, widest / 32 + 64);
    }
    return s;
}

void g3n_step_free(Step *s) {
    void *parts[] = {s->streams, s->predictions, s->x, s->attended, s->laurel, s->residual, s->down, s->update, s->laurel_low,
                     s->queries, s->attention, s->new_keys, s->new_values, s->keys, s->values, s->gate, s->up,
                     s->unit_values, s->units, s->ple_gate, s->projected, s->per_layer_inputs, s->cos[0], s->cos[1],
                     s->sin[0], s->sin[1], s->partials};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) free(parts[i]);
    for (int i = 0; i <= MAX_PRODUCTS; i++) {
        free(s->operand_values[i]);
        free(s->operand_sums[i]);
    }
    free(s);
}

float *g3n_step_streams(Step *s) { return s->streams; }
void *g3n_step_keys(Step *s) { return s->keys; }
void *g3n_step_values(Step *s) { return s->values; }

void g3n_start(Step *s, const float *embeddings, const float *per_layer_rows, const int32_t *positions, int rows) {
    const Model *m = &s->model;
    s->rows = rows;
    memcpy(s->positions, positions, rows * sizeof *positions);
    for (int kind = 0; kind < 2; kind++)
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < m->head_dim / 2; i++) {
                float angle = (float)positions[row] * m->inverse_frequencies[kind][i];
                s->cos[kind][row * s->rope_width + i] = as_rounded(cosf(angle), m->rounded);
                s->sin[kind][row * s->rope_width + i] = as_rounded(sinf(angle), m->rounded);
            }
    Call call = {.step = s, .embeddings = embeddings, .per_layer_rows = per_layer_rows};
    pool_run(chosen->start, &call);
}

void g3n_queries(Step *s, const Layer *layer) {
    Call call = {.step = s, .layer = layer};
    pool_run(chosen->queries, &call);
}

void g3n_layer(Step *s, const Layer *layer, int layer_idx, const Sequence *sequences, int count) {
    long chunks = 0;
    for (int i = 0; i < count; i++) chunks = at_least(chunks, chunks_of(s, &sequences[i]));
    long room = chunks * MAX_ROWS * s->model.heads * (PARTIAL_HEAD + s->model.head_dim);
    if (room > s->partial_room) {
        free(s->partials);
        s->partials = floats(1, room);
        s->partial_room = room;
    }
    s->partial_chunks = chunks;
    Call call = {.step = s, .layer = layer, .layer_idx = layer_idx, .sequences = sequences, .count = count};
    pool_run(chosen->layer, &call);
}

void g3n_keep(Step *s, const int32_t *kept, int count) {
    struct {
        float *rows;
        long width;
    } all[] = {{s->streams, s->model.inputs * s->width}, {s->predictions, s->model.inputs * s->width},
               {s->x, s->width}, {s->queries, s->query_width}, {s->laurel_low, s->width},
               {s->per_layer_inputs, s->inputs_width}, {s->cos[0], s->rope_width}, {s->cos[1], s->rope_width},
               {s->sin[0], s->rope_width}, {s->sin[1], s->rope_width}};
    for (int i = 0; i < count; i++) {  // in order, so no row is overwritten that is still wanted
        for (size_t j = 0; j < sizeof all / sizeof *all; j++)
            memmove(all[j].rows + i * all[j].width, all[j].rows + kept[i] * all[j].width, all[j].width * sizeof(float));
        s->positions[i] = s->positions[kept[i]];
    }
    s->rows = count;
}

void g3n_logits(Step *s, float *logits) {
    Call call = {.step = s, .logits = logits};
    pool_run(chosen->logits, &call);
}
