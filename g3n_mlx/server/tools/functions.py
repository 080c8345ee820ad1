"""A function that a request offers, and the JSON schemas that a call of it must fit."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from g3n_mlx.engine.schemas import closed
from g3n_mlx.failures import BadValue

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_NO_PARAMETERS: Mapping[str, Any] = {"properties": {}}
# The values of these keywords are data, where nothing is a reference ...
_DATA = {"const", "enum", "default", "examples"}
# ... and of these, objects whose keys are names, not keywords.
_SCHEMAS_BY_NAME = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}


@dataclass(frozen=True, slots=True)
class Function:
    """A function that the model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]  # the JSON schema of an object
    strict: bool  # refuse a schema with keywords that the grammar can't enforce, instead of ignoring them

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> "Function":
        """Reads OpenAI's `function` object; raises ValueError naming what is wrong with it."""
        name, parameters = fields.get("name"), fields.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise BadValue(f"a function's name is {name!r:.80}, expected 1 to 64 of the letters a-z A-Z 0-9 _ . -")
        if parameters is None or parameters == {}:
            parameters = _NO_PARAMETERS
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise BadValue(f"the parameters of {name} are {parameters!r:.80}, expected the JSON schema of an object")
        parameters = {"type": "object", **parameters}
        description = fields.get("description") or ""
        return Function(name, description, parameters, fields.get("strict") is True)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The schema that a call must fit: only the listed properties, unless the schema says more about others."""
        return closed(self.parameters)

    @property
    def call(self) -> Mapping[str, Any]:
        """The schema of a call as a whole."""
        properties = {"name": {"const": self.name}, "parameters": _moved(self.arguments, "#/properties/parameters")}
        return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}

    def line(self) -> str:
        """Its line of the system text."""
        described = {"description": self.description} if self.description else {}
        return json.dumps({"name": self.name, **described, "parameters": self.parameters}, ensure_ascii=False)


def _moved(schema: Any, pointer: str) -> Any:
    """A copy of a schema for use inside another one at a JSON pointer, with its own `$ref` pointers adjusted.

    A schema with an `$id` of its own stays as it is: its pointers are relative to itself wherever it stands.
    """
    if isinstance(schema, list | tuple):
        return [_moved(value, pointer) for value in schema]
    if not isinstance(schema, Mapping) or _has_id(schema):
        return schema
    return {key: _moved_value(key, value, pointer) for key, value in schema.items()}


def _moved_value(key: str, value: Any, pointer: str) -> Any:
    """The value of one keyword of a schema that moves."""
    if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
        return pointer + value[1:]
    if key in _DATA:
        return value
    if key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
        return {name: _moved(named, pointer) for name, named in value.items()}
    return _moved(value, pointer)


def _has_id(schema: Mapping[str, Any]) -> bool:
    """Whether pointers in a schema are relative to it; an `$id` that is a mere fragment, as of old, is an anchor."""
    identity = schema.get("$id")
    return isinstance(identity, str) and not identity.startswith("#")
