"""Safetensors files: headers, plain positional reads, and maps.

A read takes what is asked for into fresh memory. A map leaves it in the file: weights that a backend multiplies as they
are stored, and tables of which a run touches a few rows.
Format: safetensors, README.md ("Format").
"""

import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from g3n_mlx.checkpoint.files import weight_files
from g3n_mlx.config.fields import parse_json, shown
from g3n_mlx.failures import BadValue

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "BOOL": np.dtype("?"),
}

# The format's own limit on the header.
_MAX_HEADER_BYTES = 100_000_000
# Linux reads no more at a call than the device reads ahead, 128 KiB by default (mm/readahead.c, force_page_cache_ra):
# of a file of 2.9 GB, one call for 1.4 GB brought 0.6 %.
_READ_AHEAD_BYTES = 128 << 10


class Shard:
    """One open file. Reads are positional and may come from several threads."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("rb", buffering=0)
        # Windows has no pread: seek and read belong together.
        self._lock = threading.Lock()
        self._whole: weakref.ref[mmap.mmap] | None = None  # a map of the file, while a view of it is alive

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills a buffer of bytes from an offset in the file; raises ValueError where the file ends early."""
        with self._lock:
            self._file.seek(offset)
            while len(buffer):
                count = self._file.readinto(buffer)
                if not count:
                    raise BadValue(f"{self.path} ends early: was it changed while it was being read?")
                buffer = buffer[count:]

    def view(self, offset: int, num_bytes: int) -> np.ndarray:
        """Some bytes of the file as a read-only array, uint8 [num_bytes], left in the file.

        Its pages are read when they are first touched, shared by all processes that map the file, and count as
        resident memory, which the system takes back without writing. All views share one map, which ends with the last
        of them. While it lasts the file must stay as it is (it may be renamed or removed, on Windows neither): a
        process that touches what was cut off a mapped file is ended by the system. Raises ValueError where the file has
        become too short before that.
        """
        with self._lock:
            if os.fstat(self._file.fileno()).st_size < offset + num_bytes:
                raise BadValue(f"{self.path} ends early: was it changed while it was being read?")
            whole = self._whole() if self._whole is not None else None
            if whole is None or len(whole) < offset + num_bytes:
                whole = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
                self._whole = weakref.ref(whole)
        return np.frombuffer(whole, np.uint8, num_bytes, offset)

    def read_ahead(self, offset: int, num_bytes: int) -> None:
        """Has the system begin to read a range into its cache; on Linux alone."""
        for start in range(offset, offset + num_bytes, _READ_AHEAD_BYTES):
            count = min(_READ_AHEAD_BYTES, offset + num_bytes - start)
            os.posix_fadvise(self._file.fileno(), start, count, os.POSIX_FADV_WILLNEED)

    def release_pages(self) -> None:
        """Takes the pages that views have touched out of the process; what is still read comes back from the cache."""
        whole = self._whole() if self._whole is not None else None
        if whole is not None:
            _release(whole)

    def map(self, offset: int, num_bytes: int) -> tuple[mmap.mmap, int]:
        """A read-only map that covers a range, and the place of the range in it."""
        base = offset - offset % mmap.ALLOCATIONGRANULARITY
        place = offset - base
        return mmap.mmap(self._file.fileno(), place + num_bytes, access=mmap.ACCESS_READ, offset=base), place

    def close(self) -> None:
        """Closes the file; views and maps made before stay valid."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a read of the whole tensor returns."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: "BF16", "F32", "U32", ...


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor's bytes are."""

    shard: Shard
    offset: int  # bytes from the start of the file
    dtype: str  # as in the header: "BF16", "U32", ...
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class MappedTensor:
    """A two-dimensional tensor that stays on disk; its rows can be picked out of a memory map."""

    def __init__(self, stored: StoredTensor):
        self._map, place = stored.shard.map(stored.offset, stored.num_bytes)
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_RANDOM)  # rows are far apart: readahead would only waste I/O
        data = np.frombuffer(self._map, DTYPES[stored.dtype], prod(stored.shape), place)
        self._rows = data.reshape(stored.shape)

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """A copy of the rows named by ids."""
        return self._rows[ids]

    def release(self) -> None:
        """Releases the pages read so far; the file is read again when they are needed."""
        _release(self._map)


