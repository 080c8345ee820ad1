"""Answers kept to a schema, a regex or a Lark grammar, by the official client; and what is refused, with why."""

import json
import re
from enum import Enum

import jsonschema
import openai
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_schemas import SCHEMAS

HELLO = [{"role": "user", "content": "Hello"}]


def ask(client, **options):
    options = {"max_tokens": 200, "temperature": 1, "seed": 1, **options}
    return client.chat.completions.create(model="default", messages=HELLO, **options)


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "any", "schema": schema}}


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 99))
def test_answers_follow_their_schema(client, schema, seed):
    choice = ask(client, response_format=schema_format(schema), seed=seed).choices[0]
    if choice.finish_reason == "stop":  # else it was cut
        jsonschema.validate(json.loads(choice.message.content), schema)


def test_a_pydantic_model_of_the_client(client):
    class Colour(Enum):
        RED = "red"
        BLUE = "blue"

    class Shape(pydantic.BaseModel):
        colour: Colour
        sides: int = pydantic.Field(ge=3, le=8)
        big: bool | None

    answer = client.chat.completions.parse(
        model="default", messages=HELLO, response_format=Shape, temperature=1, seed=2, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Shape)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "text"}, "Invalid type: text"),
        ({"not": {"type": "string"}}, '"not"'),
        ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
        ({"type": "string", "format": "postcode"}, "Unknown format: postcode"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "Unsatisfiable"),
        ({"$ref": "#/$defs/missing"}, "does not exist"),
        ({"$ref": "https://example.com/schema.json"}, "does not fetch"),
        ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "use anyOf"),
        ({"enum": [f"{'long ' * 40}{number}" for number in range(1500)]}, "make it smaller"),
        (json.loads('{"items": ' * 80 + "{}" + "}" * 80), "64 levels deep"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_a_400_that_says_why(client, schema, reason):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, response_format=schema_format(schema))
    assert refused.value.param == "response_format"
    assert reason in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("kind", "value", "pattern"),
    [
        ("regex", r"[a-f]{3}-\d{2}", r"[a-f]{3}-\d{2}"),
        ("regex", "(rouge|vert|bleu foncé)!?", "(rouge|vert|bleu foncé)!?"),
        (
            "lark",
            'start: item ("," item){0,3}\nitem: /[a-z]{1,4}/ | "<" /[0-9]/ ">"',
            "([a-z]{1,4}|<[0-9]>)(,([a-z]{1,4}|<[0-9]>)){0,3}",
        ),
        ("lark", 'start: "sum: " sum\nsum: number "+" number\nnumber: /[1-9][0-9]?/', r"sum: [1-9][0-9]?\+[1-9][0-9]?"),
        ("lark", 'start: "v=" %json {"type": "boolean"}', "v=(true|false)"),
    ],
)
def test_grammars(client, kind, value, pattern):
    for seed in (1, 2):
        options = {"extra_body": {"grammar": {"type": kind, "value": value}}, "seed": seed}
        choice = ask(client, **options).choices[0]
        assert choice.finish_reason == "stop"
        assert re.fullmatch(pattern, choice.message.content), choice.message.content
        streamed = "".join(
            chunk.choices[0].delta.content or "" for chunk in ask(client, **options, stream=True) if chunk.choices
        )
        assert streamed == choice.message.content


def test_a_grammar_with_recursion_is_balanced(client):
    """Brackets of the model close as they were opened, however deep."""
    grammar = {"type": "lark", "value": 'start: "(" start ")" | "[" start "]" | "x"'}
    for seed in range(3):
        choice = ask(client, extra_body={"grammar": grammar}, seed=seed).choices[0]
        text = choice.message.content
        if choice.finish_reason == "stop":
            before, after = text.split("x")
            assert after == before[::-1].translate(str.maketrans("([", ")]"))


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("regex", "(", "the regex can't be used"),
        ("regex", "(?=a)b", "the regex can't be used"),
        ("lark", "start: nowhere", "nowhere"),
        ("lark", "begin: /a/", "start"),
        ("lark", "", "the grammar can't be used"),
        ("lark", "a" * 300_000, "make it smaller"),
        ("ebnf", "a", "regex"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_a_400_that_says_why(client, kind, value, reason):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, extra_body={"grammar": {"type": kind, "value": value}})
    assert refused.value.param.startswith("grammar")
    assert reason in refused.value.message
