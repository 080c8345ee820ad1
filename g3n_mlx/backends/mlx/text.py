"""Gemma 3n's language model: AltUp, LAuReL, per-layer embeddings (PLE), KV sharing, activation sparsity.

Attribute names are the checkpoint's. One sequence a call: activations are [T, D], the AltUp streams [T, A, D].
Arithmetic follows transformers, modeling_gemma3n.py; AltUp is arXiv:2301.13310, LAuReL arXiv:2411.07501, MatFormer
arXiv:2310.07707. float32 islands (norms, the router's tanh, softmax, the soft cap) are explicit or inside the kernel.
A layer comes in two halves, before and after attention, because the keys and values of one serve others and a
decode step starts on the first half of layer 0 before its token is known.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np
from mlx import nn

from g3n_mlx.backends.mlx.cache import Cache
from g3n_mlx.backends.mlx.layers import linear
from g3n_mlx.backends.mlx.weights import Weights, from_numpy
from g3n_mlx.config.text import SLIDING, TextConfig

Wanted = Literal["all", "last", "none"]
Rope = dict[str, tuple[mx.array, mx.array]]  # first position and periods, for each kind of attention


class Halfway(NamedTuple):
    """What a layer has computed when its attention is about to look at keys and values."""

    predictions: mx.array  # [T, A, D]
    laurel: mx.array  # [T, D]
    queries: mx.array  # [1, N, T, H]
    keys: mx.array | None = None  # [1, K, T, H]; None in a layer that shares another's
    values: mx.array | None = None

    def parts(self) -> tuple[mx.array, ...]:
        """The arrays there are, in order."""
        return tuple(part for part in self if part is not None)

    def last_row(self) -> "Halfway":
        """The same for the last position alone; keys and values are stored by then."""
        return Halfway(self.predictions[-1:], self.laurel[-1:], self.queries[:, :, -1:])


class Ahead(NamedTuple):
    """The part of a forward pass that needs neither the PLE rows of its tokens nor the cache's contents."""

    projected: mx.array  # [T, L, P], the embedding's part of the per-layer inputs
    halfway: Halfway  # of layer 0
    rope: Rope


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 inside; without `weights` there is no weight."""

    def __init__(self, weights: Weights | None, eps: float, scale: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight = None if weights is None else weights.tensor() * scale

    def __call__(self, x: mx.array) -> mx.array:
        """Any shape, kept."""
        return mx.fast.rms_norm(x, self.weight, self.eps)


class LaurelBlock(nn.Module):
    """Learned augmented residual layer: x + norm(right(left(x)))."""

    def __init__(self, config: TextConfig, weights: Weights) -> None:
        super().__init__()
        self.linear_left = linear(weights.at("linear_left"))
        self.linear_right = linear(weights.at("linear_right"))
        self.post_laurel_norm = RMSNorm(weights.at("post_laurel_norm"), config.rms_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        """[T, D] -> [T, D]."""
        return x + self.post_laurel_norm(self.linear_right(self.linear_left(x)))


class MLP(nn.Module):
    """Gated FFN; in sparse layers the gate keeps what lies above mean + cutoff * std of its row."""

    def __init__(self, config: TextConfig, layer_idx: int, weights: Weights) -> None:
        super().__init__()
        self.gate_proj = linear(weights.at("gate_proj"))
        self.up_proj = linear(weights.at("up_proj"))
        self.down_proj = linear(weights.at("down_proj"))
        # In the weights' dtype, as the reference has it.
        cutoff = config.sparsity_cutoff(layer_idx)
        self.cutoff = None if cutoff is None else mx.array(cutoff, dtype=weights.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        """[T, D] -> [T, D]."""
        gate = self.gate_proj(x)  # [T, F]
        if self.cutoff is not None:
            gate = gaussian_topk(gate, self.cutoff)
        return self.down_proj(nn.gelu_approx(gate) * self.up_proj(x))


def gaussian_topk(gate: mx.array, cutoff: mx.array) -> mx.array:
    """relu(gate - (mean + cutoff * std)) by row, with the biased std."""
    mean = mx.mean(gate, axis=-1, keepdims=True)
    std = mx.std(gate, axis=-1, keepdims=True)
    return mx.maximum(gate - (mean + std * cutoff), 0)


class AltUp(nn.Module):
    """Alternating updates: predicts every stream from all of them, corrects them by what the layer made of one."""

    def __init__(self, config: TextConfig, weights: Weights) -> None:
        super().__init__()
        self.num_inputs, self.active_idx = config.altup_num_inputs, config.altup_active_idx
        self.modality_router = linear(weights.at("modality_router"))
        self.prediction_coefs = linear(weights.at("prediction_coefs"))
        self.correction_coefs = linear(weights.at("correction_coefs"))
        # The router's input scale 1 / D is folded into the norm's weight.
        self.router_norm = RMSNorm(weights.at("router_norm"), config.rms_norm_eps, scale=1.0 / config.hidden_size)
        self.correct_output_scale = weights.tensor("correct_output_scale") if config.altup_correct_scale else None

    def modalities(self, x: mx.array) -> mx.array:
        """Router outputs [T, A]."""
        return mx.tanh(self.modality_router(self.router_norm(x)).astype(mx.float32)).astype(x.dtype)

    def predict(self, streams: mx.array) -> mx.array:
        """[T, A, D] -> [T, A, D]: every stream plus a mix of all, coefficients from the active one."""
        coefs = self.prediction_coefs(self.modalities(streams[:, self.active_idx]))
        coefs = coefs.reshape(-1, self.num_inputs, self.num_inputs)  # [T, A, A]
        return mixed(streams, coefs)

    def correct(self, predictions: mx.array, activated: mx.array) -> mx.array:
        """Adds the innovation [T, D], what the layer made beyond the prediction, to every stream [T, A, D]."""
        coefs = self.correction_coefs(self.modalities(activated)) + 1.0  # [T, A]
        innovation = activated - predictions[:, self.active_idx]
        return predictions + coefs[..., None] * innovation[:, None]

    def scaled(self, x: mx.array) -> mx.array:
        """The corrected active stream [T, D] as the per-layer gate reads it."""
        return x if self.correct_output_scale is None else x * self.correct_output_scale


def mixed(streams: mx.array, coefs: mx.array) -> mx.array:
    """streams + coefs @ streams over the A axis: [T, A, D], [T, A, A] -> [T, A, D]."""
    return mx.addmm(streams, coefs, streams)


class Attention(nn.Module):
    """Grouped-query attention with norms on queries, keys and values, scale 1 and no soft cap."""

    def __init__(self, config: TextConfig, layer_idx: int, weights: Weights) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.owns_keys = layer_idx < config.first_kv_shared_layer
        self.kind = config.layer_types[layer_idx]
        self.window = config.sliding_window if self.kind == SLIDING else None
        self.q_proj = linear(weights.at("q_proj"))
        self.q_norm = RMSNorm(weights.at("q_norm"), config.rms_norm_eps)
        self.o_proj = linear(weights.at("o_proj"))
        if self.owns_keys:
            self.k_proj = linear(weights.at("k_proj"))
            self.v_proj = linear(weights.at("v_proj"))
            self.k_norm = RMSNorm(weights.at("k_norm"), config.rms_norm_eps)
            self.v_norm = RMSNorm(None, config.rms_norm_eps)

    def queries(self, x: mx.array, rope: Rope) -> mx.array:
        """[T, D] -> [1, N, T, H]."""
        q = self.q_norm(self.q_proj(x).reshape(x.shape[0], -1, self.head_dim))  # [T, N, H]
        return rotated(q.swapaxes(0, 1)[None], rope[self.kind])

    def keys_values(self, x: mx.array, rope: Rope) -> tuple[mx.array, mx.array]:
        """[T, D] -> two of [1, K, T, H]."""
        k = self.k_norm(self.k_proj(x).reshape(x.shape[0], -1, self.head_dim))  # [T, K, H]
        v = self.v_norm(self.v_proj(x).reshape(x.shape[0], -1, self.head_dim))
        return rotated(k.swapaxes(0, 1)[None], rope[self.kind]), v.swapaxes(0, 1)[None]

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Queries of the last T of the S positions that keys and values cover -> [T, N * H]."""
        _, num_heads, rows, head_dim = queries.shape
        mask = None
        if rows > 1:
            mask = visible(rows, keys.shape[2], self.window)
        elif self.window is not None:
            keys, values = keys[:, :, -self.window :], values[:, :, -self.window :]
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask)
        return out[0].swapaxes(0, 1).reshape(rows, num_heads * head_dim)


