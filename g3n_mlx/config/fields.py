"""Config files as JSON objects: read from disk, and their fields one by one with errors that say where.

Fields have no defaults: a missing key is an error, never a guess.
"""

import json
from pathlib import Path
from typing import Any

from g3n_mlx.failures import BadValue, MissingFile


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises FileNotFoundError or ValueError with the path in the message."""
    if not path.is_file():
        raise MissingFile(f"{path} does not exist: is {path.parent} a model folder?")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadValue(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadValue(f"{path} holds a {type(value).__name__}, expected an object")
    return value


class Fields:
    """Typed access to one JSON object, with errors that say where the key should stand."""

    def __init__(self, raw: dict[str, Any], where: str):
        self._raw, self._where = raw, where

    def get(self, key: str) -> Any:
        """Any value; raises ValueError when the key is missing."""
        if key not in self._raw:
            raise BadValue(
                f"{self._where}: the key {key!r} is missing: copy it from the config.json of the model that this "
                "checkpoint was made from"
            )
        return self._raw[key]

    def integer(self, key: str, at_least: int = 0) -> int:
        """Raises ValueError when the value is not an integer, or too small."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise BadValue(f"{self._where}: {key} is {value!r}, expected an integer of at least {at_least}")
        return value

    def number(self, key: str) -> float:
        """Raises ValueError when the value is not a number."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadValue(f"{self._where}: {key} is {value!r}, expected a number")
        return float(value)

    def per_layer(self, key: str, layers: int, kind: type) -> tuple[Any, ...]:
        """A list with one entry per layer; older files write one scalar for all."""
        value = self.get(key)
        if value is None:  # the reference fills it in from numbers of its own
            raise BadValue(f"{self._where}: {key} is null, expected a value for every layer: write the list out")
        entries: list[Any] = value if isinstance(value, list) else [value] * layers
        if len(entries) != layers:
            raise BadValue(
                f"{self._where}: {key} has {len(entries)} entries, num_hidden_layers is {layers}; "
                "was the checkpoint sliced without its config?"
            )
        try:
            return tuple(kind(entry) for entry in entries)
        except (TypeError, ValueError):
            raise BadValue(f"{self._where}: {key} is {value!r}, expected {kind.__name__} entries") from None
