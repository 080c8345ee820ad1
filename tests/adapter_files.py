"""Adapters of the tiny checkpoint, written independently of the package, and what they make of its weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_files import write_safetensors

LAYERS = "model.language_model.layers"
# One of every kind: of all layers and of some, keys that later layers share, wide and narrow ones, LAuReL, AltUp, PLE.
TARGETS = (
    *(f"{LAYERS}.{layer}.self_attn.{part}" for layer in (0, 3, 8) for part in ("q_proj", "k_proj", "o_proj")),
    *(f"{LAYERS}.{layer}.mlp.{part}" for layer in (1, 2, 9) for part in ("gate_proj", "up_proj", "down_proj")),
    f"{LAYERS}.0.laurel.linear_left",
    f"{LAYERS}.4.altup.modality_router",
    f"{LAYERS}.5.per_layer_input_gate",
    f"{LAYERS}.6.per_layer_projection",
    "model.language_model.per_layer_model_projection",
    "model.language_model.altup_projections.1",
)
RANK, ALPHA = 4, 6
SCALE = ALPHA / RANK


def low_ranks(
    published: Mapping[str, np.ndarray], targets: tuple[str, ...] = TARGETS, seed: int = 0
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Random A [r, K], B [N, r] and magnitudes [N] by module, large enough to change every answer."""
    rng = np.random.default_rng(seed)
    found = {}
    for target in targets:
        weight = published[f"{target}.weight"].astype(np.float32)
        rows, columns = weight.shape[0], weight[0].size
        down, up = (rng.normal(0, 0.15, shape).astype(np.float32) for shape in ((RANK, columns), (rows, RANK)))
        norms = np.linalg.norm(weight.reshape(rows, -1), axis=1)
        found[target] = down, up, (norms * rng.uniform(0.8, 1.2, rows)).astype(np.float32)
    return found


def merged(published: Mapping[str, np.ndarray], changes: Mapping[str, Any], dora: bool = False, scale: float = SCALE):
    """All tensors of the checkpoint, those that an adapter changes merged in float32."""
    tensors = dict(published)
    for target, (down, up, magnitude) in changes.items():
        weight = published[f"{target}.weight"].astype(np.float32)
        changed = weight + (scale * up @ down).reshape(weight.shape)
        if dora:
            norms = np.linalg.norm(changed.reshape(len(changed), -1), axis=1)
            changed *= (magnitude / norms).reshape(-1, *[1] * (weight.ndim - 1))
        tensors[f"{target}.weight"] = changed.astype(np.float32)
    return tensors


def write_peft(folder: Path, changes: Mapping[str, Any], dora: bool = False, **settings: Any) -> Path:
    """As PEFT's save_pretrained does."""
    folder.mkdir(parents=True)
    given = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": dora, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    tensors = {}
    for target, (down, up, magnitude) in changes.items():
        name = f"base_model.model.{target}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        if dora:
            tensors[f"{name}.lora_magnitude_vector"] = magnitude
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder


def write_mlx(folder: Path, changes: Mapping[str, Any], dora: bool = False, old: bool = False) -> Path:
    """As mlx-lm's trainer does, and mlx-vlm's; old: as mlx-vlm's did before."""
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {"lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0}, "num_layers": 10}
    settings["fine_tune_type"] = "dora" if dora else "lora"
    if old:
        settings = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    first, second = ("A", "B") if old else ("lora_a", "lora_b")
    tensors = {}
    for target, (down, up, magnitude) in changes.items():
        tensors |= {f"{target}.{first}": down.T.copy(), f"{target}.{second}": up.T.copy()}
        if dora:
            tensors[f"{target}.m"] = magnitude
    write_safetensors(folder / "adapters.safetensors", tensors)
    return folder
