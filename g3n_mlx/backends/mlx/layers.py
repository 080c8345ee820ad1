"""Linear layers over dense and quantized weights. MLX multiplies by the stored form, so it is held as it is.

Scales and biases are held in the activations' dtype: float32 on MLX's CPU device (see device.py).
"""

import mlx.core as mx
from mlx import nn

from g3n_mlx.backends.mlx.weights import Weights, evaluated
from g3n_mlx.checkpoint.quantization import Quantization


def linear(weights: Weights) -> "Linear | QuantizedLinear":
    """The layer for a weight [N, K] in whatever form it is stored."""
    quantization = weights.quantization()
    return Linear(weights) if quantization is None else QuantizedLinear(weights, quantization)


class Linear(nn.Module):
    """y = x W^T with a dense W [N, K]."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weight = weights.tensor()

    def __call__(self, x: mx.array) -> mx.array:
        """[T, K] -> [T, N]."""
        return x @ self.weight.T

    def embed(self, ids: mx.array) -> mx.array:
        """Rows of the weight, [T] -> [T, K], in its dtype."""
        return self.weight[ids]


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
