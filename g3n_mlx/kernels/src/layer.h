// A decoder layer and both ends of the model for 1 to MAX_ROWS rows, as backends/torch/text.py has them: same names,
// same order. Streams are [T, A, D] there; here every row of D numbers begins at a multiple of `padded(D)`.
#ifndef G3N_LAYER_H
#define G3N_LAYER_H

#include "attention.h"
#include "ffn.h"
#include "layer_call.h"

// ---- A layer ----

// From the streams to queries, new keys and values, and the first half of LAuReL.
static void queries_region(Place *place, void *argument) {
    const Call *call = argument;
    Step *s = call->step;
    const Layer *l = call->layer;
    const Model *m = &s->model;
    const int rows = s->rows;
    Fan fan = {0};
    add_product(s, &fan, 0, &l->q_proj, s->queries, s->query_width);
    add_product(s, &fan, 0, &l->k_proj, s->new_keys, s->kv_width);
    add_product(s, &fan, 0, &l->v_proj, s->new_values, s->kv_width);
    add_product(s, &fan, 0, &l->linear_left, s->laurel_low, s->width);
    for EACH(place, row, rows) {
        predict(s, l, row);
        float *x = s->x + row * s->width;
        norm(s->predictions + (row * m->inputs + m->active) * s->width, l->input_layernorm, m->hidden, m->eps, x);
        lay_out_all(s, &fan, row, x, 0, s->width);
    }
    end_loop(place);
    products(place, fan.products, fan.count, rows);
    long size = m->head_dim, stored = l->k_proj.rows ? m->kv_heads : 0, heads = m->heads + 2 * stored;
    for EACH(place, item, rows * heads) {
        long row = item / heads, head = item % heads;
        const float *cos = s->cos[l->rope] + row * s->rope_width, *sin = s->sin[l->rope] + row * s->rope_width;
        if (head < m->heads) {
            float *x = s->queries + row * s->query_width + head * size;
            norm(x, l->q_norm, size, m->eps, x);
            rotate(x, cos, sin, size / 2);
            for (long i = 0; i < size; i += LANES) store(x + i, as_rounded_lanes(load(x + i), m->rounded));
            continue;
        }
        head -= m->heads;
        int is_key = head < stored;
        if (!is_key) head -= stored;
        float *x = (is_key ? s->new_keys : s->new_values) + row * s->kv_width + head * size;
        norm(x, is_key ? l->k_norm : NULL, size, m->eps, x);
        if (is_key) rotate(x, cos, sin, size / 2);
        long at = (row * m->kv_heads + head) * size;
        void *out = is_key ? s->keys : s->values;
        if (m->rounded)
            for (long i = 0; i < size; i += LANES) store_halves((uint16_t *)out + at + i, load(x + i));
        else
            memcpy((float *)out + at, x, size * sizeof *x);
    }
    end_loop(place);
}

// From the queries to the next layer's streams.
static void layer_region(Place *place, void *argument) {
    const Call *call = argument;
    Step *s = call->step;
    const Layer *l = call->layer;
    const Model *m = &s->model;
    const int rows = s->rows;
    const float half = 0.70710678118654752f;

    for (int i = 0; i < call->count; i++) {
        const Sequence *q = &call->sequences[i];
        for EACH(place, item, m->kv_heads * chunks_of(s, q))
            attend_chunk(s, l, q, item % m->kv_heads, first_key(s, q) / KEYS + item / m->kv_heads);
        end_loop(place);
    }
    Fan out = {0}, laurel = {0};
    add_product(s, &out, 0, &l->o_proj, s->attended, s->width);
    add_product(s, &laurel, 1, &l->linear_right, s->laurel, s->width);
    for EACH(place, row, rows) {
        const Sequence *q = call->sequences;
        while (row >= q->first + q->rows) q++;
        join_chunks(s, q, row);
        lay_out_all(s, &out, row, s->attention + row * s->query_width, 0, s->query_width);
        lay_out_all(s, &laurel, row, s->laurel_low + row * s->width, 0, padded(l->linear_right.columns));
    }
    end_loop(place);
    Product both[2] = {out.products[0], laurel.products[0]};
    products(place, both, 2, rows);

    Fan gate_and_up = {0};
    add_product(s, &gate_and_up, 0, &l->gate_proj, s->gate, s->ffn_width);
    add_product(s, &gate_and_up, 0, &l->up_proj, s->up, s->ffn_width);
    for EACH(place, row, rows) {
        const float *active = s->predictions + (row * m->inputs + m->active) * s->width;
        float *x = s->x + row * s->width, *attended = s->attended + row * s->width, *low = s->laurel + row * s->width;
        norm(attended, l->post_attention_layernorm, m->hidden, m->eps, attended);
        norm(low, l->post_laurel_norm, m->hidden, m->eps, low);
        float *residual = s->residual + row * s->width;
        for (long i = 0; i < m->hidden; i += LANES)
            store(residual + i, (load(active + i) + load(attended + i) + load(x + i) + load(low + i)) * half);
        norm(residual, l->pre_feedforward_layernorm, m->hidden, m->eps, x);
        lay_out_all(s, &gate_and_up, row, x, 0, s->width);
    }
    end_loop(place);
    ffn(place, s, l, rows, &gate_and_up);

    Fan gate = {0}, projection = {0};
    add_product(s, &gate, 0, &l->per_layer_input_gate, s->ple_gate, s->ple_width);
    add_product(s, &projection, 0, &l->per_layer_projection, s->update, s->width);
    for EACH(place, row, rows) {
        float *down = s->down + row * s->width, *residual = s->residual + row * s->width, *x = s->x + row * s->width;
        norm(down, l->post_feedforward_layernorm, m->hidden, m->eps, down);
        for (long i = 0; i < m->hidden; i += LANES) store(residual + i, load(residual + i) + load(down + i));
        correct(s, l, row, residual);
        const float *active = s->streams + (row * m->inputs + m->active) * s->width;
        for (long i = 0; i < m->hidden; i += LANES)
            store(x + i, l->correct_output_scale ? load(active + i) * load(l->correct_output_scale + i) : load(active + i));
        lay_out_all(s, &gate, row, x, 0, s->width);
    }
    end_loop(place);
    products(place, gate.products, 1, rows);
    for EACH(place, row, rows) {
        float *gated = s->ple_gate + row * s->ple_width;
        const float *input = s->per_layer_inputs + row * s->inputs_width + call->layer_idx * s->ple_width;
        for (long i = 0; i < m->per_layer; i += LANES) store(gated + i, gelu(load(gated + i)) * load(input + i));
        lay_out_all(s, &projection, row, gated, 0, s->ple_width);
    }
    end_loop(place);
    products(place, projection.products, 1, rows);
    for EACH(place, row, rows) {
        float *update = s->update + row * s->width, *streams = s->streams + row * m->inputs * s->width;
        norm(update, l->post_per_layer_input_norm, m->hidden, m->eps, update);
        for (int a = 1; a < m->inputs; a++)
            for (long i = 0; i < m->hidden; i += LANES)
                store(streams + a * s->width + i, load(streams + a * s->width + i) + load(update + i));
    }
    end_loop(place);
}

