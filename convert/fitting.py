"""Scales, biases and codes that lose less than the plain ones: MLX's affine layout, chosen with more care.

`fitted` looks for the scale and bias of each group by squared error, without data. `compensated` is GPTQ: it takes a
row's groups one after the other and lets those behind make up for what rounding those before has cost, by the second
moments of what the weight multiplies. Both write what the plain method writes, so whatever reads MLX's layout reads it.
Sources: GPTQ, arXiv:2210.17323; its columns go in their own order here, for a group's columns lie side by side on disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from g3n_mlx.checkpoint.quantization import pack, quantize, to_float32, unpack

# Ranges that are tried: the group's whole one, and these parts of it, around its middle.
_SHRUNK = (1.0, 0.92, 0.84, 0.76, 0.68)
# How often scale and bias are fitted to the codes, and the codes to them.
_ROUNDS = 3
# Of the mean of the diagonal, added to it, so that directions that calibration never saw do not count as free.
_DAMPING = 0.01
# Up to this size a triangle is inverted like any matrix.
_TRIANGLE = 64
# Elements worked on at once.
_BLOCK_ELEMENTS = 1 << 18

Quantized = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Of what a weight [N, K] multiplies: means of x x^T, float32, in blocks of columns; between blocks they are 0."""

    blocks: Sequence[np.ndarray]  # each [k, k], with whole groups of columns


