"""Keys and values of one sequence: a growing cache for full attention, a bounded one for sliding attention.

Arrays are [1, K, S, H]; what `update` returns is in the order of the positions. Only layers that own keys and
values have a cache (`TextConfig.kv_owners`). `offset` is the only position in the program.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from g3n_mlx.config.text import SLIDING, TextConfig

# Rows a cache grows by, and the room a sliding one keeps behind its window: one allocation or one move of the
# window every 256 tokens, as in mlx-lm's KVCache.
GROWTH_ROWS = 256


class KVCache:
    """Every key and value of a full-attention layer."""

    def __init__(self) -> None:
        self.offset = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends [1, K, T, H]; returns all [1, K, offset + T, H]."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        if self.keys is None or self.keys.shape[2] < self.offset:
            rows = -(-self.offset // GROWTH_ROWS) * GROWTH_ROWS
            self.keys, self.values = grown(self.keys, keys, start, rows), grown(self.values, values, start, rows)
        assert self.values is not None
        self.keys[:, :, start : self.offset] = keys
        self.values[:, :, start : self.offset] = values
        return self.keys[:, :, : self.offset], self.values[:, :, : self.offset]

    def trim(self, n: int) -> None:
        """Forgets the last n tokens."""
        if not 0 <= n <= self.offset:
            raise ValueError(f"cannot trim {n} of {self.offset} cached tokens")
        self.offset -= n

    def fork(self, length: int) -> "KVCache":
        """A cache of its own that holds the first `length` tokens."""
        other = KVCache()
        if self.keys is not None and self.values is not None and length:
            other.update(self.keys[:, :, :length], self.values[:, :, :length])
        return other

    def nbytes_at(self, tokens: int) -> int:
        """Bytes allocated once it holds so many tokens; one must have been seen, for its size."""
        assert self.keys is not None
        return self.nbytes // self.keys.shape[2] * -(-tokens // GROWTH_ROWS) * GROWTH_ROWS

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes


class SlidingKVCache:
    """The last keys and values of a sliding-attention layer: at least the `window - 1` before the next token.

    A `trim` survives while that many rows before the new offset are still here: up to GROWTH_ROWS tokens back
    when they came one by one, none after a long prefill. Beyond it, it raises.
    """

    def __init__(self, window: int) -> None:
        self.offset = 0
        self.window = window
        self.length = 0  # rows in use
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends [1, K, T, H]; returns what the new tokens may see: [1, K, min(offset, window - 1) + T, H]."""
        new = keys.shape[2]
        seen = min(self.offset, self.window - 1)
        self.offset += new
        if self.keys is None or self.values is None:
            self.fill(keys, values)
            return keys, values
        if self.length + new <= self.keys.shape[2]:
            end = self.length + new
            self.keys[:, :, self.length : end] = keys
            self.values[:, :, self.length : end] = values
            self.length = end
            return self.keys[:, :, end - seen - new : end], self.values[:, :, end - seen - new : end]
        keys = torch.cat([self.keys[:, :, self.length - seen : self.length], keys], dim=2)
        values = torch.cat([self.values[:, :, self.length - seen : self.length], values], dim=2)
        self.fill(keys, values)
        return keys, values

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Starts anew from the last rows of [1, K, S, H], leaving room to append."""
        self.length = min(keys.shape[2], self.window)
        rows = self.window + GROWTH_ROWS
        self.keys = grown(None, keys, 0, rows)
        self.values = grown(None, values, 0, rows)
        self.keys[:, :, : self.length] = keys[:, :, -self.length :]
        self.values[:, :, : self.length] = values[:, :, -self.length :]

    def trim(self, n: int) -> None:
        """Forgets the last n tokens; raises ValueError when their window is gone."""
        if not 0 <= n <= self.offset or self.length - n < min(self.offset - n, self.window - 1):
            raise ValueError(f"cannot trim {n} of {self.offset} tokens: the window of {self.window} before is gone")
        self.offset -= n
        self.length -= n

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An offset and, by layer, a copy of the rows that a sliding cache needs to go on from there."""

    offset: int
    windows: dict[int, tuple[Tensor, Tensor] | None]

    @property
    def nbytes(self) -> int:
        """Bytes of the copied rows."""
        return sum(pair[0].nbytes + pair[1].nbytes for pair in self.windows.values() if pair is not None)


class Cache:
    """The caches of all owner layers of one sequence, by layer index."""

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self.layers = {
            layer_idx: SlidingKVCache(config.sliding_window) if kind == SLIDING else KVCache()
            for layer_idx, kind in enumerate(config.layer_types[: config.first_kv_shared_layer])
        }

    @property
    def offset(self) -> int:
        """Tokens seen: the position of the next one."""
        return self.layers[0].offset

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers."""
        return sum(layer.nbytes for layer in self.layers.values())

    def nbytes_at(self, tokens: int) -> int:
        """Bytes allocated once it holds so many tokens; one must have been seen, for its size."""
        return sum(
            layer.nbytes_at(tokens) if isinstance(layer, KVCache) else layer.nbytes for layer in self.layers.values()
        )

    def snapshot(self) -> Snapshot:
        """The present offset with copies of the sliding windows; full caches keep their own rows.

        One row more than the next token sees, so that the way leads also to the offset before.
        """
        windows = {}
        for layer_idx, layer in self.layers.items():
            if isinstance(layer, SlidingKVCache):
                start, end = max(0, layer.length - layer.window), layer.length
                windows[layer_idx] = None
                if layer.keys is not None and layer.values is not None and end > start:
                    windows[layer_idx] = copied(layer.keys, start, end), copied(layer.values, start, end)
        return Snapshot(self.offset, windows)

    def restore(self, snapshot: Snapshot, back: int = 0) -> None:
        """Back to a snapshot's offset, or 1 before it. Full caches still hold the rows, so they are trimmed."""
        for layer_idx, layer in self.layers.items():
            if isinstance(layer, SlidingKVCache):
                window = snapshot.windows[layer_idx]
                layer.length, layer.keys, layer.values = 0, None, None
                if window is not None:
                    layer.fill(*window)
                layer.offset = snapshot.offset
                layer.trim(back)
            else:
                layer.trim(layer.offset - snapshot.offset + back)

    def fork(self, snapshot: Snapshot, back: int = 0) -> "Cache":
        """A cache of its own at the offset of a snapshot of this one, or 1 before it; this one stays as it is."""
        other = Cache(self.config)
        for layer_idx, layer in self.layers.items():
            if isinstance(layer, KVCache):
                other.layers[layer_idx] = layer.fork(snapshot.offset)
        other.restore(snapshot, back)
        return other


def grown(old: Tensor | None, like: Tensor, used: int, rows: int) -> Tensor:
    """An array of `rows` rows shaped as `like`, beginning with the `used` rows of the old one."""
    new = like.new_empty(like.shape[0], like.shape[1], rows, like.shape[3])
    if old is not None:
        new[:, :, :used] = old[:, :, :used]
    return new


def copied(rows: Tensor, start: int, end: int) -> Tensor:
    """Rows [start, end) of [1, K, S, H] in memory of their own."""
    return rows[:, :, start:end].clone()
