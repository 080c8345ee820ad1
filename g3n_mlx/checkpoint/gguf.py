"""What the header of a GGUF file says, llama.cpp's format: metadata, and where every tensor is.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from g3n_mlx.failures import BadValue

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32


# Axes that a tensor may have (ggml.h, GGML_MAX_DIMS).
_MAX_AXES = 4
# Arrays may hold arrays; llama.cpp writes none.
_MAX_DEPTH = 4


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor's bytes are."""

    shape: tuple[int, ...]  # the fastest axis last, so the reverse of what is written in the file
    kind: int  # ggml's number of the type, such as 12 for Q4_K
    offset: int  # bytes from the start of the file
    room: int  # bytes up to the next tensor, padding included


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensors' data."""

    metadata: dict[str, Any]  # of an array its length alone, unless arrays were asked for
    tensors: dict[str, GgufTensor]


def read_header(path: Path, arrays: bool = False) -> Header:
    """Reads a file's header; raises BadValue when it is no GGUF file or is cut off.

    arrays: reads metadata that are arrays too, as lists; a vocabulary takes half a second.
    """
    with path.open("rb") as file:
        reader = _Reader(file, path, arrays)
        try:
            return reader.header()
        except (struct.error, UnicodeDecodeError):
            raise reader.complaint() from None


class _Reader:
    def __init__(self, file: BinaryIO, path: Path, arrays: bool) -> None:
        self._file, self._path, self._arrays = file, path, arrays
        self._size = os.fstat(file.fileno()).st_size

    def complaint(self) -> BadValue:
        return BadValue(f"{self._path} is not a whole GGUF file of version 2 or 3")

    def header(self) -> Header:
        if self._file.read(4) != b"GGUF" or self._number("I") not in (2, 3):
            raise self.complaint()
        tensors, entries = self._count(), self._count()
        metadata = {self._string(): self._value(self._number("I")) for _ in range(entries)}
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name, axes = self._string(), self._number("I")
            if axes > _MAX_AXES or name in found:
                raise self.complaint()
            shape = tuple(self._number("Q") for _ in range(axes))[::-1]
            found[name] = (shape, self._number("I"), self._number("Q"))
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.complaint()
        start = -(-self._file.tell() // alignment) * alignment
        ordered = sorted(found, key=lambda name: found[name][2])
        ends = [*(found[name][2] for name in ordered[1:]), self._size - start] if ordered else []
        rooms = {name: end - found[name][2] for name, end in zip(ordered, ends, strict=True)}
        if min(rooms.values(), default=0) < 0:
            raise self.complaint()
        places = {
            name: GgufTensor(shape, kind, start + offset, rooms[name]) for name, (shape, kind, offset) in found.items()
        }
        return Header(metadata, places)

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth == _MAX_DEPTH:
            raise self.complaint()
        of, count = self._number("I"), self._count()
        if of not in _SCALARS:
            items = [self._value(of, depth + 1) for _ in range(count)]
            return items if self._arrays else count
        size = count * struct.calcsize(f"<{_SCALARS[of]}")
        if self._file.tell() + size > self._size:
            raise self.complaint()
        if self._arrays:
            return np.frombuffer(self._file.read(size), f"<{_SCALARS[of]}").tolist()
        self._file.seek(size, os.SEEK_CUR)
        return count

    def _string(self) -> str:
        length = self._count()
        return self._file.read(length).decode() if length else ""

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._file.read(struct.calcsize(f"<{letter}")))[0]

    def _count(self) -> int:
        """Of things that take a byte at least: more than the file has is none."""
        count: int = self._number("Q")
        if count > self._size:
            raise self.complaint()
        return count
