"""A checkpoint's tensors as MLX arrays."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from g3n_mlx.checkpoint import weights

Weights = weights.Weights[mx.array]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and as what arrays are made."""

    dtype: mx.Dtype  # of the activations
    device: mx.Device

    def placed(self, array: np.ndarray) -> mx.array:
        """An array on the device, in the dtype of the file."""
        return from_numpy(array)

    def cast(self, array: mx.array) -> mx.array:
        """An array in the activations' dtype."""
        return evaluated(array.astype(self.dtype))


def from_numpy(array: np.ndarray) -> mx.array:
    """A copy of the array on the device."""
    return mx.array(array)


def evaluated(array: mx.array) -> mx.array:
    """The array computed now, so that what it was made from is freed and no later step computes it again."""
    mx.eval(array)
    return array
