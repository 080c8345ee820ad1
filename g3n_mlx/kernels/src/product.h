// Products of 1 to MAX_ROWS rows with a weight as it is stored, exact: float32 sums of what dequantizing would give.
//
// A code q stands for scale * q + bias of its group, so a group adds scale * sum(q x) + bias * sum(x). One word of 32
// bits holds 32 / bits codes, and a vector LANES words; so x is laid out in planes: for every block of LANES words
// first what meets the lowest code of every word, then what meets the next. In bfloat16 with AVX512_BF16 the unit is
// the 16-bit half of a word: 4-bit codes are looked up as bfloat16 numbers and multiplied in pairs, which is exact.
//
// The sums of a row run in the same order whatever other rows the call has, so its bits do not depend on them.
#ifndef G3N_PRODUCT_H
#define G3N_PRODUCT_H

#include "g3n.h"
#include "lanes.h"
#include "operand.h"
#include "pool.h"

#if PAIRS
// 128 columns rounded, as 4 planes of 32 halves.
INLINE void lay_out_planes_of_pairs(const float *x, uint16_t *halves) {
    static const uint16_t every_fourth[4][32] = {
#define QUARTER(j) {j, 4 + j, 8 + j, 12 + j, 16 + j, 20 + j, 24 + j, 28 + j, 32 + j, 36 + j, 40 + j, 44 + j, 48 + j, 52 + j, 56 + j, 60 + j}
        QUARTER(0), QUARTER(1), QUARTER(2), QUARTER(3),
#undef QUARTER
    };
    __m512i columns[4];
    UNROLLED (int i = 0; i < 4; i++)
        columns[i] = (__m512i)_mm512_cvtne2ps_pbh((__m512)load(x + 32 * i + 16), (__m512)load(x + 32 * i));
    UNROLLED (int j = 0; j < 4; j++) {
        __m512i index = _mm512_loadu_si512(every_fourth[j]);
        __m512i low = _mm512_permutex2var_epi16(columns[0], index, columns[1]);
        __m512i high = _mm512_permutex2var_epi16(columns[2], index, columns[3]);
        _mm512_storeu_si512(halves + 32 * j, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
    }
}
#endif

// Lays out columns [first, last) of a row x [columns, zeros up to whole blocks]; first and last are whole blocks.
static void lay_out(const Operand *o, long row, const float *x, int rounds, long columns, long first, long last) {
    float *floats = (float *)o->values + row * o->stride;
    uint16_t *halves = (uint16_t *)o->values + row * o->stride;
    switch (o->layout) {
    case NATURAL:
        for (long i = first; i < last; i += LANES) store(floats + i, as_rounded_lanes(load(x + i), rounds));
        break;
    case NATURAL_PAIRS:
        for (long i = first; i < last; i += LANES) store_halves(halves + i, load(x + i));
        break;
    case PLANE_PAIRS:  // of every 128: 4 planes of 32, plane j holds the columns 4 i + j
#if PAIRS
        for (long block = first; block < last; block += 128) lay_out_planes_of_pairs(x + block, halves + block);
#endif
        break;
    case PLANES: {
        int planes = planes_of(o->bits), size = planes * LANES;
        for (long block = first; block < last; block += size)
            for (int j = 0; j < planes; j++)
                for (int i = 0; i < LANES; i++)
                    floats[block + j * LANES + i] = as_rounded(x[block + planes * i + j], rounds);
    }
    }
    if (!o->group) return;
    float *sums = o->sums + row * o->sums_stride;
    for (long start = first; start < last && start < columns; start += o->group) {
        Floats total = {0};
        for (int i = 0; i < o->group; i += LANES) total += as_rounded_lanes(load(x + start + i), rounds);
        sums[start / o->group] = sum(total);
    }
    if (last >= columns) memset(sums + columns / o->group, 0, LANES * sizeof *sums);
}

// Scales or biases of the last groups, fewer than LANES, from `group` on; zeros behind them.
INLINE Floats groups_at(const void *p, int bits, long group, long groups) {
    float some[LANES] = {0};
    for (long i = group; i < groups; i++)
        some[i - group] = bits == 16 ? widened(((const uint16_t *)p)[i]) : ((const float *)p)[i];
    return load(some);
}

INLINE float group_at(const void *p, int bits, long group) {
    return bits == 16 ? widened(((const uint16_t *)p)[group]) : ((const float *)p)[group];
}

// The scale of every lane's word, from the word `first` on; a group is 2^shift words. `whole`: no lane is beyond the row.
INLINE Floats lane_scales(const void *scales, const int bits, long first, const int shift, long groups, const int whole) {
#if defined(__AVX512F__)
    if (bits == 16 && shift == 3 && whole) {  // two groups: both bfloat16 numbers everywhere, the upper or the lower kept
        uint32_t both;
        memcpy(&both, (const uint16_t *)scales + (first >> 3), sizeof both);
        const __m512i up = _mm512_setr_epi32(16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0);
        __m512i words = _mm512_sllv_epi32(_mm512_set1_epi32((int)both), up);
        return (Floats)_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000));
    }
