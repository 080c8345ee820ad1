"""What a KV cache asks of MLX (g3n_mlx/engine/cache.py). Arrays are [1, K, S, H]; updates are functional inside."""

from collections.abc import Sequence

import mlx.core as mx


def grown(old: mx.array | None, like: mx.array, used: int, rows: int) -> mx.array:
    """An array of `rows` rows shaped as `like`, beginning with the `used` rows of the old one."""
    new = mx.zeros((like.shape[0], like.shape[1], rows, like.shape[3]), like.dtype)
    if old is not None:
        new[:, :, :used] = old[:, :, :used]
    return new


def joined(first: mx.array, second: mx.array) -> mx.array:
    """Rows behind rows: [1, K, S, H], [1, K, T, H] -> [1, K, S + T, H]."""
    return mx.concatenate([first, second], axis=2)


def copied(rows: mx.array, start: int, end: int) -> mx.array:
    """Rows [start, end) of [1, K, S, H] in memory of their own."""
    # A product, since a slice alone would keep the whole buffer alive; times one is exact.
    return rows[:, :, start:end] * mx.array(1, rows.dtype)


def evaluate(arrays: Sequence[mx.array]) -> None:
    """Computes arrays whose work was put off, all in one go: a GPU is waited for once."""
    mx.eval(list(arrays))
