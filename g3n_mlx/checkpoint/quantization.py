"""Group-wise affine quantization in numpy, MLX's scheme: w ≈ code · scale + bias for each group of a row.

Equal, bit for bit, to `mx.quantize` on MLX's CPU stream (mlx, backend/cpu/quantized.cpp, `quantize`), so a
checkpoint does not depend on the machine that wrote it. Codes are packed LSB first into a little-endian
bit stream, and groups never straddle rows: a slice of whole groups can be cut out of the packed form.
"""

from dataclasses import dataclass
from math import prod

import ml_dtypes
import numpy as np

from g3n_mlx.failures import BadValue

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# The tensors that stand for a quantized weight.
PARTS = ("weight", "scales", "biases")

# Elements worked on at once: a float32 block and its temporaries stay in a core's own cache.
_BLOCK_ELEMENTS = 1 << 17
# The smallest range of a group that MLX divides by.
_MIN_SCALE = np.float32(1e-7)


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the weight of one module is stored."""

    bits: int  # a code's width
    group_size: int  # consecutive inputs that share a scale and a bias

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.group_size not in GROUP_SIZES:
            raise BadValue(
                f"{self.bits} bits in groups of {self.group_size} cannot be stored: "
                f"bits are one of {BITS}, group sizes one of {GROUP_SIZES}"
            )

    def packed_width(self, width: int) -> int:
        """uint32 words that `width` codes take; width is a multiple of the group size."""
        return width * self.bits // 32

    def num_bytes(self, shape: tuple[int, ...], item_bytes: int) -> int:
        """Bytes of codes, scales and biases of a weight; item_bytes: of one scale."""
        *lead, width = shape
        return prod(lead) * (4 * self.packed_width(width) + 2 * item_bytes * (width // self.group_size))


def quantize(weight: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed codes, scales and biases of a weight.

    weight: [..., K] float32, float16 or bfloat16. Returns uint32 [..., K * bits / 32], and twice [..., K / group_size]
    in the weight's dtype. Raises ValueError when the groups do not fit or the weight holds NaN or infinity.
    Source: mlx, backend/cpu/quantized.cpp, `quantize`.
    """
    Quantization(bits, group_size)
    width = weight.shape[-1]
    if width % group_size:
        raise BadValue(f"rows of {width} do not divide into groups of {group_size}")
    groups = weight.reshape(-1, group_size)  # [n, G]
    packed = np.empty((len(groups), group_size * bits // 32), np.uint32)
    scales, biases = np.empty(len(groups), weight.dtype), np.empty(len(groups), weight.dtype)
    step = max(1, _BLOCK_ELEMENTS // group_size)
    for start in range(0, len(groups), step):
        block = slice(start, start + step)
        packed[block], scales[block], biases[block] = _quantize_groups(groups[block], bits)
    lead = weight.shape[:-1]
    return (
        packed.reshape(*lead, width * bits // 32),
        scales.reshape(*lead, width // group_size),
        biases.reshape(*lead, width // group_size),
    )


def dequantize(packed: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """The weight that the codes stand for: float32 [..., K], code · scale + bias computed in float32."""
    codes = unpack(packed, bits)
    groups = codes.reshape(*scales.shape, group_size).astype(np.float32)  # [..., K / G, G]
    groups *= to_float32(scales)[..., None]
    groups += to_float32(biases)[..., None]
    return groups.reshape(codes.shape)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [..., K] as uint32 words [..., K * bits / 32]; K is a multiple of 32."""
    *lead, width = codes.shape
    stream = np.ascontiguousarray(codes)
    if bits in (2, 4, 8):
        # Neighbours merge in pairs until a byte is full: the upper one moves down from the upper half of a 16-bit word.
        filled = bits
        while filled < 8:
            pairs = stream.view(np.dtype("<u2"))
            stream = (pairs | pairs >> (8 - filled)).astype(np.uint8)
            filled *= 2
    else:
        eights = stream.reshape(*lead, width // 8, 8)  # eight codes fill `bits` whole bytes
        words = np.zeros(eights.shape[:-1], np.dtype("<u8"))
        for place in range(8):
            words |= eights[..., place].astype(np.uint64) << np.uint64(place * bits)
        stream = np.ascontiguousarray(words.view(np.uint8).reshape(*lead, width // 8, 8)[..., :bits])
    return stream.reshape(*lead, width * bits // 8).view(np.dtype("<u4")).astype(np.uint32, copy=False)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The codes of packed rows: uint32 [..., K * bits / 32] -> uint8 [..., K]."""
    *lead, words = packed.shape
    stream = np.ascontiguousarray(packed, dtype=np.dtype("<u4")).view(np.uint8)  # [..., K * bits / 8]
    if bits in (2, 4, 8):
        filled = 8
        while filled > bits:
            filled //= 2
            pairs = np.empty((*stream.shape, 2), np.uint8)
            np.bitwise_and(stream, (1 << filled) - 1, out=pairs[..., 0])
            np.right_shift(stream, filled, out=pairs[..., 1])
            stream = pairs.reshape(*lead, -1)
        return stream
    eights = np.zeros((*lead, words * 4 // bits, 8), np.uint8)
    eights[..., :bits] = stream.reshape(*lead, -1, bits)
    stream = eights.view(np.dtype("<u8"))  # [..., K / 8, 1]
    shifts = np.arange(0, 8 * bits, bits, dtype=np.uint64)
    return ((stream >> shifts) & np.uint64((1 << bits) - 1)).astype(np.uint8).reshape(*lead, -1)


def to_float32(array: np.ndarray) -> np.ndarray:
    """The same numbers in float32; bfloat16 is shifted into place, several times faster than ml_dtypes' cast."""
    if array.dtype == ml_dtypes.bfloat16:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def _quantize_groups(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n, G] floats -> packed [n, G * bits / 32], scales [n], biases [n]; the order of operations is MLX's."""
    num_bins = np.float32((1 << bits) - 1)
    work = to_float32(groups)
    lowest, highest = _of_groups(np.minimum, work), _of_groups(np.maximum, work)
    if not (np.isfinite(lowest).all() and np.isfinite(highest).all()):
        raise BadValue("the weight holds NaN or infinity")
    # A float32 group may span more than float32 can hold: MLX's scale is then infinite and all codes 0.
    with np.errstate(over="ignore", invalid="ignore"):
        scales = np.maximum((highest - lowest) / num_bins, _MIN_SCALE)
        negative_edge = np.abs(lowest) > np.abs(highest)
        scales = np.where(negative_edge, scales, -scales)
        edges = np.where(negative_edge, lowest, highest)
        # The edge of larger magnitude becomes a multiple of the scale, so that it and zero are met exactly.
        edge_codes = np.rint(edges / scales)
        on_grid = edge_codes != 0
        scales = np.where(on_grid, edges / np.where(on_grid, edge_codes, np.float32(1)), scales)
        biases = np.where(on_grid, edges, np.float32(0))
        work = work - biases[:, None]
        work /= scales[:, None]
    np.rint(work, out=work)
    np.clip(work, np.float32(0), num_bins, out=work)
    with np.errstate(over="ignore"):  # float16 scales may overflow, as MLX's do
        return pack(work.astype(np.uint8), bits), scales.astype(groups.dtype), biases.astype(groups.dtype)


def _of_groups(pick: np.ufunc, groups: np.ndarray) -> np.ndarray:
    """Minimum or maximum of each row of [n, G]; NaN wins.

    Neighbours are compared in pairs over the whole array, G a power of two: four times as fast as numpy's own
    reduction of short rows.
    """
    left = groups.reshape(-1)
    while len(left) > len(groups):
        left = pick(left[0::2], left[1::2])
    return left
