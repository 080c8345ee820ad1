"""How each tensor of the new checkpoint is made, a block of rows at a time."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np

from g3n_mlx.checkpoint.finite import all_finite
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import PARTS, Quantization, dequantize, quantize, to_float32
from g3n_mlx.checkpoint.shards import DTYPES
from g3n_mlx.config.manifest import TEXT, dead_manifest
from g3n_mlx.failures import BadValue

FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


# How a block of rows of a module's weight is quantized: by its path, which says what was measured of its inputs.
Method = Callable[[str, np.ndarray, Quantization], tuple[np.ndarray, np.ndarray, np.ndarray]]


def affine(path: str, rows: np.ndarray, how: Quantization) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As MLX quantizes."""
    return quantize(rows, how.bits, how.group_size)


@dataclass(frozen=True, slots=True)
class Readable:
    """A tensor of the source as the conversion reads it."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it
    read: Callable[[int, int], np.ndarray]  # rows [start, stop)


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the new checkpoint."""

    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class TensorJob:
    """Tensors made from one source tensor, with the same number of rows."""

    outputs: tuple[Output, ...]
    num_rows: int
    source_bytes: int
    produce: Callable[[int, int], tuple[np.ndarray, ...]]  # rows [start, stop) of every output
    least_rows: int = 1  # that are worth a call


def quantized_outputs(path: str, shape: tuple[int, ...], quantization: Quantization, dtype: str) -> tuple[Output, ...]:
    """The three tensors that stand for a weight of this shape."""
    *lead, width = shape
    per_group = (*lead, width // quantization.group_size)
    return (
        Output(f"{path}.weight", "U32", (*lead, quantization.packed_width(width))),
        Output(f"{path}.scales", dtype, per_group),
        Output(f"{path}.biases", dtype, per_group),
    )


def readable(checkpoint: Checkpoint, dequantize: bool) -> dict[str, Readable]:
    """What the source holds, by canonical names. dequantize: quantized weights as the numbers that they stand for.

    The unused keys and values of KV-sharing layers are among them, as zeros where the source lacks them: mlx-lm
    requires them.
    """
    found: dict[str, Readable] = {}
    for name in (*checkpoint.names, *checkpoint.dead_names):
        info, (path, _, part) = checkpoint.info(name), name.rpartition(".")
        quantization = checkpoint.quantization(path) if dequantize else None
        if quantization is None:
            found[name] = Readable(info.shape, info.dtype, partial(checkpoint.read, name))
        elif part == "weight":
            shape = (info.shape[0], info.shape[1] * 32 // quantization.bits)
            found[name] = Readable(shape, "F32", partial(_dequantized, checkpoint, path, quantization))
    stored = checkpoint.info(f"{TEXT}norm.weight").dtype
    for name, shape in dead_manifest(checkpoint.config.text).items():
        if name not in checkpoint.dead_names:
            found[name] = Readable(shape, stored, partial(_zeros, shape[1:], stored))
    return found


def plan_jobs(
    tensors: Mapping[str, Readable],
    quantizations: Mapping[str, Quantization],
    dtype: str | None,
    method: Method = affine,
) -> list[TensorJob]:
    """Everything that the new checkpoint holds, under the published names.

    dtype: of all floats, as safetensors spells it; None leaves every tensor as it is stored.
    """
    return [_job(name, tensor, quantizations, dtype, method) for name, tensor in tensors.items()]


def _job(
    name: str, tensor: Readable, quantizations: Mapping[str, Quantization], dtype: str | None, method: Method
) -> TensorJob:
    published, shape = f"model.{name}", tensor.shape
    target = dtype if dtype and tensor.dtype in FLOATS.values() else tensor.dtype
    path = name.removesuffix(".weight")
    quantization = quantizations.get(path)
    if quantization is None:
        outputs = (Output(published, target, shape),)
        produce = partial(_copy, published, tensor.read, DTYPES[target])
    else:
        outputs = quantized_outputs(published.removesuffix(".weight"), shape, quantization, target)
        produce = partial(_quantize, path, tensor.read, DTYPES[target], quantization, method)
    num_bytes = prod(shape) * DTYPES[tensor.dtype].itemsize
    least_rows = 1 if quantization is None else getattr(method, "least_rows", 1)
    return TensorJob(outputs, shape[0] if shape else 1, num_bytes, produce, least_rows)


def quantization_entry(quantizations: Mapping[str, Quantization]) -> dict[str, Any]:
    """config.json's entry, as mlx-lm writes it: what most modules have, then the others by path, also as mlx-vlm."""
    common = Counter(quantizations.values()).most_common(1)[0][0]
    entry: dict[str, Any] = _as_dict(common)
    for path, quantization in quantizations.items():
        if quantization != common:
            entry[f"model.{path}"] = _as_dict(quantization)
            if path.startswith(TEXT):
                entry[f"{TEXT}model.{path.removeprefix(TEXT)}"] = _as_dict(quantization)
    return entry


def _as_dict(quantization: Quantization) -> dict[str, Any]:
    return {"group_size": quantization.group_size, "bits": quantization.bits, "mode": "affine"}


def _dequantized(checkpoint: Checkpoint, path: str, quantization: Quantization, start: int, stop: int) -> np.ndarray:
    packed, scales, biases = (checkpoint.read(f"{path}.{part}", start, stop) for part in PARTS)
    rows = dequantize(packed, scales, biases, quantization.bits, quantization.group_size)
    low_rank = checkpoint.low_ranks.get(path)
    return rows if low_rank is None else low_rank.merged(rows, start)


def _zeros(row: tuple[int, ...], dtype: str, start: int, stop: int) -> np.ndarray:
    return np.zeros((stop - start, *row), DTYPES[dtype])


def _copy(
    name: str, read: Callable[[int, int], np.ndarray], dtype: np.dtype, start: int, stop: int
) -> tuple[np.ndarray, ...]:
    rows = _cast(read(start, stop), dtype)
    if not all_finite(rows):
        raise BadValue(_not_finite(name, dtype))
    return (rows,)


def _quantize(
    path: str,
    read: Callable[[int, int], np.ndarray],
    dtype: np.dtype,
    quantization: Quantization,
    method: Method,
    start: int,
    stop: int,
) -> tuple[np.ndarray, ...]:
    rows = _cast(read(start, stop), dtype)
    try:
        return method(path, rows, quantization)
    except ValueError:
        if all_finite(rows):  # then something else is wrong
            raise
        raise BadValue(_not_finite(f"model.{path}.weight", dtype)) from None


def _not_finite(name: str, dtype: np.dtype) -> str:
    return f"{name} holds NaN or infinity in {dtype.name}: the source is damaged, or its values need a wider --dtype"


def _cast(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if rows.dtype == dtype:
        return rows
    with np.errstate(over="ignore"):  # an overflow is found as infinity afterwards
        return to_float32(rows).astype(dtype)