// ---- Both ends ----

// From embeddings [T, D] to streams and PLE inputs.
static void start_region(Place *place, void *argument) {
    const Call *call = argument;
    Step *s = call->step;
    const Model *m = &s->model;
    const int rows = s->rows, others = m->inputs - 1;
    Fan fan = {0};
    for (int i = 0; i < others; i++)
        add_product(s, &fan, 0, &m->altup_projections[i], s->streams + (i + 1) * s->width, m->inputs * s->width);
    add_product(s, &fan, 0, &m->per_layer_model_projection, s->projected, s->projected_width);
    for EACH(place, row, rows) {
        float *first = s->streams + row * m->inputs * s->width;
        memcpy(first, call->embeddings + row * m->hidden, m->hidden * sizeof *first);
        lay_out_all(s, &fan, row, first, 0, s->width);
    }
    end_loop(place);
    products(place, fan.products, fan.count, rows);
    const float scale = 1.0f / sqrtf((float)m->hidden), half = 0.70710678118654752f;
    for EACH(place, item, rows * (others + m->layers)) {
        long row = item / (others + m->layers), part = item % (others + m->layers);
        float *first = s->streams + row * m->inputs * s->width;
        if (part < others) {
            rescale(first + (part + 1) * s->width, first, m->hidden);
            continue;
        }
        long idx = part - others, size = m->per_layer;
        const float *projected = s->projected + row * s->projected_width + idx * size;
        const float *table = call->per_layer_rows + (row * m->layers + idx) * size;
        float *input = s->per_layer_inputs + row * s->inputs_width + idx * s->ple_width;
        for (long i = 0; i < size; i++) input[i] = projected[i] * scale;
        norm(input, m->per_layer_projection_norm, size, m->eps, input);
        for (long i = 0; i < size; i++) input[i] = (input[i] + table[i]) * half;
    }
    end_loop(place);
}

// From streams to soft-capped logits [T, V].
static void logits_region(Place *place, void *argument) {
    const Call *call = argument;
    Step *s = call->step;
    const Model *m = &s->model;
    const int rows = s->rows, others = m->inputs - 1;
    for (int i = 0; i < others; i++) {
        Fan back = {0};
        add_product(s, &back, 0, &m->altup_unembed_projections[i], s->predictions + (i + 1) * s->width, m->inputs * s->width);
        for EACH(place, row, rows)
            lay_out_all(s, &back, row, s->streams + (row * m->inputs + i + 1) * s->width, 0, s->width);
        end_loop(place);
        products(place, back.products, 1, rows);
    }
    Fan head = {0};
    add_product(s, &head, 0, &m->head, call->logits, m->head.rows);
    for EACH(place, row, rows) {
        const float *first = s->streams + row * m->inputs * s->width;
        float *x = s->x + row * s->width, *back = s->predictions + row * m->inputs * s->width;
        memcpy(x, first, m->hidden * sizeof *x);
        for (int i = 1; i <= others; i++) {
            rescale(back + i * s->width, first, m->hidden);
            for (long j = 0; j < m->hidden; j += LANES) store(x + j, load(x + j) + load(back + i * s->width + j));
        }
        for (long j = 0; j < m->hidden; j += LANES) store(x + j, load(x + j) / (float)m->inputs);
        norm(x, m->norm, m->hidden, m->eps, x);
        lay_out_all(s, &head, row, x, 0, s->width);
    }
    end_loop(place);
    products(place, head.products, 1, rows);
    if (m->softcap == 0) return;
    long entries = (long)rows * m->head.rows, chunks = (entries + 4095) / 4096;
    for EACH(place, item, chunks) {
        float *at = call->logits + item * 4096, rest[LANES];
        long count = at_most(4096, entries - item * 4096), i = 0;
        for (; i + LANES <= count; i += LANES) store(at + i, hyperbolic_tangent(load(at + i) / m->softcap) * m->softcap);
        memset(rest, 0, sizeof rest);
        memcpy(rest, at + i, (count - i) * sizeof *at);
        store(rest, hyperbolic_tangent(load(rest) / m->softcap) * m->softcap);
        memcpy(at + i, rest, (count - i) * sizeof *at);
    }
    end_loop(place);
}

#endif
