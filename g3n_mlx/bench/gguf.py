"""What the header of a GGUF file says, llama.cpp's format: metadata, and the bytes of every tensor.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from g3n_mlx.failures import BadValue

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensors' data."""

    metadata: dict[str, Any]  # scalars and strings; of an array its length alone
    tensor_bytes: dict[str, int]  # as stored, up to the padding behind each


def read_header(path: Path) -> Header:
    """Reads a file's header; raises BadValue when it is no GGUF file or is cut off."""
    with path.open("rb") as file:
        reader = _Reader(file, path)
        try:
            return reader.header()
        except (struct.error, UnicodeDecodeError):
            raise reader.complaint() from None


def bytes_per_token(header: Header) -> int:
    """Stored bytes of the Gemma 3n weights that one decode step reads.

    Not the PLE table, of which it is a row, nor the keys' and values' projections of KV-sharing layers.
    """
    shared = header.metadata.get("gemma3n.attention.shared_kv_layers", 0)
    first_shared = header.metadata.get("gemma3n.block_count", 0) - shared

    def reads(name: str) -> bool:
        layer = re.match(r"blk\.(\d+)\.attn_[kv](_norm)?\.", name)
        return name != "per_layer_token_embd.weight" and (layer is None or int(layer[1]) < first_shared)

    return sum(size for name, size in header.tensor_bytes.items() if reads(name))


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._size = os.fstat(file.fileno()).st_size

    def complaint(self) -> BadValue:
        return BadValue(f"{self._path} is not a whole GGUF file of version 2 or 3")

    def header(self) -> Header:
        if self._file.read(4) != b"GGUF" or self._number("I") not in (2, 3):
            raise self.complaint()
        tensors, entries = self._count(), self._count()
        metadata = {self._string(): self._value(self._number("I")) for _ in range(entries)}
        starts: dict[str, int] = {}
        for _ in range(tensors):
            name = self._string()
            for _ in range(self._number("I")):
                self._number("Q")  # an axis
            self._number("I")  # type
            starts[name] = self._number("Q")
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.complaint()
        data_bytes = self._size - -(-self._file.tell() // alignment) * alignment
        ordered = sorted(starts, key=lambda name: starts[name])
        ends = [*(starts[name] for name in ordered[1:]), data_bytes]
        sizes = {name: end - starts[name] for name, end in zip(ordered, ends, strict=True)} if ordered else {}
        if min(sizes.values(), default=0) < 0:
            raise self.complaint()
        return Header(metadata, sizes)

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self.complaint()
        of, count = self._number("I"), self._count()
        if of in _SCALARS:
            self._skip(count * struct.calcsize(f"<{_SCALARS[of]}"))
        else:
            for _ in range(count):
                self._value(of)
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

    def _skip(self, count: int) -> None:
        if self._file.tell() + count > self._size:
            raise self.complaint()
        self._file.seek(count, os.SEEK_CUR)
