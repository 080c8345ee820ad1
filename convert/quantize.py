"""How each tensor of the new checkpoint is made, a block of rows at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from g3n_mlx.checkpoint.finite import all_finite
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import Quantization, quantize, to_float32
from g3n_mlx.checkpoint.shards import DTYPES
from g3n_mlx.config.manifest import TEXT, dead_manifest
from g3n_mlx.failures import BadValue

FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


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


def quantized_outputs(path: str, shape: tuple[int, ...], quantization: Quantization, dtype: str) -> tuple[Output, ...]:
    """The three tensors that stand for a weight of this shape."""
    *lead, width = shape
    per_group = (*lead, width // quantization.group_size)
    return (
        Output(f"{path}.weight", "U32", (*lead, quantization.packed_width(width))),
        Output(f"{path}.scales", dtype, per_group),
        Output(f"{path}.biases", dtype, per_group),
    )


def plan_jobs(checkpoint: Checkpoint, quantizations: Mapping[str, Quantization], dtype: str | None) -> list[TensorJob]:
    """Everything that the new checkpoint holds, under the published names.

    The unused keys and values of KV-sharing layers are written too, as zeros where the source lacks them: mlx-lm
    requires them.
    dtype: of all floats, as safetensors spells it; None leaves every tensor as it is stored.
    """
    jobs = [
        _job(
            name,
            checkpoint.info(name).shape,
            checkpoint.info(name).dtype,
            partial(checkpoint.read, name),
            quantizations,
            dtype,
        )
        for name in (*checkpoint.names, *checkpoint.dead_names)
    ]
    stored = dtype or checkpoint.info(f"{TEXT}norm.weight").dtype
    for name, shape in dead_manifest(checkpoint.config.text).items():
        if name not in checkpoint.dead_names:
            jobs.append(_job(name, shape, stored, partial(_zeros, shape[1:], stored), quantizations, dtype))
    return jobs


def _job(
    name: str,
    shape: tuple[int, ...],
    stored: str,
    read: Callable[[int, int], np.ndarray],
    quantizations: Mapping[str, Quantization],
    dtype: str | None,
) -> TensorJob:
    published = f"model.{name}"
    target = dtype if dtype and stored in FLOATS.values() else stored
    quantization = quantizations.get(name.removesuffix(".weight"))
    if quantization is None:
        outputs = (Output(published, target, shape),)
        produce = partial(_copy, published, read, DTYPES[target])
    else:
        outputs = quantized_outputs(published.removesuffix(".weight"), shape, quantization, target)
        produce = partial(_quantize, published, read, DTYPES[target], quantization)
    return TensorJob(outputs, shape[0] if shape else 1, prod(shape) * DTYPES[stored].itemsize, produce)


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
    name: str,
    read: Callable[[int, int], np.ndarray],
    dtype: np.dtype,
    quantization: Quantization,
    start: int,
    stop: int,
) -> tuple[np.ndarray, ...]:
    rows = _cast(read(start, stop), dtype)
    try:
        return quantize(rows, quantization.bits, quantization.group_size)
    except ValueError:
        raise BadValue(_not_finite(name, dtype)) from None


def _not_finite(name: str, dtype: np.dtype) -> str:
    return f"{name} holds NaN or infinity in {dtype.name}: the source is damaged, or its values need a wider --dtype"


def _cast(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if rows.dtype == dtype:
        return rows
    with np.errstate(over="ignore"):  # an overflow is found as infinity afterwards
        return to_float32(rows).astype(dtype)
