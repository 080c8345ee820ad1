// Attention of many rows over the keys and values that are cached: a prefill's. For bfloat16 on processors that multiply
// it; elsewhere PyTorch's serves. Softmax is computed while the keys go by (arXiv:2112.05682, arXiv:2205.14135).
#ifndef G3N_PREFILL_ATTENTION_H
#define G3N_PREFILL_ATTENTION_H

#include <stdlib.h>

#include "lanes.h"
#include "pool.h"
#include "work.h"

#ifdef __AVX512BF16__

#define LINES 96      // queries at a time: rows times the heads that share keys and values
#define LINE_VECTORS (LINES / LANES)
#define LINE_KEYS 64  // keys at a time
#define MAX_HEAD 512

// What a thread needs at a time, 370 KB.
typedef struct {
    uint32_t queries[MAX_HEAD / 2][LINES];          // pairs of numbers of each query
    uint32_t values[LINE_KEYS / 2][MAX_HEAD];       // pairs of keys
    float scores[LINE_KEYS][LINES];
    uint32_t weights[LINE_KEYS / 2][LINES];         // e^score, pairs of keys
    float out[LINES][MAX_HEAD];
    float top[LINES], total[LINES], factor[LINES];  // greatest score so far, sum of weights, what the past shrinks by
    int32_t first[LINES], end[LINES];               // keys that a query sees
} Lines;

// c [R, VECTORS * LANES] = c * factors + a b, in pairs of bfloat16: a [R, pairs], b [pairs, VECTORS * LANES].
INLINE void add_products_of_pairs(const uint32_t *const *a, long a_step, const uint32_t *b, long b_step, long pairs, float *const *c,
                      const float *factors, const int R, const int VECTORS) {
    __m512 sums[6][6];
    UNROLLED (int r = 0; r < R; r++)
        UNROLLED (int v = 0; v < VECTORS; v++)
            sums[r][v] = factors ? (__m512)(load(c[r] + v * LANES) * factors[r]) : _mm512_setzero_ps();
    for (long pair = 0; pair < pairs; pair++) {
        __m512bh many[6];
        UNROLLED (int v = 0; v < VECTORS; v++) many[v] = (__m512bh)load_words(b + pair * b_step + v * LANES);
        UNROLLED (int r = 0; r < R; r++) {
            __m512bh one = (__m512bh)_mm512_set1_epi32((int)a[r][pair * a_step]);
            UNROLLED (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], one, many[v]);
        }
    }
    UNROLLED (int r = 0; r < R; r++)
        UNROLLED (int v = 0; v < VECTORS; v++) store(c[r] + v * LANES, (Floats)sums[r][v]);
}

INLINE uint32_t pair_at(const uint16_t *p) {
    uint32_t pair;
    memcpy(&pair, p, sizeof pair);
    return pair;
}

// scores [keys, LINES] of the keys [key, key + LINE_KEYS), of which `count` are there.
static void score(Lines *l, const AttentionWork *work, const uint16_t *keys, long key, long count) {
    for (long i = 0; i < count; i += 4) {
        const uint32_t *a[4];
        float *c[4];
        for (long r = 0; r < 4; r++) {  // a missing key is the last one once more, and nobody sees it
            a[r] = (const uint32_t *)(const void *)(keys + (key + at_most(i + r, count - 1)) * work->head_dim);
            c[r] = l->scores[i + r];
        }
        add_products_of_pairs(a, 1, l->queries[0], LINES, work->head_dim / 2, c, NULL, 4, LINE_VECTORS);
    }
}

// Weights of the keys from scores, for one vector of queries.
static void weigh(Lines *l, long key, long count, int vector) {
    const int at = vector * LANES;
    Ints first, end;
    memcpy(&first, l->first + at, sizeof first);
    memcpy(&end, l->end + at, sizeof end);
    Floats top = load(l->top + at), before = top, total = {0};
    const Floats unseen = splat(-1e30f);
    for (long i = 0; i < count; i++) {
        Floats x = load(l->scores[i] + at);
        x = chosen_lanes((first <= (int32_t)(key + i)) & (end > (int32_t)(key + i)), x, unseen);
        store(l->scores[i] + at, x);
        top = chosen_lanes(x > top, x, top);
    }
    for (long i = 0; i < LINE_KEYS; i += 2) {
        Words pair[2];
        for (long j = 0; j < 2; j++) {
            Floats weight = {0};
            if (i + j < count) {
                Floats x = load(l->scores[i + j] + at);
                weight = chosen_lanes(x < -1e29f, weight, exponential(x - top));  // a NaN stays one
            }
            pair[j] = rounded_words(weight);
            total += weight;
        }
        Words both = pair[0] | pair[1] << 16;
        memcpy(l->weights[i / 2] + at, &both, sizeof both);
    }
    Floats factor = chosen_lanes(before > -1e29f, exponential(before - top), (Floats){0});
    store(l->factor + at, factor);
    store(l->total + at, load(l->total + at) * factor + total);
    store(l->top + at, top);
}

