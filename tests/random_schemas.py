"""Random JSON schemas whose answers have an end: texts and lists of bounded length, nothing that names itself."""

from typing import Any

from hypothesis import strategies as st

NAMES = st.sampled_from(["a", "b c", "ü", 'q"', "long_name"])
VALUES = st.none() | st.booleans() | st.integers(-9, 99) | st.text("aé\n🙂", max_size=3)


@st.composite
def ranges(draw: st.DrawFn, kind: str, numbers: st.SearchStrategy[float]) -> dict[str, Any]:
    low, high = sorted([draw(numbers), draw(numbers)])
    return {"type": kind, "minimum": low, "maximum": high}


@st.composite
def strings(draw: st.DrawFn) -> dict[str, Any]:
    shortest = draw(st.integers(0, 3))
    return {"type": "string", "minLength": shortest, "maxLength": shortest + draw(st.integers(0, 3))}


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    fewest = draw(st.integers(0, 2))
    return {"type": "array", "items": draw(inner), "minItems": fewest, "maxItems": fewest + draw(st.integers(0, 2))}


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, inner, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMAS = st.recursive(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "pattern": "^[a-c]{1,3}x?$"}])
    | st.sampled_from([{"type": "string", "format": "date"}, {"type": ["null", "boolean"]}])
    | st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values})
    | VALUES.map(lambda value: {"const": value})
    | ranges("integer", st.integers(-1000, 1000))
    | strings(),
    lambda inner: (
        arrays(inner) | objects(inner) | st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some})
    ),
    max_leaves=5,
)

OBJECTS = objects(SCHEMAS)
