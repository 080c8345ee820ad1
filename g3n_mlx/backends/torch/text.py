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

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from g3n_mlx.backends.torch.cache import Cache
from g3n_mlx.backends.torch.layers import gives_rows, linear, padded
from g3n_mlx.backends.torch.weights import Weights, from_numpy
from g3n_mlx.config.text import SLIDING, TextConfig

Wanted = Literal["all", "last", "none"]
Rope = dict[str, tuple[Tensor, Tensor]]  # cos and sin of the positions, for each kind of attention


class Halfway(NamedTuple):
    """What a layer has computed when its attention is about to look at keys and values."""

    predictions: Tensor  # [T, A, D]
    laurel: Tensor  # [T, D]
    queries: Tensor  # [1, N, T, H]
    keys: Tensor | None = None  # [1, K, T, H]; None in a layer that shares another's
    values: Tensor | None = None

    def parts(self) -> tuple[Tensor, ...]:
        """The arrays there are, in order."""
        return tuple(part for part in self if part is not None)

    def last_row(self) -> "Halfway":
        """The same for the last position alone; keys and values are stored by then."""
        return Halfway(self.predictions[-1:], self.laurel[-1:], self.queries[:, :, -1:])


class Ahead(NamedTuple):
    """The part of a forward pass that needs neither the PLE rows of its tokens nor the cache's contents."""

    projected: Tensor  # [T, L, P], the embedding's part of the per-layer inputs
    halfway: Halfway  # of layer 0
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
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class LaurelBlock(nn.Module):
    """Learned augmented residual layer: x + norm(right(left(x)))."""

    def __init__(self, config: TextConfig, weights: Weights) -> None:
        super().__init__()
        self.linear_left = linear(weights.at("linear_left"))
        self.linear_right = linear(weights.at("linear_right"))
        self.post_laurel_norm = RMSNorm(weights.at("post_laurel_norm"), config.rms_norm_eps)

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
        gate = self.gate_proj(x)  # [T, F]
        if self.cutoff is not None:
            gate = gaussian_topk(gate, self.cutoff)
        return self.down_proj(F.gelu(gate, approximate="tanh") * self.up_proj(x))


def gaussian_topk(gate: Tensor, cutoff: Tensor) -> Tensor:
    """relu(gate - (mean + cutoff * std)) by row, with the biased std."""
    std, mean = torch.std_mean(gate, dim=-1, keepdim=True, correction=0)
    return F.relu(gate - (mean + std * cutoff))


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
        """Adds the innovation [T, D], what the layer made beyond the prediction, to every stream [T, A, D]."""
        coefs = self.correction_coefs(self.modalities(activated)) + 1.0  # [T, A]
        innovation = activated - predictions[:, self.active_idx]
        return torch.addcmul(predictions, coefs[..., None], innovation[:, None])

    def scaled(self, x: Tensor) -> Tensor:
        """The corrected active stream [T, D] as the per-layer gate reads it."""
        return x if self.correct_output_scale is None else x * self.correct_output_scale


def mixed(streams: Tensor, coefs: Tensor) -> Tensor:
    """streams + coefs @ streams over the A axis: [T, A, D], [T, A, A] -> [T, A, D]."""
    more = padded(streams, dim=0)
    return torch.baddbmm(more, padded(coefs, dim=0), more)[: streams.shape[0]]


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

    def queries(self, x: Tensor, rope: Rope) -> Tensor:
        """[T, D] -> [1, N, T, H]."""
        q = self.q_norm(self.q_proj(x).view(x.shape[0], -1, self.head_dim))  # [T, N, H]
        return rotated(q, rope[self.kind]).transpose(0, 1)[None]

    def keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """[T, D] -> two of [1, K, T, H]."""
        k = self.k_norm(self.k_proj(x).view(x.shape[0], -1, self.head_dim))  # [T, K, H]
        v = self.v_norm(self.v_proj(x).view(x.shape[0], -1, self.head_dim))
        return rotated(k, rope[self.kind]).transpose(0, 1)[None], v.transpose(0, 1)[None]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries of the last T of the S positions that keys and values cover -> [T, N * H]."""
        _, num_heads, rows, head_dim = queries.shape
        if rows == 1:
            if self.window is not None:
                keys, values = keys[:, :, -self.window :], values[:, :, -self.window :]
            # The heads that share keys and values attend as rows of one query: no copy of keys for each.
            grouped = queries.view(1, keys.shape[1], -1, head_dim)
            return F.scaled_dot_product_attention(grouped, keys, values, scale=1.0).view(1, num_heads * head_dim)
        mask = visible(rows, keys.shape[2], self.window, queries.device)
        out = F.scaled_dot_product_attention(queries, keys, values, mask, scale=1.0, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(rows, num_heads * head_dim)


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

    def before_attention(self, streams: Tensor, rope: Rope) -> Halfway:
        """From the streams [T, A, D] to queries, keys and values."""
        predictions = self.altup.predict(streams)
        x = self.input_layernorm(predictions[:, self.active_idx])
        keys, values = self.self_attn.keys_values(x, rope) if self.self_attn.owns_keys else (None, None)
        return Halfway(predictions, self.laurel(x), self.self_attn.queries(x, rope), keys, values)

    def after_attention(self, attended: Tensor, predictions: Tensor, laurel: Tensor, per_layer_input: Tensor) -> Tensor:
        """From the attended values [T, N * H] and the layer's PLE input [T, P] to the streams [T, A, D]."""
        attention = self.post_attention_layernorm(self.self_attn.o_proj(attended))
        active = predictions[:, self.active_idx]
        x = (active + attention + laurel) * (1 / math.sqrt(2))
        activated = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        streams = self.altup.correct(predictions, activated)
        gate = self.per_layer_input_gate(self.altup.scaled(streams[:, self.active_idx]))
        gated = F.gelu(gate, approximate="tanh") * per_layer_input
        update = self.post_per_layer_input_norm(self.per_layer_projection(gated))
        # To streams 1.. whatever the active one is; not in place, which autograd would refuse.
        return torch.cat([streams[:, :1], streams[:, 1:] + update[:, None]], dim=1)


