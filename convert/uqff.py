"""UQFF, mistral.rs' prequantized models, as checkpoints of the usual layout.

A .uqff file is a safetensors file; beside a module's `weight` it says in which format that is stored. AFQ is MLX's
affine layout and is copied; llama.cpp's blocks that are affine in groups of 32 keep their exact numbers, with scales in
float32; Q6_K, whose groups are of 16, goes to 8 bits. Towers, which are not quantized here, become dense. What was not
quantized lies in residual.safetensors.
Sources: mistral.rs 0.9.5, mistralrs-quant/src/uqff (version 1.2); llama.cpp, ggml/src/ggml-quants.c, for the blocks.
"""

import hashlib
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.hub import cache_folder
from g3n_mlx.checkpoint.names import TOWERS, canonical_name
from g3n_mlx.checkpoint.quantization import Quantization, dequantize, pack, quantize
from g3n_mlx.checkpoint.shards import DTYPES, Shard, StoredTensor, read_header
from g3n_mlx.checkpoint.source import Source
from g3n_mlx.config.fields import read_json
from g3n_mlx.convert.gguf.blocks import AFFINE, Affine, Parts
from g3n_mlx.convert.quantize import Output, TensorJob, quantization_entry, quantized_outputs
from g3n_mlx.convert.write import (
    appearing_folder,
    check_free_name,
    check_space,
    copy_sidecars,
    write_json,
    write_shards,
)
from g3n_mlx.failures import BadValue, MissingFile

logger = logging.getLogger(__name__)

RESIDUAL = "residual.safetensors"
# The newest version that is read.
_VERSION = (1, 2)
# Raised when the output changes, so that cached conversions are made again.
_CACHE_VERSION = 1
_FORMATS = {0: "GGUF", 1: "unquantized", 2: "HQQ", 3: "FP8", 4: "AFQ", 5: "F8Q8", 6: "MXFP4"}
# What mistral.rs writes beside the weights: buffers that follow from the config, and norms that have no weight.
_BUFFERS = (
    ".invalid_logits_tensor",
    ".local_causal_valid_mask",
    ".per_dim_scale_softplus",
    ".inv_timescales",
    ".pos_indices",
    ".embedding_post_projection_norm.weight",
    ".v_norm.weight",
)
_REPORT = "uqff_report.json"


def convert_uqff(source: Path, output: Path, *, progress: bool = True) -> Path:
    """Writes a UQFF folder as a checkpoint into a new folder; returns the folder.

    Raises OSError, or ValueError for versions and formats that are not read and for what is damaged.
    """
    check_free_name(output)
    with ExitStack() as opened:
        modules, plain = _tensors(source, opened)
        jobs: list[TensorJob] = []
        chosen: dict[str, Quantization] = {}
        for name, stored in plain.items():
            jobs.append(_copied(f"model.{name}", stored))
        for path, module in modules.items():
            job, how = _converted(path, module)
            jobs.append(job)
            if how is not None:
                chosen[path] = how
        config = read_json(source / "config.json")
        if chosen:
            config["quantization"] = config["quantization_config"] = quantization_entry(chosen)
        with appearing_folder(output, wait_for_others=False) as partial_folder:
            check_space(output, jobs)
            write_shards(partial_folder, jobs, progress)
            copy_sidecars(source, partial_folder, whole=True)
            (partial_folder / _REPORT).unlink(missing_ok=True)
            write_json(partial_folder / "config.json", config)
            Checkpoint.open(partial_folder).close()  # complete, and of the shapes that the config says
    return output


def cached_uqff(source: Path) -> Path:
    """The conversion of a UQFF folder in the user's cache, made on first use; raises as `convert_uqff` does."""
    digest = hashlib.sha256(repr(_CACHE_VERSION).encode() + (source / "config.json").read_bytes())
    for path in (*sorted(source.glob("*.uqff")), source / RESIDUAL):
        if path.is_file():
            status = path.stat()
            digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
    target = cache_folder() / "conversions" / f"{source.resolve().name}-uqff-{digest.hexdigest()[:16]}"
    if not target.is_dir():
        logger.info("converting %s once, into %s", source, target)
        try:
            convert_uqff(source, target)
        except FileExistsError:
            if not target.is_dir():
                raise
    return target


