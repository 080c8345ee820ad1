"""What is kept of a tensor on disk: reads of its rows into memory, and tables that stay on disk."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from g3n_mlx.checkpoint.low_rank import LowRank
from g3n_mlx.checkpoint.quantization import Quantization, dequantize, to_float32
from g3n_mlx.checkpoint.shards import DTYPES, MappedTensor, Shard, StoredTensor

# Ranges [start, stop) along one axis, ascending.
Ranges = tuple[tuple[int, int], ...]

# Gaps of a page or more between kept columns are skipped; shorter ones are read along, for the disk reads whole pages.
_PAGE_BYTES = 4096
# Rows that are read whole and then cut, per block.
_BLOCK_BYTES = 1 << 20
# Mapped pages that may stay resident before they are released, ...
_MAPPED_BYTES = 32 << 20
# ... and what one touched row can map: Linux keeps large files in pieces of up to this size and maps a piece whole
# (measured with 512 rows of E4B's table at 8 bits: 300 MB resident; 64 KiB per row would have been 32 MB).
_TOUCH_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """A readable tensor: where it is stored, what is kept of it, and how its axes lie on disk."""

    stored: StoredTensor
    shape: tuple[int, ...]  # as read
    rows: Ranges | None = None  # kept rows
    columns: Ranges | None = None  # kept columns in stored units: words of packed codes, or scales, one per group
    axes: tuple[int, ...] | None = None  # the transposition from the stored to the published order
    absent: bool = False  # not on disk: reads as zeros
    low_rank: LowRank | None = None  # of an adapter that is merged while the tensor is read, which gives float32

    @property
    def dtype_name(self) -> str:
        """As safetensors spells it, of what is read."""
        return self.stored.dtype if self.low_rank is None else "F32"

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.dtype_name]

    @property
    def num_bytes(self) -> int:
        """Size of what is kept, as it is stored."""
        return prod(self.shape) * DTYPES[self.stored.dtype].itemsize

    def narrowed(self, rows: Ranges | None, columns: Ranges | None) -> "Source":
        """Some rows and columns of what is kept here; None is all of them."""
        shape = list(self.shape)
        for axis, kept in enumerate((rows, columns)):
            if kept is not None:
                shape[axis] = sum(stop - start for start, stop in kept)
        low_rank = None if self.low_rank is None else self.low_rank.narrowed(rows, columns)
        kept_rows, kept_columns = _within(self.rows, rows), _within(self.columns, columns)
        return replace(self, shape=tuple(shape), rows=kept_rows, columns=kept_columns, low_rank=low_rank)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of what is kept, in memory of their own."""
        length = self.shape[0] if self.shape else 1
        stop = length if stop is None else stop
        assert 0 <= start <= stop <= length, (start, stop, length)
        if self.absent:
            return np.zeros((stop - start, *self.shape[1:]), self.dtype)
        array = _read_rows(self, start, stop)
        array = array if self.axes is None else np.ascontiguousarray(array.transpose(self.axes))
        return array if self.low_rank is None else self.low_rank.merged(array, start)

    def mapped(self) -> np.ndarray | None:
        """What is kept as a read-only view of the file (`Shard.view`), its rows perhaps apart; None where it is none.

        That is so for kernels turned to another order of axes, rows or columns from several places, tensors that are
        empty, absent or not aligned to the size of their numbers, and weights that an adapter is merged into.
        """
        stored = self.stored
        if self.absent or self.axes is not None or not self.num_bytes or stored.offset % self.dtype.itemsize:
            return None
        if self.low_rank is not None:
            return None
        if any(ranges is not None and len(ranges) != 1 for ranges in (self.rows, self.columns)):
            return None
        array = stored.shard.view(stored.offset, stored.num_bytes).view(self.dtype).reshape(stored.shape)
        if self.rows is not None:
            array = array[slice(*self.rows[0])]
        return array if self.columns is None else array[:, slice(*self.columns[0])]


