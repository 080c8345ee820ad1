"""Objects that list their properties have no others, unless the schema says so or several schemas describe them."""

import jsonschema
import pytest

from g3n_mlx.engine.schemas import closed

LISTED = {"type": "object", "properties": {"a": {"type": "integer"}}}
OTHER = {"type": "object", "properties": {"b": {"type": "integer"}}}
EXTRA = {"a": 1, "c": 2}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (LISTED, EXTRA),
        ({"type": "array", "items": LISTED}, [EXTRA]),
        ({"$ref": "#/$defs/x", "$defs": {"x": LISTED}}, EXTRA),
        ({"anyOf": [LISTED, {"type": "null"}]}, EXTRA),
        ({"type": "object", "properties": {"x": {"allOf": [LISTED]}}}, {"x": EXTRA}),
    ],
)
def test_what_is_not_listed_is_left_out(schema, value):
    jsonschema.validate(value, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, closed(schema))


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({**LISTED, "additionalProperties": True}, EXTRA),
        ({**LISTED, "additionalProperties": {"type": "integer"}}, EXTRA),
        ({**LISTED, "patternProperties": {"^c": {}}}, EXTRA),
        ({"type": "object"}, EXTRA),
        ({**LISTED, "required": ["c"]}, EXTRA),
        ({"allOf": [LISTED, OTHER]}, {"a": 1, "b": 2}),
        ({**LISTED, "allOf": [OTHER]}, {"a": 1, "b": 2}),
        ({**LISTED, "anyOf": [{"required": ["b"], **OTHER}, {"required": ["a"]}]}, {"a": 1, "b": 2}),
        ({**LISTED, "$ref": "#/$defs/x", "$defs": {"x": OTHER}}, {"a": 1, "b": 2}),
        ({"allOf": [{"$ref": "#/$defs/x"}, LISTED], "$defs": {"x": OTHER}}, {"a": 1, "b": 2}),
    ],
)
def test_open_objects_stay_open(schema, value):
    jsonschema.validate(value, closed(schema))


def test_a_schema_that_is_far_too_deep_is_left_to_its_own_error():
    schema: dict = {}
    for _ in range(5000):
        schema = {"properties": {"a": schema}}
    assert closed(schema) is schema
    assert closed(True) is True
