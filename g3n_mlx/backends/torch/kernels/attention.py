"""A prefill's attention through the kernels in C (g3n_mlx/kernels): on a CPU that multiplies bfloat16."""

import torch
from torch import Tensor

from g3n_mlx.backends.torch.kernels.stored import calls
from g3n_mlx.kernels import library

HEAD_MULTIPLE, MAX_HEAD = 32, 512
MAX_GROUP = 96  # heads of queries that share keys and values


def takes(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel attends: queries [1, N, T, H], keys and values [1, K, S, H]."""
    sequences, heads, _, head_dim = queries.shape
    return (
        all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in (queries, keys, values))
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (queries, keys, values)))
        and sequences == 1
        and heads % keys.shape[1] == 0
        and head_dim % HEAD_MULTIPLE == 0
        and head_dim <= MAX_HEAD
        and heads // keys.shape[1] <= MAX_GROUP
        and library.library() is not None
        and calls().g3n_attends()
    )


def attend(queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Queries [1, N, T, H] of the last T of the S positions of keys and values [1, K, S, H] -> [T, N * H]."""
    _, heads, rows, head_dim = queries.shape
    keys, values = (x if x.stride()[2:] == (head_dim, 1) else x.contiguous() for x in (keys, values))
    sequence = library.Sequence(
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        key_head_stride=keys.stride(1),
        value_head_stride=values.stride(1),
        length=keys.shape[2],
        rows=rows,
        first=0,
    )
    by_row = queries[0].transpose(0, 1).contiguous()  # as the projection left them
    out = queries.new_empty(rows, heads * head_dim)
    calls().g3n_attend(sequence, by_row.data_ptr(), heads, keys.shape[1], head_dim, window or 0, out.data_ptr())
    return out
