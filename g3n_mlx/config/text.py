"""The language model's part of config.json, checked once and frozen.

Fields are named as in the file and have no defaults: a missing key is an error, never a guess.
Source of the semantics: transformers, configuration_gemma3n.py.
"""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from g3n_mlx.config.fields import MAX_LAYERS, Fields, shown
from g3n_mlx.failures import BadValue

SLIDING = "sliding_attention"
FULL = "full_attention"
# AltUp's inputs, each with a matrix of its own at both ends; Gemma 3n has 4.
_MAX_STREAMS = 64


@dataclass(frozen=True, slots=True)
class TextConfig:
    """Shape of the language model; tuples hold one entry per layer."""

    vocab_size: int
    vocab_size_per_layer_input: int  # rows of the PLE table; ids from here on use row 0
    hidden_size: int
    hidden_size_per_layer_input: int  # width of one layer's PLE input
    num_hidden_layers: int
    num_kv_shared_layers: int  # the last ones: they read another layer's keys and values
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: tuple[int, ...]
    activation_sparsity_pattern: tuple[float, ...]  # share of FFN units the Gaussian top-k closes
    layer_types: tuple[str, ...]
    sliding_window: int  # tokens a sliding layer sees, its own included
    max_position_embeddings: int  # context limit in tokens
    rope_theta: float  # full attention
    rope_local_base_freq: float  # sliding attention
    rms_norm_eps: float
    final_logit_softcapping: float | None
    laurel_rank: int
    altup_num_inputs: int
    altup_active_idx: int
    altup_correct_scale: bool

    @property
    def first_kv_shared_layer(self) -> int:
        """Index of the first layer without keys and values of its own; the layer count if all own."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    @property
    def kv_owners(self) -> tuple[int, ...]:
        """Per layer, the layer whose keys and values it attends to: itself, or the last owner of its type.

        Source: transformers, configuration_gemma3n.py, `kv_sharing_modes`.
        """
        last: dict[str, int] = {}
        owners = []
        for layer_idx, kind in enumerate(self.layer_types):
            if layer_idx < self.first_kv_shared_layer:
                last[kind] = layer_idx
            owners.append(last[kind])
        return tuple(owners)

    def rope_frequencies(self) -> dict[str, np.ndarray]:
        """Radians a position turns each pair of dimensions by, float32 [head_dim / 2], for each kind of attention."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        bases = {FULL: self.rope_theta, SLIDING: self.rope_local_base_freq}
        return {kind: np.float32(1.0) / np.float32(base) ** exponents for kind, base in bases.items()}

    def sparsity_cutoff(self, layer_idx: int) -> float | None:
        """Standard deviations above its mean that a gate must reach to stay open; None in dense layers.

        The quantile of the normal distribution: 1.6449 at a sparsity of 0.95.
        """
        sparsity = self.activation_sparsity_pattern[layer_idx]
        return NormalDist().inv_cdf(sparsity) if sparsity > 0 else None

    @staticmethod
    def from_dict(raw: Any, where: str = "config.json") -> "TextConfig":
        """Takes the `text_config` of a published config.json; raises ValueError naming the key that does not fit."""
        values = Fields(raw, where)
        layers = values.integer("num_hidden_layers", at_least=1, at_most=MAX_LAYERS)
        _require_supported(raw, where)
        no_softcap = values.get("final_logit_softcapping") is None
        config = TextConfig(
            vocab_size=values.integer("vocab_size", at_least=1),
            vocab_size_per_layer_input=values.integer("vocab_size_per_layer_input", at_least=1),
            hidden_size=values.integer("hidden_size", at_least=1),
            hidden_size_per_layer_input=values.integer("hidden_size_per_layer_input", at_least=1),
            num_hidden_layers=layers,
            num_kv_shared_layers=values.integer("num_kv_shared_layers"),
            num_attention_heads=values.integer("num_attention_heads", at_least=1),
            num_key_value_heads=values.integer("num_key_value_heads", at_least=1),
            head_dim=values.integer("head_dim", at_least=2),
            intermediate_size=values.per_layer("intermediate_size", layers, int),
            activation_sparsity_pattern=values.per_layer("activation_sparsity_pattern", layers, float),
            # MatFormer Lab leaves the list of the larger model; the reference reads its beginning too.
            layer_types=values.per_layer("layer_types", layers, str, longer=True),
            sliding_window=values.integer("sliding_window", at_least=1),
            max_position_embeddings=values.integer("max_position_embeddings", at_least=1),
            rope_theta=values.positive("rope_theta"),
            rope_local_base_freq=values.positive("rope_local_base_freq"),
            rms_norm_eps=values.positive("rms_norm_eps", at_most=1),
            final_logit_softcapping=None if no_softcap else values.positive("final_logit_softcapping"),
            laurel_rank=values.integer("laurel_rank", at_least=1),
            altup_num_inputs=values.integer("altup_num_inputs", at_least=1, at_most=_MAX_STREAMS),
            altup_active_idx=values.integer("altup_active_idx"),
            altup_correct_scale=values.boolean("altup_correct_scale"),
        )
        _check_text(config, where)
        return config


def _require_supported(raw: dict[str, Any], where: str) -> None:
    """The constants that the model code relies on."""
    expected = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "rope_scaling": None}
    for key, value in expected.items():
        if key in raw and raw[key] != value:
            raise BadValue(f"{where}: {key} is {shown(raw[key])}, only {value!r} is supported")


def _check_text(config: TextConfig, where: str) -> None:
    unknown = set(config.layer_types) - {SLIDING, FULL}
    if unknown:
        raise BadValue(f"{where}: layer_types has {shown(sorted(unknown))}, expected {SLIDING!r} or {FULL!r}")
    if config.num_kv_shared_layers >= config.num_hidden_layers:
        raise BadValue(
            f"{where}: num_kv_shared_layers is {config.num_kv_shared_layers}, "
            f"expected less than num_hidden_layers ({config.num_hidden_layers})"
        )
    owned = set(config.layer_types[: config.first_kv_shared_layer])
    orphans = set(config.layer_types) - owned
    if orphans:
        raise BadValue(f"{where}: layers of type {sorted(orphans)} share keys and values that no layer owns")
    if config.sliding_window > config.max_position_embeddings:
        raise BadValue(
            f"{where}: sliding_window is {config.sliding_window}, "
            f"expected at most max_position_embeddings ({config.max_position_embeddings})"
        )
    if config.head_dim % 2:
        raise BadValue(f"{where}: head_dim is {config.head_dim}, expected an even number: RoPE turns pairs")
    if config.num_attention_heads % config.num_key_value_heads:
        raise BadValue(
            f"{where}: num_attention_heads ({config.num_attention_heads}) is not a multiple of "
            f"num_key_value_heads ({config.num_key_value_heads})"
        )
    if config.altup_active_idx >= config.altup_num_inputs:
        raise BadValue(f"{where}: altup_active_idx is {config.altup_active_idx}, of {config.altup_num_inputs} inputs")
    if not all(0.0 <= sparsity < 1.0 for sparsity in config.activation_sparsity_pattern):
        raise BadValue(f"{where}: activation_sparsity_pattern has values outside [0, 1)")
    if min(config.intermediate_size) < 1:
        raise BadValue(f"{where}: intermediate_size has values below 1")
