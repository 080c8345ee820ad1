"""What a KV cache asks of PyTorch (g3n_mlx/engine/cache.py). Arrays are [1, K, S, H], updated in place."""

from collections.abc import Sequence

import torch
from torch import Tensor


def grown(old: Tensor | None, like: Tensor, used: int, rows: int) -> Tensor:
    """An array of `rows` rows shaped as `like`, beginning with the `used` rows of the old one."""
    new = like.new_empty(like.shape[0], like.shape[1], rows, like.shape[3])
    if old is not None:
        new[:, :, :used] = old[:, :, :used]
    return new


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Rows behind rows: [1, K, S, H], [1, K, T, H] -> [1, K, S + T, H]."""
    return torch.cat([first, second], dim=2)


def copied(rows: Tensor, start: int, end: int) -> Tensor:
    """Rows [start, end) of [1, K, S, H] in memory of their own."""
    return rows[:, :, start:end].clone()


def evaluate(arrays: Sequence[Tensor]) -> None:
    """Nothing is put off here."""
