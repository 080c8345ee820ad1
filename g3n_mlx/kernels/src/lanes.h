// Vectors of one instruction set: LANES floats, and what differs in how 4-bit codes become numbers. This file and all
// that include it are compiled once for every instruction set (instructions.c).
#ifndef G3N_LANES_H
#define G3N_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))

// A loop of constant length, without the loop.
#define UNROLLED _Pragma("GCC unroll 16") for

INLINE long at_least(long a, long b) { return a > b ? a : b; }
INLINE long at_most(long a, long b) { return a < b ? a : b; }

// n rounded up to whole blocks of every layout (product.h): rows of activations are padded so, with zeros.
INLINE long padded(long n) { return (n + 255) / 256 * 256; }

// Entries from one row of an operand to the next: not a multiple of 4 KB, or all rows would meet in one set of the cache.
INLINE long operand_width(long columns) { return padded(columns) + 96; }

INLINE Floats load(const float *p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, Floats v) { memcpy(p, &v, sizeof v); }

INLINE Floats splat(float x) { return x - (Floats){0}; }

INLINE Words load_words(const void *p) {
    Words v;
    memcpy(&v, p, sizeof v);
    return v;
}

// The first `count` words, zeros behind them; nothing beyond them is touched.
INLINE Words load_some_words(const void *p, long count) {
#if defined(__AVX512F__)
    return (Words)_mm512_maskz_loadu_epi32((__mmask16)((1u << count) - 1), p);
#else
    Words v = {0};
    memcpy(&v, p, 4 * count);
    return v;
#endif
}

// LANES bytes as words.
INLINE Words load_bytes(const uint8_t *p) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    Words v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}

INLINE float widened(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &word, sizeof x);
    return x;
}

INLINE Floats load_halves(const uint16_t *p) {
    Halves v;
    memcpy(&v, p, sizeof v);
    return (Floats)(__builtin_convertvector(v, Words) << 16);
}

// To bfloat16, to nearest, ties to even; a NaN stays one.
INLINE uint16_t rounded(float x) {
    uint32_t word;
    memcpy(&word, &x, sizeof word);
    if (x != x) return (uint16_t)(word >> 16 | 0x40);
    return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

INLINE float as_rounded(float x, int yes) { return yes ? widened(rounded(x)) : x; }

INLINE Words rounded_words(Floats v) {
#if defined(__AVX512BF16__)
    return (Words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
#endif
    Words word = (Words)v;
    Words nan = (Words)(v != v);
    Words to_nearest = word + 0x7fff + (word >> 16 & 1);
    return ((to_nearest & ~nan) | ((word | 0x400000) & nan)) >> 16;
}

INLINE Floats as_rounded_lanes(Floats v, int yes) { return yes ? (Floats)(rounded_words(v) << 16) : v; }

INLINE void store_halves(uint16_t *p, Floats v) {
    Halves halves = __builtin_convertvector(rounded_words(v), Halves);
    memcpy(p, &halves, sizeof halves);
}

// The same order of additions wherever a row stands.
INLINE float sum(Floats v) {
#if LANES == 16
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#elif LANES == 8
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
#else
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
#endif
    return v[0] + v[1];
}

INLINE float largest(Floats v) {
    float found = v[0];
    for (int i = 1; i < LANES; i++) found = v[i] > found ? v[i] : found;
    return found;
}

// The codes of `bits` bits that every word holds at `shift`, as numbers.
INLINE Floats codes_at(Words words, int shift, int bits) {
#if defined(__AVX512F__)
    if (bits == 4) {  // a table of 16 numbers is one register, and its index needs no mask
        const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return (Floats)_mm512_permutexvar_ps((__m512i)(words >> shift), table);
    }
#endif
    Words code = words >> shift;
    if (shift + bits < 32) code &= (1u << bits) - 1;
    return __builtin_convertvector((Ints)code, Floats);
}

// Of every lane the first where the comparison holds, else the second.
INLINE Floats chosen_lanes(Ints holds, Floats first, Floats second) {
    return (Floats)((holds & (Ints)first) | (~holds & (Ints)second));
}

// e^x, to 2 units in the last place: x = n ln 2 + r, and a polynomial of r (Cephes, expf).
INLINE Floats exponential(Floats x) {
    x = chosen_lanes(x < -87.0f, splat(-87.0f), x);
    x = chosen_lanes(x > 88.0f, splat(88.0f), x);
    Floats scaled = x * 1.44269504088896341f;
    // Adding and taking away 1.5 * 2^23 rounds to a whole number.
    Floats n = (scaled + 12582912.0f) - 12582912.0f;
    Floats r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Floats y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    Words power = (Words)(__builtin_convertvector(n, Ints) + 127) << 23;
    return y * (Floats)power;
}

INLINE Floats hyperbolic_tangent(Floats x) { return 1.0f - 2.0f / (exponential(x + x) + 1.0f); }

// GELU with the tanh approximation (arXiv:1606.08415, section 2).
INLINE Floats gelu(Floats x) {
    Floats inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + hyperbolic_tangent(inner));
}

#endif
