// A decoder layer and both ends of the model for 1 to MAX_ROWS rows, as backends/torch/text.py has them: same names,
// same order. Streams are [T, A, D] there; here every row of D numbers begins at a multiple of `padded(D)`.
#ifndef G3N_LAYER_H
#define G3N_LAYER_H

#include <stdlib.h>

#include "layer_call.h"
#include "product.h"
#include "step.h"

// ---- One row ----

INLINE float mean_square(const float *x, long n) {
    Floats total = {0};
    for (long i = 0; i < n; i += LANES) total += load(x + i) * load(x + i);  // zeros behind the row
    return sum(total) / n;
}

// RMSNorm; weight NULL: none.
static void norm(const float *x, const float *weight, long n, float eps, float *out) {
    Floats factor = splat(1.0f / sqrtf(mean_square(x, n) + eps));
    for (long i = 0; i < n; i += LANES) {
        Floats y = load(x + i) * factor;
        store(out + i, weight ? y * load(weight + i) : y);
    }
}

// A product of one row with a small weight, on this thread.
static void small_product(const Step *s, const Matrix *m, const float *x, float *out) {
    float values[operand_width(m->columns)], row[padded(m->columns)], sums[m->columns / 32 + 64];
    memset(row, 0, sizeof row);
    memcpy(row, x, m->columns * sizeof *x);
    Operand o = operand_for(m, s->model.rounded, values, sums);
    lay_out(&o, 0, row, s->model.rounded, m->columns, 0, padded(m->columns));
    Product p = {m, &o, out, 0};
    product_rows(&p, NULL, 0, m->rows, 1);
}

// AltUp's router: which streams to mix, [A].
static void modalities(const Step *s, const Layer *l, const float *x, float *out) {
    long n = s->model.hidden;
    float normed[padded(n)];
    memset(normed + n, 0, (padded(n) - n) * sizeof *normed);
    norm(x, l->router_norm, n, s->model.eps, normed);
    small_product(s, &l->modality_router, normed, out);
    for (int i = 0; i < s->model.inputs; i++) out[i] = tanhf(out[i]);
}

static void predict(Step *s, const Layer *l, long row) {
    const Model *m = &s->model;
    int inputs = m->inputs;
    const float *streams = s->streams + row * inputs * s->width;
    float *predictions = s->predictions + row * inputs * s->width;
    float routed[MAX_INPUTS], coefs[MAX_INPUTS * MAX_INPUTS];
    modalities(s, l, streams + m->active * s->width, routed);
    small_product(s, &l->prediction_coefs, routed, coefs);
    for (long i = 0; i < m->hidden; i += LANES) {
        Floats stream[MAX_INPUTS];
        for (int b = 0; b < inputs; b++) stream[b] = load(streams + b * s->width + i);
        for (int a = 0; a < inputs; a++) {
            Floats mixed = stream[a];
            for (int b = 0; b < inputs; b++) mixed += coefs[a * inputs + b] * stream[b];
            store(predictions + a * s->width + i, mixed);
        }
    }
}

static void correct(Step *s, const Layer *l, long row, const float *activated) {
    const Model *m = &s->model;
    float *streams = s->streams + row * m->inputs * s->width;
    const float *predictions = s->predictions + row * m->inputs * s->width;
    float routed[MAX_INPUTS], coefs[MAX_INPUTS];
    modalities(s, l, activated, routed);
    small_product(s, &l->correction_coefs, routed, coefs);
    for (long i = 0; i < m->hidden; i += LANES) {
        Floats innovation = load(activated + i) - load(predictions + m->active * s->width + i);
        for (int a = 0; a < m->inputs; a++)
            store(streams + a * s->width + i, load(predictions + a * s->width + i) + (coefs[a] + 1.0f) * innovation);
    }
}

// RoPE on one head, the first half paired with the second.
static void rotate(float *x, const float *cos, const float *sin, long half) {
    for (long i = 0; i < half; i += LANES) {
        Floats first = load(x + i), second = load(x + half + i), c = load(cos + i), d = load(sin + i);
        store(x + i, first * c - second * d);
        store(x + half + i, second * c + first * d);
    }
}

