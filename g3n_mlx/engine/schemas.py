"""JSON schemas before they become grammars: objects that are closed, and ranges as llguidance keeps them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

# With one of these a schema itself says which further properties an object may have ...
_FURTHER = {"additionalProperties", "unevaluatedProperties", "patternProperties"}
# ... and with these `properties` may not be the whole list.
_COMBINING = ("allOf", "anyOf", "oneOf", "if", "then", "else", "$ref", "dependentSchemas")
MAX_DEPTH = 64  # objects and lists inside each other


def closed(schema: Any) -> Any:
    """A copy of a schema in which objects that list their properties have no others, unless it says so itself.

    What a schema doesn't list its reader would drop, and a model could write it without end. An object stays open with
    `additionalProperties` or its like, where it requires what it doesn't list, and where several schemas describe it
    together: each of them would forbid what only another one lists.
    """
    if depth_of(schema) > MAX_DEPTH:  # no grammar is made of it
        return schema
    together = {id(part) for one in _every(schema) for part in _described_together(one, schema)}

    def close(one: Any) -> Any:
        if not isinstance(one, Mapping):
            return one
        copy = _with_inner(one, close)
        listed = one.get("properties")
        if isinstance(listed, Mapping) and not _FURTHER & one.keys() and id(one) not in together:
            required = one.get("required")
            if not isinstance(required, list | tuple) or all(name in listed for name in required):
                copy["additionalProperties"] = False
        return copy

    return close(schema)


def _every(schema: Any) -> Iterator[Mapping[str, Any]]:
    """All schemas inside a schema, and it itself; also what only looks like one, which does no harm."""
    level = [schema]
    while level:
        value = level.pop()
        if isinstance(value, Mapping):
            yield value
            level += value.values()
        elif _is_list(value):
            level += value


def _described_together(schema: Mapping[str, Any], whole: Any) -> list[Any]:
    """The schemas that describe one object together with others: the given one and those that it combines."""
    parts = [part for key in _COMBINING if key in schema for part in _parts(key, schema[key], whole)]
    all_of = schema.get("allOf")
    several = isinstance(all_of, list | tuple) and len(all_of) > 1
    return [schema, *parts] if parts and ("properties" in schema or several) else list[Any]()


def _parts(key: str, value: Any, whole: Any) -> list[Any]:
    if key == "$ref":
        return [schema_at(whole, value)] if isinstance(value, str) else []
    parts: list[Any] = [*value] if _is_list(value) else list(value.values()) if key == "dependentSchemas" else [value]
    targets = [part["$ref"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("$ref"), str)]
    return [*parts, *(schema_at(whole, target) for target in targets)]


def depth_of(schema: Any) -> int:
    """Levels of objects and lists inside each other."""
    depth, level = 1, [schema]
    while level := [inner for value in level for inner in inner_values(value)]:
        depth += 1
    return depth


def inner_values(value: Any) -> Iterable[Any]:
    """What an object or a list holds."""
    if isinstance(value, Mapping):
        return value.values()
    return value if _is_list(value) else ()


def schema_at(schema: Any, reference: str) -> Any:
    """What a reference names; the whole schema when it can't be told."""
    found = schema
    for step in unquote(reference).removeprefix("#").split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and name in found:
            found = found[name]
        elif _is_list(found) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return schema
    return found


def _with_inner(schema: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy of a schema, with a change made to every schema inside it."""
    copy = dict(schema)
    for key, value in schema.items():
        if key in _NAMED_SCHEMAS and isinstance(value, Mapping):
            copy[key] = {name: change(inner) for name, inner in value.items()}
        elif key in _SCHEMAS:
            copy[key] = [change(inner) for inner in value] if _is_list(value) else change(value)
    return copy


def with_kept_ranges(schema: Any) -> Any:
    """A copy of a schema whose ranges llguidance keeps.

    Of a range inside one unit, as above 0 and at most 0.5, llguidance 1.9 lets the whole number in although it is
    excluded: here such a range begins a billionth further in.
    """
    if not isinstance(schema, Mapping):
        return schema
    copy = _with_inner(schema, with_kept_ranges)
    low = [schema[key] for key in ("minimum", "exclusiveMinimum") if _is_bound(schema.get(key))]
    high = [schema[key] for key in ("maximum", "exclusiveMaximum") if _is_bound(schema.get(key))]
    if low and high and max(low) < min(high) <= max(low) + 1:
        if max(low) == schema.get("exclusiveMinimum"):
            copy["minimum"] = copy.pop("exclusiveMinimum") + 1e-9
        if min(high) == schema.get("exclusiveMaximum"):
            copy["maximum"] = copy.pop("exclusiveMaximum") - 1e-9
    return copy


# Where a schema has further schemas.
_SCHEMAS = {"items", "prefixItems", "additionalItems", "additionalProperties", "allOf", "anyOf", "oneOf"}
_NAMED_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_bound(value: Any) -> bool:
    """Whether it is a number, and so small that a billionth further is another one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6
