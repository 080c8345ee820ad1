"""LoRA adapters, which trainers write where a model is expected: how their files are told, and what to do with them."""

import re
from pathlib import Path

from g3n_mlx.config.fields import read_json, shown
from g3n_mlx.failures import MissingFile

SETTINGS = "adapter_config.json"
# PEFT's name, whole or in parts, and those of mlx-lm's trainer, the last and the numbered ones.
_FILE = re.compile(r"(?:adapter_model.*|(?:.*_)?adapters)\.safetensors")


def adapter_files(folder: Path) -> list[Path]:
    """The files of a folder that hold adapters."""
    return sorted(path for path in folder.glob("*.safetensors") if _FILE.fullmatch(path.name))


def whole_adapter(path: Path) -> list[Path]:
    """The files of the adapter in a folder: PEFT's, in parts or not, or else mlx-lm's last one; a file is one itself.

    Raises FileNotFoundError where there is none.
    """
    if path.is_file():
        return [path]
    found = {file.name: file for file in adapter_files(path)}
    for name in ("adapter_model.safetensors", "adapters.safetensors"):
        if name in found:
            return [found[name]]
    if parts := [file for name, file in found.items() if name.startswith("adapter_model")]:
        return parts
    pickled = (path / "adapter_model.bin").is_file()
    what = "a pickled adapter, which can run code when opened" if pickled else "no adapter"
    raise MissingFile(f"{path} holds {what}: expected adapter_model.safetensors or adapters.safetensors")


def adapter_message(folder: Path) -> str:
    """What to say of a folder that holds an adapter and no model."""
    try:
        settings = read_json(folder / SETTINGS)
    except (OSError, ValueError):
        settings = {}
    base = settings.get("base_model_name_or_path") or settings.get("model")
    return (
        f"{folder} holds a LoRA adapter, which is no model of its own: give its base model"
        f"{f' {shown(base)}' if isinstance(base, str) else ''} as the model, and this folder as --adapter"
    )
