// What one call of a step hands to every thread.
#ifndef G3N_LAYER_CALL_H
#define G3N_LAYER_CALL_H

#include "step.h"

typedef struct {
    Step *step;
    const Layer *layer;
    int layer_idx;
    const Sequence *sequences;
    int count;
    float *logits;
    const float *embeddings, *per_layer_rows;
} Call;

// Keys that a thread takes at a time. Borders stand at multiples of it in the text, so that a row's sums do not depend
// on how the call was cut.
#define KEYS 256

// Position in the text of the first key in view.
static inline long first_key(const Step *s, const Sequence *q) {
    return s->positions[q->first + q->rows - 1] + 1 - q->length;
}

// Chunks of keys that a sequence sees.
static inline long chunks_of(const Step *s, const Sequence *q) {
    return s->positions[q->first + q->rows - 1] / KEYS - first_key(s, q) / KEYS + 1;
}

#endif
