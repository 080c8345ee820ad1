// The feed-forward block; of layers with activation sparsity only the units that the gate has chosen.
#ifndef G3N_FFN_H
#define G3N_FFN_H

#include "row.h"

// The gate of a sparse layer: what lies above mean + cutoff * std, through GELU; and which units that leaves.
static void select_units(Step *s, const Layer *l, long row) {
    long n = l->gate_proj.rows;
    float *gate = s->gate + row * s->ffn_width, least = least_kept(gate, n, l->cutoff);
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
        const long later_group = units[at_most(end + UNITS_AHEAD / 2, chosen - 1)] / group_size * hidden + first;
        for (long i = 0; i < count; i += 32) {
            __builtin_prefetch(l->units.scales + later_group + i);
            __builtin_prefetch(l->units.biases + later_group + i);
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
    // Few shares: each of them looks up all units' pages.
    const long share = at_least(1, m->hidden / UNIT_COLUMNS / place->threads) * UNIT_COLUMNS, shares = (m->hidden + share - 1) / share;
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

#endif
