"""The types of GGUF's tensors, and their blocks as codes, scales and biases of MLX's layout.

Most types are affine in groups of 32, w = code * scale + bias, with scales that are products of a float16 and a small
integer: in float32 those are exact, and so is every weight. Other types are read as numbers and rounded anew.
Source: https://github.com/ggml-org/llama.cpp, ggml/src/ggml-quants.c and gguf-py/gguf/quants.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from g3n_mlx.checkpoint.quantization import Quantization, pack, quantize
from g3n_mlx.failures import MissingPackage
from g3n_mlx.installation import install_command

# Numbers of ggml's types (ggml.h, enum ggml_type).
F32, F16, BF16 = 0, 1, 30
DENSE = {F32: ("F32", np.dtype(np.float32)), F16: ("F16", np.dtype(np.float16)), BF16: ("BF16", ml_dtypes.bfloat16)}
GROUP = 32

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class Affine:
    """A type whose groups of 32 are affine."""

    name: str
    bits: int
    block_bytes: int
    block_size: int  # weights of a block
    codes: Callable[[np.ndarray], tuple[np.ndarray, Any, Any]]  # blocks [n, bytes] -> codes, scales, biases

    def parts(self, rows: np.ndarray) -> Parts:
        """Rows of bytes -> uint8 codes [n, K], float32 scales and biases [n, K / 32]."""
        blocks = rows.reshape(-1, self.block_bytes)
        codes, scales, biases = self.codes(blocks)
        return tuple(np.ascontiguousarray(part).reshape(len(rows), -1) for part in (codes, scales, biases))  # pyright: ignore[reportReturnType]


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at a byte of every block, as float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(blocks: np.ndarray, start: int) -> np.ndarray:
    """Low halves of 16 bytes, then high halves: [n, 32]."""
    found = blocks[:, start : start + 16]
    return np.concatenate([found & 15, found >> 4], axis=1)


def _fifth_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """The 32 bits of a word, as the fifth bit of codes."""
    return np.unpackbits(np.ascontiguousarray(blocks[:, start : start + 4]), axis=1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> tuple[np.ndarray, Any, Any]:
    scale = _half(blocks, 0)
    return _nibbles(blocks, 2), scale, -8 * scale


def _q4_1(blocks: np.ndarray) -> tuple[np.ndarray, Any, Any]:
    return _nibbles(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> tuple[np.ndarray, Any, Any]:
    scale = _half(blocks, 0)
    return _nibbles(blocks, 6) | _fifth_bits(blocks, 2), scale, -16 * scale


def _q5_1(blocks: np.ndarray) -> tuple[np.ndarray, Any, Any]:
    return _nibbles(blocks, 8) | _fifth_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> tuple[np.ndarray, Any, Any]:
    scale = _half(blocks, 0)
    return blocks[:, 2:] ^ 128, scale, -128 * scale  # from signed to unsigned


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a K block's 8 groups, float32 [n, 8]: two float16 times 6-bit integers, packed in 12 bytes."""
    low, middle, high = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 2) & 48)], axis=1)
    return _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _k_nibbles(blocks: np.ndarray) -> np.ndarray:
    """The last 128 bytes: low halves of 32 bytes are one group, high halves the next: [n, 8, 32]."""
    chunks = blocks[:, -128:].reshape(-1, 4, 1, GROUP)
    return np.concatenate([chunks & 15, chunks >> 4], axis=2).reshape(-1, 8, GROUP)


def _q4_k(blocks: np.ndarray) -> tuple[np.ndarray, Any, Any]:
    return _k_nibbles(blocks), *_scales_and_minima(blocks)


def _q5_k(blocks: np.ndarray) -> tuple[np.ndarray, Any, Any]:
    bits = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # bit i is of group i
    return _k_nibbles(blocks) | bits << 4, *_scales_and_minima(blocks)


AFFINE = {
    2: Affine("Q4_0", 4, 18, 32, _q4_0),
    3: Affine("Q4_1", 4, 20, 32, _q4_1),
    6: Affine("Q5_0", 5, 22, 32, _q5_0),
    7: Affine("Q5_1", 5, 24, 32, _q5_1),
    8: Affine("Q8_0", 8, 34, 32, _q8_0),
    12: Affine("Q4_K", 4, 144, 256, _q4_k),
    13: Affine("Q5_K", 5, 176, 256, _q5_k),
}


def type_named(kind: int) -> tuple[str, int, int] | None:
    """A type's name, weights and bytes of a block; None where the gguf package can't read it as numbers."""
    if kind in DENSE:
        name, dtype = DENSE[kind]
        return name, 1, np.dtype(dtype).itemsize
    if kind in AFFINE:
        return AFFINE[kind].name, AFFINE[kind].block_size, AFFINE[kind].block_bytes
    package = gguf_package()
    try:
        known = package.GGMLQuantizationType(kind)
        package.quants.quant_shape_from_byte_shape((package.GGML_QUANT_SIZES[known][1],), known)
    except (ValueError, KeyError):
        return None
    readable = known in package.quants._type_traits and known.name not in ("F32", "F16", "BF16")
    return (known.name, *package.GGML_QUANT_SIZES[known]) if readable else None


def gguf_package() -> Any:
    """llama.cpp's Python package; raises ImportError, saying what to install, when it is absent."""
    try:
        import gguf
    except ImportError:
        raise MissingPackage(f"reading GGUF files needs the gguf package: {install_command('gguf')}") from None
    return gguf


def numbers(kind: int, rows: np.ndarray) -> np.ndarray:
    """Rows of bytes of any type as the numbers that they stand for: float32 [n, K]."""
    if kind in DENSE:
        return np.ascontiguousarray(rows).view(DENSE[kind][1]).astype(np.float32)
    if kind in AFFINE:
        codes, scales, biases = AFFINE[kind].parts(rows)
        groups = codes.reshape(*scales.shape, GROUP).astype(np.float32) * scales[..., None] + biases[..., None]
        return groups.reshape(codes.shape)
    package = gguf_package()
    return package.quants.dequantize(np.ascontiguousarray(rows), package.GGMLQuantizationType(kind))


def rounded_anew(width: int) -> Quantization:
    """How a type that is not affine in groups of 32 is stored, finer than any of them."""
    return Quantization(8, 64 if width % 64 == 0 else GROUP)


def stored_as(kind: int, width: int) -> Quantization | None:
    """How rows of `width` weights of a type are stored; None if dense."""
    if kind in DENSE:
        return None
    return Quantization(AFFINE[kind].bits, GROUP) if kind in AFFINE else rounded_anew(width)


def packed_parts(kind: int, rows: np.ndarray) -> Parts:
    """Rows of bytes of a quantized type -> packed codes, float32 scales and biases, as `stored_as` says."""
    if kind in AFFINE:
        codes, scales, biases = AFFINE[kind].parts(rows)
        return pack(codes, AFFINE[kind].bits), scales, biases
    weights = numbers(kind, rows)
    how = rounded_anew(weights.shape[1])
    return quantize(weights, how.bits, how.group_size)
