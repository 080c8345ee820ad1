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

// down_proj unit by unit (g3n.h, Units): the columns of 4-bit codes, with bfloat16 scales, as rows.
static void units_region(Place *place, void *argument) {
    const UnitsWork *work = argument;
    const Matrix *m = work->matrix;
    const long hidden = m->rows, group = m->group;
    for EACH(place, item, m->columns / group) {
        for (long row = 0; row < hidden; row++) {
            long at = row * m->scale_stride + item;
            work->scales[item * hidden + row] = ((const uint16_t *)m->scales)[at];
            work->biases[item * hidden + row] = ((const uint16_t *)m->biases)[at];
            // Columns i and 16 + i of every 32 share a byte.
            long byte = row / 32 * 16 + row % 16;
            int high = row % 32 >= 16;
            const uint8_t *codes = (const uint8_t *)m->codes + row * m->code_stride + item * group / 2;
            uint8_t *out = work->codes + item * group * (hidden / 2) + byte;
            for (long unit = 0; unit < group; unit++, out += hidden / 2) {
                uint8_t code = unit % 2 ? codes[unit / 2] >> 4 : codes[unit / 2] & 15;
                *out = high ? (uint8_t)(*out | code << 4) : code;
            }
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