#endif
    if (1 << shift >= LANES) return splat(group_at(scales, bits, first >> shift));
    long group = first >> shift, count = LANES >> shift;
    if (!whole) count = at_most(count, groups - group);
#if defined(__AVX512F__)
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i index = _mm512_srli_epi32(lane, shift);
    __mmask16 mask = (__mmask16)((1u << count) - 1);
    __m512 some;
    if (bits == 16) {
        __m256i halves = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)scales + group);
        some = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    } else {
        some = _mm512_maskz_loadu_ps(mask, (const float *)scales + group);
    }
    return (Floats)_mm512_permutexvar_ps(index, some);
#else
    float lanes[LANES] = {0};
    for (int i = 0; i < count; i++)
        for (int j = 0; j < 1 << shift; j++) lanes[(i << shift) + j] = group_at(scales, bits, group + i);
    return load(lanes);
#endif
}

INLINE Words row_words(const char *at, long count, const int whole) {
    return whole ? load_words(at) : load_some_words(at, count);
}

// Words of a group of 64 4-bit codes are 2^USUAL: a loop of its own, where that is a constant.
#define USUAL 3

// Bytes by which codes are fetched ahead of their use: with one row of activations that comes soon.
#define AHEAD(M) ((M) == 1 ? 2048 : 8192)
// The same for scales and biases, whose streams are too thin for the processor to follow by itself.
#define SCALES_AHEAD 256
// Rows of a list.
#define ROWS_AHEAD 3

// R rows of the weight by M rows of activations: constants once inlined, so that all sums stay in registers.
#define MOST_R 2
#define MOST_M 8

typedef struct {
    const char *codes[MOST_R], *scales[MOST_R], *biases[MOST_R];
} Places;

INLINE Places places_of(const Matrix *m, const long *which, const int R) {
    Places at;
    UNROLLED (int r = 0; r < R; r++) {
        long scale_start = which[r] * m->scale_stride * (m->scale_bits / 8);
        at.codes[r] = (const char *)m->codes + which[r] * m->code_stride;
        at.scales[r] = (const char *)m->scales + scale_start;
        at.biases[r] = (const char *)m->biases + scale_start;
    }
    return at;
}

// Fetches what comes of a row's codes, scales and biases; of the latter whenever a line of the cache begins. Many rows of
// activations are bound by arithmetic, which these fetches would only delay.
INLINE void fetch_ahead(const Places *at, const int r, const int M, const int scale_bits, const int shift, long word) {
    const long scale = (word >> shift) * (scale_bits / 8);
    __builtin_prefetch(at->codes[r] + 4 * word + AHEAD(M));
    if (M > 4 || scale % 64) return;
    __builtin_prefetch(at->scales[r] + scale + SCALES_AHEAD);
    __builtin_prefetch(at->biases[r] + scale + SCALES_AHEAD);
}