@dataclass(frozen=True, slots=True)
class _Module:
    """A weight in a .uqff file, and what stands beside it, by what comes behind the weight's name."""

    where: str  # for errors
    format: int
    parts: dict[str, StoredTensor]

    def number(self, part: str) -> int:
        """A number that stands in a tensor of its own."""
        if part not in self.parts:
            raise BadValue(f"{self.where} lacks its {part}: download it again")
        return int(_read(self.parts[part]).reshape(-1)[0])


def _tensors(source: Path, opened: ExitStack) -> tuple[dict[str, _Module], dict[str, StoredTensor]]:
    """Modules by canonical path, and unquantized tensors by canonical name."""
    files = sorted(source.glob("*.uqff"))
    if not files:
        raise MissingFile(f"{source} holds no *.uqff files: expected a folder that mistral.rs wrote")
    if not (source / RESIDUAL).is_file():
        raise MissingFile(f"{source} lacks {RESIDUAL}, with what is not quantized: is the download complete?")
    found: dict[str, StoredTensor] = {}
    stems = {path.stem.rpartition("-")[0] or path.stem for path in files}
    if len(stems) > 1:
        raise BadValue(
            f"{source} holds {len(stems)} models ({', '.join(sorted(stems))}): keep the .uqff files of one of them, "
            f"with {RESIDUAL} and the small files, in a folder of its own"
        )
    for path in (*files, source / RESIDUAL):
        shard = Shard(path)
        opened.callback(shard.close)
        tensors = dict(read_header(shard))
        if path.suffix == ".uqff":
            _check_version(path, tensors)
        found |= {name: stored for name, stored in tensors.items() if not name.startswith("uqff.version.")}
    modules: dict[str, _Module] = {}
    for name in [name for name in found if name.endswith(".weight.format")]:
        weight = name.removesuffix(".format")
        parts = {part.removeprefix(weight).lstrip("."): found.pop(part) for part in _parts_of(weight, found)}
        kind = int(_read(parts["format"]).reshape(-1)[0])
        modules[canonical_name(weight).removesuffix(".weight")] = _Module(weight, kind, parts)
    plain = {canonical_name(name): stored for name, stored in found.items() if not name.endswith(_BUFFERS)}
    return modules, plain


def _parts_of(weight: str, found: dict[str, StoredTensor]) -> list[str]:
    ends = ("", ".format", ".scales", ".biases", ".bits", ".group_size", ".dtype", ".shape", ".zeros")
    return [f"{weight}{end}" for end in ends if f"{weight}{end}" in found]


def _check_version(path: Path, tensors: dict[str, StoredTensor]) -> None:
    names = [f"uqff.version.{part}" for part in ("major", "minor")]
    if not all(name in tensors for name in names):
        raise BadValue(
            f"{path} is a UQFF file of before version 1.0, which mistral.rs itself no longer reads: take the original "
            "checkpoint (g3n convert -q quantizes it), or one that mistral.rs 0.9 or newer has quantized"
        )
    major, minor = (int(_read(tensors[name]).reshape(-1)[0]) for name in names)
    if major != _VERSION[0] or minor > _VERSION[1]:
        raise BadValue(f"{path} is UQFF {major}.{minor}: up to {_VERSION[0]}.{_VERSION[1]} is read, of the same major")


def _read(stored: StoredTensor, start: int = 0, stop: int | None = None) -> np.ndarray:
    return Source(stored, stored.shape).read(start, stop)


def _copied(name: str, stored: StoredTensor) -> TensorJob:
    rows = stored.shape[0] if stored.shape else 1
    produce: Callable[[int, int], tuple[np.ndarray, ...]] = lambda start, stop: (_read(stored, start, stop),)  # noqa: E731
    return TensorJob((Output(name, stored.dtype, stored.shape),), rows, stored.num_bytes, produce)


def _converted(path: str, module: _Module) -> tuple[TensorJob, Quantization | None]:
    """What is written for a module, and how it is stored then; None is dense."""
    if "" not in module.parts:
        raise BadValue(f"{module.where} is not there, but what belongs to it: download the file again")
    in_tower = path.startswith(tuple(TOWERS.values()))
    if module.format == 1:
        return _copied(f"model.{path}.weight", module.parts[""]), None
    if module.format == 4:
        return _afq(path, module, in_tower)
    if module.format == 0:
        return _blocks(path, module, in_tower)
    name = _FORMATS.get(module.format, f"format {module.format}")
    raise BadValue(
        f"{module.where} is stored as {name}, which is not read: AFQ, Q4_0 to Q8_0, Q4K, Q5K, Q6K and unquantized "
        "tensors are; quantize the original checkpoint to one of these"
    )


