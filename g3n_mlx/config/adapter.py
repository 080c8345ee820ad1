"""LoRA adapters, which trainers write where a model is expected: how their files are told, and what to do with them."""

import re
from pathlib import Path

from g3n_mlx.config.fields import read_json, shown

SETTINGS = "adapter_config.json"
# PEFT's name, whole or in parts, and those of mlx-lm's trainer, the last and the numbered ones.
_FILE = re.compile(r"(?:adapter_model.*|(?:.*_)?adapters)\.safetensors")


def adapter_files(folder: Path) -> list[Path]:
    """The files of a folder that hold adapters."""
    return sorted(path for path in folder.glob("*.safetensors") if _FILE.fullmatch(path.name))


def adapter_message(folder: Path) -> str:
    """What to say of a folder that holds an adapter and no model."""
    try:
        settings = read_json(folder / SETTINGS)
    except (OSError, ValueError):
        settings = {}
    base = settings.get("base_model_name_or_path") or settings.get("model")
    return (
        f"{folder} holds a LoRA adapter, which is no model of its own: merge it into its base model"
        f"{f' {shown(base)}' if isinstance(base, str) else ''} first (PEFT: model.merge_and_unload(), then "
        "save_pretrained; mlx-lm: mlx_lm.fuse), and give the folder that makes"
    )
