"""What a prefill does number by number, through the kernels in C (g3n_mlx/kernels): on a CPU, where they are built."""

import torch
from torch import Tensor

from g3n_mlx.backends.torch.kernels.stored import calls
from g3n_mlx.kernels import library


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels take tensors that meet number by number."""
    given = [x for x in tensors if x is not None]
    return (
        given[0].device.type == "cpu"
        and given[0].dtype in (torch.bfloat16, torch.float32)
        and all(x.dtype == given[0].dtype for x in given)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in given))
        and library.library() is not None
    )


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis; any shape, kept."""
    x, columns = x.contiguous(), x.shape[-1]
    weight = None if weight is None else weight.contiguous()
    out, halves = torch.empty_like(x), x.dtype == torch.bfloat16
    address = None if weight is None else weight.data_ptr()
    calls().g3n_norm(x.data_ptr(), address, halves, x.numel() // columns, columns, eps, out.data_ptr())
    return out


def gated(gate: Tensor, up: Tensor, cutoff: Tensor | None) -> Tensor:
    """gelu(gate) * up, [T, F] each, in the gate's place; with a cutoff, of what lies above mean + cutoff * std."""
    gate, up, halves = gate.contiguous(), up.contiguous(), gate.dtype == torch.bfloat16
    sparse = cutoff is not None
    calls().g3n_gate(gate.data_ptr(), up.data_ptr(), halves, *gate.shape, sparse, float(cutoff) if sparse else 0.0)
    return gate
