// What every instruction set compiles for itself.
#ifndef G3N_INSTRUCTIONS_H
#define G3N_INSTRUCTIONS_H

#include "pool.h"

typedef struct {
    const char *name;
    Region product, dequantize, units, start, queries, layer, logits, norm, gate;
    Region attention;  // of a prefill in bfloat16; NULL: not with these
    Region int8;       // NULL: not with these
    int int8_bits;     // the widest codes that it takes
} Instructions;

#endif
