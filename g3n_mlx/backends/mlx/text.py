"""Gemma 3n's language model: AltUp, LAuReL, per-layer embeddings (PLE), KV sharing, activation sparsity.

Attribute names are the checkpoint's. Rows of several sequences stand flat behind each other:
activations are [T, D], the AltUp streams [T, A, D]; attention alone sees where a sequence ends.
Arithmetic follows transformers, modeling_gemma3n.py; AltUp is arXiv:2301.13310, LAuReL arXiv:2411.07501, MatFormer
arXiv:2310.07707. float32 islands (norms, the router's tanh, softmax, the soft cap) are explicit or inside the kernel.
Where implementations disagree, the line that decides says so.
"""

import math
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx import nn

from g3n_mlx.backends.mlx.layers import fused, linear, plain_linear, sliceable, stacked
from g3n_mlx.backends.mlx.weights import Weights, evaluated, from_numpy
from g3n_mlx.config.text import SLIDING, TextConfig
from g3n_mlx.rows import Batch, Context

Rope = dict[str, tuple[mx.array, mx.array]]  # positions [T] and periods [H / 2], for each kind of attention


class Start(NamedTuple):
    """The beginning of a forward pass: what needs neither the ids of its tokens nor the caches."""

    streams: mx.array  # [T, A, D]
    projected: mx.array  # [T, L, P], the embeddings' part of the PLE inputs
    rope: Rope


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 inside; without `weights` there is no weight."""

    def __init__(self, weights: Weights | None, eps: float, scale: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight = None if weights is None else evaluated(weights.tensor() * scale)

    def __call__(self, x: mx.array) -> mx.array:
        """Any shape, kept."""
        return mx.fast.rms_norm(x, self.weight, self.eps)


def norm(weights: Weights, eps: float, scale: float = 1.0) -> RMSNorm:
    """The norm with a weight, which a slice shares."""
    return weights.shared() or RMSNorm(weights, eps, scale)


class LaurelBlock(nn.Module):
    """Learned augmented residual layer: x + norm(right(left(x)))."""

    def __init__(self, config: TextConfig, weights: Weights) -> None:
        super().__init__()
        self.linear_left = linear(weights.at("linear_left"))
        self.linear_right = linear(weights.at("linear_right"))
        self.post_laurel_norm = norm(weights.at("post_laurel_norm"), config.rms_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        """[T, D] -> [T, D]."""
        return x + self.added(x)

    def added(self, x: mx.array) -> mx.array:
        """What is added to x, [T, D] -> [T, D]."""
        return self.post_laurel_norm(self.linear_right(self.linear_left(x)))


class MLP(nn.Module):
    """Gated FFN; in sparse layers the gate keeps what lies above mean + cutoff * std of its row."""

    def __init__(self, config: TextConfig, layer_idx: int, weights: Weights) -> None:
        super().__init__()
        self.gate_proj = linear(weights.at("gate_proj"))
        self.up_proj = linear(weights.at("up_proj"))
        self.down_proj = linear(weights.at("down_proj"))
        # Both of one row in one product; a slice with fewer units has views of its own.
        whole = weights.at("gate_up_proj").shared(("gate_proj", "up_proj"))
        self.gate_up_proj = stacked([self.gate_proj, self.up_proj], whole)
        # In the weights' dtype, as the reference has it.
        cutoff = config.sparsity_cutoff(layer_idx)
        self.cutoff = None if cutoff is None else mx.array(cutoff, dtype=weights.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        """[T, D] -> [T, D]."""
        if x.shape[0] == 1 and self.gate_up_proj is not None:
            # As rows: halves of one row would keep its stride, and down_proj would copy what becomes of them.
            gate, up = mx.split(self.gate_up_proj(x).reshape(2, -1), 2)  # [1, F]
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        if self.cutoff is not None:
            gate = gaussian_topk(gate, self.cutoff)
        return self.down_proj(gated_by(gate, up))

    def make_sliceable(self) -> None:
        """Brings the weights into forms of which a slice takes views."""
        self.gate_proj, self.up_proj = sliceable(self.gate_proj, True), sliceable(self.up_proj, True)
        self.down_proj = sliceable(self.down_proj, False)


@fused
def gated_by(gate: mx.array, x: mx.array) -> mx.array:
    """gelu(gate) * x."""
    return nn.gelu_approx(gate) * x


@fused
def gaussian_topk(gate: mx.array, cutoff: mx.array) -> mx.array:
    """relu(gate - (mean + cutoff * std)) by row, with the biased std."""
    mean = mx.mean(gate, axis=-1, keepdims=True)
    std = mx.std(gate, axis=-1, keepdims=True)
    return mx.maximum(gate - (mean + std * cutoff), 0)


class AltUp(nn.Module):
    """Alternating updates: predicts every stream from all of them, corrects them by what the layer made of one.

    Coefficients are not clipped to `altup_coef_clip`: transformers does that in training alone, and its inference is
    the reference; gemma (JAX) and mlx-lm clip always.
    """

    def __init__(self, config: TextConfig, weights: Weights) -> None:
        super().__init__()
        self.num_inputs, self.active_idx = config.altup_num_inputs, config.altup_active_idx
        self.modality_router = linear(weights.at("modality_router"))
        self.prediction_coefs = linear(weights.at("prediction_coefs"))
        self.correction_coefs = linear(weights.at("correction_coefs"))
        # The router's input scale 1 / D is folded into the norm's weight.
        self.router_norm = norm(weights.at("router_norm"), config.rms_norm_eps, scale=1.0 / config.hidden_size)
        self.correct_output_scale = weights.tensor("correct_output_scale") if config.altup_correct_scale else None

    def modalities(self, x: mx.array) -> mx.array:
        """Router outputs [T, A]."""
        return mx.tanh(self.modality_router(self.router_norm(x)).astype(mx.float32)).astype(x.dtype)

    def predict(self, streams: mx.array) -> mx.array:
        """[T, A, D] -> [T, A, D]: every stream plus a mix of all, coefficients from the active one."""
        coefs = self.prediction_coefs(self.modalities(stream(streams, self.active_idx)))
        coefs = coefs.reshape(-1, self.num_inputs, self.num_inputs)  # [T, A, A]
        return mixed(streams, coefs)

    def correct(self, predictions: mx.array, activated: mx.array) -> mx.array:
        """Adds the innovation [T, D], what the layer made beyond the prediction, to every stream [T, A, D].

        The router reads the layer's output, not the active stream.
        """
        coefs = self.correction_coefs(self.modalities(activated))[..., None]  # [T, A, 1]
        active = predictions[:, self.active_idx : self.active_idx + 1]  # [T, 1, D]
        return corrected(predictions, active, activated[:, None], coefs)

    def scaled(self, x: mx.array) -> mx.array:
        """The corrected active stream [T, D] as the per-layer gate reads it."""
        return x if self.correct_output_scale is None else x * self.correct_output_scale


@fused
def corrected(predictions: mx.array, active: mx.array, activated: mx.array, coefs: mx.array) -> mx.array:
    """predictions + (coefs + 1) * (activated - active): [T, A, D], two of [T, 1, D], [T, A, 1] -> [T, A, D]."""
    if mx.default_device().type == mx.gpu or predictions.shape[0] == 1:
        # Of one shape throughout, or MLX makes several kernels of it.
        activated, active, _ = mx.broadcast_arrays(activated, active, predictions)
    return predictions + (coefs + 1.0) * (activated - active)


def stream(streams: mx.array, index: int) -> mx.array:
    """One of the streams [T, A, D], as [T, D].

    Of one row, MLX's products would copy a view that keeps the row's stride of A * D. So the row is left out of it.
    """
    return streams[0, index : index + 1] if streams.shape[0] == 1 else streams[:, index]


def mixed(streams: mx.array, coefs: mx.array) -> mx.array:
    """streams + coefs @ streams over the A axis: [T, A, D], [T, A, A] -> [T, A, D]."""
    return mx.addmm(streams, coefs, streams)


class Attention(nn.Module):
    """Grouped-query attention with norms on queries, keys and values, scale 1 and no soft cap.

    The last `num_kv_shared_layers` layers read the keys and values of another one, and turn their queries by the same
    positions as that layer did: not by the cache's offset, which has moved on by then.
    """

    def __init__(self, config: TextConfig, layer_idx: int, weights: Weights) -> None:
        super().__init__()
        self.layer_idx, self.owner_idx = layer_idx, config.kv_owners[layer_idx]
        self.head_dim, self.num_kv_heads = config.head_dim, config.num_key_value_heads
        self.kind = config.layer_types[layer_idx]
        self.window = config.sliding_window if self.kind == SLIDING else None
        self.q_proj = linear(weights.at("q_proj"))
        self.q_norm = norm(weights.at("q_norm"), config.rms_norm_eps)
        self.o_proj = linear(weights.at("o_proj"))
        if self.owner_idx == layer_idx:
            self.k_proj = linear(weights.at("k_proj"))
            self.v_proj = linear(weights.at("v_proj"))
            self.k_norm = norm(weights.at("k_norm"), config.rms_norm_eps)
            self.v_norm = RMSNorm(None, config.rms_norm_eps)
            whole = weights.at("qkv_proj").shared(("q_proj", "k_proj", "v_proj"))
            self.qkv_proj = stacked([self.q_proj, self.k_proj, self.v_proj], whole)
            queries, keys, heads = self.q_norm.weight, self.k_norm.weight, config.num_key_value_heads
            assert queries is not None
            assert keys is not None
            scales = [queries] * config.num_attention_heads + [keys] * heads + [mx.ones_like(keys)] * heads
            self._norms = evaluated(mx.stack(scales)[:, None])  # [N + 2 K, 1, H]: of queries, keys and values

    def __call__(self, x: mx.array, rope: Rope, context: Context) -> mx.array:
        """[T, D] -> [T, D]; new keys and values go into the sequences' caches."""
        queries = self.queries(x, rope)
        if self.owner_idx == self.layer_idx and not context.holds(self.layer_idx):
            self.store(x, rope, context)
        return self.o_proj(self.attend(queries, context))

    def decode_inputs(self, x: mx.array, rope: Rope) -> tuple[mx.array, ...]:
        """Queries [T, N, 1, H] and, in a layer that owns them, keys and values [T, K, 1, H], of [T, D]."""
        if self.owner_idx != self.layer_idx:
            return (self.queries(x, rope),)
        if self.qkv_proj is None:
            return self.queries(x, rope), *self.keys_values(x, rope)
        heads = self.qkv_proj(x).reshape(x.shape[0], -1, 1, self.head_dim)  # [T, N + 2 K, 1, H]
        # The norm rounds before it multiplies by a weight, so that the product here is the same.
        normed = self.v_norm(heads) * self._norms
        keys = self.num_kv_heads
        turned = rotated(normed[:, :-keys], rope[self.kind])
        return turned[:, :-keys], turned[:, -keys:], normed[:, -keys:]

    def queries(self, x: mx.array, rope: Rope) -> mx.array:
        """[T, D] -> [T, N, 1, H]."""
        return rotated(self.q_norm(self.q_proj(x).reshape(x.shape[0], -1, 1, self.head_dim)), rope[self.kind])

    def store(self, x: mx.array, rope: Rope, context: Context) -> None:
        """Appends the keys and values of [T, D]."""
        keys, values = self.keys_values(x, rope)
        context.store(self.layer_idx, by_sequence(keys, context), by_sequence(values, context))

    def keys_values(self, x: mx.array, rope: Rope) -> tuple[mx.array, mx.array]:
        """[T, D] -> two of [T, K, 1, H]."""
        keys = rotated(self.k_norm(self.k_proj(x).reshape(x.shape[0], -1, 1, self.head_dim)), rope[self.kind])
        return keys, self.v_norm(self.v_proj(x).reshape(x.shape[0], -1, 1, self.head_dim))

    def attend(self, queries: mx.array, context: Context) -> mx.array:
        """Queries [T, N, 1, H] over the keys and values of their sequences -> [T, N * H]."""
        parts = [self.attend_one(heads_first(queries, a, b), k, v) for a, b, k, v in context.sequences(self.owner_idx)]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def attend_one(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Queries [1, N, T, H] of the last T of the S positions of keys and values [1, K, S, H] -> [T, N * H]."""
        _, num_heads, rows, head_dim = queries.shape
        mask = None
        if rows > 1:
            mask = visible(rows, keys.shape[2], self.window)
        elif self.window is not None and keys.shape[2] > self.window:
            keys, values = keys[:, :, -self.window :], values[:, :, -self.window :]
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask)  # [1, N, T, H]
        if rows == 1:
            return out.reshape(1, num_heads * head_dim)
        return out.squeeze(0).swapaxes(0, 1).reshape(rows, num_heads * head_dim)


def by_sequence(x: mx.array, context: Context) -> list[mx.array]:
    """Keys or values [T, K, 1, H] as [1, K, n, H] for each sequence."""
    return [heads_first(x, start, stop) for start, stop in context.spans]


def heads_first(x: mx.array, start: int, stop: int) -> mx.array:
    """Rows [start, stop) of [T, N, 1, H] as [1, N, n, H]; one row alone is so already."""
    rows = x if stop - start == x.shape[0] else x[start:stop]
    return rows if stop - start == 1 else rows.squeeze(2).swapaxes(0, 1)[None]


def visible(rows: int, cached: int, window: int | None) -> mx.array | str:
    """Mask [T, S] of what the last T of S positions see: themselves and what came before, within the window."""
    if window is None or cached <= window:
        return "causal"
    key = mx.arange(cached)
    query = mx.arange(cached - rows, cached)[:, None]
    return (key <= query) & (key > query - window)


def rotated(x: mx.array, rope: tuple[mx.array, mx.array]) -> mx.array:
    """RoPE on [T, N, 1, H], the first half of H paired with the second."""
    positions, periods = rope
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=positions, freqs=periods)


class DecoderLayer(nn.Module):
    """One layer: AltUp predict, attention beside LAuReL, FFN, AltUp correct, per-layer input."""

    def __init__(self, config: TextConfig, layer_idx: int, weights: Weights) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        self.active_idx = config.altup_active_idx
        self.altup = weights.at("altup").shared() or AltUp(config, weights.at("altup"))
        self.laurel = weights.at("laurel").shared() or LaurelBlock(config, weights.at("laurel"))
        self.self_attn = Attention(config, layer_idx, weights.at("self_attn"))
        self.mlp = MLP(config, layer_idx, weights.at("mlp"))
        self.input_layernorm = norm(weights.at("input_layernorm"), eps)
        self.post_attention_layernorm = norm(weights.at("post_attention_layernorm"), eps)
        self.pre_feedforward_layernorm = norm(weights.at("pre_feedforward_layernorm"), eps)
        self.post_feedforward_layernorm = norm(weights.at("post_feedforward_layernorm"), eps)
        self.per_layer_input_gate = linear(weights.at("per_layer_input_gate"))
        self.per_layer_projection = linear(weights.at("per_layer_projection"))
        self.post_per_layer_input_norm = norm(weights.at("post_per_layer_input_norm"), eps)
        # 0 for stream 0 and 1 for the others: the PLE result goes to streams 1.. whatever the active one is.
        self._others = mx.array([[0.0]] + [[1.0]] * (config.altup_num_inputs - 1), dtype=weights.dtype)

    def __call__(self, streams: mx.array, per_layer_input: mx.array, rope: Rope, context: Context) -> mx.array:
        """Streams [T, A, D] and the layer's PLE input [T, P] -> streams [T, A, D]."""
        predictions = self.altup.predict(streams)
        active = stream(predictions, self.active_idx)  # [T, D]
        x = self.input_layernorm(active)
        attended = self.post_attention_layernorm(self.self_attn(x, rope, context))
        x = (active + attended + self.laurel(x)) * (1 / math.sqrt(2))
        activated = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return self.updated(self.altup.correct(predictions, activated), per_layer_input)

    def updated(self, streams: mx.array, per_layer_input: mx.array) -> mx.array:
        """The corrected streams [T, A, D] after the per-layer input [T, P], gated by the active one."""
        gate = self.per_layer_input_gate(self.altup.scaled(stream(streams, self.active_idx)))  # [T, P]
        gated = gated_by(gate, per_layer_input)
        update = self.post_per_layer_input_norm(self.per_layer_projection(gated))  # [T, D]
        return updated(streams, update[:, None], self._others)

    def store_keys_values(self, streams: mx.array, rope: Rope, context: Context) -> None:
        """Appends the keys and values of streams [T, A, D], and goes no further."""
        x = self.input_layernorm(stream(self.altup.predict(streams), self.active_idx))
        self.self_attn.store(x, rope, context)


@fused
def updated(streams: mx.array, update: mx.array, others: mx.array) -> mx.array:
    """streams + update * others: [T, A, D], [T, 1, D], [A, 1] -> [T, A, D]."""
    return streams + update * others


class LanguageModel(nn.Module):
    """From embeddings to logits; the PLE table stays on disk."""

    def __init__(self, config: TextConfig, weights: Weights) -> None:
        super().__init__()
        self.config = config
        self._dtype = weights.dtype
        # The head, tied to the token embeddings [V, D].
        self.embed_tokens = plain_linear(weights.at("embed_tokens"))
        self.layers = [
            DecoderLayer(config, layer_idx, weights.at(f"layers.{layer_idx}"))
            for layer_idx in range(config.num_hidden_layers)
        ]
        self.embed_tokens_per_layer = weights.at("embed_tokens_per_layer").rows()
        self.per_layer_model_projection = linear(weights.at("per_layer_model_projection"))
        self.per_layer_projection_norm = norm(weights.at("per_layer_projection_norm"), config.rms_norm_eps)
        others = range(config.altup_num_inputs - 1)
        self.altup_projections = [linear(weights.at(f"altup_projections.{i}")) for i in others]
        self.altup_unembed_projections = [linear(weights.at(f"altup_unembed_projections.{i}")) for i in others]
        self.norm = norm(weights.at("norm"), config.rms_norm_eps)
        # mx.fast.rope takes the periods, not the frequencies.
        self._periods = {kind: mx.array(1.0 / values) for kind, values in config.rope_frequencies().items()}
        # Rounded to the weights' dtype, as the reference has it: sqrt(2048) is 45.25 in bfloat16.
        self._embedding_scale = mx.array(math.sqrt(config.hidden_size), dtype=self._dtype)
        self._per_layer_scale = mx.array(math.sqrt(config.hidden_size_per_layer_input), dtype=self._dtype)

    def embed(self, ids: mx.array) -> mx.array:
        """Scaled token embeddings, [T] -> [T, D]."""
        return self.embed_tokens.embed(ids) * self._embedding_scale

    def per_layer_rows(self, token_ids: np.ndarray) -> mx.array:
        """Scaled rows of the PLE table, [T] -> [T, L, P]; row 0 for ids beyond the table."""
        return self.scaled_rows(from_numpy(self.table_rows(token_ids)))

    def table_rows(self, token_ids: np.ndarray) -> np.ndarray:
        """Rows of the PLE table, [T] -> float32 [T, L * P]; row 0 for ids beyond the table."""
        return self.embed_tokens_per_layer.gather(
            np.where(token_ids < self.config.vocab_size_per_layer_input, token_ids, 0)
        )

    def scaled_rows(self, table_rows: mx.array) -> mx.array:
        """float32 [T, L * P] -> [T, L, P]."""
        rows = table_rows.astype(self._dtype) * self._per_layer_scale
        return rows.reshape(rows.shape[0], self.config.num_hidden_layers, -1)

    def start(self, embeddings: mx.array, positions: np.ndarray) -> Start:
        """What a forward pass over [T, D] embeddings at some positions needs no other row and no token id for."""
        return Start(self.expanded(embeddings), self.projected(embeddings), self.rope(positions))

    def __call__(self, start: Start, batch: Batch) -> mx.array | None:
        """Finishes a forward pass -> the final hidden states [R, D] of the rows that are kept, None where R is 0.

        The layers behind the last owner of keys and values leave nothing in the caches. So they, and that owner once
        its keys and values are stored, run for the kept rows alone.
        """
        streams, projected, rope = start
        per_layer_inputs = (projected + self.per_layer_rows(batch.token_ids())) * (1 / math.sqrt(2))  # [T, L, P]
        context, kept_rows = Context(batch.caches, batch.counts), batch.kept_rows()
        for layer_idx, layer in enumerate(self.layers):
            if layer_idx == self.config.first_kv_shared_layer - 1 and kept_rows is not None:
                layer.store_keys_values(streams, rope, context)
                if not len(kept_rows):
                    return None
                kept = mx.array(kept_rows)
                streams, per_layer_inputs = streams[kept], per_layer_inputs[kept]
                rope, context = self.rope(batch.positions[kept_rows]), context.narrowed(batch.kept)
            streams = layer(streams, per_layer_inputs[:, layer_idx], rope, context)
        return self.norm(self.merged(streams))

    def projected(self, embeddings: mx.array) -> mx.array:
        """The part of the PLE inputs [T, L, P] that comes from the embeddings [T, D]."""
        projected = self.per_layer_model_projection(embeddings) * self.config.hidden_size**-0.5
        return self.per_layer_projection_norm(projected.reshape(embeddings.shape[0], self.config.num_hidden_layers, -1))

    def expanded(self, embeddings: mx.array) -> mx.array:
        """The AltUp streams [T, A, D] of embeddings [T, D]: themselves and their projections, of equal magnitude."""
        projections = [projection(embeddings) for projection in self.altup_projections]
        return mx.stack([embeddings, *(rescaled(x, embeddings) for x in projections)], axis=1)

    def merged(self, streams: mx.array) -> mx.array:
        """The mean [T, D] of the streams [T, A, D] after their projections back, all of stream 0's magnitude."""
        first = stream(streams, 0)
        back = [projection(stream(streams, i + 1)) for i, projection in enumerate(self.altup_unembed_projections)]
        return mx.stack([first, *(rescaled(x, first) for x in back)]).mean(axis=0)

    def logits(self, hidden: mx.array) -> mx.array:
        """Soft-capped logits in float32: [T, D] -> [T, V]."""
        logits = self.embed_tokens(hidden).astype(mx.float32)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else mx.tanh(logits / cap) * cap

    def rope(self, positions: np.ndarray) -> Rope:
        """The positions [T] and the periods of each kind of attention."""
        on_device = mx.array(positions)
        return {kind: (on_device, periods) for kind, periods in self._periods.items()}


def rescaled(x: mx.array, target: mx.array) -> mx.array:
    """x with the root mean square of the target, both [T, D].

    The floor is transformers': 1e-5 under the root. gemma (JAX) has 1e-12 after it; mlx-lm's does nothing.
    """
    magnitude = mx.sqrt(mx.square(target).mean(-1, keepdims=True))
    return x * magnitude / mx.sqrt(mx.maximum(mx.square(x).mean(-1, keepdims=True), 1e-5))
