"""The checkpoint that training starts from: config, tokenizer, and seeded random weights in the published layout.

    python start.py FOLDER --seed 1
    python start.py FOLDER --from ../../g3n_mlx/demo

Names and shapes are those that the project's manifests ask for, in the published layout, which transformers loads too.
With `--from`, weights and tokenizer are those of a finished model, quantized or not, in float32: training goes on from
it.
"""

import argparse
import math
import shutil
from pathlib import Path

import torch
from architecture import CONFIG, GENERATION, PREPROCESSOR, PROCESSOR, TEXT
from safetensors.torch import save_file
from torch import Tensor
from vocabulary import write_json, write_tokenizer

from g3n_mlx.backends.torch.weights import from_numpy
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import PARTS, dequantize
from g3n_mlx.config.audio import audio_manifest
from g3n_mlx.config.manifest import dead_manifest, embedder_manifest, text_manifest
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.config.vision import vision_manifest

SMALL_FILES = (
    "chat_template.jinja", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
TEMPLATE = Path(__file__).resolve().parents[2] / "g3n_mlx" / "demo" / "chat_template.jinja"


def started(name: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """A tensor to begin with: norms and gates open, updates small, matrices of unit gain."""
    leaf = name.rsplit(".", 1)[-1]
    if name.endswith(("embed_tokens.weight", "embedding.weight")):
        scale = shape[-1] ** -0.5
    elif name.endswith("embed_tokens_per_layer.weight"):
        scale = 0.3 * TEXT["hidden_size_per_layer_input"] ** -0.5
    elif name.endswith(("prediction_coefs.weight", "correction_coefs.weight", "modality_router.weight")):
        scale = 0.02
    elif leaf in ("gamma", "bias", "per_dim_scale") or len(shape) == 1:
        return torch.zeros(shape) if leaf in ("bias", "per_dim_scale") else torch.ones(shape)
    else:
        scale = math.prod(shape[1:]) ** -0.5
    return torch.randn(shape, generator=random) * scale


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of the checkpoint."""
    config = ModelConfig.from_dict(CONFIG)
    assert config.vision is not None
    assert config.audio is not None
    return (
        text_manifest(config.text)
        | dead_manifest(config.text)
        | vision_manifest(config.vision)
        | audio_manifest(config.audio)
        | embedder_manifest("embed_vision", config.vision, config.text.hidden_size)
        | embedder_manifest("embed_audio", config.audio, config.text.hidden_size)
    )


def write_start(folder: Path, seed: int) -> None:
    """Writes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", GENERATION)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    write_json(folder / "processor_config.json", PROCESSOR)
    write_tokenizer(folder, seed)
    shutil.copyfile(TEMPLATE, folder / "chat_template.jinja")
    random = torch.Generator().manual_seed(seed)
    tensors = {f"model.{name}": started(name, shape, random) for name, shape in published_shapes().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def unquantized(folder: Path) -> dict[str, Tensor]:
    """Canonical name -> float32 of every tensor of a checkpoint, whatever its bits, the dead ones included."""
    checkpoint = Checkpoint.open(folder)
    tensors: dict[str, Tensor] = {}
    for name in published_shapes():
        path, _, leaf = name.rpartition(".")
        stored = checkpoint.quantization(path) if leaf == "weight" else None
        if stored is None:
            tensors[name] = from_numpy(checkpoint.read(name)).float()
        else:
            parts = (checkpoint.read(f"{path}.{part}") for part in PARTS)
            tensors[name] = from_numpy(dequantize(*parts, stored.bits, stored.group_size))
    checkpoint.close()
    return tensors


def write_from(finished: Path, folder: Path) -> None:
    """Writes the folder with the weights and the small files of a finished model."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SMALL_FILES:
        shutil.copyfile(finished / name, folder / name)
    write_json(folder / "config.json", CONFIG)  # without the quantization
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in unquantized(finished).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Writes the checkpoint that training starts from."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--from", type=Path, dest="finished", help="a model to go on from, such as g3n_mlx/demo")
    arguments = parser.parse_args()
    if arguments.finished:
        write_from(arguments.finished, arguments.folder)
    else:
        write_start(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
