"""A checkpoint's tensors as MLX arrays: read by name, cast once."""

import mlx.core as mx
import numpy as np

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.source import RowTable


class Weights:
    """What a checkpoint holds below one module path; `at` goes down, leaf modules read."""

    def __init__(self, checkpoint: Checkpoint, dtype: mx.Dtype, device: mx.Device, path: str = "") -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.path = path

    def at(self, name: str | int) -> "Weights":
        """The weights of a submodule."""
        path = f"{self.path}.{name}" if self.path else str(name)
        return Weights(self.checkpoint, self.dtype, self.device, path)

    def tensor(self, name: str = "weight") -> mx.array:
        """A whole tensor in the activations' dtype."""
        return evaluated(self.stored(name).astype(self.dtype))

    def stored(self, name: str, start: int = 0, stop: int | None = None) -> mx.array:
        """Rows [start, stop) of a tensor in the dtype of the file."""
        return from_numpy(self.checkpoint.read(f"{self.path}.{name}", start, stop))

    def shape(self, name: str = "weight") -> tuple[int, ...]:
        """The shape of a tensor as stored."""
        return tuple(self.checkpoint.info(f"{self.path}.{name}").shape)

    def quantization(self) -> Quantization | None:
        """How this module's weight is stored; None if dense."""
        return self.checkpoint.quantization(self.path)

    def rows(self) -> RowTable:
        """The rows of this module's table, left on disk."""
        return self.checkpoint.rows(self.path)


def from_numpy(array: np.ndarray) -> mx.array:
    """A copy of the array on the device."""
    return mx.array(array)


def evaluated(array: mx.array) -> mx.array:
    """The array computed now, so that what it was cast from is freed."""
    mx.eval(array)
    return array
