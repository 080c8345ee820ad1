"""HQQ, half-quadratic quantization: w = (code - zero) * scale, in groups that mistral.rs lays across the rows.

With axis 0 a matrix is looked at as [group size, n], and each of the n columns has a scale and a zero: they belong to
weights of several rows. Affine groups lie along a row, so such weights are read as numbers and rounded anew. With axis
1 it is [n, group size], and a group is affine: bias = -zero * scale.
Source: mistral.rs 0.9.5, mistralrs-quant/src/hqq, which itself writes 4 and 8 bits, axis 0 and groups of 64.
"""

from collections.abc import Callable
from math import prod

import numpy as np

from g3n_mlx.checkpoint.quantization import GROUP_SIZES
from g3n_mlx.checkpoint.shards import StoredTensor
from g3n_mlx.convert.gguf.blocks import Parts
from g3n_mlx.convert.uqff.files import Module, read
from g3n_mlx.failures import BadValue

_BITS = (2, 4, 8)


def hqq_parts(module: Module) -> Callable[[int, int], Parts]:
    """Rows [start, stop) as codes uint8 [n, width], with float32 scales and biases, one of each for a group.

    Where groups lie across the rows every weight has its own: [n, width].
    Raises ValueError for what is not read or damaged.
    """
    bits, group_size, axis = (module.number(part) for part in ("bits", "group_size", "axis"))
    rows, width = module.shape()
    along_rows = axis == 1 and group_size in GROUP_SIZES and width % group_size == 0
    if bits not in _BITS or not (along_rows or axis == 0) or not module.number("channel_wise"):
        raise BadValue(
            f"{module.where} is HQQ of {bits} bits in groups of {group_size} along axis {axis}, which is not read: "
            "quantize the original checkpoint to HQQ4 or HQQ8"
        )
    packed, scales, zeros = (_flat(module.part(part)) for part in ("", "scales", "zeros"))
    sizes = (packed.shape[0] * 8, scales.shape[0] * group_size, zeros.shape[0] * group_size)
    if sizes != (rows * width * bits, rows * width, rows * width):
        raise BadValue(f"{module.where} has other sizes than HQQ of {bits} bits of {[rows, width]}: download it again")

    def parts(start: int, stop: int) -> Parts:
        first, last = start * width, stop * width
        codes = _codes(packed, bits, first, last)
        if along_rows:
            first, last = first // group_size, last // group_size
        scale, zero = (_repeated(part, first, last).astype(np.float32) for part in (scales, zeros))
        return codes.reshape(-1, width), scale.reshape(stop - start, -1), (-zero * scale).reshape(stop - start, -1)

    return parts


def _flat(stored: StoredTensor) -> StoredTensor:
    return StoredTensor(stored.shard, stored.offset, stored.dtype, (prod(stored.shape),))


def _codes(packed: StoredTensor, bits: int, first: int, last: int) -> np.ndarray:
    """Codes of a range of weights: those of the matrix's first part are in the bytes' highest bits, and so on."""
    per_part = packed.shape[0]
    shifts = 8 - bits - bits * (np.arange(first, last) // per_part)
    return _repeated(packed, first, last) >> shifts.astype(np.uint8) & (2**bits - 1)


def _repeated(stored: StoredTensor, first: int, last: int) -> np.ndarray:
    """A range of a flat tensor that follows upon itself without end."""
    size = stored.shape[0]
    pieces = []
    while first < last:
        at = first % size
        pieces.append(read(stored, at, min(size, at + last - first)))
        first += len(pieces[-1])
    return np.concatenate(pieces)
