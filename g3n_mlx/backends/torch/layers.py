"""Linear layers over dense and quantized weights; a quantized one is held once, in the form that its kernel takes.

`narrowed` gives a layer over the first rows and columns of a weight, in the same memory: what a MatFormer slice of a
loaded model multiplies by.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from g3n_mlx.backends.torch.kernels import stored
from g3n_mlx.backends.torch.kernels.dense import blockwise_product, product, unpacked
from g3n_mlx.backends.torch.kernels.packed import (
    EMBED_BLOCK_ROWS,
    PackedLinear,
    SlabLinear,
    Slabs,
    packed_linear,
    packs,
)
from g3n_mlx.backends.torch.weights import Weights
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.source import Ranges


def linear(weights: Weights) -> "Linear | QuantizedLinear | PackedLinear | AdaptedLinear":
    """The layer for a weight [N, K] in whatever form it is stored, or in which a slice shares it, with its adapter."""
    layer, low_rank = plain_linear(weights), weights.low_rank()
    return layer if low_rank is None else AdaptedLinear(layer, *low_rank)


def plain_linear(weights: Weights) -> "Linear | QuantizedLinear | PackedLinear":
    """The same without what an adapter adds to it here."""
    shared = weights.shared()
    if shared is not None:
        return shared
    quantization = weights.quantization()
    if quantization is None:
        return Linear(weights.tensor())
    if not stored.multiplies(weights, quantization) and packs(weights, quantization):
        return packed_linear(weights, quantization)
    return QuantizedLinear(weights, quantization)


class Linear(nn.Module):
    """y = x W^T with a dense W [N, K]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        return product(x, self.weight)

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the weight, [T] -> [T, K], in its dtype."""
        return F.embedding(ids, self.weight)

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
        self.dtype = weights.dtype
        self.weight = weights.mapped("weight")
        self.scales = weights.mapped("scales")
        self.biases = weights.mapped("biases")
        self.kernel = None
        self.int8_activations = False  # set by device.round_activations
        if stored.multiplies(weights, quantization):
            self.scales, self.biases = stored.kernel_scales(self.scales), stored.kernel_scales(self.biases)
            self.kernel = stored.StoredProduct(self.weight, self.scales, self.biases, quantization)

    def forward(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        if self.kernel is not None and x.shape[0] <= stored.KERNEL_ROWS:
            return self.kernel(x)
        if self.kernel is not None and self.int8_activations:
            return self.kernel.int8(x)
        in_features = self.scales.shape[1] * self.group_size
        return blockwise_product(x, self.weight.shape[0], in_features, 1, self.dequantized)

    def dequantized(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """W^T of the rows [start, stop): [K, rows]."""
        if self.kernel is not None:
            return self.kernel.dequantized(start, stop, dtype).t()
        return self.rows(slice(start, stop), dtype).t()

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the weight, [T] -> [T, K], in the activations' dtype."""
        if self.kernel is not None:
            return self.kernel.embed(ids).to(self.dtype)
        return self.rows(ids, self.dtype)

    def rows(self, chosen: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Dequantized rows [n, K]."""
        codes = unpacked(self.weight[chosen], self.bits)
        scales, biases = self.scales[chosen].float(), self.biases[chosen].float()
        codes = codes.view(codes.shape[0], -1, self.group_size)
        return torch.addcmul(biases[..., None], codes.float(), scales[..., None]).flatten(1).to(dtype)

    def narrowed(self, rows: int | None, columns: int | None) -> "QuantizedLinear":
        """The layer over the first rows and columns, the latter whole groups; None is all of them."""
        words = None if columns is None else columns * self.bits // 32
        groups = None if columns is None else columns // self.group_size
        return self.over(self.weight[:rows, :words], self.scales[:rows, :groups], self.biases[:rows, :groups])

    def picked(self, rows: Ranges) -> "QuantizedLinear":
        """The layer over some ranges of rows, which are copied."""
        return self.over(*(joined(x, rows) for x in (self.weight, self.scales, self.biases)))

    def over(self, weight: Tensor, scales: Tensor, biases: Tensor) -> "QuantizedLinear":
        """The same layer over other rows and columns."""
        other = copy.copy(self)
        other.weight, other.scales, other.biases = weight, scales, biases
        if self.kernel is not None:
            other.kernel = self.kernel.over(weight, scales, biases)
        return other


class AdaptedLinear(nn.Module):
    """y = factor * (x W^T + x A^T B^T), beside a weight that stays as it is stored."""

    def __init__(self, layer: Any, down: Tensor, up: Tensor, factor: Tensor | None) -> None:
        """down: A [r, K]. up: B [N, r]. factor: [N], of DoRA."""
        super().__init__()
        self.layer: Any = layer
        self.down, self.up, self.factor = Linear(down), Linear(up), factor

    def forward(self, x: Tensor) -> Tensor:
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


class Recorder(nn.Module):
    """A linear layer that hands over the second moments of what it multiplies (g3n_mlx/calibration.py)."""

    def __init__(self, layer: Any, block_width: int, found: Callable[[list[np.ndarray]], None]) -> None:
        """block_width: columns of one matrix of moments. found: takes the sums of x x^T, float32, block by block."""
        super().__init__()
        self.layer, self.block_width, self.found = layer, block_width, found

    def forward(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        parts = (part.float() for part in x.split(self.block_width, dim=1))
        self.found([(part.T @ part).cpu().numpy() for part in parts])
        return self.layer(x)


def joined(x: Tensor, rows: Ranges) -> Tensor:
    """Ranges of the rows of [N, K], one behind the other."""
    return torch.cat([x[start:stop] for start, stop in rows])


def sliceable(layer: nn.Module, of_rows: bool) -> nn.Module:
    """The layer in a form whose first rows, or else columns, are views: most layers as they are."""
    if isinstance(layer, AdaptedLinear):
        return AdaptedLinear(sliceable(layer.layer, of_rows), layer.down.weight, layer.up.weight, layer.factor)
    if not isinstance(layer, PackedLinear):
        return layer
    slabs = Slabs(layer, of_rows)
    return SlabLinear(slabs, slabs.size)


def gives_rows(layer: "Linear | QuantizedLinear | PackedLinear") -> bool:
    """Whether `embed` works on the layer: a packed one has to consist of whole blocks."""
    return not isinstance(layer, PackedLinear) or layer.out_features % EMBED_BLOCK_ROWS[layer.packed.device.type]() == 0
