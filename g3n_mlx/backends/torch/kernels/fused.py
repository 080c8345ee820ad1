"""The language model for a few rows at once, as calls of the kernels in C (g3n_mlx/kernels/src/layer.h).

A decode step in PyTorch is some 2,600 operations, most of them on a few kilobytes; here a layer is two calls, between
which its new keys and values go into the caches. `LanguageModel` stays the reference, layer by layer.
"""

import ctypes
import math
import weakref
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from g3n_mlx.backends.torch.kernels.stored import calls
from g3n_mlx.backends.torch.layers import AdaptedLinear, Linear, QuantizedLinear
from g3n_mlx.backends.torch.text import DecoderLayer, LanguageModel, by_sequence
from g3n_mlx.config.text import TextConfig
from g3n_mlx.kernels import library
from g3n_mlx.rows import Batch, Context

# Vectors of the widest instructions, 16 numbers, go over whole heads and over both their halves.
HEAD_MULTIPLE = 32
# Rows of activations are padded to whole blocks, and the weights that meet them number by number with them.
BLOCK = 256
# Columns of a block of down_proj's units.
UNIT_COLUMNS = 128


def fused_model(network: LanguageModel) -> "FusedModel | None":
    """The network as calls of the kernels; None where there are none or the kernels do not cover its weights."""
    config = network.config
    covered = (
        network.device.type == "cpu"
        and network.dtype in (torch.bfloat16, torch.float32)
        and library.library() is not None
        and config.head_dim % HEAD_MULTIPLE == 0
        and config.altup_num_inputs <= library.MAX_INPUTS
        and not any(isinstance(layer, AdaptedLinear) for layer in network.modules())
        and all(is_covered(layer) for layer in network.modules() if hasattr(layer, "embed") and layer is not network)
    )
    return FusedModel(network) if covered else None


def is_covered(layer: torch.nn.Module) -> bool:
    """Whether the kernels read a linear layer's weight."""
    if isinstance(layer, Linear):
        return layer.weight.stride(1) == 1
    return isinstance(layer, QuantizedLinear) and layer.kernel is not None