// Adds what the biases give, and writes the sums.
INLINE void finish(const Product *p, const long *which, const Places *at, const int R, long first, const int M, const int scale_bits,
                   Floats (*total)[MOST_M]) {
    const Matrix *m = p->matrix;
    const Operand *o = p->operand;
    const long groups = groups_of(m);
    long g = 0;
    for (; g + LANES <= groups; g += LANES)
        UNROLLED (int r = 0; r < R; r++) {
            const char *biases_at = at->biases[r] + g * (scale_bits / 8);
            Floats biases = scale_bits == 16 ? load_halves((const uint16_t *)biases_at) : load((const float *)biases_at);
            UNROLLED (int i = 0; i < M; i++) total[r][i] += biases * load(o->sums + (first + i) * o->sums_stride + g);
        }
    if (g < groups)
        UNROLLED (int r = 0; r < R; r++) {
            Floats biases = groups_at(at->biases[r], scale_bits, g, groups);
            UNROLLED (int i = 0; i < M; i++) total[r][i] += biases * load(o->sums + (first + i) * o->sums_stride + g);
        }
    UNROLLED (int r = 0; r < R; r++)
        UNROLLED (int i = 0; i < M; i++) p->out[(first + i) * p->out_stride + which[r]] = sum(total[r][i]);
}

#define EMPTY_TOTALS(R, M)                                                                  \
    Floats total[MOST_R][MOST_M];                                                           \
    UNROLLED (int r = 0; r < R; r++) UNROLLED (int i = 0; i < M; i++) total[r][i] = (Floats){0};

// One vector of words of each row: codes of 2, 4 or 8 bits, float32 activations in planes.
INLINE void add_planes(const Matrix *m, const Operand *o, const Places *at, const int R, long first, const int M, const int bits,
                       const int scale_bits, const int shift, long word, const int whole, Floats (*total)[MOST_M]) {
    const int planes = 32 / bits;
    const float *x = (const float *)o->values + first * o->stride + word * planes;
    Words codes[MOST_R];
    Floats scale[MOST_R], part[MOST_R][MOST_M];
    UNROLLED (int r = 0; r < R; r++) {
        codes[r] = row_words(at->codes[r] + 4 * word, m->columns / planes - word, whole);
        fetch_ahead(at, r, M, scale_bits, shift, word);
        scale[r] = lane_scales(at->scales[r], scale_bits, word, shift, m->columns / m->group, whole);
        UNROLLED (int i = 0; i < M; i++) part[r][i] = (Floats){0};
    }
    UNROLLED (int j = 0; j < planes; j++) {
        Floats code[MOST_R];
        UNROLLED (int r = 0; r < R; r++) code[r] = codes_at(codes[r], j * bits, bits);
        UNROLLED (int i = 0; i < M; i++) {
            Floats plane = load(x + i * o->stride + j * LANES);
            UNROLLED (int r = 0; r < R; r++) part[r][i] += code[r] * plane;
        }
    }
    UNROLLED (int r = 0; r < R; r++)
        UNROLLED (int i = 0; i < M; i++) total[r][i] += part[r][i] * scale[r];
}

// The words [word, end) of R rows; only the last words of a row may be no whole vector.
INLINE void sweep_planes(const Product *p, const long *which, const int R, long first, const int M, const int bits, const int scale_bits,
                         long word, long end, Floats (*total)[MOST_M]) {
    const Matrix m = *p->matrix;
    const Operand o = *p->operand;
    const Places at = places_of(&m, which, R);
    const int shift = __builtin_ctz(m.group) - __builtin_ctz(32 / bits);
    if (shift == USUAL)
        for (; word + LANES <= end; word += LANES) add_planes(&m, &o, &at, R, first, M, bits, scale_bits, USUAL, word, 1, total);
    else
        for (; word + LANES <= end; word += LANES) add_planes(&m, &o, &at, R, first, M, bits, scale_bits, shift, word, 1, total);
    if (word < end) add_planes(&m, &o, &at, R, first, M, bits, scale_bits, shift, word, 0, total);
}

