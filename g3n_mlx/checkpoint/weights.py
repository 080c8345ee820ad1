"""A checkpoint's tensors by module path, as the arrays of a backend."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from g3n_mlx.checkpoint.folder import Changes, Checkpoint
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.source import RowTable

Array = TypeVar("Array")


class Placement(Protocol[Array]):
    """Where and as what a backend's arrays are made (backends/*/weights.py)."""

    @property
    def dtype(self) -> Any:
        """Of the activations."""
        ...

    @property
    def device(self) -> Any:
        """The backend's device."""
        ...

    def placed(self, array: np.ndarray) -> Array:
        """An array on the device, in the dtype of the file."""
        ...

    def cast(self, array: Array) -> Array:
        """An array in the activations' dtype."""
        ...


class Weights(Generic[Array]):
    """What a checkpoint holds below one module path; `at` goes down, leaf modules read."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        placement: Placement[Array],
        path: str = "",
        loaded: Callable[[str], Any] | None = None,
        changes: Changes | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.placement = placement
        self.path = path
        self._loaded, self._changes = loaded, changes

    @property
    def dtype(self) -> Any:
        """Of the activations."""
        return self.placement.dtype

    @property
    def device(self) -> Any:
        """Where the arrays are."""
        return self.placement.device

    def at(self, name: str | int) -> "Weights[Array]":
        """The weights of a submodule."""
        path = f"{self.path}.{name}" if self.path else str(name)
        return Weights(self.checkpoint, self.placement, path, self._loaded, self._changes)

    def sharing(self, loaded: Callable[[str], Any], changes: Changes | None = None) -> "Weights[Array]":
        """The same weights for a slice of a loaded model, or for that model with an adapter.

        loaded: what it shares with that model at a module path. changes: the adapter's.
        """
        return Weights(self.checkpoint, self.placement, self.path, loaded, changes or Changes({}, {}))

    def reopened(self) -> "Weights[Array]":
        """The same weights over files that stay open as long as these are held."""
        return Weights(self.checkpoint.again(), self.placement, self.path)

    def shared(self, parts: Sequence[str] = ()) -> Any:
        """This module, as the loaded model that a slice is taken from holds it, or a view of it; None: read the files.

        It is a module of the backend. A linear layer is shared without what an adapter adds to it (`low_rank`).
        parts: of a module that stands for several beside it, their names.
        """
        if self._loaded is None:
            return None
        assert self._changes is not None
        parent, _, name = self.path.rpartition(".")
        below = tuple(f"{parent}.{part}." for part in parts or [name])
        if any(changed.startswith(below) for changed in (*self._changes.tensors, *self._changes.low_ranks)):
            return None
        return self._loaded(self.path)

    def low_rank(self) -> tuple[Array, Array, Array | None] | None:
        """What an adapter adds beside this module's weight: A [r, K], B [N, r] and the factors [N], if there are any.

        What the loaded model has added already is left out.
        """
        found = (self.checkpoint if self._changes is None else self._changes).low_ranks.get(self.path)
        if found is None:
            return None
        placed = [self.placement.cast(self.placement.placed(x)) for x in (found.down, found.up)]
        factor = None if found.factor is None else self.placement.cast(self.placement.placed(found.factor))
        return placed[0], placed[1], factor

    def tensor(self, name: str = "weight") -> Array:
        """A whole tensor in the activations' dtype; it may be a view of the file and must not be written to."""
        array = self.checkpoint.mapped(f"{self.path}.{name}")
        if array is None or not array.flags.c_contiguous:
            return self.placement.cast(self.stored(name))
        return self.placement.cast(self.placement.placed(array))

    def mapped(self, name: str = "weight") -> Array:
        """A whole tensor in the dtype of the file, left in the file where that can be, and not to be written to.

        Of a slice its rows may lie apart: a prefix of the columns is a view too. What can't be viewed is read
        (`Source.mapped`), and a device with memory of its own gets a copy.
        """
        array = self.checkpoint.mapped(f"{self.path}.{name}")
        return self.stored(name) if array is None else self.placement.placed(array)

    def stored(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows [start, stop) of a tensor in the dtype of the file."""
        return self.placement.placed(self.checkpoint.read(f"{self.path}.{name}", start, stop))

    def shape(self, name: str = "weight") -> tuple[int, ...]:
        """The shape of a tensor as stored."""
        return tuple(self.checkpoint.info(f"{self.path}.{name}").shape)

    def quantization(self) -> Quantization | None:
        """How this module's weight is stored; None if dense."""
        return self.checkpoint.quantization(self.path)

    def rows(self) -> RowTable:
        """The rows of this module's table, left on disk."""
        return self.checkpoint.rows(self.path)