class FusedModel:
    """Appends batches of up to MAX_ROWS rows to their caches, as LanguageModel does."""

    def __init__(self, network: LanguageModel) -> None:
        self.network, self.config = network, network.config
        self.rounded = network.dtype == torch.bfloat16
        self.kept_alive: list[Tensor] = []  # what the structs point to
        self.calls = calls()
        self.layers = [self._layer(idx, layer) for idx, layer in enumerate(network.layers)]
        self.model = self._model()
        self._free: weakref.finalize | None = None

    @cached_property
    def step(self) -> int:
        """The kernels' room for a call: 22 MB at E4B's dimensions, taken at the first one."""
        step = self.calls.g3n_step_new(self.model)
        self._free = weakref.finalize(self, self.calls.g3n_step_free, step)
        return step

    @cached_property
    def new_keys_values(self) -> tuple[Tensor, Tensor]:
        """Where a layer's new keys and values come, twice [MAX_ROWS, K, H]."""
        return self._view(self.calls.g3n_step_keys(self.step)), self._view(self.calls.g3n_step_values(self.step))

    def takes(self, batch: Batch) -> bool:
        """Whether a batch has few enough rows."""
        return len(batch.positions) <= library.MAX_ROWS

    def __call__(self, embeddings: Tensor, batch: Batch) -> Tensor | None:
        """Embeddings [T, D] of a batch -> soft-capped logits [R, V] of the rows that are kept, None where R is 0."""
        found, config = calls(), self.config
        per_layer_rows = self.network.per_layer_rows(batch.token_ids()).float().contiguous()
        embeddings, positions = embeddings.float().contiguous(), np.ascontiguousarray(batch.positions, np.int32)
        found.g3n_start(
            self.step, embeddings.data_ptr(), per_layer_rows.data_ptr(), positions.ctypes.data, len(positions)
        )
        context, kept_rows = Context(batch.caches, batch.counts), batch.kept_rows()
        for layer_idx, layer in enumerate(self.layers):
            found.g3n_queries(self.step, layer)
            if layer_idx < config.first_kv_shared_layer:
                keys, values = (new[: len(positions)] for new in self.new_keys_values)
                context.store(layer_idx, by_sequence(keys, context), by_sequence(values, context))
            if layer_idx == config.first_kv_shared_layer - 1 and kept_rows is not None:
                if not len(kept_rows):
                    return None
                found.g3n_keep(self.step, kept_rows.ctypes.data, len(kept_rows))
                context = context.narrowed(batch.kept)
            views = sequences_of(context, config.kv_owners[layer_idx])
            found.g3n_layer(self.step, layer, layer_idx, views, len(views))
        rows = len(positions) if kept_rows is None else len(kept_rows)
        logits = torch.empty(rows, config.vocab_size)
        found.g3n_logits(self.step, logits.data_ptr())
        return logits

    def close(self) -> None:
        """Frees what the kernels hold; no call may follow."""
        if self._free is not None:
            self._free()

    def _view(self, address: int) -> Tensor:
        """The kernels' room for new keys or values, [MAX_ROWS, K, H]."""
        config = self.config
        shape = library.MAX_ROWS, config.num_key_value_heads, config.head_dim
        kind = ctypes.c_uint16 if self.rounded else ctypes.c_float
        array = np.ctypeslib.as_array((kind * math.prod(shape)).from_address(address)).reshape(shape)
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if self.rounded else torch.from_numpy(array)

    def _matrix(self, layer: torch.nn.Module) -> library.Matrix:
        if isinstance(layer, QuantizedLinear):
            assert layer.kernel is not None
            return layer.kernel.matrix
        assert isinstance(layer, Linear)
        weight = layer.weight
        self.kept_alive.append(weight)
        return library.Matrix(
            codes=weight.data_ptr(),
            code_stride=weight.stride(0) * weight.element_size(),
            rows=weight.shape[0],
            columns=weight.shape[1],
            bits=8 * weight.element_size(),
        )

    def _vector(self, x: Tensor) -> int:
        """The address of a vector in float32 with zeros up to whole blocks."""
        padded = torch.zeros(-(-len(x) // BLOCK) * BLOCK)
        padded[: len(x)] = x
        self.kept_alive.append(padded)
        return padded.data_ptr()

    def _layer(self, layer_idx: int, layer: DecoderLayer) -> library.Layer:
        attention, mlp, altup, laurel = layer.self_attn, layer.mlp, layer.altup, layer.laurel
        owns = attention.owner_idx == layer_idx
        linears = {
            "q_proj": attention.q_proj,
            "o_proj": attention.o_proj,
            "linear_left": laurel.linear_left,
            "linear_right": laurel.linear_right,
            "gate_proj": mlp.gate_proj,
            "up_proj": mlp.up_proj,
            "down_proj": mlp.down_proj,
            "modality_router": altup.modality_router,
            "prediction_coefs": altup.prediction_coefs,
            "correction_coefs": altup.correction_coefs,
            "per_layer_input_gate": layer.per_layer_input_gate,
            "per_layer_projection": layer.per_layer_projection,
        }
        norms = {
            "input_layernorm": layer.input_layernorm,
            "post_attention_layernorm": layer.post_attention_layernorm,
            "pre_feedforward_layernorm": layer.pre_feedforward_layernorm,
            "post_feedforward_layernorm": layer.post_feedforward_layernorm,
            "post_laurel_norm": laurel.post_laurel_norm,
            "router_norm": altup.router_norm,
            "post_per_layer_input_norm": layer.post_per_layer_input_norm,
            "q_norm": attention.q_norm,
        }
        if owns:
            linears |= {"k_proj": attention.k_proj, "v_proj": attention.v_proj}
            norms |= {"k_norm": attention.k_norm}
        scale = altup.correct_output_scale
        return library.Layer(
            **{name: self._matrix(linear) for name, linear in linears.items()},
            **{name: self._vector(norm.weight) for name, norm in norms.items() if norm.weight is not None},
            correct_output_scale=None if scale is None else self._vector(scale),
            units=self._units(mlp.down_proj) if mlp.cutoff is not None else library.Units(),
            cutoff=0.0 if mlp.cutoff is None else float(mlp.cutoff),
            sparse=mlp.cutoff is not None,
            window=attention.window or 0,
            rope=list(self.network.inverse_frequencies).index(attention.kind),
        )

    def _units(self, down_proj: torch.nn.Module) -> library.Units:
        """down_proj [D, F] of a sparse layer once more, unit by unit, if it has the form that the converter writes."""
        if (
            not isinstance(down_proj, QuantizedLinear)
            or down_proj.bits != 4
            or down_proj.scales.dtype != torch.bfloat16
        ):
            return library.Units()
        assert down_proj.kernel is not None
        if down_proj.kernel.out_features % UNIT_COLUMNS:
            return library.Units()
        units = down_proj.kernel.units()
        self.kept_alive += units
        return library.Units(*(x.data_ptr() for x in units))

    def _model(self) -> library.Model:
        network, config = self.network, self.config
        others = library.Matrix * (library.MAX_INPUTS - 1)
        frequencies = [self._vector(x) for x in network.inverse_frequencies.values()]
        assert network.per_layer_projection_norm.weight is not None
        assert network.norm.weight is not None
        return library.Model(
            altup_projections=others(*map(self._matrix, network.altup_projections)),
            altup_unembed_projections=others(*map(self._matrix, network.altup_unembed_projections)),
            per_layer_model_projection=self._matrix(network.per_layer_model_projection),
            head=self._matrix(network.embed_tokens),
            per_layer_projection_norm=self._vector(network.per_layer_projection_norm.weight),
            norm=self._vector(network.norm.weight),
            inverse_frequencies=(ctypes.c_void_p * 2)(*frequencies),
            **sizes_of(config),
            rounded=self.rounded,
            eps=config.rms_norm_eps,
            softcap=config.final_logit_softcapping or 0.0,
        )


def sizes_of(config: TextConfig) -> dict[str, int]:
    """The model's sizes by their names in src/g3n.h."""
    return {
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "inputs": config.altup_num_inputs,
        "active": config.altup_active_idx,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "per_layer": config.hidden_size_per_layer_input,
        "widest": max(config.intermediate_size),
    }


def sequences_of(context: Context, owner_idx: int) -> ctypes.Array[library.Sequence]:
    """What the rows of every sequence attend to in a layer."""
    found: Sequence[library.Sequence] = [
        library.Sequence(
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            key_head_stride=keys.stride(1),
            value_head_stride=values.stride(1),
            length=keys.shape[2],
            rows=end - first,
            first=first,
        )
        for first, end, keys, values in context.sequences(owner_idx)
    ]
    return (library.Sequence * len(found))(*found)
