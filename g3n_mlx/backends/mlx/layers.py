"""Linear layers over dense and quantized weights. MLX multiplies by the stored form, so it is held as it is.

Scales and biases are held in the activations' dtype: float32 on MLX's CPU device (see device.py). `narrowed` gives a
layer over the first rows and columns of a weight, in the same memory: what a MatFormer slice of a loaded model
multiplies by.
"""

import copy
from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from g3n_mlx.backends.mlx.weights import Weights, evaluated
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.source import Ranges

# Pieces of a weight of which slices are taken: E4B's published slices have halves of its FFN, users' own any eighth.
MAX_SLABS = 8


def fused(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The function as one kernel on a GPU, compiled for arrays of any length; in a compiled step it is part of that.

    On the CPU device, which has no vectorized functions in compiled kernels, it is computed as it stands.
    """
    compiled = mx.compile(function, shapeless=True)

    @wraps(function)
    def call(*arrays: mx.array) -> mx.array:
        return compiled(*arrays) if mx.default_device().type == mx.gpu else function(*arrays)

    return call


def linear(weights: Weights) -> "Linear | QuantizedLinear | AdaptedLinear":
    """The layer for a weight [N, K] in whatever form it is stored, or in which a slice shares it, with its adapter."""
    layer, low_rank = plain_linear(weights), weights.low_rank()
    return layer if low_rank is None else AdaptedLinear(layer, *low_rank)


def plain_linear(weights: Weights) -> "Linear | QuantizedLinear":
    """The same without what an adapter adds to it here."""
    shared = weights.shared()
    if shared is not None:
        return shared
    quantization = weights.quantization()
    return Linear(weights.tensor()) if quantization is None else QuantizedLinear(weights, quantization)


class Linear(nn.Module):
    """y = x W^T with a dense W [N, K]."""

    def __init__(self, weight: mx.array) -> None:
        super().__init__()
        self.weight = weight

    def __call__(self, x: mx.array) -> mx.array:
        """[T, K] -> [T, N]."""
        return x @ self.weight.T

    def embed(self, ids: mx.array) -> mx.array:
        """Rows of the weight, [T] -> [T, K], in its dtype."""
        return self.weight[ids]

    def narrowed(self, rows: int | None, columns: int | None) -> "Linear":
        """The layer over the first rows and columns; None is all of them."""
        return Linear(self.weight[:rows, :columns])

    def picked(self, rows: Ranges) -> "Linear":
        """The layer over some ranges of rows, which are copied."""
        return Linear(joined(self.weight, rows))


class QuantizedLinear(nn.Module):
    """y = x W^T with W as stored: packed codes [N, K * bits / 32], scales and biases [N, K / group size]."""

    def __init__(self, weights: Weights, quantization: Quantization) -> None:
        super().__init__()
        self.bits, self.group_size = quantization.bits, quantization.group_size
        self.weight = evaluated(weights.stored("weight"))
        self.scales = weights.tensor("scales")
        self.biases = weights.tensor("biases")

    def __call__(self, x: mx.array) -> mx.array:
        """[T, K] -> [T, N]."""
        return mx.quantized_matmul(
            x, self.weight, self.scales, self.biases, transpose=True, group_size=self.group_size, bits=self.bits
        )

    def embed(self, ids: mx.array) -> mx.array:
        """Rows of the weight, [T] -> [T, K], in the activations' dtype."""
        rows = (self.weight[ids], self.scales[ids], self.biases[ids])
        return mx.dequantize(*rows, group_size=self.group_size, bits=self.bits)

    def narrowed(self, rows: int | None, columns: int | None) -> "QuantizedLinear":
        """The layer over the first rows; of fewer columns there is no view (see SlabLinear)."""
        assert columns is None, columns
        return self.over(self.weight[:rows], self.scales[:rows], self.biases[:rows])

    def picked(self, rows: Ranges) -> "QuantizedLinear":
        """The layer over some ranges of rows, which are copied."""
        return self.over(*(joined(x, rows) for x in (self.weight, self.scales, self.biases)))

    def over(self, weight: mx.array, scales: mx.array, biases: mx.array) -> "QuantizedLinear":
        """The same layer over other rows and columns."""
        other = copy.copy(self)
        other.weight, other.scales, other.biases = weight, scales, biases
        return other


class AdaptedLinear(nn.Module):
    """y = factor * (x W^T + x A^T B^T), beside a weight that stays as it is stored."""

    def __init__(self, layer: Any, down: mx.array, up: mx.array, factor: mx.array | None) -> None:
        """down: A [r, K]. up: B [N, r]. factor: [N], of DoRA."""
        super().__init__()
        self.layer: Any = layer
        self.down, self.up, self.factor = Linear(down), Linear(up), factor

    def __call__(self, x: mx.array) -> mx.array:
        """[T, K] -> [T, N]."""
        y = self.layer(x) + self.up(self.down(x))
        return y if self.factor is None else y * self.factor

    def narrowed(self, rows: int | None, columns: int | None) -> "AdaptedLinear":
        """The layer over the first rows and columns; None is all of them."""
        factor = None if self.factor is None else self.factor[:rows]
        down, up = self.down.narrowed(None, columns).weight, self.up.narrowed(rows, None).weight
        return AdaptedLinear(self.layer.narrowed(rows, columns), down, up, factor)

    def picked(self, rows: Ranges) -> "AdaptedLinear":
        """The layer over some ranges of rows, which are copied."""
        factor = None if self.factor is None else joined(self.factor, rows)
        return AdaptedLinear(self.layer.picked(rows), self.down.weight, joined(self.up.weight, rows), factor)


def stacked(layers: list[Any], whole: Any | None) -> Any | None:
    """One layer over the rows of all of these, which become views of it; None for unlike or adapted ones.

    Several small products of the same row are so one, which keeps a GPU busier. whole: the stack that a slice shares
    with its model, where it has been narrowed to no fewer rows.
    """
    if any(isinstance(layer, AdaptedLinear) for layer in layers):
        return None
    if whole is not None:
        return whole if whole.weight.shape[0] == sum(layer.weight.shape[0] for layer in layers) else None
    kind = {(type(layer), getattr(layer, "bits", 0), getattr(layer, "group_size", 0)) for layer in layers}
    if len(kind) > 1:
        return None
    parts = ("weight", "scales", "biases") if isinstance(layers[0], QuantizedLinear) else ("weight",)
    whole = copy.copy(layers[0])
    start = 0
    for part in parts:
        setattr(whole, part, evaluated(mx.concatenate([getattr(layer, part) for layer in layers])))
    for layer in layers:
        stop = start + layer.weight.shape[0]
        for part in parts:
            setattr(layer, part, evaluated(getattr(whole, part)[start:stop]))
        start = stop
    return whole


class Slabs:
    """The columns of a quantized weight in pieces of equal width, one after the other in memory.

    MLX multiplies rows without gaps between them, so the first columns of a weight are no view in the stored form. The
    first pieces are: what slices of a model share with it.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        self.bits, self.group_size = layer.bits, layer.group_size
        self.size = layer.scales.shape[1] * self.group_size
        self.count = max(n for n in range(1, MAX_SLABS + 1) if self.size % (n * self.group_size) == 0)
        self.width = self.size // self.count
        self._layer: QuantizedLinear | None = layer

    @cached_property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """Codes, scales and biases, [n, N, words or groups of a piece]; made at the first use."""
        layer, self._layer = self._layer, None
        assert layer is not None
        found = tuple(
            x.reshape(x.shape[0], self.count, -1).swapaxes(0, 1) for x in (layer.weight, layer.scales, layer.biases)
        )
        weight, scales, biases = (mx.contiguous(x) for x in found)
        mx.eval(weight, scales, biases)
        return weight, scales, biases


class SlabLinear(nn.Module):
    """y = x W^T with the first columns of a quantized W."""

    def __init__(self, slabs: Slabs, size: int) -> None:
        """size: how many columns."""
        super().__init__()
        self._slabs, self._size = slabs, size
        self._count = -(-size // slabs.width)

    @cached_property
    def _views(self) -> tuple[mx.array, ...]:
        """The pieces; views, but arrays of their own for MLX, which would slice them again in every step."""
        return tuple(evaluated(array[: self._count]) for array in self._slabs.arrays)

    def __call__(self, x: mx.array) -> mx.array:
        """[T, K] -> [T, N]; the sum over the pieces is float32."""
        slabs, count = self._slabs, self._count
        weight, scales, biases = self._views
        if self._size < count * slabs.width:
            x = mx.pad(x, [(0, 0), (0, count * slabs.width - self._size)])
        pieces = x.reshape(x.shape[0], count, slabs.width).swapaxes(0, 1)  # [n, T, K / n]
        parts = mx.quantized_matmul(
            pieces, weight, scales, biases, transpose=True, group_size=slabs.group_size, bits=slabs.bits
        )
        return parts.astype(mx.float32).sum(axis=0).astype(x.dtype)

    def narrowed(self, rows: int | None, columns: int | None) -> "SlabLinear":
        """The layer over the first columns; None is all of them."""
        assert rows is None, rows
        return self if columns is None else SlabLinear(self._slabs, columns)


class Recorder(nn.Module):
    """A linear layer that hands over the second moments of what it multiplies (g3n_mlx/calibration.py)."""

    def __init__(self, layer: Any, block_width: int, found: Callable[[list[np.ndarray]], None]) -> None:
        """block_width: columns of one matrix of moments. found: takes the sums of x x^T, float32, block by block."""
        super().__init__()
        self.layer, self.block_width, self.found = layer, block_width, found

    def __call__(self, x: mx.array) -> mx.array:
        """[T, K] -> [T, N]."""
        starts = range(0, x.shape[1], self.block_width)
        parts = (x[:, start : start + self.block_width].astype(mx.float32) for start in starts)
        self.found([np.array(part.T @ part) for part in parts])
        return self.layer(x)


def joined(x: mx.array, rows: Ranges) -> mx.array:
    """Ranges of the rows of [N, K], one behind the other."""
    return mx.concatenate([x[start:stop] for start, stop in rows])


def sliceable(layer: nn.Module, of_rows: bool) -> nn.Module:
    """The layer in a form whose first rows, or else columns, are views: most layers as they are."""
    if isinstance(layer, AdaptedLinear):
        return AdaptedLinear(sliceable(layer.layer, of_rows), layer.down.weight, layer.up.weight, layer.factor)
    if of_rows or not isinstance(layer, QuantizedLinear):
        return layer
    slabs = Slabs(layer)
    return SlabLinear(slabs, slabs.size)
