"""Writes a full-size Gemma 3n checkpoint with random weights, in the published layout (bfloat16 shards).

For measuring: conversion, load, memory and speed do not depend on what the weights say. Values are normal with the
spread that keeps activations sane. Sizes: `e4b`, `e2b`, and `overhead`, which has E4B's layers but small widths, so
that the time of a token is the time of its operations' overhead. It is a text model alone unless `--towers` adds the
published ones of images and audio, without which mistral.rs loads no Gemma 3n.

    python tests/full_size/write_random_checkpoint.py --size e2b --tokenizer FOLDER -o FOLDER
"""

import argparse
import sys
import zlib
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from g3n_mlx.config.audio import audio_manifest
from g3n_mlx.config.fields import read_json
from g3n_mlx.config.manifest import PLE_TABLE, TEXT, TOKEN_TABLE, dead_manifest, embedder_manifest, text_manifest
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.config.text import TextConfig
from g3n_mlx.config.vision import vision_manifest
from g3n_mlx.convert.quantize import Output, TensorJob
from g3n_mlx.convert.write import appearing_folder, check_space, copy_sidecars, write_json, write_shards
from g3n_mlx.matformer.plan import find_slice, plan_slice, slice_config
from g3n_mlx.matformer.table import PUBLISHED, read_slices

MAX_SHARD_BYTES = 4_000_000_000
# A prime, so that rows of no width repeat.
BLOCK_ELEMENTS = 16_777_259
OVERHEAD = {
    "hidden_size": 256,
    "hidden_size_per_layer_input": 64,
    "intermediate_size": 1024,
    "head_dim": 64,
    "vocab_size": 2048,
    "vocab_size_per_layer_input": 2048,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("e4b", "e2b", "overhead"), required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder to copy tokenizer and template from")
    parser.add_argument("--towers", action="store_true", help="with the vision and the audio tower, for e4b and e2b")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    raw = published_config(text_config(flags.size)) | (published_towers() if flags.towers else {})
    shapes = all_shapes(ModelConfig.from_dict(raw))
    block = np.random.default_rng(flags.seed).standard_normal(BLOCK_ELEMENTS, np.float32)
    blocks: dict[tuple[float, float], np.ndarray] = {}
    jobs = [job(name, shape, block, blocks) for name, shape in shapes.items()]
    with appearing_folder(flags.output, wait_for_others=False) as partial_folder:
        check_space(flags.output, jobs)
        write_shards(partial_folder, jobs, progress=True, max_shard_bytes=MAX_SHARD_BYTES)
        copy_sidecars(flags.tokenizer, partial_folder, whole=True)
        write_json(partial_folder / "config.json", raw)
    print(f"wrote {flags.output}: {sum(prod(job.outputs[0].shape) for job in jobs):,} parameters", file=sys.stderr)
    return 0


def text_config(size: str) -> dict[str, Any]:
    raw = read_json(PUBLISHED.with_name("gemma3n-e4b.json"))
    raw.pop("_source")
    if size == "e2b":
        return slice_config(raw, plan_slice(TextConfig.from_dict(raw), find_slice("e2b", read_slices())))
    if size == "overhead":
        raw |= OVERHEAD
    return raw | {"intermediate_size": [raw["intermediate_size"]] * raw["num_hidden_layers"]}


def published_towers() -> dict[str, Any]:
    """What config.json says of the published towers."""
    raw = read_json(PUBLISHED.with_name("gemma3n-towers.json"))
    towers = raw["audio"] | raw["vision"]
    return towers | {name: towers[name] | {"torch_dtype": "bfloat16"} for name in ("audio_config", "vision_config")}


def all_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes = text_manifest(config.text) | dead_manifest(config.text)
    if config.vision is not None and config.audio is not None:
        width = config.text.hidden_size
        shapes |= vision_manifest(config.vision) | embedder_manifest("embed_vision", config.vision, width)
        shapes |= audio_manifest(config.audio) | embedder_manifest("embed_audio", config.audio, width)
    return shapes


def published_config(raw_text: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "initializer_range": 0.02,
        "model_type": "gemma3n",
        "text_config": raw_text | {"torch_dtype": "bfloat16"},
        "torch_dtype": "bfloat16",
    }


def job(
    name: str, shape: tuple[int, ...], block: np.ndarray, blocks: dict[tuple[float, float], np.ndarray]
) -> TensorJob:
    spread = spread_of(name, shape)
    if spread not in blocks:
        mean, deviation = spread
        blocks[spread] = (block * np.float32(deviation) + np.float32(mean)).astype(ml_dtypes.bfloat16)
    output = Output(f"model.{name}", "BF16", shape)
    produce = partial(rows, blocks[spread], zlib.crc32(name.encode()), shape[1:])
    return TensorJob((output,), shape[0], output.num_bytes, produce)


def spread_of(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    if len(shape) == 1:
        return 1.0, 0.1
    if name == f"{PLE_TABLE}.weight":
        return 0.0, 1 / 16
    if name == f"{TOKEN_TABLE}.weight":
        return 0.0, shape[1] ** -0.5
    if name.startswith(f"{TEXT}layers.") and name.endswith("_coefs.weight"):
        return 0.0, 0.1
    return 0.0, prod(shape[1:]) ** -0.5


def rows(block: np.ndarray, place: int, row_shape: tuple[int, ...], start: int, stop: int) -> tuple[np.ndarray, ...]:
    width = prod(row_shape)
    out = np.empty((stop - start) * width, block.dtype)
    position, filled = (place + start * width) % len(block), 0
    while filled < len(out):
        piece = block[position : position + len(out) - filled]
        out[filled : filled + len(piece)] = piece
        filled += len(piece)
        position = 0
    return (out.reshape(stop - start, *row_shape),)


if __name__ == "__main__":
    sys.exit(main())
