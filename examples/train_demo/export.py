"""Writes a training's state as a checkpoint in the published layout, and as the 4-bit model that the package carries.

    python export.py START_FOLDER STATE FOLDER [--quantized OUT]

The first is float32, and transformers loads it. The second is `g3n-convert -q` of it, as a user would call it.
"""

import argparse
import shutil
from pathlib import Path

import torch
from architecture import TEXT
from safetensors.torch import load_file, save_file
from start import published_shapes

from g3n_mlx.convert import convert

# The tables that training holds as parameters of their own.
TABLES = {
    "tables.per_layer": "language_model.embed_tokens_per_layer.weight",
    "tables.vision": "embed_vision.embedding.weight",
    "tables.audio": "embed_audio.embedding.weight",
}


def export(start: Path, state: Path, folder: Path) -> None:
    """The start's files, with the tensors of the state."""
    parameters = torch.load(state, weights_only=True, map_location="cpu")["parameters"]
    trained = {TABLES.get(name, name): tensor for name, tensor in parameters.items()}
    shapes = published_shapes()
    strangers = sorted(set(trained) - set(shapes))
    assert not strangers, f"{state}: {strangers[0]} is no tensor of this config"
    for name in trained:
        if name.endswith("router_norm.weight"):  # the module holds it divided by hidden_size
            trained[name] = trained[name] * TEXT["hidden_size"]
    tensors = load_file(start / "model.safetensors")
    tensors |= {f"model.{name}": tensor.reshape(shapes[name]).contiguous() for name, tensor in trained.items()}
    shutil.copytree(start, folder, dirs_exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Reads the flags and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("start", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantized", type=Path, help="folder for the 4-bit model; must not be there yet")
    arguments = parser.parse_args()
    export(arguments.start, arguments.state, arguments.folder)
    if arguments.quantized:
        convert(arguments.folder, arguments.quantized, q_bits=4)


if __name__ == "__main__":
    main()
