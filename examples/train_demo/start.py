"""The checkpoint that training starts from: config, tokenizer, and seeded random weights in the published layout.

    python start.py FOLDER --seed 1

Names and shapes are those that the project's manifests ask for, in the published layout, which transformers loads too.
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

from g3n_mlx.config.audio import audio_manifest
from g3n_mlx.config.manifest import dead_manifest, embedder_manifest, text_manifest
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.config.vision import vision_manifest

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


def main() -> None:
    """Writes the checkpoint that training starts from."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    write_start(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
