"""Seeded random vision towers of any shape, on disk beside the other parts of the tiny checkpoint."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from checkpoint_files import read_config, read_folder, write_folder

from g3n_mlx.config.manifest import embedder_manifest
from g3n_mlx.config.vision import VisionConfig, vision_manifest


def write_random_vision(
    folder: Path, tiny_folder: Path, model_args: dict[str, Any] | None, *, hidden_size: int = 2048
) -> Path:
    """A checkpoint whose tower is bfloat16 noise; every parameter is away from 0 and 1."""
    raw = read_config(tiny_folder)
    raw["vision_config"] |= {"model_args": model_args, "hidden_size": hidden_size}
    raw["vision_soft_tokens_per_image"] = (model_args or {}).get("msfa_output_resolution", 16) ** 2
    vision = VisionConfig.from_dict(raw["vision_config"], raw["vision_soft_tokens_per_image"], "vision_config")
    tensors = {name: array for name, array in read_folder(tiny_folder).items() if "vision" not in name}
    tensors |= vision_tensors(vision, raw["text_config"]["hidden_size"], 0, ml_dtypes.bfloat16)
    return write_folder(folder, raw, tensors)


def vision_tensors(vision: VisionConfig, text_width: int, seed: int, dtype: Any) -> dict[str, np.ndarray]:
    """Noise for the tower and its embedder, by their names in a checkpoint."""
    shapes = vision_manifest(vision) | embedder_manifest("embed_vision", vision, text_width)
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = generator.standard_normal(shape, dtype=np.float32)
        if name.endswith("layer_scale.gamma"):
            values = 0.4 + 0.1 * noise
        elif name.endswith("conv.bias"):
            values = 0.1 * noise
        elif len(shape) == 1:  # a norm's weight
            values = 1 + 0.3 * noise
        else:
            values = noise / np.sqrt(np.float32(noise[0].size))
        tensors[f"model.{name}"] = values.astype(dtype)
    return tensors


def tower_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tower's tensors by the names that timm has for them, in float32."""
    prefix = "model.vision_tower.timm_model."
    return {
        name.removeprefix(prefix): array.astype(np.float32)
        for name, array in read_folder(folder).items()
        if name.startswith(prefix)
    }


# Blocks as timm's `decode_arch_def` writes them.


def er(channels: int, kernel: int, stride: int = 1, ratio: float = 2.0, **changes: Any) -> dict[str, Any]:
    block = {"block_type": "er", "exp_kernel_size": kernel, "pw_kernel_size": 1, "exp_ratio": ratio, "force_in_chs": 0}
    block |= {"out_chs": channels, "stride": stride, "se_ratio": 0.0}
    return block | {"noskip": False, "act_layer": None} | changes


def uir(
    channels: int, start: int, mid: int, end: int = 0, stride: int = 1, ratio: float = 2.0, **changes: Any
) -> dict[str, Any]:
    block = {"dw_kernel_size_start": start, "dw_kernel_size_mid": mid, "dw_kernel_size_end": end, "exp_ratio": ratio}
    block |= {"block_type": "uir", "out_chs": channels, "stride": stride, "se_ratio": 0.0}
    return block | {"noskip": False, "act_layer": None} | changes


def mqa(channels: int, heads: int, key_dim: int, kv_stride: int = 1, kernel: int = 3, **changes: Any) -> dict[str, Any]:
    block = {"block_type": "mqa", "num_heads": heads, "key_dim": key_dim, "value_dim": key_dim, "kv_stride": kv_stride}
    block |= {"dw_kernel_size": kernel, "out_chs": channels, "stride": 1, "noskip": False, "act_layer": None}
    return block | changes
