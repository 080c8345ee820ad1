"""A checkpoint's tensors as torch tensors: read by name, cast once, placed on the device."""

import numpy as np
import torch
from torch import Tensor

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.source import RowTable


class Weights:
    """What a checkpoint holds below one module path; `at` goes down, leaf modules read."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, path: str = "") -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.path = path

    def at(self, name: str | int) -> "Weights":
        """The weights of a submodule."""
        path = f"{self.path}.{name}" if self.path else str(name)
        return Weights(self.checkpoint, self.dtype, self.device, path)

    def tensor(self, name: str = "weight") -> Tensor:
        """A whole tensor in the activations' dtype."""
        return self.stored(name).to(self.dtype)

    def stored(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor in the dtype of the file; uint32 as int32 with the same bits."""
        return from_numpy(self.checkpoint.read(f"{self.path}.{name}", start, stop)).to(self.device)

    def shape(self, name: str = "weight") -> tuple[int, ...]:
        """The shape of a tensor as stored."""
        return tuple(self.checkpoint.info(f"{self.path}.{name}").shape)

    def quantization(self) -> Quantization | None:
        """How this module's weight is stored; None if dense."""
        return self.checkpoint.quantization(self.path)

    def rows(self) -> RowTable:
        """The rows of this module's table, left on disk."""
        return self.checkpoint.rows(self.path)


def from_numpy(array: np.ndarray) -> Tensor:
    """A tensor over the array's memory; bfloat16 and uint32 go by their bits, which torch cannot take directly."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array.view(np.int32) if array.dtype == np.uint32 else array)