// x with the root mean square of the target.
static void rescale(float *x, const float *target, long n) {
    float magnitude = sqrtf(mean_square(target, n)), own = mean_square(x, n);
    Floats factor = splat(magnitude / sqrtf(own > 1e-5f ? own : 1e-5f));
    for (long i = 0; i < n; i += LANES) store(x + i, load(x + i) * factor);
}

// ---- Products of all rows ----

// Products with one input: every layout that their weights need, once.
typedef struct {
    Operand operands[MAX_PRODUCTS];
    Product products[MAX_PRODUCTS];
    int layouts, count;
    long columns;
} Fan;

// Adds y = x W^T to a fan, the rows of y `out_stride` apart; a weight without rows adds nothing.
static void add_product(const Step *s, Fan *fan, int slot, const Matrix *m, float *out, long out_stride) {
    if (!m->rows) return;
    Operand wanted = operand_for(m, s->model.rounded, NULL, NULL);
    int at = 0;
    while (at < fan->layouts && !same_layout(&fan->operands[at], &wanted)) at++;
    if (at == fan->layouts) {
        wanted.values = s->operand_values[slot + at];
        wanted.sums = s->operand_sums[slot + at];
        fan->operands[fan->layouts++] = wanted;
    }
    fan->columns = m->columns;
    fan->products[fan->count++] = (Product){m, &fan->operands[at], out, out_stride};
}

static void lay_out_all(const Step *s, const Fan *fan, long row, const float *x, long first, long last) {
    for (int i = 0; i < fan->layouts; i++) lay_out(&fan->operands[i], row, x, s->model.rounded, fan->columns, first, last);
}

