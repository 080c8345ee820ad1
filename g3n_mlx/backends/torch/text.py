"""Gemma 3n's language model: AltUp, LAuReL, per-layer embeddings (PLE), KV sharing, activation sparsity.

Attribute names are the checkpoint's. Rows of several sequences stand flat behind each other:
activations are [T, D], the AltUp streams [T, A, D]; attention alone sees where a sequence ends.
Arithmetic follows transformers, modeling_gemma3n.py; AltUp is arXiv:2301.13310, LAuReL arXiv:2411.07501, MatFormer
arXiv:2310.07707. float32 islands (norms, the router's tanh, softmax, the soft cap) are explicit or inside the kernel.
Where implementations disagree, the line that decides says so.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from g3n_mlx.backends.torch.kernels import attention, elementwise
from g3n_mlx.backends.torch.kernels.dense import dense_product_dtype, padded
from g3n_mlx.backends.torch.layers import gives_rows, linear, plain_linear, sliceable
from g3n_mlx.backends.torch.weights import Weights, from_numpy
from g3n_mlx.config.text import SLIDING, TextConfig
from g3n_mlx.rows import Batch, Context

Rope = dict[str, tuple[Tensor, Tensor]]  # cos and sin [T, 1, H] of the positions, for each kind of attention


class Start(NamedTuple):
    """The beginning of a forward pass: what needs neither the ids of its tokens nor the caches."""

    streams: Tensor  # [T, A, D]
    projected: Tensor  # [T, L, P], the embeddings' part of the PLE inputs
    rope: Rope


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 inside; without `weights` there is no weight."""

    def __init__(self, weights: Weights | None, eps: float, scale: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        weight = None if weights is None else weights.tensor() * scale
        self.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, kept."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        if elementwise.takes(x, weight):
            return elementwise.rms_norm(x, weight, self.eps)
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)


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

    def forward(self, x: Tensor) -> Tensor:
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
        self.cutoff = None if cutoff is None else torch.tensor(cutoff, dtype=weights.dtype, device=weights.device)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        gate, up = self.gate_proj(x), self.up_proj(x)  # [T, F]
        if elementwise.takes(gate, up):
            return self.down_proj(elementwise.gated(gate, up, self.cutoff))
        if self.cutoff is not None:
            gate = gaussian_topk(gate, self.cutoff)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)

    def make_sliceable(self) -> None:
        """Brings the weights into forms of which a slice takes views."""
        self.gate_proj, self.up_proj = sliceable(self.gate_proj, True), sliceable(self.up_proj, True)
        self.down_proj = sliceable(self.down_proj, False)


def gaussian_topk(gate: Tensor, cutoff: Tensor) -> Tensor:
    """relu(gate - (mean + cutoff * std)) by row, with the biased std."""
    std, mean = torch.std_mean(gate, dim=-1, keepdim=True, correction=0)
    return F.relu(gate - (mean + std * cutoff))


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
        scale = weights.tensor("correct_output_scale") if config.altup_correct_scale else None
        self.correct_output_scale = None if scale is None else nn.Parameter(scale, requires_grad=False)

    def modalities(self, x: Tensor) -> Tensor:
        """Router outputs [T, A]."""
        return torch.tanh(self.modality_router(self.router_norm(x)).float()).to(x.dtype)

    def predict(self, streams: Tensor) -> Tensor:
        """[T, A, D] -> [T, A, D]: every stream plus a mix of all, coefficients from the active one."""
        coefs = self.prediction_coefs(self.modalities(streams[:, self.active_idx]))
        coefs = coefs.view(-1, self.num_inputs, self.num_inputs)  # [T, A, A]
        return mixed(streams, coefs)

    def correct(self, predictions: Tensor, activated: Tensor) -> Tensor:
        """Adds the innovation [T, D], what the layer made beyond the prediction, to every stream [T, A, D].

        The router reads the layer's output, not the active stream.
        """
        coefs = self.correction_coefs(self.modalities(activated)) + 1.0  # [T, A]
        innovation = activated - predictions[:, self.active_idx]
        return torch.addcmul(predictions, coefs[..., None], innovation[:, None])

    def scaled(self, x: Tensor) -> Tensor:
        """The corrected active stream [T, D] as the per-layer gate reads it."""
        return x if self.correct_output_scale is None else x * self.correct_output_scale


