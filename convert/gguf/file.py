"""A GGUF file whose tensors are read by rows."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from g3n_mlx.checkpoint.gguf import GgufTensor, Header, read_header
from g3n_mlx.convert.gguf.blocks import numbers, type_named
from g3n_mlx.failures import BadValue, MissingFile

# Rows of the PLE table that are looked at together for being zeros.
_TAIL_ROWS = 64

Rows = Callable[[int, int], np.ndarray]  # bytes of the rows [start, stop)


class GgufFile:
    """A GGUF file whose tensors are read by rows."""

    def __init__(self, path: Path, check: Callable[[Path, Header], None]) -> None:
        """check: raises ValueError where a header is of another kind of model than the one that is wanted."""
        if not path.is_file():
            raise MissingFile(f"{path} does not exist; give a GGUF file of a Gemma 3n")
        self.path = path
        self.header: Header = read_header(path, arrays=True)
        check(path, self.header)
        self._bytes = np.memmap(path, np.uint8, "r")
        self.kinds: Counter[str] = Counter()
        for name, tensor in self.header.tensors.items():
            self.kinds[self._check(name, tensor)] += 1

    def _check(self, name: str, tensor: GgufTensor) -> str:
        """The name of a tensor's type; raises ValueError where its rows can't be read."""
        known = type_named(tensor.kind)
        if known is None:
            raise BadValue(f"{self.path}: {name:.80} has a type that is not read (ggml's number {tensor.kind})")
        kind, block_size, block_bytes = known
        width = tensor.shape[-1] if tensor.shape else 1
        size = prod(tensor.shape) // block_size * block_bytes
        if not tensor.shape or width % block_size or not 0 < size <= tensor.room:
            raise BadValue(
                f"{self.path}: {name:.80} is {kind}{list(tensor.shape)}, for which the file has {tensor.room} bytes: "
                "it is damaged or cut off; download it again"
            )
        return kind

    def rows(self, name: str, shape: tuple[int, ...], first: int = 0) -> Rows:
        """Reads a tensor, or what follows `first` rows of it, as rows of a shape, in bytes; a vector's are elements."""
        tensor = self.header.tensors[name]
        known = type_named(tensor.kind)
        assert known is not None
        _, block_size, block_bytes = known
        return partial(self._read, tensor.offset, prod(shape[1:]) * block_bytes // block_size, first)

    def _read(self, offset: int, row_bytes: int, first: int, start: int, stop: int) -> np.ndarray:
        begin = offset + (first + start) * row_bytes
        return self._bytes[begin : begin + (stop - start) * row_bytes].reshape(stop - start, row_bytes)

    def rows_before_zeros(self, name: str) -> int:
        """Rows of a matrix but for those at its end that are zeros: the converter fills tables up with them."""
        tensor = self.header.tensors.get(name)
        if tensor is None or len(tensor.shape) != 2:
            raise BadValue(f"{self.path} has no matrix {name}: is it a whole Gemma 3n?")
        read, stop = self.rows(name, tensor.shape), tensor.shape[0]
        while stop:
            start = max(0, stop - _TAIL_ROWS)
            filled = np.flatnonzero(numbers(tensor.kind, read(start, stop)).any(axis=1))
            if len(filled):
                return start + int(filled[-1]) + 1
            stop = start
        raise BadValue(f"{self.path}: {name} holds zeros alone")
