// Products of every number of bits against sums in double precision, for machines that Python's tests do not reach.
// usage: products INSTRUCTIONS; exit status 0 where all are right, and rows do not depend on the rows beside them.

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "g3n.h"

enum { ROWS = 19 };

static double number(uint16_t bfloat16) {
    uint32_t word = (uint32_t)bfloat16 << 16;
    float x;
    memcpy(&x, &word, sizeof x);
    return x;
}

static double rounded(float x) {
    uint32_t word;
    memcpy(&word, &x, sizeof word);
    return number((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

static unsigned code_at(const uint8_t *codes, int bits, int column) {
    unsigned code = 0;
    for (int i = 0; i < bits; i++) {
        long bit = (long)column * bits + i;
        code |= (codes[bit / 8] >> (bit % 8) & 1u) << i;
    }
    return code;
}

// How many numbers are wrong for a weight of random codes.
static int wrong(int bits, int group, int groups, int rounds) {
    const int columns = group * groups, stride = columns * bits / 8;
    uint8_t *codes = malloc(ROWS * stride);
    uint16_t *scales = malloc(ROWS * groups * 2), *biases = malloc(ROWS * groups * 2);
    float *x = malloc(MAX_ROWS * columns * sizeof *x), all[MAX_ROWS * ROWS], some[MAX_ROWS * ROWS];
    for (int i = 0; i < ROWS * stride; i++) codes[i] = (uint8_t)rand();
    for (int i = 0; i < ROWS * groups; i++) {
        scales[i] = (uint16_t)(0x3c00 + rand() % 256);
        biases[i] = (uint16_t)(0xbd00 + rand() % 256);
    }
    for (int i = 0; i < MAX_ROWS * columns; i++) x[i] = (float)(rand() % 2001 - 1000) / 1000;
    Matrix matrix = {codes, scales, biases, stride, groups, ROWS, columns, bits, group, 16};
    int found = 0;
    for (int rows = MAX_ROWS; rows > 0; rows--) {
        g3n_product(&matrix, x, rounds, rows, some);
        if (rows == MAX_ROWS) memcpy(all, some, sizeof all);
        found += memcmp(all, some, rows * ROWS * sizeof *some) != 0;
    }
    for (int row = 0; row < MAX_ROWS; row++)
        for (int n = 0; n < ROWS; n++) {
            double sum = 0, size = 0;
            for (int k = 0; k < columns; k++) {
                double value = rounds ? rounded(x[row * columns + k]) : x[row * columns + k];
                double scaled = code_at(codes + n * stride, bits, k) * number(scales[n * groups + k / group]);
                double bias = number(biases[n * groups + k / group]);
                sum += (scaled + bias) * value;
                size += (fabs(scaled) + fabs(bias)) * fabs(value);
            }
            found += !(fabs(all[row * ROWS + n] - sum) <= 2e-6 * size + 1e-6);
        }
    free(codes);
    free(scales);
    free(biases);
    free(x);
    return found;
}

int main(int count, char **arguments) {
    static const int bits[] = {2, 3, 4, 5, 6, 8}, sizes[] = {32, 64, 128};
    if (count != 2 || !g3n_use(arguments[1])) return 2;
    g3n_threads(2);
    int found = 0;
    for (int b = 0; b < 6; b++)
        for (int s = 0; s < 3; s++)
            for (int groups = 1; groups < 6; groups++)
                for (int rounds = 0; rounds < 2; rounds++) found += wrong(bits[b], sizes[s], groups, rounds);
    printf("%s: %d wrong\n", arguments[1], found);
    return found != 0;
}
