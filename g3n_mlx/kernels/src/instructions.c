// Compiled once for every instruction set, with INSTRUCTIONS its name and the compiler's flags for it.

#include "instructions.h"

#include "elementwise.h"
#include "int8.h"
#include "layer.h"
#include "prefill_attention.h"
#include "work.h"

#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)
#define JOINED_OF(a, b) a##b
#define JOINED(a, b) JOINED_OF(a, b)

// y = x W^T for rows [T, columns] in float32.
static void product_region(Place *place, void *argument) {
    const ProductWork *work = argument;
    Operand operand = operand_for(work->matrix, work->rounded, work->values, work->sums);
    Product p = {work->matrix, &operand, work->y, work->matrix->rows};
    long columns = work->matrix->columns, blocks = padded(columns) / 256;
    for EACH(place, item, work->rows * blocks) {
        long row = item / blocks, first = item % blocks * 256;
        float x[256] = {0};
        // lay_out reads a row from its beginning on, and of it only what lies in the block.
        memcpy(x, work->x + row * columns + first, at_most(256, columns - first) * sizeof *x);
        Operand block = operand;
        block.values = (char *)block.values + first * (block.layout >= NATURAL_PAIRS ? 2 : 4);
        if (block.group) block.sums += first / block.group;
        lay_out(&block, row, x, work->rounded, columns - first, 0, 256);
    }
    end_loop(place);
    products(place, &p, 1, work->rows);
}

// Rows [start, stop) dequantized, behind each other, as bfloat16 or float32.
static void dequantize_region(Place *place, void *argument) {
    const DequantizeWork *work = argument;
    const Matrix *m = work->matrix;
    for EACH(place, item, work->stop - work->start) {
        long row = work->start + item;
        for (long column = 0; column < m->columns; column += 256) {
            float values[256];
            long count = at_most(256, m->columns - column);
            dequantize_some(m, row, column, count, values);
            long at = item * m->columns + column, i = 0;
            if (!work->rounded) {
                memcpy((float *)work->out + at, values, count * sizeof *values);
                continue;
            }
            for (; i + LANES <= count; i += LANES) store_halves((uint16_t *)work->out + at + i, load(values + i));
            for (; i < count; i++) ((uint16_t *)work->out)[at + i] = rounded(values[i]);
        }
    }
    end_loop(place);
}

// Bytes of 32 rows' codes of a group of units, [32] rows apart by `stride`, as 16 bytes of each unit, a line of 64 apart:
// columns i and 16 + i of every 32 share a byte.
INLINE void transpose_codes(const uint8_t *codes, long stride, long group, uint8_t *out) {
    for (long row = 0; row < 16; row++) {
        const uint8_t *low = codes + row * stride, *high = low + 16 * stride;
        for (long pair = 0; pair < group / 2; pair++) {
            out[2 * pair * 64 + row] = (uint8_t)((low[pair] & 15) | high[pair] << 4);
            out[(2 * pair + 1) * 64 + row] = (uint8_t)(low[pair] >> 4 | (high[pair] & 0xF0));
        }
    }
}

// down_proj unit by unit (g3n.h, Units): the columns of 4-bit codes, with bfloat16 scales, as rows. 128 rows of a group
// at a time, so that whole cache lines are written.
static void units_region(Place *place, void *argument) {
    const UnitsWork *work = argument;
    const Matrix *m = work->matrix;
    const long hidden = m->rows, group = m->group;
    for EACH(place, item, m->columns / group) {
        uint8_t lines[128 * 64] __attribute__((aligned(64)));
        for (long first = 0; first < hidden; first += 128) {
            for (long row = first; row < first + 128; row++) {
                long at = row * m->scale_stride + item;
                work->scales[item * hidden + row] = ((const uint16_t *)m->scales)[at];
                work->biases[item * hidden + row] = ((const uint16_t *)m->biases)[at];
            }
            const uint8_t *codes = (const uint8_t *)m->codes + first * m->code_stride + item * group / 2;
            for (long part = 0; part < 4; part++)
                transpose_codes(codes + part * 32 * m->code_stride, m->code_stride, group, lines + part * 16);
            uint8_t *out = work->codes + (item * group * hidden + first) / 2;
            for (long unit = 0; unit < group; unit++) memcpy(out + unit * (hidden / 2), lines + unit * 64, 64);
        }
    }
    end_loop(place);
}

const Instructions JOINED(instructions_, INSTRUCTIONS) = {
    STRING(INSTRUCTIONS), product_region, dequantize_region, units_region,
    start_region,         queries_region, layer_region,      logits_region,
    norm_region,          gate_region,    ATTENTION,    int8_region,
    INT8_BITS,
};