def fitted(weight: np.ndarray, bits: int, group_size: int, importance: np.ndarray | None = None) -> Quantized:
    """As `quantize`, with the least squared error that was found for each group; never more than the plain one's.

    importance: float32 [K], what an error in each column counts.
    """
    plain = quantize(weight, bits, group_size)
    groups = to_float32(weight).reshape(-1, group_size)  # [n, G]
    counts = np.ones(weight.shape[-1], np.float32) if importance is None else importance
    counts = np.broadcast_to(
        counts.reshape(-1, group_size), (*weight.shape[:-1], *counts.reshape(-1, group_size).shape)
    )
    counts = counts.reshape(-1, group_size)
    codes = unpack(plain[0], bits).reshape(-1, group_size)
    scales, biases = plain[1].reshape(-1).copy(), plain[2].reshape(-1).copy()
    step = max(1, _BLOCK_ELEMENTS // group_size)
    for start in range(0, len(groups), step):
        block = slice(start, start + step)
        codes[block], scales[block], biases[block] = _best(
            groups[block], counts[block], (codes[block], scales[block], biases[block]), (1 << bits) - 1
        )
    return pack(codes.reshape(weight.shape), bits), scales.reshape(plain[1].shape), biases.reshape(plain[2].shape)


def _best(groups: np.ndarray, counts: np.ndarray, plain: Quantized, top: int) -> Quantized:
    """Codes [n, G], scales and biases [n] of [n, G] weights, the best of what is tried for each."""
    codes, scales, biases = (x.copy() for x in plain)
    best = _errors(groups, counts, codes, scales, biases)
    lowest, highest = groups.min(axis=1), groups.max(axis=1)
    middle, width = (lowest + highest) / 2, highest - lowest
    for part in _SHRUNK:
        scale, bias = np.maximum(width * (part / top), 1e-12), middle - width * (part / 2)
        for _ in range(_ROUNDS):
            scale, bias = _regression(groups, counts, _rounded(groups, scale, bias, top), scale, bias)
        scale, bias = scale.astype(scales.dtype), bias.astype(biases.dtype)
        found = _rounded(groups, to_float32(scale), to_float32(bias), top)
        errors = _errors(groups, counts, found, scale, bias)
        better = errors < best
        best = np.where(better, errors, best)
        codes[better], scales[better], biases[better] = found[better], scale[better], bias[better]
    return codes, scales, biases


def _rounded(groups: np.ndarray, scale: np.ndarray, bias: np.ndarray, top: int) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint((groups - bias[:, None]) / scale[:, None])
    return np.fmin(np.fmax(codes, 0), top).astype(np.uint8)  # 0 for 0 / 0 too


def _regression(
    groups: np.ndarray, counts: np.ndarray, codes: np.ndarray, scale: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The scale and bias that fit some codes best; those that were, where the codes are all the same."""
    q = codes.astype(np.float32)
    total = counts.sum(axis=1)
    mean_q, mean_w = (q * counts).sum(axis=1) / total, (groups * counts).sum(axis=1) / total
    spread = (np.square(q - mean_q[:, None]) * counts).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = ((q - mean_q[:, None]) * (groups - mean_w[:, None]) * counts).sum(axis=1) / spread
    usable = (spread > 0) & (slope != 0)
    scale = np.where(usable, slope, scale)
    return scale, np.where(usable, mean_w - scale * mean_q, bias)


def _errors(
    groups: np.ndarray, counts: np.ndarray, codes: np.ndarray, scales: np.ndarray, biases: np.ndarray
) -> np.ndarray:
    made = codes.astype(np.float32) * to_float32(scales)[:, None] + to_float32(biases)[:, None]
    return (np.square(groups - made) * counts).sum(axis=1)


def compensated(weight: np.ndarray, bits: int, group_size: int, factors: Sequence[np.ndarray]) -> Quantized:
    """As `quantize`, with the least error of products that was found. factors: `inverse_factors` of its inputs."""
    top = (1 << bits) - 1
    left = to_float32(weight).T.copy()  # [K, N]: the columns, one after the other, lie in one piece each
    packed, scales, biases = [], [], []
    start = 0
    for factor in factors:
        block = left[start : start + len(factor)]
        importance = 1 / np.square(np.diag(factor))
        for first in range(0, len(factor), group_size):
            group = slice(first, first + group_size)
            _, scale, bias = fitted(block[group].T.astype(weight.dtype), bits, group_size, importance[group])
            codes, errors = _compensated_group(block[group], factor[group, group], (scale[:, 0], bias[:, 0]), top)
            block[first + group_size :] -= factor[group, first + group_size :].T @ errors
            packed.append(pack(np.ascontiguousarray(codes.T), bits))
            scales.append(scale)
            biases.append(bias)
        start += len(factor)
    return np.concatenate(packed, axis=1), np.concatenate(scales, axis=1), np.concatenate(biases, axis=1)


def _compensated_group(
    columns: np.ndarray, factor: np.ndarray, grid: tuple[np.ndarray, np.ndarray], top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [G, N] of columns [G, N], each rounded with the errors of those before it, and their errors [G, N].

    factor: [G, G], of these columns. grid: scale and bias [N] of the rows. The columns are changed.
    """
    scale, bias = map(to_float32, grid)
    codes, errors = np.empty(columns.shape, np.uint8), np.empty_like(columns)
    for at, values in enumerate(columns):
        codes[at] = _rounded(values[:, None], scale, bias, top)[:, 0]
        errors[at] = (values - (codes[at] * scale + bias)) / factor[at, at]
        columns[at + 1 :] -= factor[at, at + 1 :, None] * errors[at]
    return codes, errors


def inverse_factors(moments: Moments) -> list[np.ndarray]:
    """For each block the upper Cholesky factor of the inverse of its second moments, float32 [k, k].

    Raises numpy's LinAlgError for what are no moments: numbers that are not finite, or not of squares.
    """
    found = []
    for block in moments.blocks:
        if not np.isfinite(block).all():
            raise np.linalg.LinAlgError("it holds NaN or infinity")
        damped = block.astype(np.float64)
        mean = float(np.mean(np.diag(damped)))
        damped[np.diag_indices(len(damped))] += _DAMPING * mean if mean > 0 else 1.0
        # With the order of the columns turned round, the factor of a matrix becomes that of its inverse when it is
        # inverted, which for a triangle takes a third of the time of inverting the matrix first.
        lower = np.linalg.cholesky(damped[::-1, ::-1])
        found.append(np.ascontiguousarray(_inverse_of_lower(lower)[::-1, ::-1], np.float32))
    return found


def _inverse_of_lower(triangle: np.ndarray) -> np.ndarray:
    """Of a lower triangular matrix [k, k], half by half."""
    if len(triangle) <= _TRIANGLE:
        return np.linalg.inv(triangle)
    half = len(triangle) // 2
    top, rest = _inverse_of_lower(triangle[:half, :half]), _inverse_of_lower(triangle[half:, half:])
    inverse = np.zeros_like(triangle)
    inverse[:half, :half], inverse[half:, half:] = top, rest
    inverse[half:, :half] = -rest @ (triangle[half:, :half] @ top)
    return inverse
