"""What a checkpoint's config and headers say of its size; those of a hub id can be had before it is downloaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from g3n_mlx.checkpoint import hub
from g3n_mlx.checkpoint.check import quantizations_of
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.names import TOWERS, canonical_name, declared_quantization, without_absent_modalities
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.shards import DTYPES
from g3n_mlx.config.manifest import TEXT
from g3n_mlx.config.model import ModelConfig, read_config
from g3n_mlx.config.text import TextConfig

_NORM = f"{TEXT}norm.weight"


@dataclass(frozen=True, slots=True)
class Outline:
    """A checkpoint without its weights."""

    folder: Path  # holds config.json and, where the checkpoint has one, its table of slices
    text: TextConfig
    raw_text: dict[str, Any]  # text_config as `TextConfig.from_dict` takes it
    quantizations: Mapping[str, Quantization]  # by module path
    dtype: str  # of what is not quantized, as safetensors spells it: "F32", else "BF16"
    tower_bytes: int  # of the towers and embedders of images and audio

    @staticmethod
    def of(checkpoint: Checkpoint) -> "Outline":
        """The outline of an opened checkpoint."""
        return Outline(
            checkpoint.folder,
            checkpoint.config.text,
            checkpoint.raw_config["text_config"],
            checkpoint.quantizations,
            _float(checkpoint.info(_NORM).dtype),
            sum(checkpoint.sources[name].num_bytes for name in checkpoint.names if not name.startswith(TEXT)),
        )

    @staticmethod
    def of_hub_id(hub_id: str, revision: str | None = None) -> "Outline":
        """The outline of a hub id, of which the config and the headers alone are fetched.

        Raises as `hub.resolve` does, and ValueError for the config of another model.
        """
        folder = hub.resolve(hub_id, revision, weights=False)
        raw_config, where = read_config(folder), str(folder / "config.json")
        declared_quantization(raw_config, where)  # raises where it is none that is read
        config = ModelConfig.from_dict(raw_config, where)
        tensors = {canonical_name(name): info for name, info in hub.tensor_headers(hub_id, revision).items()}
        config, raw_config = without_absent_modalities(config, raw_config, tensors)
        towers = (*TOWERS.values(), *(f"embed_{modality}." for modality in TOWERS))
        return Outline(
            folder,
            config.text,
            raw_config["text_config"],
            quantizations_of(tensors, config),
            _float(tensors[_NORM].dtype if _NORM in tensors else ""),
            sum(
                prod(info.shape) * DTYPES[info.dtype].itemsize
                for name, info in tensors.items()
                if name.startswith(towers) and info.dtype in DTYPES
            ),
        )


def _float(dtype: str) -> str:
    return "F32" if dtype == "F32" else "BF16"