def visible(rows: int, cached: int, window: int | None) -> mx.array | str:
    """Mask [T, S] of what the last T of S positions see: themselves and what came before, within the window."""
    if window is None or cached <= window:
        return "causal"
    key = mx.arange(cached)
    query = mx.arange(cached - rows, cached)[:, None]
    return (key <= query) & (key > query - window)


def rotated(x: mx.array, rope: tuple[mx.array, mx.array]) -> mx.array:
    """RoPE on [1, N, T, H], the first half of H paired with the second."""
    offset, periods = rope
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=offset, freqs=periods)


class DecoderLayer(nn.Module):
    """One layer: AltUp predict, attention beside LAuReL, FFN, AltUp correct, per-layer input."""

    def __init__(self, config: TextConfig, layer_idx: int, weights: Weights) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        self.active_idx = config.altup_active_idx
        self.altup = AltUp(config, weights.at("altup"))
        self.laurel = LaurelBlock(config, weights.at("laurel"))
        self.self_attn = Attention(config, layer_idx, weights.at("self_attn"))
        self.mlp = MLP(config, layer_idx, weights.at("mlp"))
        self.input_layernorm = RMSNorm(weights.at("input_layernorm"), eps)
        self.post_attention_layernorm = RMSNorm(weights.at("post_attention_layernorm"), eps)
        self.pre_feedforward_layernorm = RMSNorm(weights.at("pre_feedforward_layernorm"), eps)
        self.post_feedforward_layernorm = RMSNorm(weights.at("post_feedforward_layernorm"), eps)
        self.per_layer_input_gate = linear(weights.at("per_layer_input_gate"))
        self.per_layer_projection = linear(weights.at("per_layer_projection"))
        self.post_per_layer_input_norm = RMSNorm(weights.at("post_per_layer_input_norm"), eps)
        # 0 for stream 0 and 1 for the others: the PLE result goes to streams 1.. whatever the active one is.
        self._others = mx.array([[0.0]] + [[1.0]] * (config.altup_num_inputs - 1), dtype=weights.dtype)

    def before_attention(self, streams: mx.array, rope: Rope) -> Halfway:
        """From the streams [T, A, D] to queries, keys and values."""
        predictions = self.altup.predict(streams)
        x = self.input_layernorm(predictions[:, self.active_idx])
        keys, values = self.self_attn.keys_values(x, rope) if self.self_attn.owns_keys else (None, None)
        return Halfway(predictions, self.laurel(x), self.self_attn.queries(x, rope), keys, values)

    def after_attention(
        self, attended: mx.array, predictions: mx.array, laurel: mx.array, per_layer_input: mx.array
    ) -> mx.array:
        """From the attended values [T, N * H] and the layer's PLE input [T, P] to the streams [T, A, D]."""
        attention = self.post_attention_layernorm(self.self_attn.o_proj(attended))
        active = predictions[:, self.active_idx]
        x = (active + attention + laurel) * (1 / math.sqrt(2))
        activated = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        streams = self.altup.correct(predictions, activated)
        gate = self.per_layer_input_gate(self.altup.scaled(streams[:, self.active_idx]))
        gated = nn.gelu_approx(gate) * per_layer_input
        update = self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return streams + update[:, None] * self._others


