// What one row goes through beside attention and the FFN, and products of all rows with one input.
#ifndef G3N_ROW_H
#define G3N_ROW_H

#include "product.h"
#include "step.h"

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

// mean + cutoff * std of a gate's n numbers, with the biased std; zeros behind them.
static float least_kept(const float *gate, long n, float cutoff) {
    Floats total = {0}, squares = {0};
    for (long i = 0; i < n; i += LANES) total += load(gate + i);
    float mean = sum(total) / n;
    for (long i = 0; i < n; i += LANES) {
        Floats apart = load(gate + i) - mean;
        for (int lane = 0; i + LANES > n && lane < LANES; lane++)
            if (i + lane >= n) apart[lane] = 0;
        squares += apart * apart;
    }
    return mean + sqrtf(sum(squares) / n) * cutoff;
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

#endif
