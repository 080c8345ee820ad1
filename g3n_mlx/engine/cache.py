"""Keys and values of one sequence: a growing cache for full attention, a bounded one for sliding attention.

Arrays are [1, K, S, H] of either backend, which gives the few functions that are spelled differently in it
(interface.KVArrays). What `update` returns is in the order of the positions. Only layers that own keys and values have
a cache (`TextConfig.kv_owners`). A full-attention layer keeps every row; a sliding one keeps its window and some spare
rows, so that the last MAX_TRIM_TOKENS can be forgotten at any time: a draft that was not accepted, or the end of a
prompt that another one does not share.
"""

from dataclasses import dataclass
from typing import Any

from g3n_mlx.config.text import SLIDING, TextConfig
from g3n_mlx.failures import BadValue
from g3n_mlx.interface import MAX_TRIM_TOKENS, KVArrays

# Rows a cache grows by, and the room a sliding one keeps after its window: one allocation or one move of the
# window every 256 tokens, as in mlx-lm's KVCache.
GROWTH_ROWS = 256

Array = Any  # of the backend


class KVCache:
    """Every key and value of a full-attention layer."""

    def __init__(self, arrays: KVArrays) -> None:
        self.offset = 0
        self.keys: Array = None  # [1, K, S, H]; None when it has seen no token
        self.values: Array = None
        self._arrays = arrays

    def update(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Appends [1, K, T, H]; returns all [1, K, offset + T, H]."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        if self.keys is None or self.keys.shape[2] < self.offset:
            rows = -(-self.offset // GROWTH_ROWS) * GROWTH_ROWS
            self.keys = self._arrays.grown(self.keys, keys, start, rows)
            self.values = self._arrays.grown(self.values, values, start, rows)
        self.keys[:, :, start : self.offset] = keys
        self.values[:, :, start : self.offset] = values
        return self.keys[:, :, : self.offset], self.values[:, :, : self.offset]

    @property
    def spare(self) -> int:
        """How many of the last tokens `trim` can forget."""
        return self.offset

    def trim(self, n: int) -> None:
        """Forgets the last n tokens; raises ValueError when there are fewer."""
        _check_trim(n, self.spare, self.offset)
        self.offset -= n

    def fork(self, length: int) -> "KVCache":
        """A cache of its own that holds the first `length` tokens, not evaluated yet."""
        other = KVCache(self._arrays)
        if self.keys is not None and length:
            rows = self._arrays.copied(self.keys, 0, length), self._arrays.copied(self.values, 0, length)
            other.update(*rows)
        return other

    def nbytes_at(self, tokens: int) -> int:
        """Bytes allocated once it holds so many tokens; one must have been seen, for its size."""
        assert self.keys is not None
        return self.nbytes // self.keys.shape[2] * -(-tokens // GROWTH_ROWS) * GROWTH_ROWS

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes


class SlidingKVCache:
    """The last keys and values of a sliding-attention layer: the `window - 1` before the next token, and spare rows.

    At least MAX_TRIM_TOKENS spare rows stay whenever older ones are dropped, so that as many of the tokens that came
    since the last `trim` can be forgotten at any time.
    """

    def __init__(self, window: int, arrays: KVArrays) -> None:
        self.offset = 0
        self.window = window
        self.length = 0  # rows in use
        self.keys: Array = None  # [1, K, S, H]; None when it has seen no token
        self.values: Array = None
        self._arrays = arrays

    def update(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Appends [1, K, T, H]; returns what the new tokens may see: [1, K, min(offset, window - 1) + T, H]."""
        new = keys.shape[2]
        shown = min(self.offset, self.window - 1) + new
        self.offset += new
        if self.keys is not None:
            if self.length + new <= self.keys.shape[2]:
                start, self.length = self.length, self.length + new
                self.keys[:, :, start : self.length] = keys
                self.values[:, :, start : self.length] = values
                first = self.length - shown
                return self.keys[:, :, first : self.length], self.values[:, :, first : self.length]
            first = max(0, self.length - self.kept_rows)
            keys = self._arrays.joined(self.keys[:, :, first : self.length], keys)
            values = self._arrays.joined(self.values[:, :, first : self.length], values)
        self._fill(keys, values)
        if shown <= self.length:  # its own rows: those that came in may be a buffer that is written again
            keys, values = self._rows()
        first = keys.shape[2] - shown
        return (keys[:, :, first:], values[:, :, first:]) if first else (keys, values)

    def _fill(self, keys: Array, values: Array) -> None:
        """Starts anew from the last rows of [1, K, S, H], leaving room to append."""
        self.length = min(keys.shape[2], self.kept_rows)
        rows = self.kept_rows + GROWTH_ROWS
        self.keys = self._arrays.grown(None, keys, 0, rows)
        self.values = self._arrays.grown(None, values, 0, rows)
        self.keys[:, :, : self.length] = keys[:, :, -self.length :]
        self.values[:, :, : self.length] = values[:, :, -self.length :]

    def _rows(self) -> tuple[Array, Array]:
        """All rows in use."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    @property
    def kept_rows(self) -> int:
        """Rows that stay when older ones are dropped."""
        return self.window - 1 + MAX_TRIM_TOKENS

    @property
    def spare(self) -> int:
        """How many of the last tokens `trim` can forget."""
        return self.offset if self.length == self.offset else self.length - (self.window - 1)

    def trim(self, n: int) -> None:
        """Forgets the last n tokens; raises ValueError when the window before them is gone."""
        _check_trim(n, self.spare, self.offset)
        self.offset -= n
        self.length -= n

    def saved(self) -> "Window":
        """A copy of the rows that stay when older ones are dropped, to come back to this offset; not evaluated yet."""
        if self.keys is None:
            return Window(self.offset, None, None)
        first = max(0, self.length - self.kept_rows)
        rows = (self._arrays.copied(array, first, self.length) for array in (self.keys, self.values))
        return Window(self.offset, *rows)

    def restored(self, saved: "Window") -> "SlidingKVCache":
        """A cache of its own at the offset of a saved window."""
        other = SlidingKVCache(self.window, self._arrays)
        if saved.keys is not None:
            other._fill(saved.keys, saved.values)
            other.offset = saved.offset
        return other

    def nbytes_at(self, tokens: int) -> int:
        """Bytes allocated once it holds so many tokens; one must have been seen, for its size."""
        return self.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True, slots=True)
class Window:
    """The rows [1, K, S, H] of a sliding layer that later tokens overwrite; None when it has seen no token."""

    offset: int
    keys: Array
    values: Array

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An offset and the windows of the sliding layers, by layer index; full-attention layers keep their own rows."""

    offset: int
    spare: int  # tokens before the offset that can be forgotten once back there
    windows: dict[int, Window]

    @property
    def nbytes(self) -> int:
        """Bytes of the copied rows."""
        return sum(window.nbytes for window in self.windows.values())


class Cache:
    """The caches of all layers that own keys and values, by layer index: one sequence's whole memory."""

    def __init__(self, config: TextConfig, arrays: KVArrays) -> None:
        self._config, self._arrays = config, arrays
        self.layers: dict[int, KVCache | SlidingKVCache] = {
            layer_idx: SlidingKVCache(config.sliding_window, arrays) if kind == SLIDING else KVCache(arrays)
            for layer_idx, kind in enumerate(config.layer_types[: config.first_kv_shared_layer])
        }

    @property
    def offset(self) -> int:
        """Tokens seen: the position of the next one."""
        return self.layers[0].offset

    @property
    def spare(self) -> int:
        """How many of the last tokens `trim` can forget."""
        return min(layer.spare for layer in self.layers.values())

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers."""
        return sum(layer.nbytes for layer in self.layers.values())

    def nbytes_at(self, tokens: int) -> int:
        """Bytes allocated once it holds so many tokens; one must have been seen, for its size."""
        return sum(layer.nbytes_at(tokens) for layer in self.layers.values())

    def trim(self, n: int) -> None:
        """Forgets the last n tokens; raises ValueError, with nothing forgotten, when `spare` is less."""
        _check_trim(n, self.spare, self.offset)
        for layer in self.layers.values():
            layer.trim(n)

    def snapshot(self) -> Snapshot:
        """The present offset with copies of the sliding windows, to come back to it."""
        windows = {idx: layer.saved() for idx, layer in self.layers.items() if isinstance(layer, SlidingKVCache)}
        # All at once: on a GPU every evaluation is waited for.
        self._arrays.evaluate([rows for w in windows.values() if w.keys is not None for rows in (w.keys, w.values)])
        spare = min(self.spare, MAX_TRIM_TOKENS) if windows else self.spare  # a saved window has no more
        return Snapshot(self.offset, spare, windows)

    def restore(self, snapshot: Snapshot) -> None:
        """Back to the offset of a snapshot of this cache. The tokens before it must be the same ones."""
        for layer_idx, layer in self.layers.items():
            if isinstance(layer, SlidingKVCache):
                self.layers[layer_idx] = layer.restored(snapshot.windows[layer_idx])
            else:
                layer.trim(layer.offset - snapshot.offset)

    def fork(self, snapshot: Snapshot) -> "Cache":
        """A cache of its own at the offset of a snapshot of this one, which stays as it is."""
        other = Cache(self._config, self._arrays)
        for layer_idx, layer in self.layers.items():
            if isinstance(layer, SlidingKVCache):
                other.layers[layer_idx] = layer.restored(snapshot.windows[layer_idx])
            else:
                other.layers[layer_idx] = layer.fork(snapshot.offset)
        filled = [layer for layer in other.layers.values() if layer.keys is not None]
        self._arrays.evaluate([rows for layer in filled for rows in (layer.keys, layer.values)])
        return other


def _check_trim(n: int, spare: int, offset: int) -> None:
    if not 0 <= n <= spare:
        raise BadValue(f"cannot trim {n} of {offset} cached tokens, at most {spare}")