#if PAIRS
// The same for 4-bit codes and bfloat16 activations in planes of pairs: 32 halves meet 32 columns of a plane.
INLINE void add_pairs(const Matrix *m, const Operand *o, const Places *at, const int R, long first, const int M, const int scale_bits,
                      const int shift, long word, const int whole, Floats (*total)[MOST_M]) {
    // The numbers 0 to 15 twice: the index is 5 bits wide, and the fifth is the next code's lowest.
    static const uint16_t numbers[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    const __m512i table = _mm512_loadu_si512(numbers);
    const uint16_t *x = (const uint16_t *)o->values + first * o->stride + word * 8;
    Floats scale[MOST_R];
    __m512bh plane[MOST_R][4];
    UNROLLED (int r = 0; r < R; r++) {
        __m512i codes = (__m512i)row_words(at->codes[r] + 4 * word, m->columns / 8 - word, whole);
        fetch_ahead(at, r, M, scale_bits, shift, word);
        scale[r] = lane_scales(at->scales[r], scale_bits, word, shift, m->columns / m->group, whole);
        plane[r][0] = (__m512bh)_mm512_permutexvar_epi16(codes, table);
        plane[r][1] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
        plane[r][2] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
        plane[r][3] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table);
    }
    UNROLLED (int i = 0; i < M; i++) {
        __m512bh values[4];
        UNROLLED (int j = 0; j < 4; j++) values[j] = (__m512bh)_mm512_loadu_si512(x + i * o->stride + 32 * j);
        UNROLLED (int r = 0; r < R; r++) {
            __m512 part = _mm512_dpbf16_ps(_mm512_setzero_ps(), plane[r][0], values[0]);
            UNROLLED (int j = 1; j < 4; j++) part = _mm512_dpbf16_ps(part, plane[r][j], values[j]);
            total[r][i] = (Floats)_mm512_fmadd_ps(part, (__m512)scale[r], (__m512)total[r][i]);
        }
    }
}

INLINE void sweep_pairs(const Product *p, const long *which, const int R, long first, const int M, const int bits, const int scale_bits,
                        long word, long end, Floats (*total)[MOST_M]) {
    (void)bits;
    const Matrix m = *p->matrix;
    const Operand o = *p->operand;
    const Places at = places_of(&m, which, R);
    const int shift = __builtin_ctz(m.group) - 3;
    if (shift == USUAL)
        for (; word + LANES <= end; word += LANES) add_pairs(&m, &o, &at, R, first, M, scale_bits, USUAL, word, 1, total);
    else
        for (; word + LANES <= end; word += LANES) add_pairs(&m, &o, &at, R, first, M, scale_bits, shift, word, 1, total);
    if (word < end) add_pairs(&m, &o, &at, R, first, M, scale_bits, shift, word, 0, total);
}

// Dense bfloat16 weights and activations.
INLINE void tile_of_dense_pairs(const Product *p, const long *which, const int R, long first, const int M) {
    const Matrix *m = p->matrix;
    const Operand *o = p->operand;
    const Places at = places_of(m, which, R);
    const uint16_t *x = (const uint16_t *)o->values + first * o->stride;
    EMPTY_TOTALS(R, M)
    for (long column = 0; column < m->columns; column += 32) {
        long left = m->columns - column;
        __mmask32 mask = left >= 32 ? 0xffffffff : (1u << left) - 1;
        __m512bh weight[MOST_R];
        UNROLLED (int r = 0; r < R; r++) weight[r] = (__m512bh)_mm512_maskz_loadu_epi16(mask, at.codes[r] + 2 * column);
        UNROLLED (int i = 0; i < M; i++) {
            __m512bh values = (__m512bh)_mm512_loadu_si512(x + i * o->stride + column);
            UNROLLED (int r = 0; r < R; r++) total[r][i] = (Floats)_mm512_dpbf16_ps((__m512)total[r][i], weight[r], values);
        }
    }
    finish(p, which, &at, R, first, M, 16, total);
}
#endif