def mixed(streams: Tensor, coefs: Tensor) -> Tensor:
    """streams + coefs @ streams over the A axis: [T, A, D], [T, A, A] -> [T, A, D]."""
    dtype = dense_product_dtype(streams.dtype, streams.device.type)
    more = padded(streams.to(dtype), dim=0)
    return torch.baddbmm(more, padded(coefs.to(dtype), dim=0), more)[: streams.shape[0]].to(streams.dtype)


class Attention(nn.Module):
    """Grouped-query attention with norms on queries, keys and values, scale 1 and no soft cap.

    The last `num_kv_shared_layers` layers read the keys and values of another one, and turn their queries by the same
    positions as that layer did: not by the cache's offset, which has moved on by then.
    """

    def __init__(self, config: TextConfig, layer_idx: int, weights: Weights) -> None:
        super().__init__()
        self.layer_idx, self.owner_idx = layer_idx, config.kv_owners[layer_idx]
        self.head_dim = config.head_dim
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

    def forward(self, x: Tensor, rope: Rope, context: Context) -> Tensor:
        """[T, D] -> [T, D]; new keys and values go into the sequences' caches."""
        queries = self.queries(x, rope)
        if self.owner_idx == self.layer_idx and not context.holds(self.layer_idx):
            self.store(x, rope, context)
        return self.o_proj(self.attend(queries, context))

    def queries(self, x: Tensor, rope: Rope) -> Tensor:
        """[T, D] -> [T, N, H]."""
        return rotated(self.q_norm(self.q_proj(x).view(x.shape[0], -1, self.head_dim)), rope[self.kind])

    def store(self, x: Tensor, rope: Rope, context: Context) -> None:
        """Appends the keys and values of [T, D]."""
        keys, values = self.keys_values(x, rope)
        context.store(self.layer_idx, by_sequence(keys, context), by_sequence(values, context))

    def keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """[T, D] -> two of [T, K, H]."""
        keys = rotated(self.k_norm(self.k_proj(x).view(x.shape[0], -1, self.head_dim)), rope[self.kind])
        return keys, self.v_norm(self.v_proj(x).view(x.shape[0], -1, self.head_dim))

    def attend(self, queries: Tensor, context: Context) -> Tensor:
        """Queries [T, N, H] over the keys and values of their sequences -> [T, N * H]."""
        parts = [self.attend_one(heads_first(queries, a, b), k, v) for a, b, k, v in context.sequences(self.owner_idx)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def attend_one(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries [1, N, T, H] of the last T of the S positions of keys and values [1, K, S, H] -> [T, N * H]."""
        _, num_heads, rows, head_dim = queries.shape
        if rows == 1:
            if self.window is not None and keys.shape[2] > self.window:
                keys, values = keys[:, :, -self.window :], values[:, :, -self.window :]
            # The heads that share keys and values attend as rows of one query: no copy of keys for each.
            grouped = queries.view(1, keys.shape[1], -1, head_dim)
            return F.scaled_dot_product_attention(grouped, keys, values, scale=1.0).view(1, num_heads * head_dim)
        if attention.takes(queries, keys, values):
            return attention.attend(queries, keys, values, self.window)
        mask = visible(rows, keys.shape[2], self.window, queries.device)
        out = F.scaled_dot_product_attention(queries, keys, values, mask, scale=1.0, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(rows, num_heads * head_dim)


def by_sequence(x: Tensor, context: Context) -> list[Tensor]:
    """Keys or values [T, K, H] as [1, K, n, H] for each sequence."""
    return [heads_first(x, start, stop) for start, stop in context.spans]


def heads_first(x: Tensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of [T, N, H] as [1, N, n, H]."""
    rows = x if stop - start == x.shape[0] else x[start:stop]
    return rows.view(1, -1, 1, rows.shape[2]) if stop - start == 1 else rows.transpose(0, 1)[None]


def visible(rows: int, cached: int, window: int | None, device: torch.device) -> Tensor:
    """Mask [T, S] of what the last T of S positions see: themselves and what came before, within the window."""
    key = torch.arange(cached, device=device)
    query = torch.arange(cached - rows, cached, device=device)[:, None]
    return (key <= query) & (key > query - (cached if window is None else window))


def rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on [T, N, H], the first half of H paired with the second; cos and sin are [T, 1, H]."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([-second, first], dim=-1), sin)


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

    def forward(self, streams: Tensor, per_layer_input: Tensor, rope: Rope, context: Context) -> Tensor:
        """Streams [T, A, D] and the layer's PLE input [T, P] -> streams [T, A, D]."""
        predictions = self.altup.predict(streams)
        active = predictions[:, self.active_idx]  # [T, D]
        x = self.input_layernorm(active)
        attended = self.post_attention_layernorm(self.self_attn(x, rope, context))
        x = (active + attended + self.laurel(x)) * (1 / math.sqrt(2))
        activated = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return self.updated(self.altup.correct(predictions, activated), per_layer_input)

    def updated(self, streams: Tensor, per_layer_input: Tensor) -> Tensor:
        """The corrected streams [T, A, D] after the per-layer input [T, P], gated by the active one."""
        gate = self.per_layer_input_gate(self.altup.scaled(streams[:, self.active_idx]))  # [T, P]
        gated = F.gelu(gate, approximate="tanh") * per_layer_input
        update = self.post_per_layer_input_norm(self.per_layer_projection(gated))  # [T, D]
        # To streams 1.. whatever the active one is; not in place, which autograd would refuse.
        return torch.cat([streams[:, :1], streams[:, 1:] + update[:, None]], dim=1)

    def store_keys_values(self, streams: Tensor, rope: Rope, context: Context) -> None:
        """Appends the keys and values of streams [T, A, D], and goes no further."""
        x = self.input_layernorm(self.altup.predict(streams)[:, self.active_idx])
        self.self_attn.store(x, rope, context)


class LanguageModel(nn.Module):
    """From embeddings to logits; the PLE table stays on disk."""

    def __init__(self, config: TextConfig, weights: Weights) -> None:
        super().__init__()
        self.config = config
        self.dtype, self.device = weights.dtype, weights.device
        # The head, tied to the token embeddings [V, D].
        self.embed_tokens = plain_linear(weights.at("embed_tokens"))
        self.embedding_rows = None if gives_rows(self.embed_tokens) else weights.at("embed_tokens").rows()
        self.layers: list[DecoderLayer] = nn.ModuleList(  # pyright: ignore[reportAttributeAccessIssue]
            DecoderLayer(config, layer_idx, weights.at(f"layers.{layer_idx}"))
            for layer_idx in range(config.num_hidden_layers)
        )
        self.embed_tokens_per_layer = weights.at("embed_tokens_per_layer").rows()
        self.per_layer_model_projection = linear(weights.at("per_layer_model_projection"))
        self.per_layer_projection_norm = norm(weights.at("per_layer_projection_norm"), config.rms_norm_eps)
        others = range(config.altup_num_inputs - 1)
        self.altup_projections = nn.ModuleList(linear(weights.at(f"altup_projections.{i}")) for i in others)
        self.altup_unembed_projections = nn.ModuleList(
            linear(weights.at(f"altup_unembed_projections.{i}")) for i in others
        )
        self.norm = norm(weights.at("norm"), config.rms_norm_eps)
        self.inverse_frequencies = {
            kind: from_numpy(frequencies).to(self.device) for kind, frequencies in config.rope_frequencies().items()
        }
        # Rounded to the weights' dtype, as the reference has it: sqrt(2048) is 45.25 in bfloat16.
        self.embedding_scale = torch.tensor(math.sqrt(config.hidden_size), dtype=self.dtype, device=self.device)
        self.per_layer_scale = torch.tensor(
            math.sqrt(config.hidden_size_per_layer_input), dtype=self.dtype, device=self.device
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Scaled token embeddings, [T] -> [T, D]."""
        if self.embedding_rows is not None:
            return (
                from_numpy(self.embedding_rows.gather(ids.cpu().numpy())).to(self.device, self.dtype)
                * self.embedding_scale
            )
        return self.embed_tokens.embed(ids) * self.embedding_scale

    def per_layer_rows(self, token_ids: np.ndarray) -> Tensor:
        """Scaled rows of the PLE table, [T] -> [T, L, P]; row 0 for ids beyond the table."""
        rows = np.where(token_ids < self.config.vocab_size_per_layer_input, token_ids, 0)
        table = from_numpy(self.embed_tokens_per_layer.gather(rows)).to(self.device, self.dtype)
        return (table * self.per_layer_scale).view(len(token_ids), self.config.num_hidden_layers, -1)

    def start(self, embeddings: Tensor, positions: np.ndarray) -> Start:
        """What a forward pass over [T, D] embeddings at some positions needs no other row and no token id for."""
        return Start(self.expanded(embeddings), self.projected(embeddings), self.rope(positions))

    def forward(self, start: Start, batch: Batch) -> Tensor | None:
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
                kept = torch.from_numpy(kept_rows).to(self.device)
                streams, per_layer_inputs = streams[kept], per_layer_inputs[kept]
                rope, context = self.rope(batch.positions[kept_rows]), context.narrowed(batch.kept)
            streams = layer(streams, per_layer_inputs[:, layer_idx], rope, context)
        return self.norm(self.merged(streams))

    def projected(self, embeddings: Tensor) -> Tensor:
        """The part of the PLE inputs [T, L, P] that comes from the embeddings [T, D]."""
        projected = self.per_layer_model_projection(embeddings) * self.config.hidden_size**-0.5
        return self.per_layer_projection_norm(projected.view(embeddings.shape[0], self.config.num_hidden_layers, -1))

    def expanded(self, embeddings: Tensor) -> Tensor:
        """The AltUp streams [T, A, D] of embeddings [T, D]: themselves and their projections, of equal magnitude."""
        projections = [projection(embeddings) for projection in self.altup_projections]
        return torch.stack([embeddings, *(rescaled(x, embeddings) for x in projections)], dim=1)

    def merged(self, streams: Tensor) -> Tensor:
        """The mean [T, D] of the streams [T, A, D] after their projections back, all of stream 0's magnitude."""
        first = streams[:, 0]
        back = [projection(streams[:, i + 1]) for i, projection in enumerate(self.altup_unembed_projections)]
        return torch.stack([first, *(rescaled(x, first) for x in back)]).mean(dim=0)

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits in float32: [T, D] -> [T, V]."""
        logits = self.embed_tokens(hidden).float()
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def rope(self, positions: np.ndarray) -> Rope:
        """cos and sin [T, 1, H] of positions [T], for each kind of attention."""
        on_device = torch.from_numpy(positions).to(self.device, torch.float32)
        tables = {}
        for kind, frequencies in self.inverse_frequencies.items():
            angles = (on_device[:, None] * frequencies).repeat(1, 2)[:, None]
            # Cast as the reference casts them.
            tables[kind] = (angles.cos().to(self.dtype), angles.sin().to(self.dtype))
        return tables


def rescaled(x: Tensor, target: Tensor) -> Tensor:
    """x with the root mean square of the target, both [T, D].

    The floor is transformers': 1e-5 under the root. gemma (JAX) has 1e-12 after it; mlx-lm's does nothing.
    """
    magnitude = torch.sqrt(target.square().mean(-1, keepdim=True))
    return x * magnitude / torch.sqrt(x.square().mean(-1, keepdim=True).clamp(min=1e-5))
