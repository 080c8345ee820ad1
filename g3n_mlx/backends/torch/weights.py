"""A checkpoint's tensors as torch tensors."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from g3n_mlx.checkpoint import weights

Weights = weights.Weights[Tensor]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and as what tensors are made."""

    dtype: torch.dtype  # of the activations
    device: torch.device

    def placed(self, array: np.ndarray) -> Tensor:
        """A tensor on the device, in the dtype of the file; uint32 as int32 with the same bits."""
        return from_numpy(array).to(self.device)

    def cast(self, array: Tensor) -> Tensor:
        """A tensor in the activations' dtype."""
        return array.to(self.dtype)


def from_numpy(array: np.ndarray) -> Tensor:
    """A tensor over the array's memory; bfloat16 and uint32 go by their bits, which torch cannot take directly.

    Over a read-only array, a mapped file, writing to the tensor ends the process.
    """
    if array.dtype.name == "bfloat16":
        return from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    if array.dtype == np.uint32:
        array = array.view(np.int32)
    if not array.flags.writeable:  # torch knows no read-only tensors, and would warn
        address, _ = array.__array_interface__["data"]
        interface = {**array.__array_interface__, "data": (address, False)}
        array = np.asarray(SimpleNamespace(__array_interface__=interface, memory=array))  # keeps the memory
    return torch.from_numpy(array)