// 4-bit codes in their own order, LANES at a time.
INLINE void unpack_nibbles(const uint8_t *codes, long count, float *out) {
#if LANES == 16
    const Words shifts = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
    for (long i = 0; i + 16 <= count; i += 16) {
        uint32_t both[2];
        memcpy(both, codes + i / 2, sizeof both);
        Words low = (Words)_mm512_set1_epi32((int)both[0]);
        Words words = (Words)_mm512_mask_set1_epi32((__m512i)low, 0xff00, (int)both[1]);
        store(out + i, __builtin_convertvector((Ints)(words >> shifts & 15), Floats));
    }
#elif LANES == 8
    const Words shifts = {0, 4, 8, 12, 16, 20, 24, 28};
    for (long i = 0; i < count; i += 8) {
        uint32_t word;
        memcpy(&word, codes + i / 2, sizeof word);
        store(out + i, __builtin_convertvector((Ints)((word - (Words){0}) >> shifts & 15), Floats));
    }
#else
    const Words shifts = {0, 4, 8, 12};
    for (long i = 0; i < count; i += 4) {
        uint16_t word;
        memcpy(&word, codes + i / 2, sizeof word);
        store(out + i, __builtin_convertvector((Ints)(((uint32_t)word - (Words){0}) >> shifts & 15), Floats));
    }
#endif
}

// Units of 8 codes, which are `bits` bytes, the first code lowest.
INLINE void unpack(const uint8_t *codes, long units, const int bits, float *out) {
    for (long unit = 0; unit < units; unit++) {
        uint64_t word = 0;
        memcpy(&word, codes + unit * bits, bits);
        for (int i = 0; i < 8; i++) out[8 * unit + i] = (float)(int)(word >> (bits * i) & ((1u << bits) - 1));
    }
}

// Columns [first, first + count) of a row as dequantized numbers, count at most 256 and a multiple of 8; of a quantized
// weight, first and count are whole groups.
static void dequantize_some(const Matrix *m, long row, long first, long count, float *out) {
    const uint8_t *codes = (const uint8_t *)m->codes + row * m->code_stride;
    if (m->bits >= 16) {
        for (long i = 0; i < count; i++)
            out[i] = m->bits == 16 ? widened(((const uint16_t *)codes)[first + i]) : ((const float *)codes)[first + i];
        return;
    }
    codes += first / 8 * m->bits;
    switch (m->bits) {
    case 2: unpack(codes, count / 8, 2, out); break;
    case 3: unpack(codes, count / 8, 3, out); break;
    case 4: unpack_nibbles(codes, count, out); break;
    case 5: unpack(codes, count / 8, 5, out); break;
    case 6: unpack(codes, count / 8, 6, out); break;
    default: unpack(codes, count / 8, 8, out);
    }
    long scale_row = row * m->scale_stride;
    for (long start = 0; start < count; start += m->group) {
        long group = scale_row + (first + start) / m->group;
        Floats scale = splat(group_at(m->scales, m->scale_bits, group)), bias = splat(group_at(m->biases, m->scale_bits, group));
        for (int i = 0; i < m->group; i += LANES) store(out + start + i, scale * load(out + start + i) + bias);
    }
}

// Any weight, float32 activations in their own order: 256 columns of a row are dequantized, then multiplied.
static void any_tile(const Product *p, const long *which, int R, long first, int M) {
    const Matrix *m = p->matrix;
    const Operand *o = p->operand;
    for (int r = 0; r < R; r++) {
        Floats total[MAX_ROWS];
        for (int i = 0; i < M; i++) total[i] = (Floats){0};
        for (long column = 0; column < m->columns; column += 256) {
            float weights[256];
            long count = at_most(256, m->columns - column);
            dequantize_some(m, which[r], column, count, weights);
            for (long i = count; i % LANES; i++) weights[i] = 0;
            for (int i = 0; i < M; i++) {
                const float *x = (const float *)o->values + (first + i) * o->stride + column;
                Floats part = {0};
                for (long j = 0; j < count; j += LANES) part += load(weights + j) * load(x + j);
                total[i] += part;
            }
        }
        for (int i = 0; i < M; i++) p->out[(first + i) * p->out_stride + which[r]] = sum(total[i]);
    }
}