class RowTable:
    """Rows of a table on disk, gathered from a memory map and dequantized after the gather.

    Touched pages are released from time to time, so a long run does not make the table resident.
    """

    def __init__(self, sources: list[Source], quantization: Quantization | None):
        self.num_rows, columns = sources[0].shape
        self.width = columns if quantization is None else columns * 32 // quantization.bits
        self._quantization = quantization
        self._columns = [source.columns for source in sources]
        self._maps = [MappedTensor(source.stored) for source in sources]
        self._rows_per_step = max(1, _MAPPED_BYTES // (_TOUCH_BYTES * len(sources)))
        self._touched_rows = 0

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """The rows of ids [n], float32 [n, width]; an id outside the table is an IndexError."""
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_rows:
            raise IndexError(f"ids from {ids.min()} to {ids.max()}, the table has {self.num_rows} rows")
        gathered = np.empty((len(ids), self.width), np.float32)
        for start in range(0, len(ids), self._rows_per_step):
            step = slice(start, start + self._rows_per_step)
            gathered[step] = self._gather_some(ids[step])
        return gathered

    def _gather_some(self, ids: np.ndarray) -> np.ndarray:
        parts = []
        for mapped, columns in zip(self._maps, self._columns, strict=True):
            rows = mapped.gather(ids)
            parts.append(rows if columns is None else np.concatenate([rows[:, a:b] for a, b in columns], axis=1))
        self._touched_rows += len(ids)
        if self._touched_rows >= self._rows_per_step:
            for mapped in self._maps:
                mapped.release()
            self._touched_rows = 0
        if self._quantization is None:
            return to_float32(parts[0])
        packed, scales, biases = parts
        return dequantize(packed, scales, biases, self._quantization.bits, self._quantization.group_size)


def _read_rows(source: Source, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of what is kept, axes as stored."""
    stored = source.stored
    dtype = DTYPES[stored.dtype]
    row_bytes = prod(stored.shape[1:]) * dtype.itemsize
    spans = None
    if source.columns is not None:
        spans = [(first * dtype.itemsize, last * dtype.itemsize) for first, last in source.columns]
    kept_bytes = row_bytes if spans is None else sum(last - first for first, last in spans)
    out = np.empty((stop - start, kept_bytes), np.uint8)
    filled = 0
    for first, last in _runs(source.rows, start, stop):
        offset = stored.offset + first * row_bytes
        target = out[filled : filled + last - first]
        if spans is None:
            stored.shard.read_into(offset, target.reshape(-1).data)
        else:
            _read_spans(stored.shard, offset, row_bytes, spans, target)
        filled += last - first
    columns = stored.shape[1:] if source.columns is None else (kept_bytes // dtype.itemsize,)
    return out.reshape(-1).view(dtype).reshape((stop - start, *columns) if stored.shape else ())


def _within(outer: Ranges | None, inner: Ranges | None) -> Ranges | None:
    """Ranges that count what `outer` keeps, as ranges of what is stored."""
    if outer is None or inner is None:
        return inner if outer is None else outer
    return tuple(run for start, stop in inner for run in _runs(outer, start, stop))


def _runs(rows: Ranges | None, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) of the kept ones as ranges of stored rows."""
    if rows is None:
        yield start, stop
        return
    passed = 0
    for first, last in rows:
        begin, end = max(start - passed, 0), min(stop - passed, last - first)
        if begin < end:
            yield first + begin, first + end
        passed += last - first


def _read_spans(shard: Shard, offset: int, row_bytes: int, spans: list[tuple[int, int]], out: np.ndarray) -> None:
    """Fills out [n, kept bytes] with some byte ranges of n rows."""
    edges = [0, *(edge for span in spans for edge in span), row_bytes]
    widest_gap = max(last - first for first, last in zip(edges[::2], edges[1::2], strict=True))
    if widest_gap >= _PAGE_BYTES:
        for row in range(len(out)):
            filled = 0
            for first, last in spans:
                shard.read_into(offset + row * row_bytes + first, out[row, filled : filled + last - first].data)
                filled += last - first
        return
    step = max(1, _BLOCK_BYTES // row_bytes)
    for row in range(0, len(out), step):
        whole = np.empty((min(step, len(out) - row), row_bytes), np.uint8)
        shard.read_into(offset + row * row_bytes, whole.reshape(-1).data)
        np.concatenate([whole[:, first:last] for first, last in spans], axis=1, out=out[row : row + len(whole)])