// Adds what the weights make of the values of these keys to every query's sum.
static void add_values(Lines *l, const AttentionWork *work, const uint16_t *values, long key, long count) {
    const long size = work->head_dim;
    for (long i = 0; i < count; i += 2) {
        const uint16_t *even = values + (key + i) * size, *odd = values + (key + at_most(i + 1, count - 1)) * size;
        for (long d = 0; d < size; d += LANES) {
            Words both = ((Words)load_halves(even + d) >> 16) | (Words)load_halves(odd + d);
            memcpy(l->values[i / 2] + d, &both, sizeof both);
        }
    }
    for (long line = 0; line < LINES; line += 6) {
        const uint32_t *a[6];
        for (long r = 0; r < 6; r++) a[r] = l->weights[0] + line + r;
        for (long d = 0; d < size;) {
            float *c[6];
            for (long r = 0; r < 6; r++) c[r] = l->out[line + r] + d;
            const uint32_t *b = l->values[0] + d;
            if (size - d >= 4 * LANES) {
                add_products_of_pairs(a, LINES, b, MAX_HEAD, (count + 1) / 2, c, l->factor + line, 6, 4);
                d += 4 * LANES;
            } else {
                add_products_of_pairs(a, LINES, b, MAX_HEAD, (count + 1) / 2, c, l->factor + line, 6, 2);
                d += 2 * LANES;
            }
        }
    }
}

// Rows [first, last) of the heads that share one head of keys and values.
static void attend_rows(Lines *l, const AttentionWork *work, long kv_head, long first, long last) {
    const long group = work->heads / work->kv_heads, size = work->head_dim, lines = (last - first) * group;
    const long past = work->length - work->rows;  // keys before those of the first row
    const uint16_t *queries = work->queries, *keys = work->keys, *values = work->values;
    keys += kv_head * work->key_head_stride;
    values += kv_head * work->value_head_stride;
    memset(l->out, 0, sizeof l->out);
    for (long line = 0; line < LINES; line++) {
        const long row = first + line / group, head = kv_head * group + line % group;
        const uint16_t *query = queries + (row * work->heads + head) * size;
        for (long pair = 0; pair < size / 2; pair++) l->queries[pair][line] = line < lines ? pair_at(query + 2 * pair) : 0;
        l->end[line] = line < lines ? (int32_t)(past + row + 1) : 0;
        l->first[line] = work->window ? (int32_t)at_least(0, l->end[line] - work->window) : 0;
        l->top[line] = -1e30f;
        l->total[line] = 0;
    }
    for (long key = l->first[0] / LINE_KEYS * LINE_KEYS; key < past + last; key += LINE_KEYS) {
        const long count = at_most(LINE_KEYS, past + last - key);
        score(l, work, keys, key, count);
        for (int vector = 0; vector < LINE_VECTORS; vector++) weigh(l, key, count, vector);
        add_values(l, work, values, key, count);
    }
    for (long line = 0; line < lines; line++) {
        const long row = first + line / group, head = kv_head * group + line % group;
        uint16_t *out = (uint16_t *)work->out + (row * work->heads + head) * size;
        for (long d = 0; d < size; d += LANES) store_halves(out + d, load(l->out[line] + d) / l->total[line]);
    }
}

static void attention_region(Place *place, void *argument) {
    const AttentionWork *work = argument;
    const long rows = LINES / (work->heads / work->kv_heads), blocks = (work->rows + rows - 1) / rows;
    Lines *lines = aligned_alloc(64, (sizeof *lines + 63) / 64 * 64);
    if (!lines) abort();
    for EACH(place, item, work->kv_heads * blocks) {
        // The last rows see most keys: they come first, so that no thread is left with them.
        const long block = blocks - 1 - item / work->kv_heads, first = block * rows;
        attend_rows(lines, work, item % work->kv_heads, first, at_most(work->rows, first + rows));
    }
    end_loop(place);
    free(lines);
}

#define ATTENTION attention_region
#else
#define ATTENTION NULL
#endif
#endif