// Rows of a weight that stay in the cache while all rows of activations go over them.
#define BAND 16

// Columns after which 8 rows of activations start over with the next rows of a band, to stay in a first-level cache of
// 32 KB; fewer rows fit whole.
#define STRETCH 1024

INLINE void set_rows(long *which, const int32_t *listed, long start, const int R) {
    UNROLLED (int r = 0; r < R; r++) which[r] = listed ? listed[start + r] : start + r;
}

// Adds the words [word, end) of the rows [start, stop), R at a time while there are as many -> the first that is left.
#define SWEEP(ROWS, KIND, ...)                                                                                  \
    for (; row + ROWS <= stop; row += ROWS) {                                                                    \
        long which[MOST_R];                                                                                      \
        Floats part[MOST_R][MOST_M];                                                                             \
        set_rows(which, listed, row, ROWS);                                                                      \
        UNROLLED (int r = 0; r < ROWS; r++) UNROLLED (int i = 0; i < M; i++) part[r][i] = total[row - start + r][i]; \
        KIND(p, which, ROWS, first, M, __VA_ARGS__, word, end, part);                                            \
        UNROLLED (int r = 0; r < ROWS; r++) UNROLLED (int i = 0; i < M; i++) total[row - start + r][i] = part[r][i]; \
    }

// The rows [start, stop) of a product, at most BAND of them, or those of a list, for M rows of activations.
INLINE void band(const Product *p, const int32_t *listed, long start, long stop, long first, const int M) {
    const Matrix *m = p->matrix;
    const Layout layout = p->operand->layout;
    const int bits = m->bits, wide = m->scale_bits == 32;
    const int R = LANES >= 16 ? 2 : 1;
    if (layout == NATURAL || layout == NATURAL_PAIRS) {
        for (long row = start; row < stop; row++) {
            long which[MOST_R];
            set_rows(which, listed, row, 1);
#if PAIRS
            if (layout == NATURAL_PAIRS) tile_of_dense_pairs(p, which, 1, first, M);
            else
#endif
                any_tile(p, which, 1, first, M);
        }
        return;
    }
    Floats total[BAND][MOST_M];
    for (long r = 0; r < stop - start; r++) UNROLLED (int i = 0; i < M; i++) total[r][i] = (Floats){0};
    const long words = (long)m->columns * bits / 32, step = M == 8 ? STRETCH * bits / 32 : words;
    for (long word = 0; word < words; word += step) {
        const long end = at_most(word + step, words);
        long row = start;
#define SWEEPS(KIND, BITS, SCALES) { SWEEP(R, KIND, BITS, SCALES) SWEEP(1, KIND, BITS, SCALES) }
#if PAIRS
        if (layout == PLANE_PAIRS && !wide) SWEEPS(sweep_pairs, 4, 16)
        else if (layout == PLANE_PAIRS) SWEEPS(sweep_pairs, 4, 32)
        else
#endif
        if (bits == 4 && !wide) SWEEPS(sweep_planes, 4, 16)
        else if (bits == 4) SWEEPS(sweep_planes, 4, 32)
        else if (bits == 8 && !wide) SWEEPS(sweep_planes, 8, 16)
        else if (bits == 8) SWEEPS(sweep_planes, 8, 32)
        else if (!wide) SWEEPS(sweep_planes, 2, 16)
        else SWEEPS(sweep_planes, 2, 32)
    }
    for (long row = start; row < stop; row++) {
        long which[MOST_R];
        set_rows(which, listed, row, 1);
        const Places at = places_of(m, which, 1);
        finish(p, which, &at, 1, first, M, wide ? 32 : 16, &total[row - start]);
    }
}

// Fetches a row of a list before its turn: where it begins, nothing before it tells the processor.
INLINE void fetch_row(const Matrix *m, long row) {
    const Places at = places_of(m, &row, 1);
    for (long byte = 0; byte < (long)m->columns * m->bits / 8; byte += 64) __builtin_prefetch(at.codes[0] + byte);
    for (long byte = 0; byte < groups_of(m) * (m->scale_bits / 8); byte += 64) {
        __builtin_prefetch(at.scales[0] + byte);
        __builtin_prefetch(at.biases[0] + byte);
    }
}

