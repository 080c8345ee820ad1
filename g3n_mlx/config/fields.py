"""Config files as JSON objects: read from disk, and their fields one by one with errors that say where.

Fields have no defaults: a missing key is an error, never a guess. Each is held to what its kind may be: what passes
here reaches array shapes, loops and the arithmetic of a model.
"""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from reprlib import Repr
from typing import Any, TypeGuard

from g3n_mlx.failures import BadValue, MissingFile

logger = logging.getLogger(__name__)

# Sizes are 32-bit integers and numbers float32 wherever they end up.
MAX_INTEGER = 2**31 - 1
MAX_NUMBER = 3e38
# Of what is listed one by one: a thousand layers are thirty times those of the largest Gemma 3n.
MAX_LAYERS = 1024

# A value as errors show it: a damaged file may hold any length and any depth.
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlist = 8


def shown(value: object) -> str:
    """A value of a config file in an error: its repr, cut short."""
    return _SHORT.repr(value)


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text; raises ValueError whatever is wrong with it, its depth included.

    pairs: makes objects of their keys and values; None makes dicts.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise BadValue("it is nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises FileNotFoundError or ValueError with the path in the message."""
    if not path.is_file():
        raise MissingFile(f"{path} does not exist: is {path.parent} a model folder?")
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, of UTF-8, or of an integer with thousands of digits
        raise BadValue(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadValue(f"{path} holds a {type(value).__name__}, expected an object")
    return value


class Fields:
    """Typed access to one JSON object, with errors that say where the key should stand."""

    def __init__(self, raw: Any, where: str):
        """Raises ValueError when raw is not an object."""
        if not isinstance(raw, dict):
            raise BadValue(f"{where} is {shown(raw)}, expected an object")
        self._raw: dict[str, Any] = raw
        self._where = where

    def get(self, key: str) -> Any:
        """Any value; raises ValueError when the key is missing."""
        if key not in self._raw:
            raise BadValue(
                f"{self._where}: the key {key!r} is missing: copy it from the config.json of the model that this "
                "checkpoint was made from"
            )
        return self._raw[key]

    def integer(self, key: str, at_least: int = 0, at_most: int = MAX_INTEGER) -> int:
        """Raises ValueError when the value is not an integer, too small or too large."""
        value = self.get(key)
        if not is_integer(value, at_least, at_most):
            bounds = f"of at least {at_least}" if at_most == MAX_INTEGER else f"from {at_least} to {at_most}"
            raise BadValue(f"{self._where}: {key} is {shown(value)}, expected an integer {bounds}")
        return value

    def number(self, key: str) -> float:
        """Raises ValueError when the value is not a number that float32 can hold."""
        value = self.get(key)
        if not is_number(value):
            raise BadValue(f"{self._where}: {key} is {shown(value)}, expected a finite number")
        return float(value)

    def positive(self, key: str, at_most: float = MAX_NUMBER) -> float:
        """A number above 0; raises ValueError otherwise."""
        value = self.get(key)
        if not is_number(value) or not 0 < value <= at_most:
            bounds = "above 0" if at_most == MAX_NUMBER else f"above 0 and at most {at_most:g}"
            raise BadValue(f"{self._where}: {key} is {shown(value)}, expected a number {bounds}")
        return float(value)

    def boolean(self, key: str) -> bool:
        """Raises ValueError when the value is neither true nor false."""
        value = self.get(key)
        if not isinstance(value, bool):
            raise BadValue(f"{self._where}: {key} is {shown(value)}, expected true or false")
        return value

    def per_layer(self, key: str, layers: int, kind: type, *, longer: bool = False) -> tuple[Any, ...]:
        """A list with one int, float or str per layer; older files write one scalar for all.

        longer: entries behind those of the last layer are left out.
        """
        value = self.get(key)
        if value is None:  # the reference fills it in from numbers of its own
            raise BadValue(f"{self._where}: {key} is null, expected a value for every layer: write the list out")
        entries: list[Any] = value if isinstance(value, list) else [value] * layers
        if longer and len(entries) > layers:
            logger.info("%s: %s has %d entries, the first %d are used", self._where, key, len(entries), layers)
            entries = entries[:layers]
        if len(entries) != layers:
            raise BadValue(
                f"{self._where}: {key} has {len(entries)} entries, num_hidden_layers is {layers}; "
                "was the checkpoint sliced without its config?"
            )
        if not all(_is_of(kind, entry) for entry in entries):
            raise BadValue(f"{self._where}: {key} is {shown(value)}, expected {kind.__name__} entries")
        return tuple(kind(entry) for entry in entries)


def _is_of(kind: type, entry: object) -> bool:
    if kind is int:
        return is_integer(entry)
    return is_number(entry) if kind is float else isinstance(entry, kind)


def is_integer(value: object, at_least: int = -MAX_INTEGER, at_most: int = MAX_INTEGER) -> bool:
    """Whether a JSON value is an integer in a range; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and at_least <= value <= at_most


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a number that float32 can hold."""
    if isinstance(value, float):
        return math.isfinite(value) and abs(value) <= MAX_NUMBER
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
