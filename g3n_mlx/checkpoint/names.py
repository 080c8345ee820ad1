"""The names that Gemma 3n's tensors have on disk, and what its config.json says about quantization.

Names differ by who wrote the file: Google and mlx-lm, mlx-vlm, text-only Hugging Face, transformers 5. Canonical
names are the module paths of our models.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.shards import StoredTensor
from g3n_mlx.config.fields import is_integer, shown
from g3n_mlx.config.manifest import TEXT
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.failures import BadValue

logger = logging.getLogger(__name__)

TOWERS = {"vision": "vision_tower.", "audio": "audio_tower."}
STEM = "vision_tower.timm_model.conv_stem.conv"
# Prefix on disk -> canonical prefix, the first that fits: published and mlx-lm, mlx-vlm, text-only Hugging Face.
_PREFIXES = (
    ("model.language_model.", TEXT),
    ("language_model.model.", TEXT),
    *(
        (f"{root}{part}.", f"{part}.")
        for root in ("model.", "")
        for part in ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
    ),
    ("model.", TEXT),
)
# Names of wrappers that training leaves in a path: torch.compile's, FSDP's, activation checkpointing's. DDP's is
# "module." in front.
_WRAPPERS = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Of PEFT's models, merged or not.
_PEFT = re.compile(r"^base_model\.model\.|\.(?:lora_\w+|base_layer|modules_to_save)(?:\.|$)")
# Buffers that follow from the config, and that some programs write out.
_DERIVED = re.compile(r"(?:^|\.)(?:\w*inv_freq|embed_scale|router_input_scale|per_layer_(?:projection|input)_scale)$")
# The defaults of mx.quantize (mlx, ops.cpp, `quantize`, mode "affine").
_MLX_DEFAULT = Quantization(bits=4, group_size=64)


@dataclass(frozen=True, slots=True)
class Declared:
    """What config.json says about quantization."""

    default: Quantization
    modules: Mapping[str, Quantization | None]  # canonical module paths; None is dense


def canonical_name(name: str) -> str:
    """The module path of a tensor or module in our models."""
    name = _WRAPPERS.sub("", name.removeprefix("module."))
    for on_disk, canonical in _PREFIXES:
        if name.startswith(on_disk):
            return canonical + name.removeprefix(on_disk)
    return name


def canonical_tensors(on_disk: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """Tensors by their canonical names; raises ValueError when two of them have the same, or are an adapter's."""
    names: dict[str, str] = {}
    for name in on_disk:
        if _PEFT.search(name):
            raise BadValue(
                f"{folder} holds tensors of a PEFT model ({name}): merge its LoRA adapter into the base model first, "
                "by model.merge_and_unload() and then save_pretrained"
            )
        canonical = canonical_name(name)
        if _DERIVED.search(canonical):
            continue
        if canonical in names:
            raise BadValue(f"{folder} holds both {names[canonical]} and {name}: two checkpoints in one folder?")
        names[canonical] = name
    return {canonical: on_disk[name] for canonical, name in names.items()}


def tower_names(tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """The names below the vision and audio towers."""
    return (name for name in tensors if name.startswith(tuple(TOWERS.values())))


def lacks_stem_bias(tensors: Mapping[str, StoredTensor]) -> bool:
    """Vision weights of before July 2025: kernels have height and width swapped, and the stem has no bias."""
    return f"{STEM}.weight" in tensors and f"{STEM}.bias" not in tensors


def without_absent_modalities(
    config: ModelConfig, raw_config: dict[str, Any], tensors: Mapping[str, object]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Drops modalities that have no tensors: text-only conversions keep the whole config.json."""
    for modality, tower in TOWERS.items():
        key = f"{modality}_config"
        if key in raw_config and not any(name.startswith((tower, f"embed_{modality}.")) for name in tensors):
            logger.info("no %s tensors: the checkpoint is used without %s", modality, modality)
            raw_config = {name: value for name, value in raw_config.items() if name != key}
            config = replace(config, vision=None) if modality == "vision" else replace(config, audio=None)
    return config, raw_config


def declared_quantization(raw_config: dict[str, Any], where: str) -> Declared | None:
    """Takes the quantization keys out of a config; the shapes decide, and are checked against them."""
    repeated = raw_config.pop("quantization_config", None)
    raw = raw_config.pop("quantization", repeated)
    if raw is None:
        return None
    if not isinstance(raw, dict) or "bits" not in raw or "group_size" not in raw or "quant_method" in raw:
        method = raw.get("quant_method") if isinstance(raw, dict) else raw
        raise BadValue(
            f"{where}: quantized by {shown(method)}; only MLX's affine quantization is read: "
            "start from the unquantized checkpoint"
        )
    modules: dict[str, Quantization | None] = {}
    for path, value in raw.items():
        if "." in path and value is not True:
            here = f"{where}, quantization of {shown(path)}"
            modules[canonical_name(path)] = None if value is False else _declared_module(value, here)
    return Declared(_declared_module(raw, f"{where}, quantization"), modules)


def _declared_module(raw: Any, where: str) -> Quantization:
    if not isinstance(raw, dict) or "bits" not in raw or "group_size" not in raw:
        raise BadValue(f"{where}: is {shown(raw)}, expected false or an object with bits and group_size")
    if raw.get("mode", "affine") != "affine":
        raise BadValue(f"{where}: mode is {shown(raw['mode'])}, only 'affine' is read")
    # mlx-lm's mixed recipes write null for what they leave to mx.quantize.
    bits = _MLX_DEFAULT.bits if raw["bits"] is None else raw["bits"]
    group_size = _MLX_DEFAULT.group_size if raw["group_size"] is None else raw["group_size"]
    if not (is_integer(bits) and is_integer(group_size)):
        raise BadValue(f"{where}: bits and group_size are {shown(bits)} and {shown(group_size)}, expected integers")
    try:
        return Quantization(bits, group_size)
    except ValueError as error:
        raise BadValue(f"{where}: {error}") from None
