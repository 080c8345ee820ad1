"""Reads and writes checkpoint folders in the tests, independently of the package: plain safetensors, and the layouts
that other programs write."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from g3n_mlx.matformer.table import Slice

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "U32": np.uint32, "U8": np.uint8}
_SPELLED = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = np.frombuffer(raw[start + first : start + last], DTYPES[entry["dtype"]])
        tensors[name] = data.reshape(entry["shape"])
    return tensors


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= read_safetensors(path)
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": _SPELLED[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def write_folder(folder: Path, config: dict[str, Any], tensors: Mapping[str, np.ndarray], shards: int = 1) -> Path:
    """A checkpoint folder; with several shards, their index as well."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        here = names[number::shards]
        write_safetensors(folder / file, {name: tensors[name] for name in here})
        weight_map |= dict.fromkeys(here, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two arrays are equal bit for bit."""
    return found.shape == expected.shape and found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


def slice_of(widths: list[int], skipped: list[int]) -> Slice:
    """A slice as a table of the user's own would have it."""
    return Slice("test", "test", len(widths), None, None, tuple(widths), tuple(skipped))


def copy_sidecars(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copy(path, folder / path.name)


# The layouts, each made from the published one.


def text_only(config: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict]:
    """Gemma3nForCausalLM as Hugging Face saves it: flat config, `model.` names."""
    prefix = "model.language_model."
    flat = {**config["text_config"], "architectures": ["Gemma3nForCausalLM"], "eos_token_id": config["eos_token_id"]}
    return flat, {
        "model." + name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)
    }


def resaved(config: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict]:
    """Transformers 5: no keys and values of KV-sharing layers, `rope_parameters`."""
    text = dict(config["text_config"])
    first_shared = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    dead = {
        f"model.language_model.layers.{layer}.self_attn.{part}.weight"
        for layer in range(first_shared, text["num_hidden_layers"])
        for part in ("k_proj", "v_proj", "k_norm")
    }
    text["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": text.pop("rope_theta")},
        "sliding_attention": {"rope_type": "default", "rope_theta": text.pop("rope_local_base_freq")},
    }
    return {**config, "text_config": text}, {name: array for name, array in tensors.items() if name not in dead}


def mlx_lm(config: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict]:
    """mlx-lm: published names, no towers and embedders, the config left whole."""
    return config, {name: array for name, array in tensors.items() if name.startswith("model.language_model.")}


def mlx_vlm(config: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict]:
    """mlx-vlm: its own prefixes, kernels with their inputs last."""
    renamed = {}
    for name, array in tensors.items():
        plain = name.removeprefix("model.")
        plain = plain.replace("language_model.", "language_model.model.", 1)
        if "_tower" in plain and array.ndim == 4:
            array = array.transpose(0, 2, 3, 1)
        elif "_tower" in plain and array.ndim == 3:
            array = array.transpose(0, 2, 1)
        renamed[plain] = np.ascontiguousarray(array)
    return config, renamed


def old_vision(config: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict]:
    """Before July 2025: vision kernels with height and width swapped, no bias of the stem."""
    old = {}
    for name, array in tensors.items():
        if name == "model.vision_tower.timm_model.conv_stem.conv.bias":
            continue
        if name.startswith("model.vision_tower.") and array.ndim == 4:
            array = np.ascontiguousarray(array.transpose(0, 1, 3, 2))
        old[name] = array
    return config, old