class LanguageModel(nn.Module):
    """From embeddings to logits; the PLE table stays on disk."""

    def __init__(self, config: TextConfig, weights: Weights) -> None:
        super().__init__()
        self.config = config
        self.dtype, self.device = weights.dtype, weights.device
        # The head, tied to the token embeddings [V, D].
        self.embed_tokens = linear(weights.at("embed_tokens"))
        self.embedding_rows = None if gives_rows(self.embed_tokens) else weights.at("embed_tokens").rows()
        self.layers: list[DecoderLayer] = nn.ModuleList(  # pyright: ignore[reportAttributeAccessIssue]
            DecoderLayer(config, layer_idx, weights.at(f"layers.{layer_idx}"))
            for layer_idx in range(config.num_hidden_layers)
        )
        self.embed_tokens_per_layer = weights.at("embed_tokens_per_layer").rows()
        self.per_layer_model_projection = linear(weights.at("per_layer_model_projection"))
        self.per_layer_projection_norm = RMSNorm(weights.at("per_layer_projection_norm"), config.rms_norm_eps)
        others = range(config.altup_num_inputs - 1)
        self.altup_projections = nn.ModuleList(linear(weights.at(f"altup_projections.{i}")) for i in others)
        self.altup_unembed_projections = nn.ModuleList(
            linear(weights.at(f"altup_unembed_projections.{i}")) for i in others
        )
        self.norm = RMSNorm(weights.at("norm"), config.rms_norm_eps)
        self.inverse_frequencies = {
            kind: from_numpy(frequencies).to(self.device) for kind, frequencies in config.rope_frequencies().items()
        }
        self.steps = [self.layer_step(layer_idx) for layer_idx in range(config.num_hidden_layers)]
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

    def ahead(self, embeddings: Tensor, offset: int) -> Ahead:
        """Starts a forward pass over [T, D] embeddings at a position."""
        rope = self.rope(offset, embeddings.shape[0])
        projected, *halfway = self.start(embeddings, rope)
        return Ahead(projected, Halfway(*halfway), rope)

    def start(self, embeddings: Tensor, rope: Rope) -> tuple[Tensor, ...]:
        """The embeddings' part of the PLE inputs [T, L, P] and layer 0's first half."""
        projected = self.per_layer_model_projection(embeddings) * self.config.hidden_size**-0.5
        projected = projected.view(embeddings.shape[0], self.config.num_hidden_layers, -1)  # [T, L, P]
        halfway = self.layers[0].before_attention(self.expanded(embeddings), rope)
        return self.per_layer_projection_norm(projected), *halfway.parts()

    def layer_step(self, layer_idx: int) -> Callable[..., tuple[Tensor, ...]]:
        """From one layer's attended values to the next one's attention, or behind the last layer to the streams."""
        layer, following = self.layers[layer_idx], self.layers[layer_idx + 1 : layer_idx + 2]

        def step(
            attended: Tensor, predictions: Tensor, laurel: Tensor, per_layer_inputs: Tensor, rope: Rope
        ) -> tuple[Tensor, ...]:
            streams = layer.after_attention(attended, predictions, laurel, per_layer_inputs[:, layer_idx])
            return following[0].before_attention(streams, rope).parts() if following else (streams,)

        return step

    def finish(self, streams: Tensor) -> Tensor:
        """Final hidden states [T, D] from the streams [T, A, D]."""
        return self.norm(self.merged(streams))

    def forward(self, ahead: Ahead, token_ids: np.ndarray, cache: Cache, wanted: Wanted) -> Tensor | None:
        """Finishes a forward pass and appends to the cache -> the wanted rows of the final hidden states [T, D].

        The layers behind the last owner of keys and values leave nothing in the cache. So unless all rows are wanted
        they, and that owner once its keys are stored, run for the last row alone, or not at all.
        """
        owners, last_owner = self.config.kv_owners, self.config.first_kv_shared_layer - 1
        per_layer_inputs = (ahead.projected + self.per_layer_rows(token_ids)) * (1 / math.sqrt(2))
        halfway, rope = ahead.halfway, ahead.rope
        shared: dict[int, tuple[Tensor, Tensor]] = {}
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
            parts = self.steps[layer_idx](attended, halfway.predictions, halfway.laurel, per_layer_inputs, rope)
            if layer_idx < self.config.num_hidden_layers - 1:
                halfway = Halfway(*parts)
        return self.finish(parts[0])

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

    def rope(self, offset: int, rows: int) -> Rope:
        """cos and sin [T, 1, H] of the positions from `offset` on, for each kind of attention."""
        positions = torch.arange(offset, offset + rows, device=self.device, dtype=torch.float32)
        tables = {}
        for kind, frequencies in self.inverse_frequencies.items():
            angles = (positions[:, None] * frequencies).repeat(1, 2)[:, None]
            # Cast as the reference casts them.
            tables[kind] = (angles.cos().to(self.dtype), angles.sin().to(self.dtype))
        return tables


def rescaled(x: Tensor, target: Tensor) -> Tensor:
    """x with the root mean square of the target, both [T, D]; the floor is the reference's."""
    magnitude = torch.sqrt(target.square().mean(-1, keepdim=True))
    return x * magnitude / torch.sqrt(x.square().mean(-1, keepdim=True).clamp(min=1e-5))
