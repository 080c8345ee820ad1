"""config.json and generation_config.json, made of a GGUF file's metadata and shapes.

Source of the keys: https://github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py and conversion/gemma.py.
"""

import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

from g3n_mlx.checkpoint.gguf import Header
from g3n_mlx.config.text import FULL, SLIDING
from g3n_mlx.failures import BadValue

ARCHITECTURE = "gemma3n"
# What llama.cpp has in its code for Gemma 3n and not in the file: llama-hparams.h, `rope_freq_base_train_swa`.
_SLIDING_ROPE_BASE = 10_000.0
# Published sampling, where the file does not say.
_TOP_K, _TOP_P = 64, 0.95


def check_architecture(path: Path, header: Header) -> None:
    """Raises ValueError unless the file is a whole text model of Gemma 3n."""
    kind = header.metadata.get("general.architecture")
    if kind == "clip":
        raise BadValue(f"{path} holds towers alone: give it as --mmproj, and the language model's file as --gguf")
    if kind != ARCHITECTURE:
        raise BadValue(f"{path}: the architecture is {kind!r}, expected {ARCHITECTURE!r}: other models are not read")
    parts = header.metadata.get("split.count", 0)
    if parts and parts != 1:
        raise BadValue(f"{path} is one of {parts} parts: join them with `llama-gguf-split --merge` first")


def text_config(path: Path, header: Header, ple_rows: int) -> dict[str, Any]:
    """The `text_config` of a file; raises ValueError naming what is missing."""
    fields = _Fields(path, header.metadata)
    layers = fields.integer("block_count")
    windows = fields.per_layer("attention.sliding_window_pattern", layers)
    cutoffs = fields.per_layer("activation_sparsity_scale", layers)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}

    def rows(name: str) -> int:
        if len(shapes.get(name, ())) != 2:
            raise BadValue(f"{path} has no matrix {name}: is it a whole Gemma 3n?")
        return shapes[name][0]

    return {
        "model_type": "gemma3n_text",
        "vocab_size": rows("token_embd.weight"),
        "vocab_size_per_layer_input": ple_rows,
        "hidden_size": fields.integer("embedding_length"),
        "hidden_size_per_layer_input": fields.integer("embedding_length_per_layer_input"),
        "num_hidden_layers": layers,
        "num_kv_shared_layers": fields.integer("attention.shared_kv_layers"),
        "num_attention_heads": fields.integer("attention.head_count"),
        "num_key_value_heads": fields.integer("attention.head_count_kv"),
        "head_dim": fields.integer("attention.key_length"),
        "intermediate_size": [rows(f"blk.{layer}.ffn_gate.weight") for layer in range(layers)],
        "activation_sparsity_pattern": [_sparsity(value) for value in cutoffs],
        "layer_types": [SLIDING if window else FULL for window in windows],
        "sliding_window": fields.integer("attention.sliding_window"),
        "max_position_embeddings": fields.integer("context_length"),
        "rope_theta": fields.number("rope.freq_base"),
        "rope_local_base_freq": fields.number("rope.freq_base_swa", _SLIDING_ROPE_BASE),
        "rope_scaling": None,
        "rms_norm_eps": _short(fields.number("attention.layer_norm_rms_epsilon")),
        "final_logit_softcapping": fields.number("final_logit_softcapping", 0.0) or None,
        "laurel_rank": rows("blk.0.laurel_l.weight"),
        "altup_num_inputs": fields.integer("altup.num_inputs"),
        "altup_active_idx": fields.integer("altup.active_idx"),
        "altup_correct_scale": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }


def generation_config(metadata: dict[str, Any], ends: list[int]) -> dict[str, Any]:
    """How answers are sampled and ended."""
    config: dict[str, Any] = {"do_sample": True, "eos_token_id": ends}
    config["top_k"] = metadata.get("general.sampling.top_k", _TOP_K)
    config["top_p"] = _short(metadata.get("general.sampling.top_p", _TOP_P))
    if (temperature := metadata.get("general.sampling.temp")) is not None:
        config["temperature"] = _short(temperature)
    for key, name in (("bos", "bos"), ("pad", "padding")):
        if (token_id := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{key}_token_id"] = token_id
    return config


def _sparsity(cutoff: Any) -> float:
    """The share of units below a number of standard deviations, which is minus infinity in dense layers."""
    if not isinstance(cutoff, float) or math.isnan(cutoff) or cutoff == -math.inf:
        return 0.0
    return round(NormalDist().cdf(cutoff), 6)  # float32 has as many digits: 1.6448536 is 0.95


def _short(value: float) -> float:
    """A float32 as it was written: 1e-6 instead of 9.999999974752427e-07."""
    return float(f"{value:.7g}")


class _Fields:
    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self._path, self._metadata = path, metadata

    def _get(self, key: str) -> Any:
        name = f"{ARCHITECTURE}.{key}"
        if name not in self._metadata:
            raise BadValue(f"{self._path} lacks {name}: make the file anew with a current llama.cpp")
        return self._metadata[name]

    def integer(self, key: str) -> int:
        value = self._get(key)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise BadValue(f"{self._path}: {ARCHITECTURE}.{key} is {value!r:.60}, expected an integer")
        return value

    def number(self, key: str, otherwise: float | None = None) -> float:
        if otherwise is not None and f"{ARCHITECTURE}.{key}" not in self._metadata:
            return otherwise
        value = self._get(key)
        if not isinstance(value, float) or not math.isfinite(value):
            raise BadValue(f"{self._path}: {ARCHITECTURE}.{key} is {value!r:.60}, expected a number")
        return value

    def per_layer(self, key: str, layers: int) -> list[Any]:
        value = self._get(key)
        if not isinstance(value, list) or len(value) < layers:
            raise BadValue(f"{self._path}: {ARCHITECTURE}.{key} is {value!r:.60}, expected {layers} values")
        return value[:layers]