class LanguageModel(nn.Module):
    """From embeddings to logits; the PLE table stays on disk."""

    def __init__(self, config: TextConfig, weights: Weights) -> None:
        super().__init__()
        self.config = config
        self._dtype = weights.dtype
        # The head, tied to the token embeddings [V, D].
        self.embed_tokens = linear(weights.at("embed_tokens"))
        self.layers = [
            DecoderLayer(config, layer_idx, weights.at(f"layers.{layer_idx}"))
            for layer_idx in range(config.num_hidden_layers)
        ]
        self.embed_tokens_per_layer = weights.at("embed_tokens_per_layer").rows()
        self.per_layer_model_projection = linear(weights.at("per_layer_model_projection"))
        self.per_layer_projection_norm = RMSNorm(weights.at("per_layer_projection_norm"), config.rms_norm_eps)
        others = range(config.altup_num_inputs - 1)
        self.altup_projections = [linear(weights.at(f"altup_projections.{i}")) for i in others]
        self.altup_unembed_projections = [linear(weights.at(f"altup_unembed_projections.{i}")) for i in others]
        self.norm = RMSNorm(weights.at("norm"), config.rms_norm_eps)
        # mx.fast.rope takes the periods, not the frequencies.
        self._periods = {kind: mx.array(1.0 / values) for kind, values in config.rope_frequencies().items()}
        # Rounded to the weights' dtype, as the reference has it: sqrt(2048) is 45.25 in bfloat16.
        self._embedding_scale = mx.array(math.sqrt(config.hidden_size), dtype=self._dtype)
        self._per_layer_scale = mx.array(math.sqrt(config.hidden_size_per_layer_input), dtype=self._dtype)
        # What repeats a token is compiled: decode is held back by the count of operations, not only by bandwidth.
        self._steps = [self.layer_step(layer_idx) for layer_idx in range(config.num_hidden_layers)]
        self._compiled_steps = [mx.compile(step) for step in self._steps]
        self._compiled_start = mx.compile(self.start)
        self._compiled_finish = mx.compile(self.finish)

    def embed(self, ids: mx.array) -> mx.array:
        """Scaled token embeddings, [T] -> [T, D]."""
        return self.embed_tokens.embed(ids) * self._embedding_scale

    def per_layer_rows(self, token_ids: np.ndarray) -> mx.array:
        """Scaled rows of the PLE table, [T] -> [T, L, P]; row 0 for ids beyond the table."""
        rows = np.where(token_ids < self.config.vocab_size_per_layer_input, token_ids, 0)
        table = from_numpy(self.embed_tokens_per_layer.gather(rows)).astype(self._dtype)
        return (table * self._per_layer_scale).reshape(len(token_ids), self.config.num_hidden_layers, -1)

    def ahead(self, embeddings: mx.array, offset: int) -> Ahead:
        """Starts a forward pass over [T, D] embeddings at a position."""
        start = self._compiled_start if embeddings.shape[0] == 1 else self.start
        rope = self.rope(offset, embeddings.shape[0])
        projected, *halfway = start(embeddings, rope)
        return Ahead(projected, Halfway(*halfway), rope)

    def start(self, embeddings: mx.array, rope: Rope) -> tuple[mx.array, ...]:
        """The embeddings' part of the PLE inputs [T, L, P] and layer 0's first half."""
        projected = self.per_layer_model_projection(embeddings) * self.config.hidden_size**-0.5
        projected = projected.reshape(embeddings.shape[0], self.config.num_hidden_layers, -1)  # [T, L, P]
        halfway = self.layers[0].before_attention(self.expanded(embeddings), rope)
        return self.per_layer_projection_norm(projected), *halfway.parts()

    def layer_step(self, layer_idx: int) -> Callable[..., tuple[mx.array, ...]]:
        """From one layer's attended values to the next one's attention, or behind the last layer to the streams."""
        layer, following = self.layers[layer_idx], self.layers[layer_idx + 1 : layer_idx + 2]

        def step(
            attended: mx.array, predictions: mx.array, laurel: mx.array, per_layer_inputs: mx.array, rope: Rope
        ) -> tuple[mx.array, ...]:
            streams = layer.after_attention(attended, predictions, laurel, per_layer_inputs[:, layer_idx])
            return following[0].before_attention(streams, rope).parts() if following else (streams,)

        return step

    def finish(self, streams: mx.array) -> mx.array:
        """Final hidden states [T, D] from the streams [T, A, D]."""
        return self.norm(self.merged(streams))

    def __call__(self, ahead: Ahead, token_ids: np.ndarray, cache: Cache, wanted: Wanted) -> mx.array | None:
        """Finishes a forward pass and appends to the cache -> the wanted rows of the final hidden states [T, D].

        The layers behind the last owner of keys and values leave nothing in the cache. So unless all rows are wanted
        they, and that owner once its keys are stored, run for the last row alone, or not at all.
        """
        owners, last_owner = self.config.kv_owners, self.config.first_kv_shared_layer - 1
        per_layer_inputs = (ahead.projected + self.per_layer_rows(token_ids)) * (1 / math.sqrt(2))
        halfway, rope = ahead.halfway, ahead.rope
        shared: dict[int, tuple[mx.array, mx.array]] = {}
        parts = halfway.parts()
        for layer_idx, layer in enumerate(self.layers):
            if layer_idx <= last_owner:
                assert halfway.keys is not None
                assert halfway.values is not None
                shared[layer_idx] = cache.layers[layer_idx].update(halfway.keys, halfway.values)
            if layer_idx == last_owner and wanted == "none":
                return None
            if layer_idx == last_owner and wanted == "last":
                rope = self.rope(cache.offset - 1, 1)
                halfway, per_layer_inputs = halfway.last_row(), per_layer_inputs[-1:]
            attended = layer.self_attn.attend(halfway.queries, *shared[owners[layer_idx]])
            step = (self._compiled_steps if attended.shape[0] == 1 else self._steps)[layer_idx]
            parts = step(attended, halfway.predictions, halfway.laurel, per_layer_inputs, rope)
            if layer_idx < self.config.num_hidden_layers - 1:
                halfway = Halfway(*parts)
        return (self._compiled_finish if parts[0].shape[0] == 1 else self.finish)(parts[0])

    def expanded(self, embeddings: mx.array) -> mx.array:
        """The AltUp streams [T, A, D] of embeddings [T, D]: themselves and their projections, of equal magnitude."""
        projections = [projection(embeddings) for projection in self.altup_projections]
        return mx.stack([embeddings, *(rescaled(x, embeddings) for x in projections)], axis=1)

    def merged(self, streams: mx.array) -> mx.array:
        """The mean [T, D] of the streams [T, A, D] after their projections back, all of stream 0's magnitude."""
        first = streams[:, 0]
        back = [projection(streams[:, i + 1]) for i, projection in enumerate(self.altup_unembed_projections)]
        return mx.stack([first, *(rescaled(x, first) for x in back)]).mean(axis=0)

    def logits(self, hidden: mx.array) -> mx.array:
        """Soft-capped logits in float32: [T, D] -> [T, V]."""
        logits = self.embed_tokens(hidden).astype(mx.float32)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else mx.tanh(logits / cap) * cap

    def rope(self, offset: int, rows: int) -> Rope:
        """The position `offset`, from which the kernel counts on, and the periods of each kind of attention."""
        position = mx.array(offset)
        return {kind: (position, periods) for kind, periods in self._periods.items()}


def rescaled(x: mx.array, target: mx.array) -> mx.array:
    """x with the root mean square of the target, both [T, D]; the floor is the reference's."""
    magnitude = mx.sqrt(mx.square(target).mean(-1, keepdims=True))
    return x * magnitude / mx.sqrt(mx.maximum(mx.square(x).mean(-1, keepdims=True), 1e-5))