class OpenFiles:
    """The files of one folder, or of several, which several views read and the last one closes."""

    def __init__(self, shards: Sequence[Shard], others: "Sequence[OpenFiles]" = ()):
        """others: files that are held as long as these."""
        self._shards, self._others = shards, others
        for files in others:
            files.hold()
        self._holders = 0
        self._lock = threading.Lock()

    def release_pages(self) -> None:
        """As Shard.release_pages, for all of them."""
        for files in (*self._shards, *self._others):
            files.release_pages()

    def hold(self) -> None:
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        """Closes the files when nobody else holds them."""
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                for shard in self._shards:
                    shard.close()
                for files in self._others:
                    files.release()


def open_shards(folder: Path) -> tuple[list[Shard], dict[str, StoredTensor]]:
    """The open files of a checkpoint folder, and its tensors under the names on disk.

    Raises FileNotFoundError where there is nothing to read, ValueError for files that are damaged or contradict
    each other.
    """
    shards: list[Shard] = []
    tensors: dict[str, StoredTensor] = {}
    with ExitStack() as opened:
        for path in weight_files(folder):
            shard = Shard(path)
            opened.callback(shard.close)
            shards.append(shard)
            for name, stored in read_header(shard):
                if name in tensors:
                    raise BadValue(f"{name} is in both {tensors[name].shard.path.name} and {path.name} of {folder}")
                tensors[name] = stored
        opened.pop_all()
    return shards, tensors


def _release(mapped: mmap.mmap) -> None:
    """Takes a map's pages out of the process where the system asks for it.

    Windows trims a process by itself. macOS counts clean pages of files to no process and takes them back on demand,
    while this call would look at every page of the map, resident or not: 143,360 of them for E4B's table at 8 bits
    (xnu, osfmk/vm/vm_map.c, vm_map_msync).
    """
    if sys.platform == "linux":
        mapped.madvise(mmap.MADV_DONTNEED)


def read_header(shard: Shard) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a file by their names; raises ValueError where it is damaged."""
    path = shard.path
    size = path.stat().st_size
    advice = "download it again"
    if size < 8:
        raise BadValue(f"{path} is {size} bytes long, too short for a safetensors file: {advice}")
    prefix = bytearray(8)
    shard.read_into(0, memoryview(prefix))
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > _MAX_HEADER_BYTES:
        raise BadValue(f"{path} is not a safetensors file (perhaps a Git LFS pointer): {advice}")
    start = 8 + header_bytes
    if start > size:
        raise BadValue(f"{path} is truncated: {size} bytes, its header alone has {start}; {advice}")
    raw = bytearray(header_bytes)
    shard.read_into(8, memoryview(raw))
    try:
        header = parse_json(raw.decode("utf-8"), _without_duplicates)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise BadValue(f"{path} has a damaged header ({error}): {advice}") from None
    if not isinstance(header, dict):
        raise BadValue(f"{path} has a damaged header (expected an object): {advice}")
    end, used = start, start
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        stored = _stored_tensor(shard, start, name, entry)
        end = max(end, stored.offset + stored.num_bytes)
        used += stored.num_bytes
        yield name, stored
    if end != size:
        kind = "truncated" if size < end else "longer than its header says"
        raise BadValue(f"{path} is {kind}: {size} bytes, expected {end}; {advice}")
    if used != size:
        raise BadValue(f"{path}: the header's tensors overlap or leave gaps: {advice}")


def _stored_tensor(shard: Shard, start: int, name: str, entry: Any) -> StoredTensor:
    if not (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and _are_counts(entry.get("shape"))
        and _are_counts(entry.get("data_offsets"), 2)
    ):
        raise BadValue(f"{shard.path}: the header's entry for {name} is damaged: {shown(entry)}")
    dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in DTYPES:
        raise BadValue(f"{shard.path}: {name} has dtype {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    stored = StoredTensor(shard, start + first, dtype, shape)
    if stored.num_bytes != last - first:
        raise BadValue(f"{shard.path}: {name} has shape {shape} and dtype {dtype}, but {last - first} bytes")
    return stored


def _are_counts(value: Any, length: int | None = None) -> bool:
    return (
        isinstance(value, list)
        and (length is None or len(value) == length)
        and all(type(item) is int and item >= 0 for item in value)
    )


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise BadValue(f"{', '.join(twice[:10])} given twice")
    return found