// One row of activations: nothing to keep in a cache, so whole rows of the weight, one stream of memory.
INLINE void single(const Product *p, const int32_t *listed, long start, long stop) {
    const Matrix *m = p->matrix;
    const Layout layout = p->operand->layout;
    const int bits = m->bits, wide = m->scale_bits == 32;
    const long words = (long)m->columns * bits / 32;
#define SINGLE(KIND, BITS, SCALES)                                  \
    for (; start < stop; start++) {                                  \
        long which[MOST_R];                                          \
        set_rows(which, listed, start, 1);                           \
        if (listed) fetch_row(m, listed[at_most(start + ROWS_AHEAD, stop - 1)]); \
        const Places at = places_of(m, which, 1);                    \
        EMPTY_TOTALS(1, 1)                                           \
        KIND(p, which, 1, 0, 1, BITS, SCALES, 0, words, total);      \
        finish(p, which, &at, 1, 0, 1, SCALES, total);               \
    }
#if PAIRS
    if (layout == PLANE_PAIRS && !wide) SINGLE(sweep_pairs, 4, 16)
    else if (layout == PLANE_PAIRS) SINGLE(sweep_pairs, 4, 32)
    else
#endif
    if (layout == NATURAL || layout == NATURAL_PAIRS) band(p, listed, start, stop, 0, 1);
    else if (bits == 4 && !wide) SINGLE(sweep_planes, 4, 16)
    else if (bits == 4) SINGLE(sweep_planes, 4, 32)
    else if (bits == 8 && !wide) SINGLE(sweep_planes, 8, 16)
    else if (bits == 8) SINGLE(sweep_planes, 8, 32)
    else if (!wide) SINGLE(sweep_planes, 2, 16)
    else SINGLE(sweep_planes, 2, 32)
}

#define BAND_OF(M)                                                                                                      \
    static __attribute__((noinline)) void band_of_##M(const Product *p, const int32_t *listed, long start, long stop, long first) { \
        band(p, listed, start, stop, first, M);                                                                          \
    }
BAND_OF(1)
BAND_OF(2)
BAND_OF(4)
BAND_OF(8)

// The rows [start, stop) of a product, or those of a list, for all rows of activations: 8, 4, 2 and 1 at a time, as
// many as the registers hold.
static void product_rows(const Product *p, const int32_t *listed, long start, long stop, int rows) {
    if (rows == 1) {
        single(p, listed, start, stop);
        return;
    }
    for (; start < stop; start += BAND) {
        long end = at_most(start + BAND, stop), first = 0;
        for (; LANES >= 16 && rows - first >= 8; first += 8) band_of_8(p, listed, start, end, first);
        for (; rows - first >= 4; first += 4) band_of_4(p, listed, start, end, first);
        for (; rows - first >= 2; first += 2) band_of_2(p, listed, start, end, first);
        if (rows > first) band_of_1(p, listed, start, end, first);
    }
}

// Rows that a thread takes at a time: long stretches of memory, but some for everyone to the end.
INLINE long chunk_of(const Place *place, long rows) { return at_least(BAND, at_most(512, rows / (8 * place->threads) / BAND * BAND)); }

// Several products of the same rows as one loop of all threads.
static void products(Place *place, const Product *list, int count, int rows) {
    long items = 0;
    for (int i = 0; i < count; i++) {
        long chunk = chunk_of(place, list[i].matrix->rows);
        items += (list[i].matrix->rows + chunk - 1) / chunk;
    }
    for EACH(place, item, items) {
        const Product *p = list;
        for (long index = item;; p++) {
            long all = p->matrix->rows, chunk = chunk_of(place, all), own = (all + chunk - 1) / chunk;
            if (index < own) {
                product_rows(p, NULL, index * chunk, at_most((index + 1) * chunk, all), rows);
                break;
            }
            index -= own;
        }
    }
    end_loop(place);
}

#endif