// ---- Attention ----

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
    for (long key = from; key < to; key++) {
        Floats total[4];
        for (int h = 0; h < HEADS; h++) total[h] = (Floats){0};
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

// ---- FFN ----

// The gate of a sparse layer: what lies above mean + cutoff * std, through GELU; and which units that leaves.
static void select_units(Step *s, const Layer *l, long row) {
    long n = l->gate_proj.rows;
    float *gate = s->gate + row * s->ffn_width;
    Floats total = {0}, squares = {0};
    for (long i = 0; i < n; i += LANES) total += load(gate + i);
    float mean = sum(total) / n;
    for (long i = 0; i < n; i += LANES) {
        Floats apart = load(gate + i) - mean;
        if (i + LANES > n)
            for (int lane = 0; lane < LANES; lane++)
                if (i + lane >= n) apart[lane] = 0;
        squares += apart * apart;
    }
    float least = mean + sqrtf(sum(squares) / n) * l->cutoff;
    int32_t *units = s->units + row * s->ffn_width, count = 0;
    for (long i = 0; i < n; i++)
        if (gate[i] > least) {
            units[count] = (int32_t)i;
            s->unit_values[row * s->ffn_width + count++] = gate[i] - least;
        }
    s->unit_counts[row] = count;
    float *kept = s->unit_values + row * s->ffn_width;
    for (long i = count; i < padded(count); i++) kept[i] = 0;
    for (long i = 0; i < count; i += LANES) store(kept + i, gelu(load(kept + i)));
    if (reads_units(s, l, row)) return;
    memset(gate, 0, n * sizeof *gate);
    for (long i = 0; i < count; i++) gate[units[i]] = kept[i];
}

// Columns [first, first + count) of what the chosen units add up to, group by group, each with one scale: 128 columns
// of a group's units at a time, so that their sums stay in registers.
#define UNIT_COLUMNS 128
#define UNITS_AHEAD 8
static void add_units(Step *s, const Layer *l, long row, long first, long count) {
    enum { VECTORS = UNIT_COLUMNS / LANES, HALF = 16 / LANES };
    const long hidden = s->model.hidden, group_size = l->down_proj.group, chosen = s->unit_counts[row];
    const int32_t *units = s->units + row * s->ffn_width;
    const float *values = s->unit_values + row * s->ffn_width;
    float *out = s->down + row * s->width + first;
    memset(out, 0, count * sizeof *out);
    for (long at = 0, end; at < chosen; at = end) {
        const long group = units[at] / group_size;
        float weight = 0;
        for (end = at; end < chosen && units[end] / group_size == group; end++) {
            weight += as_rounded(values[end], s->model.rounded);
            const uint8_t *later = l->units.codes + ((long)units[at_most(end + UNITS_AHEAD, chosen - 1)] * hidden + first) / 2;
            for (long byte = 0; byte < count / 2; byte += 64) __builtin_prefetch(later + byte);
        }
        for (long block = 0; block < count; block += UNIT_COLUMNS) {
            Floats part[VECTORS];
            UNROLLED (int i = 0; i < VECTORS; i++) part[i] = (Floats){0};
            for (long unit = at; unit < end; unit++) {
                const uint8_t *codes = l->units.codes + ((long)units[unit] * hidden + first + block) / 2;
                const float value = as_rounded(values[unit], s->model.rounded);
                // g3n_units puts columns i and 16 + i of every 32 into byte i of 16.
                UNROLLED (int i = 0; i < UNIT_COLUMNS / 32; i++)
                    UNROLLED (int j = 0; j < HALF; j++) {
                        Words both = load_bytes(codes + 16 * i + LANES * j);
                        part[2 * HALF * i + j] += value * codes_at(both & 15, 0, 4);
                        part[2 * HALF * i + HALF + j] += value * codes_at(both, 4, 4);
                    }
            }
            const uint16_t *scales = l->units.scales + group * hidden + first + block;
            const uint16_t *biases = l->units.biases + group * hidden + first + block;
            UNROLLED (int i = 0; i < VECTORS; i++) {
                float *to = out + block + i * LANES;
                store(to, load(to) + part[i] * load_halves(scales + i * LANES) + weight * load_halves(biases + i * LANES));
            }
        }
    }
}

static void ffn(Place *place, Step *s, const Layer *l, int rows, Fan *gate_and_up) {
    const Model *m = &s->model;
    long wide = l->gate_proj.rows;
    Fan down = {0};
    add_product(s, &down, 0, &l->down_proj, s->down, s->width);
    if (!l->sparse) {
        products(place, gate_and_up->products, gate_and_up->count, rows);
        long blocks = padded(wide) / 256;
        for EACH(place, item, rows * blocks) {
            long row = item / blocks, first = item % blocks * 256;
            float *gate = s->gate + row * s->ffn_width;
            const float *up = s->up + row * s->ffn_width;
            for (long i = first; i < first + 256; i += LANES) store(gate + i, gelu(load(gate + i)) * load(up + i));
            lay_out_all(s, &down, row, gate, first, first + 256);
        }
        end_loop(place);
        products(place, down.products, down.count, rows);
        return;
    }
    products(place, gate_and_up->products, 1, rows);
    for EACH(place, row, rows) select_units(s, l, row);
    end_loop(place);
    // Only the chosen units of up_proj are read.
    long chunks = padded(wide) / BAND;
    for EACH(place, item, rows * chunks) {
        long row = item / chunks, first = item % chunks * BAND, count = s->unit_counts[row];
        if (first >= count) continue;
        Product up = gate_and_up->products[1];
        Operand x = row_of(up.operand, row);
        float *values = s->unit_values + row * s->ffn_width, *out = s->up + row * s->ffn_width;
        up.operand = &x;
        up.out = out;
        long last = at_most(first + BAND, count);
        product_rows(&up, s->units + row * s->ffn_width, first, last, 1);
        for (long i = first; i < last; i++) values[i] *= out[s->units[row * s->ffn_width + i]];
    }
    end_loop(place);
    const long share = 4 * UNIT_COLUMNS, shares = (m->hidden + share - 1) / share;
    long dense = 0;
    for (long row = 0; row < rows; row++) dense += !reads_units(s, l, row);
    for EACH(place, item, rows * shares) {
        long row = item / shares, first = item % shares * share;
        if (reads_units(s, l, row)) add_units(s, l, row, first, at_most(share, m->hidden - first));
    }
    end_loop(place);
    if (!dense) return;
    // Rows that keep many units, and layers without units of their own, go through the whole of down_proj.
    for EACH(place, row, rows) {
        if (reads_units(s, l, row)) continue;
        float *gate = s->gate + row * s->ffn_width;
        for (long i = 0; i < s->unit_counts[row]; i++)
            gate[s->units[row * s->ffn_width + i]] = s->unit_values[row * s->ffn_width + i];
        lay_out_all(s, &down, row, gate, 0, padded(wide));
    }
    end_loop(place);
    for (long row = 0; row < rows; row++) {
        if (reads_units(s, l, row)) continue;
        Product p = down.products[0];
        Operand x = row_of(p.operand, row);
        p.operand = &x;
        p.out += row * p.out_stride;
        products(place, &p, 1, 1);
    }
}

// ---- A layer ----

// From the streams to queries, new keys and values, and the first half of LAuReL.
static void queries_region(Place *place, void *argument) {
    const Call *call = argument;
    Step *s = call->step;
    const Layer *l = call->layer;
    const Model *m = &s->model;
    const int rows = s->rows;
    Fan fan = {0};
    add_product(s, &fan, 0, &l->q_proj, s->queries, s->query_width);
    add_product(s, &fan, 0, &l->k_proj, s->new_keys, s->kv_width);
    add_product(s, &fan, 0, &l->v_proj, s->new_values, s->kv_width);
    add_product(s, &fan, 0, &l->linear_left, s->laurel_low, s->width);
    for EACH(place, row, rows) {
        predict(s, l, row);
        float *x = s->x + row * s->width;
        norm(s->predictions + (row * m->inputs + m->active) * s->width, l->input_layernorm, m->hidden, m->eps, x);
        lay_out_all(s, &fan, row, x, 0, s->width);
    }
    end_loop(place);
    products(place, fan.products, fan.count, rows);
    long size = m->head_dim, stored = l->k_proj.rows ? m->kv_heads : 0, heads = m->heads + 2 * stored;
    for EACH(place, item, rows * heads) {
        long row = item / heads, head = item % heads;
        const float *cos = s->cos[l->rope] + row * s->rope_width, *sin = s->sin[l->rope] + row * s->rope_width;
        if (head < m->heads) {
            float *x = s->queries + row * s->query_width + head * size;
            norm(x, l->q_norm, size, m->eps, x);
            rotate(x, cos, sin, size / 2);
            for (long i = 0; i < size; i += LANES) store(x + i, as_rounded_lanes(load(x + i), m->rounded));
            continue;
        }
        head -= m->heads;
        int is_key = head < stored;
        if (!is_key) head -= stored;
        float *x = (is_key ? s->new_keys : s->new_values) + row * s->kv_width + head * size;
        norm(x, is_key ? l->k_norm : NULL, size, m->eps, x);
        if (is_key) rotate(x, cos, sin, size / 2);
        long at = (row * m->kv_heads + head) * size;
        void *out = is_key ? s->keys : s->values;
        if (m->rounded)
            for (long i = 0; i < size; i += LANES) store_halves((uint16_t *)out + at + i, load(x + i));
        else
            memcpy((float *)out + at, x, size * sizeof *x);
    }
    end_loop(place);
}

// From the queries to the next layer's streams.
static void layer_region(Place *place, void *argument) {
    const Call *call = argument;
    Step *s = call->step;
    const Layer *l = call->layer;
    const Model *m = &s->model;
    const int rows = s->rows;
    const float half = 0.70710678118654752f;

    for (int i = 0; i < call->count; i++) {
        const Sequence *q = &call->sequences[i];
        for EACH(place, item, m->kv_heads * chunks_of(s, q))
            attend_chunk(s, l, q, item % m->kv_heads, first_key(s, q) / KEYS + item / m->kv_heads);
        end_loop(place);
    }
    Fan out = {0}, laurel = {0};
    add_product(s, &out, 0, &l->o_proj, s->attended, s->width);
    add_product(s, &laurel, 1, &l->linear_right, s->laurel, s->width);
    for EACH(place, row, rows) {
        const Sequence *q = call->sequences;
        while (row >= q->first + q->rows) q++;
        join_chunks(s, q, row);
        lay_out_all(s, &out, row, s->attention + row * s->query_width, 0, s->query_width);
        lay_out_all(s, &laurel, row, s->laurel_low + row * s->width, 0, padded(l->linear_right.columns));
    }
    end_loop(place);
    Product both[2] = {out.products[0], laurel.products[0]};
    products(place, both, 2, rows);

    Fan gate_and_up = {0};
    add_product(s, &gate_and_up, 0, &l->gate_proj, s->gate, s->ffn_width);
    add_product(s, &gate_and_up, 0, &l->up_proj, s->up, s->ffn_width);
    for EACH(place, row, rows) {
        const float *active = s->predictions + (row * m->inputs + m->active) * s->width;
        float *x = s->x + row * s->width, *attended = s->attended + row * s->width, *low = s->laurel + row * s->width;
        norm(attended, l->post_attention_layernorm, m->hidden, m->eps, attended);
        norm(low, l->post_laurel_norm, m->hidden, m->eps, low);
        float *residual = s->residual + row * s->width;
        for (long i = 0; i < m->hidden; i += LANES)
            store(residual + i, (load(active + i) + load(attended + i) + load(x + i) + load(low + i)) * half);
        norm(residual, l->pre_feedforward_layernorm, m->hidden, m->eps, x);
        lay_out_all(s, &gate_and_up, row, x, 0, s->width);
    }
    end_loop(place);
    ffn(place, s, l, rows, &gate_and_up);

    Fan gate = {0}, projection = {0};
    add_product(s, &gate, 0, &l->per_layer_input_gate, s->ple_gate, s->ple_width);
    add_product(s, &projection, 0, &l->per_layer_projection, s->update, s->width);
    for EACH(place, row, rows) {
        float *down = s->down + row * s->width, *residual = s->residual + row * s->width, *x = s->x + row * s->width;
        norm(down, l->post_feedforward_layernorm, m->hidden, m->eps, down);
        for (long i = 0; i < m->hidden; i += LANES) store(residual + i, load(residual + i) + load(down + i));
        correct(s, l, row, residual);
        const float *active = s->streams + (row * m->inputs + m->active) * s->width;
        for (long i = 0; i < m->hidden; i += LANES)
            store(x + i, l->correct_output_scale ? load(active + i) * load(l->correct_output_scale + i) : load(active + i));
        lay_out_all(s, &gate, row, x, 0, s->width);
    }
    end_loop(place);
    products(place, gate.products, 1, rows);
    for EACH(place, row, rows) {
        float *gated = s->ple_gate + row * s->ple_width;
        const float *input = s->per_layer_inputs + row * s->inputs_width + call->layer_idx * s->ple_width;
        for (long i = 0; i < m->per_layer; i += LANES) store(gated + i, gelu(load(gated + i)) * load(input + i));
        lay_out_all(s, &projection, row, gated, 0, s->ple_width);
    }
    end_loop(place);
    products(place, projection.products, 1, rows);
    for EACH(place, row, rows) {
        float *update = s->update + row * s->width, *streams = s->streams + row * m->inputs * s->width;
        norm(update, l->post_per_layer_input_norm, m->hidden, m->eps, update);
        for (int a = 1; a < m->inputs; a++)
            for (long i = 0; i < m->hidden; i += LANES)
                store(streams + a * s->width + i, load(streams + a * s->width + i) + load(update + i));
    }
    end_loop(place);
}

// ---- Both ends ----

// From embeddings [T, D] to streams and PLE inputs.
static void start_region(Place *place, void *argument) {
    const Call *call = argument;
    Step *s = call->step;
    const Model *m = &s->model;
    const int rows = s->rows, others = m->inputs - 1;
    Fan fan = {0};
    for (int i = 0; i < others; i++)
        add_product(s, &fan, 0, &m->altup_projections[i], s->streams + (i + 1) * s->width, m->inputs * s->width);
    add_product(s, &fan, 0, &m->per_layer_model_projection, s->projected, s->projected_width);
    for EACH(place, row, rows) {
        float *first = s->streams + row * m->inputs * s->width;
        memcpy(first, call->embeddings + row * m->hidden, m->hidden * sizeof *first);
        lay_out_all(s, &fan, row, first, 0, s->width);
    }
    end_loop(place);
    products(place, fan.products, fan.count, rows);
    const float scale = 1.0f / sqrtf((float)m->hidden), half = 0.70710678118654752f;
    for EACH(place, item, rows * (others + m->layers)) {
        long row = item / (others + m->layers), part = item % (others + m->layers);
        float *first = s->streams + row * m->inputs * s->width;
        if (part < others) {
            rescale(first + (part + 1) * s->width, first, m->hidden);
            continue;
        }
        long idx = part - others, size = m->per_layer;
        const float *projected = s->projected + row * s->projected_width + idx * size;
        const float *table = call->per_layer_rows + (row * m->layers + idx) * size;
        float *input = s->per_layer_inputs + row * s->inputs_width + idx * s->ple_width;
        for (long i = 0; i < size; i++) input[i] = projected[i] * scale;
        norm(input, m->per_layer_projection_norm, size, m->eps, input);
        for (long i = 0; i < size; i++) input[i] = (input[i] + table[i]) * half;
    }
    end_loop(place);
}

// From streams to soft-capped logits [T, V].
static void logits_region(Place *place, void *argument) {
    const Call *call = argument;
    Step *s = call->step;
    const Model *m = &s->model;
    const int rows = s->rows, others = m->inputs - 1;
    for (int i = 0; i < others; i++) {
        Fan back = {0};
        add_product(s, &back, 0, &m->altup_unembed_projections[i], s->predictions + (i + 1) * s->width, m->inputs * s->width);
        for EACH(place, row, rows)
            lay_out_all(s, &back, row, s->streams + (row * m->inputs + i + 1) * s->width, 0, s->width);
        end_loop(place);
        products(place, back.products, 1, rows);
    }
    Fan head = {0};
    add_product(s, &head, 0, &m->head, call->logits, m->head.rows);
    for EACH(place, row, rows) {
        const float *first = s->streams + row * m->inputs * s->width;
        float *x = s->x + row * s->width, *back = s->predictions + row * m->inputs * s->width;
        memcpy(x, first, m->hidden * sizeof *x);
        for (int i = 1; i <= others; i++) {
            rescale(back + i * s->width, first, m->hidden);
            for (long j = 0; j < m->hidden; j += LANES) store(x + j, load(x + j) + load(back + i * s->width + j));
        }
        for (long j = 0; j < m->hidden; j += LANES) store(x + j, load(x + j) / (float)m->inputs);
        norm(x, m->norm, m->hidden, m->eps, x);
        lay_out_all(s, &head, row, x, 0, s->width);
    }
    end_loop(place);
    products(place, head.products, 1, rows);
    if (m->softcap == 0) return;
    long entries = (long)rows * m->head.rows, chunks = (entries + 4095) / 4096;
    for EACH(place, item, chunks) {
        float *at = call->logits + item * 4096, rest[LANES];
        long count = at_most(4096, entries - item * 4096), i = 0;
        for (; i + LANES <= count; i += LANES) store(at + i, hyperbolic_tangent(load(at + i) / m->softcap) * m->softcap);
        memset(rest, 0, sizeof rest);
        memcpy(rest, at + i, (count - i) * sizeof *at);
        store(rest, hyperbolic_tangent(load(rest) / m->softcap) * m->softcap);
        memcpy(at + i, rest, (count - i) * sizeof *at);
    }
    end_loop(place);
}

#endif