def _afq(path: str, module: _Module, in_tower: bool) -> tuple[TensorJob, Quantization | None]:
    how = Quantization(module.number("bits"), module.number("group_size"))
    missing = [part for part in ("scales", "biases") if part not in module.parts]
    if missing:
        raise BadValue(f"{module.where} lacks its {missing[0]}: download it again")
    parts = [module.parts[part] for part in ("", "scales", "biases")]
    shape = (parts[0].shape[0], parts[0].shape[1] * 32 // how.bits)
    size = sum(part.num_bytes for part in parts)
    if in_tower:
        dense = Output(f"model.{path}.weight", parts[1].dtype, shape)
        dtype = DTYPES[dense.dtype]

        def unpacked(start: int, stop: int) -> tuple[np.ndarray, ...]:
            packed, scales, biases = (_read(part, start, stop) for part in parts)
            return (dequantize(packed, scales, biases, how.bits, how.group_size).astype(dtype),)

        return TensorJob((dense,), shape[0], size, unpacked), None
    outputs = quantized_outputs(f"model.{path}", shape, how, parts[1].dtype)

    def copied(start: int, stop: int) -> tuple[np.ndarray, ...]:
        return tuple(_read(part, start, stop) for part in parts)

    return TensorJob(outputs, shape[0], size, copied), how


def _blocks(path: str, module: _Module, in_tower: bool) -> tuple[TensorJob, Quantization | None]:
    """llama.cpp's blocks, which lie row after row."""
    kind = module.number("dtype")
    if kind not in _KINDS or "shape" not in module.parts:
        raise BadValue(
            f"{module.where} is stored as ggml type {kind}, which is not read: quantize the original checkpoint to "
            f"{', '.join(entry.name for entry in _KINDS.values())} or AFQ"
        )
    layout = _KINDS[kind]
    shape = tuple(int(size) for size in _read(module.parts["shape"]))
    rows, width = shape
    stored, row_bytes = module.parts[""], width // layout.block_size * layout.block_bytes
    if width % layout.block_size or stored.num_bytes != rows * row_bytes:
        raise BadValue(f"{module.where} has {stored.num_bytes} bytes, expected {layout.name} of {list(shape)}")
    flat = StoredTensor(stored.shard, stored.offset, "U8", (rows, row_bytes))

    def affine(start: int, stop: int) -> Parts:
        return layout.parts(_read(flat, start, stop))

    how = None if in_tower else Quantization(layout.bits, 32)
    produce = partial(_stored, affine, how)
    if how is None:
        outputs: tuple[Output, ...] = (Output(f"model.{path}.weight", "BF16", (rows, width)),)
    else:
        outputs = quantized_outputs(f"model.{path}", (rows, width), how, "F32")
    return TensorJob(outputs, rows, stored.num_bytes, produce), how


def _stored(
    affine: Callable[[int, int], Parts], how: Quantization | None, start: int, stop: int
) -> tuple[np.ndarray, ...]:
    codes, scales, biases = affine(start, stop)
    per_group = codes.shape[-1] // scales.shape[-1]
    if how is not None and per_group == how.group_size:
        return pack(codes, how.bits), scales, biases
    values = codes.reshape(*scales.shape, per_group) * scales[..., None] + biases[..., None]
    values = values.reshape(codes.shape).astype(np.float32)
    return (values.astype(DTYPES["BF16"]),) if how is None else quantize(values, how.bits, how.group_size)


def _q6_k(blocks: np.ndarray) -> Parts:
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([low & 15, low >> 4], axis=2)  # [n, 2, 4, 32]
    codes = low | (high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3) << 4
    scale = np.ascontiguousarray(blocks[:, 208:210]).view("<f2").astype(np.float32)
    scales = scale * blocks[:, 192:208].view(np.int8)  # of groups of 16
    return codes, scales, -32 * scales


# Q6K by ggml's number too: affine in groups of 16, so that it is stored at 8 bits.
_KINDS = {kind: replace(entry, name=entry.name.replace("_K", "K")) for kind, entry in AFFINE.items()}
_KINDS[14] = Affine("Q6K", 8, 210, 256, _q6_k)
