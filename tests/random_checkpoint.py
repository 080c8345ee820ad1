"""Seeded random text checkpoints of any shape, on disk as Hugging Face's text-only layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_files import write_folder

from g3n_mlx.config.manifest import dead_manifest, text_manifest
from g3n_mlx.config.text import FULL, SLIDING, TextConfig


def pattern(layers: int, every: int) -> list[str]:
    """Layer types with full attention in every n-th layer; 1 is all full, 0 is none."""
    return [FULL if every and (layer + 1) % every == 0 else SLIDING for layer in range(layers)]


BASE: dict[str, Any] = {
    "architectures": ["Gemma3nForCausalLM"],
    "model_type": "gemma3n_text",
    "vocab_size": 133,  # of no use as a multiple of anything
    "vocab_size_per_layer_input": 133,
    "hidden_size": 96,
    "hidden_size_per_layer_input": 24,
    "num_hidden_layers": 7,
    "num_kv_shared_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": [64, 96, 160, 64, 32, 128, 96],
    "activation_sparsity_pattern": [0.95, 0.5, 0.0, 0.8, 0.0, 0.9, 0.0],
    "layer_types": pattern(7, 3),
    "sliding_window": 5,
    "max_position_embeddings": 256,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "laurel_rank": 8,
    "altup_num_inputs": 4,
    "altup_active_idx": 0,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
}


def write_random(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint of float32 noise whose shape is BASE's but for the changes; every tensor is away from 0 and 1.

    Keys and values of KV-sharing layers are on disk, as published, and must not be read.
    """
    config = {**BASE, **changes}
    for name in ("layer_types", "intermediate_size", "activation_sparsity_pattern"):
        assert len(config[name]) == config["num_hidden_layers"], name
    text = TextConfig.from_dict(config)
    shapes = text_manifest(text) | dead_manifest(text)
    return write_folder(folder, config, random_tensors(shapes, seed))


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = generator.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:  # a norm's weight, or the correct_output_scale
            values = 1.0 + 0.3 * noise
        elif "embed_tokens" in name:
            values = 0.25 * noise
        else:
            values = noise / np.sqrt(np.float32(shape[1]))
        tensors["model." + name.removeprefix("language_model.")] = values.astype(np.float32)
    return tensors
