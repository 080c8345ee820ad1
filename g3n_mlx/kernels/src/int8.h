// Products of many rows whose activations are rounded to 8 bits, group by group: an approximation for prefill.
//
// x is xs * xq with xq in [-127, 127] and one xs for every row and group of the weight, so a group adds
// xs * (scale * sum(q xq) + bias * sum(xq)): the first sum runs in integers, four products an instruction and lane. A
// lane is a row of the weight here, whose codes are laid out so that four columns of every lane lie side by side.
#ifndef G3N_INT8_H
#define G3N_INT8_H

#include "lanes.h"
#include "pool.h"
#include "product.h"
#include "work.h"

// The most bits of a code that the sums can take: without VNNI two products are added in 16 bits first, and twice that
// has to hold what the widest codes give.
#if defined(__AVX512VNNI__)
#define INT8_BITS 8
#elif defined(__AVX2__)
#define INT8_BITS 6
#else
#define INT8_BITS 0
#endif

#if INT8_BITS

#define ROW_VECTORS 2                 // of weight rows in a block
#define LANE_ROWS (ROW_VECTORS * LANES)
#define PANEL_COLUMNS 1024            // columns whose codes, a byte each, stay in the first-level cache
#define PART 512                      // of activations that a block goes over
#define INT8_M (LANES == 16 ? 6 : 2)  // rows of activations whose sums the registers hold

// sum of four products of unsigned and signed bytes, added to every lane.
INLINE Ints add_dot(Ints total, Ints codes, Ints x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)codes, (__m512i)x);
#elif defined(__AVX512BW__)
    return total + (Ints)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)codes, (__m512i)x), _mm512_set1_epi16(1));
#else
    return total + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)codes, (__m256i)x), _mm256_set1_epi16(1));
#endif
}

INLINE Floats activations_at(const Int8Work *work, long row, long column) {
    long at = row * work->matrix->columns + column;
    return work->rounded ? load_halves((const uint16_t *)work->x + at) : load((const float *)work->x + at);
}

INLINE void store_bytes(int8_t *p, Ints whole) {
    typedef int8_t Bytes __attribute__((vector_size(LANES)));
    Bytes bytes = __builtin_convertvector(whole, Bytes);
    memcpy(p, &bytes, sizeof bytes);
}

// One row in 8 bits, with a scale and a scaled sum for every group.
static void round_row(const Int8Work *work, long row) {
    const long columns = work->matrix->columns, group = work->matrix->group, groups = columns / group;
    for (long g = 0; g < groups; g++) {
        Floats most = {0}, odd = {0};
        for (long i = 0; i < group; i += LANES) {
            Floats x = activations_at(work, row, g * group + i);
            odd += x * 0.0f;  // NaN where x is not finite
            most = chosen_lanes(x > most, x, most);
            most = chosen_lanes(-x > most, -x, most);
        }
        const float top = largest(most), scale = top / 127.0f + sum(odd), inverse = top > 0.0f ? 127.0f / top : 0.0f;
        int8_t *out = work->codes + row * columns + g * group;
        Ints total = {0};
        for (long i = 0; i < group; i += LANES) {
            // Adding 1.5 * 2^23 rounds to a whole number, which the low bits then hold.
            Ints whole = (Ints)(activations_at(work, row, g * group + i) * inverse + 12582912.0f) - 0x4b400000;
            total += whole;
            store_bytes(out + i, whole);
        }
        work->scales[row * groups + g] = scale;
        work->sums[row * groups + g] = scale * sum(__builtin_convertvector(total, Floats));
    }
}

// Codes [first, first + count) of a row, a byte each.
static void unpack_bytes(const Matrix *m, long row, long first, long count, uint8_t *out) {
    const uint8_t *codes = (const uint8_t *)m->codes + row * m->code_stride + first / 8 * m->bits;
    if (m->bits == 8) {
        memcpy(out, codes, count);
    } else if (m->bits == 4) {
        for (long i = 0; i < count / 2; i++) {
            out[2 * i] = codes[i] & 15;
            out[2 * i + 1] = codes[i] >> 4;
        }
    } else {
        const uint32_t mask = (1u << m->bits) - 1;
        for (long unit = 0; unit < count / 8; unit++) {
            uint64_t word = 0;
            memcpy(&word, codes + unit * m->bits, m->bits);
            for (int i = 0; i < 8; i++) out[8 * unit + i] = (uint8_t)(word >> (m->bits * i) & mask);
        }
    }
}

// A stretch of columns of a block of weight rows; a row beyond the last has zeros.
typedef struct {
    uint8_t codes[PANEL_COLUMNS / 4][LANE_ROWS][4];
    float scales[PANEL_COLUMNS / 32][LANE_ROWS], biases[PANEL_COLUMNS / 32][LANE_ROWS];
} Panel;

