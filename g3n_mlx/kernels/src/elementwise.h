// What a prefill does number by number in its many rows: norms, and the FFN's gate. Rows are bfloat16 or float32 and lie
// behind each other; sums and what lies between two steps are float32.
#ifndef G3N_ELEMENTWISE_H
#define G3N_ELEMENTWISE_H

#include "row.h"
#include "work.h"

// Numbers that a thread takes at a time.
#define SHARE 16384

// Numbers [at, at + n) of x as float32, with zeros up to a whole vector.
INLINE void widen(const void *x, long at, long n, int halves, float *out) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, halves ? load_halves((const uint16_t *)x + at + i) : load((const float *)x + at + i));
    if (i == n) return;
    store(out + i, (Floats){0});
    for (; i < n; i++) out[i] = halves ? widened(((const uint16_t *)x)[at + i]) : ((const float *)x)[at + i];
}

// The way back.
INLINE void narrow(const float *x, long n, int halves, void *out, long at) {
    long i = 0;
    if (!halves) {
        memcpy((float *)out + at, x, n * sizeof *x);
        return;
    }
    for (; i + LANES <= n; i += LANES) store_halves((uint16_t *)out + at + i, load(x + i));
    for (; i < n; i++) ((uint16_t *)out)[at + i] = rounded(x[i]);
}

static void norm_region(Place *place, void *argument) {
    const NormWork *work = argument;
    const long n = work->columns, share = at_least(1, SHARE / n);
    float x[padded(n)], weight[padded(n)];
    if (work->weight) widen(work->weight, 0, n, work->halves, weight);
    for EACH(place, item, (work->rows + share - 1) / share) {
        for (long row = item * share; row < at_most(work->rows, (item + 1) * share); row++) {
            widen(work->x, row * n, n, work->halves, x);
            norm(x, work->weight ? weight : NULL, n, work->eps, x);
            narrow(x, n, work->halves, work->out, row * n);
        }
    }
    end_loop(place);
}

// gelu(gate) * up, in the gate's place; of a sparse layer's gate what lies above mean + cutoff * std of its row.
static void gate_region(Place *place, void *argument) {
    const GateWork *work = argument;
    const long n = work->columns;
    float gate[padded(n)], up[padded(n)];
    for EACH(place, row, work->rows) {
        widen(work->gate, row * n, n, work->halves, gate);
        widen(work->up, row * n, n, work->halves, up);
        Floats least = splat(work->sparse ? least_kept(gate, n, work->cutoff) : 0);
        for (long i = 0; i < n; i += LANES) {
            Floats x = load(gate + i) - least;
            if (work->sparse) x = chosen_lanes(x < 0, (Floats){0}, x);  // a NaN stays one
            store(gate + i, gelu(x) * load(up + i));
        }
        narrow(gate, n, work->halves, work->gate, row * n);
    }
    end_loop(place);
}

#endif
