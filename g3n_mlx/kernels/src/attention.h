// Attention of every row over the keys and values that its sequence has cached, the keys in chunks for all threads.
#ifndef G3N_ATTENTION_H
#define G3N_ATTENTION_H

#include "layer_call.h"
#include "row.h"

INLINE Floats load_cached(const void *p, long at, int halves) {
    return halves ? load_halves((const uint16_t *)p + at) : load((const float *)p + at);
}

// HEADS query heads of one row over keys [from, to) of the KEYS that begin at `chunk`; positions count from the view.
INLINE void attend_some(const Step *s, const Sequence *q, long kv_head, const float *queries, const int HEADS, const int halves,
                        long chunk, long from, long to, float *const *partial) {
    const long size = s->model.head_dim;
    const long keys = kv_head * q->key_head_stride, values = kv_head * q->value_head_stride;
    float scores[4][KEYS];
    memset(scores, 0, sizeof scores);
    float top[4];
    for (int h = 0; h < HEADS; h++) top[h] = -INFINITY;
    const long width = halves ? 2 : 4;
    for (long key = from; key < to; key++) {
        Floats total[4];
        for (int h = 0; h < HEADS; h++) total[h] = (Floats){0};
        // The values come next, a few columns of all keys at a time: too far apart for the processor to foresee.
        const char *coming = (const char *)q->values + (values + key * size) * width;
        for (long byte = 0; byte < size * width; byte += 64) __builtin_prefetch(coming + byte);
        for (long i = 0; i < size; i += LANES) {
            Floats k = load_cached(q->keys, keys + key * size + i, halves);
            for (int h = 0; h < HEADS; h++) total[h] += k * load(queries + h * size + i);
        }
        for (int h = 0; h < HEADS; h++) {
            float score = scores[h][key - chunk] = sum(total[h]);
            top[h] = score > top[h] ? score : top[h];
        }
    }
    for (int h = 0; h < HEADS; h++) {
        Floats total = {0};
        for (long i = 0; i < KEYS; i += LANES) {
            Floats p = exponential(load(scores[h] + i) - top[h]);
            for (int lane = 0; (i + lane < from - chunk || i + lane + LANES > to - chunk) && lane < LANES; lane++)
                if (i + lane < from - chunk || i + lane >= to - chunk) p[lane] = 0;
            store(scores[h] + i, p);
            total += p;
        }
        partial[h][0] = top[h];
        partial[h][1] = sum(total);
    }
    for (long i = 0; i < size; i += 2 * LANES) {
        Floats low[4], high[4];
        for (int h = 0; h < HEADS; h++) low[h] = high[h] = (Floats){0};
        for (long key = from; key < to; key++) {
            Floats a = load_cached(q->values, values + key * size + i, halves);
            Floats b = load_cached(q->values, values + key * size + i + LANES, halves);
            for (int h = 0; h < HEADS; h++) {
                low[h] += scores[h][key - chunk] * a;
                high[h] += scores[h][key - chunk] * b;
            }
        }
        for (int h = 0; h < HEADS; h++) {
            store(partial[h] + PARTIAL_HEAD + i, low[h]);
            store(partial[h] + PARTIAL_HEAD + i + LANES, high[h]);
        }
    }
}

static void attend_chunk(const Step *s, const Layer *l, const Sequence *q, long kv_head, long chunk) {
    const Model *m = &s->model;
    const long base = first_key(s, q), group = m->heads / m->kv_heads, size = m->head_dim;
    for (long row = q->first; row < q->first + q->rows; row++) {
        long end = s->positions[row] + 1, begin = l->window ? at_least(0, end - l->window) : 0;
        long from = at_least(at_least(begin, base), chunk * KEYS), to = at_most(end, (chunk + 1) * KEYS);
        float *partial[4];
        for (long head = 0; head < group; head += 4) {
            int count = (int)at_most(4, group - head);
            for (int h = 0; h < count; h++) {
                partial[h] = partial_at(s, row, kv_head * group + head + h, chunk - base / KEYS);
                partial[h][1] = 0;
            }
            if (from >= to) continue;
            const float *queries = s->queries + row * s->query_width + (kv_head * group + head) * size;
#define ATTEND(HEADS, HALVES) attend_some(s, q, kv_head, queries, HEADS, HALVES, chunk * KEYS - base, from - base, to - base, partial)
            if (m->rounded) {
                if (count == 4) ATTEND(4, 1);
                else for (int h = 0; h < count; h++, queries += size, partial[0] = partial[h]) ATTEND(1, 1);
            } else {
                if (count == 4) ATTEND(4, 0);
                else for (int h = 0; h < count; h++, queries += size, partial[0] = partial[h]) ATTEND(1, 0);
            }
#undef ATTEND
        }
    }
}

// Joins what the chunks of keys gave one row: s->attention [N * H].
static void join_chunks(Step *s, const Sequence *q, long row) {
    const Model *m = &s->model;
    long chunks = chunks_of(s, q);
    for (long head = 0; head < m->heads; head++) {
        float top = -INFINITY, total = 0;
        for (long c = 0; c < chunks; c++) {
            const float *partial = partial_at(s, row, head, c);
            if (partial[1] > 0 && partial[0] > top) top = partial[0];
        }
        float *out = s->attention + row * s->query_width + head * m->head_dim;
        memset(out, 0, m->head_dim * sizeof *out);
        for (long c = 0; c < chunks; c++) {
            const float *partial = partial_at(s, row, head, c);
            if (!(partial[1] > 0)) continue;
            float weight = expf(partial[0] - top);
            total += weight * partial[1];
            for (long i = 0; i < m->head_dim; i += LANES) store(out + i, load(out + i) + weight * load(partial + PARTIAL_HEAD + i));
        }
        for (long i = 0; i < m->head_dim; i += LANES) store(out + i, load(out + i) / total);
    }
}

#endif