static void fill_panel(const Matrix *m, long start, long first, long count, Panel *panel) {
    for (long r = 0; r < LANE_ROWS; r++) {
        uint8_t codes[PANEL_COLUMNS] = {0};
        const long row = start + r, there = row < m->rows, at = row * m->scale_stride + first / m->group;
        if (there) unpack_bytes(m, row, first, count, codes);
        for (long quad = 0; quad < count / 4; quad++) memcpy(panel->codes[quad][r], codes + 4 * quad, 4);
        for (long g = 0; g < count / m->group; g++) {
            panel->scales[g][r] = there ? group_at(m->scales, m->scale_bits, at + g) : 0.0f;
            panel->biases[g][r] = there ? group_at(m->biases, m->scale_bits, at + g) : 0.0f;
        }
    }
}

// Adds a panel's part to M rows of totals [M, LANE_ROWS].
INLINE void add_panel(const Int8Work *work, const Panel *panel, long row, long first, long count, float *totals, const int M) {
    const long columns = work->matrix->columns, group = work->matrix->group, groups = columns / group;
    const int8_t *x = work->codes + row * columns + first;
    Floats total[INT8_M][ROW_VECTORS];
    UNROLLED (int i = 0; i < M; i++)
        UNROLLED (int v = 0; v < ROW_VECTORS; v++) total[i][v] = load(totals + i * LANE_ROWS + v * LANES);
    for (long g = 0; g < count / group; g++) {
        Ints sums[INT8_M][ROW_VECTORS];
        UNROLLED (int i = 0; i < M; i++) UNROLLED (int v = 0; v < ROW_VECTORS; v++) sums[i][v] = (Ints){0};
        for (long quad = g * group / 4; quad < (g + 1) * group / 4; quad++) {
            Ints codes[ROW_VECTORS];
            UNROLLED (int v = 0; v < ROW_VECTORS; v++) codes[v] = (Ints)load_words(panel->codes[quad][v * LANES]);
            UNROLLED (int i = 0; i < M; i++) {
                int32_t four;
                memcpy(&four, x + i * columns + 4 * quad, sizeof four);
                UNROLLED (int v = 0; v < ROW_VECTORS; v++) sums[i][v] = add_dot(sums[i][v], codes[v], four - (Ints){0});
            }
        }
        UNROLLED (int v = 0; v < ROW_VECTORS; v++) {
            const Floats scale = load(panel->scales[g] + v * LANES), bias = load(panel->biases[g] + v * LANES);
            UNROLLED (int i = 0; i < M; i++) {
                const long at = (row + i) * groups + first / group + g;
                total[i][v] += __builtin_convertvector(sums[i][v], Floats) * (scale * work->scales[at]);
                total[i][v] += bias * work->sums[at];
            }
        }
    }
    UNROLLED (int i = 0; i < M; i++)
        UNROLLED (int v = 0; v < ROW_VECTORS; v++) store(totals + i * LANE_ROWS + v * LANES, total[i][v]);
}

static __attribute__((noinline)) void add_panel_to_most(const Int8Work *work, const Panel *panel, long row, long first, long count, float *totals) {
    add_panel(work, panel, row, first, count, totals, INT8_M);
}

static __attribute__((noinline)) void add_panel_to_one(const Int8Work *work, const Panel *panel, long row, long first, long count, float *totals) {
    add_panel(work, panel, row, first, count, totals, 1);
}

// Rows of activations [row, row + rows) by a block of weight rows.
static void int8_block(const Int8Work *work, long row, long rows, long start) {
    const Matrix *m = work->matrix;
    const long kept = at_most(LANE_ROWS, m->rows - start);
    float totals[PART][LANE_ROWS];
    memset(totals, 0, rows * sizeof *totals);
    for (long first = 0; first < m->columns; first += PANEL_COLUMNS) {
        Panel panel;
        const long count = at_most(PANEL_COLUMNS, m->columns - first);
        fill_panel(m, start, first, count, &panel);
        long i = 0;
        for (; i + INT8_M <= rows; i += INT8_M) add_panel_to_most(work, &panel, row + i, first, count, totals[i]);
        for (; i < rows; i++) add_panel_to_one(work, &panel, row + i, first, count, totals[i]);
    }
    for (long i = 0; i < rows; i++) {
        const long at = (row + i) * m->rows + start;
        if (work->rounded) {
            uint16_t halves[LANE_ROWS];
            UNROLLED (int v = 0; v < ROW_VECTORS; v++) store_halves(halves + v * LANES, load(totals[i] + v * LANES));
            memcpy((uint16_t *)work->y + at, halves, kept * sizeof *halves);
        } else {
            memcpy((float *)work->y + at, totals[i], kept * sizeof *totals[i]);
        }
    }
}

// y = x W^T.
static void int8_region(Place *place, void *argument) {
    const Int8Work *work = argument;
    const long blocks = (work->matrix->rows + LANE_ROWS - 1) / LANE_ROWS, parts = (work->rows + PART - 1) / PART;
    for EACH(place, row, work->rows) round_row(work, row);
    end_loop(place);
    for EACH(place, item, blocks * parts) {
        const long row = item % parts * PART;
        int8_block(work, row, at_most(PART, work->rows - row), item / parts * LANE_ROWS);
    }
    end_loop(place);
}

#else
#define int8_region NULL
#endif

#endif
