"""Tools: what the grammar lets through, how calls are found in an answer, and all of it by the official client."""

import json
import re

import jsonschema
import numpy as np
import openai
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_schemas import OBJECTS

from g3n_mlx.engine.grammar import GrammarError, Grammars
from g3n_mlx.prompt.tokenizer import Tokenizer
from g3n_mlx.server.messages import template_messages
from g3n_mlx.server.schemas.messages import Message
from g3n_mlx.server.tools.history import calls_text
from g3n_mlx.server.tools.offer import REQUIRED, Tools

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a town",
    "parameters": {
        "type": "object",
        "properties": {"town": {"enum": ["Bern", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["town", "days"],
    },
}
CLOCK = {"name": "get-time"}
FUNCTIONS = {function["name"]: function.get("parameters") for function in (WEATHER, CLOCK)}
IN_BERN = '{"name": "get_weather", "parameters": {"town": "Bern", "days": 3}}'
TIME = '{"name": "get-time", "parameters": {}}'
EOS = 1
NAMES = st.sampled_from(["f", "get_weather", "a.b-c", "search", "x" * 64])
TOOLS = st.dictionaries(NAMES, OBJECTS, min_size=1, max_size=3)


@pytest.fixture(scope="module")
def tokenizer(demo):
    return Tokenizer.from_folder(demo)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, tokenizer.vocab_size, (EOS,))


def offered(functions, *args, **options):
    return Tools([{"name": name, "parameters": schema} for name, schema in functions.items()], *args, **options)


def refused_at(constraint, tokenizer, text):
    """Where a grammar refuses a text: the count of characters before; None when it lets all of it through."""
    ids = tokenizer.encode(text)
    for index, token_id in enumerate([*ids, EOS]):
        try:
            constraint.push(token_id)
        except GrammarError:
            return len(tokenizer.decode(ids[:index]))
    return None


def walk(constraint, tokenizer, seed, begin=""):
    """Any answer that the masks let through, after some text; it ends where it may, once it is long."""
    generator = np.random.default_rng(seed)
    ids = tokenizer.encode(begin)
    for token_id in ids:
        constraint.push(token_id)
    for _ in range(3000):
        mask = constraint.mask()
        drawn = EOS if mask[EOS] and len(ids) > 200 else int(generator.choice(np.flatnonzero(mask)))
        constraint.push(drawn)
        if drawn == EOS:
            return tokenizer.decode(ids)
        ids.append(drawn)
    pytest.fail("the answer does not end")


def parsed(tools, *pieces, **options):
    """The text and the calls of an answer that comes in pieces."""
    parser = tools.parser(**options)
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    text, calls = "", []
    for delta in deltas:
        text += delta.get("content", "")
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["type"] == "function"
                calls.append((call["function"]["name"], ""))
            assert call["index"] == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + call["function"]["arguments"])
    assert parser.num_calls == len(calls)
    return text, calls


def check(calls, schemas):
    """Every call parses and validates."""
    assert calls
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), schemas[name])


# What the grammar lets through.


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(functions=TOOLS, seed=st.integers(0, 2**32), parallel=st.booleans(), data=st.data())
def test_any_walk_through_a_required_or_named_call_parses_and_validates(
    grammars, tokenizer, functions, seed, parallel, data
):
    named = data.draw(st.none() | st.sampled_from(sorted(functions)))
    tools = offered(functions, REQUIRED, named=named, parallel=parallel)
    text, calls = parsed(tools, walk(tools.constraint(grammars), tokenizer, seed))
    assert text == ""
    check(calls, functions)
    if named is not None:
        assert [name for name, _ in calls] == [named]
    elif not parallel:
        assert len(calls) == 1


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    functions=TOOLS,
    seed=st.integers(0, 2**32),
    before=st.sampled_from(["", "I look it up.\n", "```json\n", "One.\n\n```tool_code\n  ", "{}\n"]),
)
def test_a_call_that_is_begun_of_its_own_accord_validates_too(grammars, tokenizer, functions, seed, before):
    name = sorted(functions)[seed % len(functions)]
    tools = offered(functions)
    begin = before + f'{{"name": "{name}"'
    text, calls = parsed(tools, walk(tools.constraint(grammars), tokenizer, seed, begin))
    assert text == before.partition("```")[0]
    check(calls, functions)
    assert calls[0][0] == name


FREE = [
    "hello",
    "",
    IN_BERN,
    f"I look.\n{TIME}",
    f"```json\n{TIME}\n```",
    f"{TIME}\n{IN_BERN}",
    '{"name":"get-time","parameters":{}}',
    '{"name": "other", "parameters": {"town": 3}}',
    'it is {"name": "get-time", "parameters": 3}',
    "```python\nget_time()\n```",
    '[{"name": 1}]',
]
NOT_FREE = {
    IN_BERN.replace("Bern", "Paris"): "P",
    TIME + " bye": " bye",
    f"{TIME}\n\nbye": "\n\nbye",
    '{"name": "get-time", "arguments": {}}': "arguments",
    '{"name": "get-time", "parameters": {"zone": 1}}': '"zone',
    f"so\n  {IN_BERN}".replace("3", "30"): "0",
}


@pytest.mark.parametrize("text", FREE)
def test_an_answer_may_be_text_or_end_in_calls(grammars, tokenizer, text):
    assert refused_at(Tools([WEATHER, CLOCK]).constraint(grammars), tokenizer, text) is None


@pytest.mark.parametrize(("text", "wrong"), NOT_FREE.items())
def test_what_names_a_function_must_call_it(grammars, tokenizer, text, wrong):
    where = refused_at(Tools([WEATHER, CLOCK]).constraint(grammars), tokenizer, text)
    assert where is not None
    assert abs(where - text.rindex(wrong)) <= 3  # a token may begin before what is wrong


@pytest.mark.parametrize(
    ("text", "required", "alone", "named"),
    [
        (IN_BERN, True, True, True),
        (TIME, True, True, False),
        (f"{IN_BERN}\n{IN_BERN}", True, False, False),
        (f"{TIME}\n{IN_BERN}", True, False, False),
        ("hello", False, False, False),
        ("", False, False, False),
        (f"so\n{IN_BERN}", False, False, False),
        (f"```json\n{IN_BERN}\n```", False, False, False),
        ('{"name": "other", "parameters": {}}', False, False, False),
    ],
)
def test_what_required_and_named_choices_let_through(grammars, tokenizer, text, required, alone, named):
    choices = [{"choice": REQUIRED}, {"choice": REQUIRED, "parallel": False}, {"named": "get_weather"}]
    answers = [
        refused_at(Tools([WEATHER, CLOCK], **choice).constraint(grammars), tokenizer, text) is None
        for choice in choices
    ]
    assert answers == [required, alone, named]


@pytest.mark.parametrize(
    ("parameters", "arguments", "let_through"),
    [
        (None, "{}", True),
        (None, '{"a": 1}', False),
        ({}, '{"a": 1}', False),
        ({"type": "object"}, '{"a": 1}', True),  # any object
        ({"properties": {"a": {}}}, '{"a": 1}', True),
        ({"properties": {"a": {}}}, '{"b": 1}', False),
        ({"properties": {"a": {}}, "additionalProperties": True}, '{"b": 1}', True),
        ({"properties": {"a": {}}, "patternProperties": {"^b$": {}}}, '{"b": 1}', True),
        ({"properties": {"a": {}}, "allOf": [{"properties": {"b": {}}}]}, '{"b": 1}', True),
    ],
)
def test_arguments_are_those_that_are_listed(grammars, tokenizer, parameters, arguments, let_through):
    constraint = offered({"f": parameters}, REQUIRED).constraint(grammars)
    where = refused_at(constraint, tokenizer, f'{{"name": "f", "parameters": {arguments}}}')
    assert (where is None) == let_through


SHAPE = {"type": "object", "properties": {"n": {"type": "integer"}, "name": {"type": "string"}}, "required": ["n"]}
TREE = {
    "properties": {"tree": {"$ref": "#/$defs/tree"}, "itself": {"$ref": "#"}},
    "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
}


@pytest.mark.parametrize(
    ("text", "let_through"),
    [
        ('{"n": 3}', True),
        ('{"n":3, "name": "get_weather"}', True),
        (IN_BERN, True),
        (f"{TIME}\n{IN_BERN}", True),
        ('{"name": "f", "parameters": {"tree": [[], [[]]], "itself": {"tree": []}}}', True),
        ('{"name": "f", "parameters": {"tree": [3]}}', False),
        ('{"name": "f", "parameters": {"itself": 3}}', False),
        ('{"name": "get_weather", "parameters": {"town": "Bern"}}', False),
        ('{"name": "get_weather", "n": 3}', False),
        ('{"name": "other", "parameters": {}}', False),
        ('{"n": "a"}', False),
        (f"{IN_BERN}\nhello", False),
        ("hello", False),
    ],
)
def test_beside_a_schema_an_answer_is_json_of_it_or_calls(grammars, tokenizer, text, let_through):
    schema = {**SHAPE, "additionalProperties": False}
    constraint = Tools([WEATHER, CLOCK, {"name": "f", "parameters": TREE}]).constraint(grammars, schema)
    assert (refused_at(constraint, tokenizer, text) is None) == let_through


def integer_at(reference, **others):
    """An object whose `a` is an integer, by a reference."""
    return {"properties": {"a": {"$ref": reference}}, "$defs": {"x": {"type": "integer"}}, "required": ["a"], **others}


@pytest.mark.parametrize(
    ("parameters", "right", "wrong"),
    [
        (integer_at("#/$defs/x"), '{"a": 3}', '{"a": "b"}'),
        (integer_at("#foo", **{"$defs": {"x": {"$anchor": "foo", "type": "integer"}}}), '{"a": 3}', '{"a": "b"}'),
        (integer_at("#/$defs/x", **{"$id": "https://example.com/s"}), '{"a": 3}', '{"a": "b"}'),
        (
            {"properties": {"in": integer_at("#/$defs/x", **{"$id": "https://example.com/s"})}, "required": ["in"]},
            '{"in": {"a": 3}}',
            '{"in": {"a": "b"}}',
        ),
        (
            {"properties": {"a": {"const": {"$ref": "#/x"}}}, "required": ["a"]},
            '{"a": {"$ref": "#/x"}}',
            '{"a": {"$ref": "#/properties',
        ),
        ({"properties": {"a": {"enum": [{"$ref": "#"}]}}, "required": ["a"]}, '{"a": {"$ref": "#"}}', '{"a": 3}'),
        # Names of properties that are keywords elsewhere.
        (
            integer_at("", properties={"const": {"$ref": "#/$defs/x"}}, required=["const"]),
            '{"const": 3}',
            '{"const": "b"}',
        ),
        (integer_at("", properties={"$id": {"$ref": "#/$defs/x"}}, required=["$id"]), '{"$id": 3}', '{"$id": "b"}'),
    ],
)
def test_references_of_parameters_hold_beside_a_schema_too(grammars, tokenizer, parameters, right, wrong):
    tools = offered({"f": parameters})
    for content in (None, {**SHAPE, "additionalProperties": False}):
        for arguments, let_through in ((right, True), (wrong, False)):
            call = f'{{"name": "f", "parameters": {arguments}}}'
            assert (refused_at(tools.constraint(grammars, content), tokenizer, call) is None) == let_through


@pytest.mark.parametrize("options", [{"choice": REQUIRED}, {"named": "get-time"}])
def test_a_schema_changes_nothing_about_a_call_that_is_required(grammars, tokenizer, options):
    for text, let_through in ((TIME, True), ('{"n": 3}', False)):
        constraint = Tools([CLOCK], **options).constraint(grammars, SHAPE)
        assert (refused_at(constraint, tokenizer, text) is None) == let_through


@pytest.mark.parametrize("seed", range(4))
def test_tools_and_a_response_format_by_the_client(client, seed):
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "The weather in Bern?"}],
        tools=[{"type": "function", "function": {"name": "get_weather", **WEATHER}}],
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": SHAPE}},
        temperature=1,
        seed=seed,
        max_tokens=300,
    ).choices[0]
    if answer.finish_reason == "length":
        return
    if answer.message.tool_calls:
        check([(c.function.name, c.function.arguments) for c in answer.message.tool_calls], FUNCTIONS)
    else:
        jsonschema.validate(json.loads(answer.message.content), SHAPE)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_json_with_lines_like_calls_stays_whole_by_the_client(client, tokenizer, is_streamed):
    step = {"type": "object", "properties": {"name": {"const": "get-time"}, "parameters": {"const": {}}}}
    step |= {"required": ["name", "parameters"], "additionalProperties": False}
    steps = {"type": "array", "prefixItems": [step], "items": False, "minItems": 1}
    schema = {"type": "object", "properties": {"steps": steps}, "required": ["steps"], "additionalProperties": False}
    (newline,) = tokenizer.encode("\n")
    by_schema = dict.fromkeys(map(str, tokenizer.encode('"steps"')), 90)  # rather than calls of the tool
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Which steps?"}],
        tools=wired({"get-time": None}),
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        logit_bias={**by_schema, str(newline): 100},  # each item begins a line
        temperature=0,
        max_tokens=300,
        stream=is_streamed,
    )
    if is_streamed:
        deltas = [chunk.choices[0].delta for chunk in answer]
        assert not any(delta.tool_calls for delta in deltas)
        content = "".join(delta.content or "" for delta in deltas)
    else:
        assert answer.choices[0].message.tool_calls is None
        content = answer.choices[0].message.content
    assert "[\n" in content
    jsonschema.validate(json.loads(content), schema)


def test_strict_functions_are_kept_or_refused(grammars):
    """What llguidance can't keep is passed over, as clients expect, unless the function is strict."""
    unkept = {"name": "f", "parameters": {"properties": {"a": {"type": "array", "uniqueItems": True}}}}
    Tools([CLOCK, unkept]).constraint(grammars)
    with pytest.raises(GrammarError, match=r"the parameters of f: .*uniqueItems"):
        Tools([CLOCK, {**unkept, "strict": True}]).constraint(grammars)
    with pytest.raises(GrammarError, match=r"the parameters of g: .*look-around"):
        offered({"f": None, "g": {"properties": {"a": {"type": "string", "pattern": "(?=a)"}}}}).constraint(grammars)


@pytest.mark.parametrize(
    ("functions", "options", "reason"),
    [
        ([CLOCK, CLOCK], {}, "'get-time'; names must differ"),
        ([], {}, "no functions"),
        ([CLOCK], {"named": "other"}, "'other'; there are get-time"),
        ([{"name": "a b"}], {}, "'a b', expected"),
        ([{"name": "a", "parameters": {"type": "array"}}], {}, "the JSON schema of an object"),
        ([{"name": "a", "parameters": [1]}], {}, "the JSON schema of an object"),
    ],
)
def test_what_is_wrong_with_tools(functions, options, reason):
    with pytest.raises(ValueError, match=reason):
        Tools(functions, **options)


# How calls are found.

PARSED = [
    ("hello", "hello", []),
    (IN_BERN, "", [("get_weather", '{"town": "Bern", "days": 3}')]),
    (f"I look.\n{TIME}", "I look.\n", [("get-time", "{}")]),
    (f"```json\n{TIME}\n```", "", [("get-time", "{}")]),
    (f"a\n```json\n{TIME}\n{TIME}\n```\n", "a\n", [("get-time", "{}")] * 2),
    (f"{TIME}\n\n{IN_BERN}\nbye", "bye", [("get-time", "{}"), ("get_weather", '{"town": "Bern", "days": 3}')]),
    ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
    (f"it is {TIME}", f"it is {TIME}", []),
    (
        '{"name": "get-time", "parameters": {"a": "}\\"]{", "b": [{}]}}',
        "",
        [("get-time", '{"a": "}\\"]{", "b": [{}]}')],
    ),
    ("```json\n[1]\n```", "```json\n[1]\n```", []),
    ('{"name": "get-time", "par', '{"name": "get-time", "par', []),  # cut by max_tokens
    ('{"name": "get-time", "parameters": {"a": [1', "", [("get-time", '{"a": [1')]),
]


@pytest.mark.parametrize(("answer", "text", "calls"), PARSED)
def test_calls_and_text(answer, text, calls):
    tools = Tools([WEATHER, CLOCK])
    assert parsed(tools, answer) == (text, calls)
    assert parsed(tools, *answer) == (text, calls)


BERN_CALL = ("get_weather", '{"town": "Bern", "days": 3}')
JSON_PARSED = [
    (f'{{"steps": [\n{TIME}]}}', f'{{"steps": [\n{TIME}]}}', []),
    (f'{{"steps": [\n\n  {TIME},\n{IN_BERN}\n]\n}}', f'{{"steps": [\n\n  {TIME},\n{IN_BERN}\n]\n}}', []),
    (f"[{TIME}]", f"[{TIME}]", []),
    (f"[\n{TIME}", f"[\n{TIME}", []),  # cut by max_tokens
    (f"\n{TIME}", f"\n{TIME}", []),
    (f'{{"name":\n{TIME}}}', f'{{"name":\n{TIME}}}', []),
    (TIME, "", [("get-time", "{}")]),
    (f"{TIME}\n{IN_BERN}", "", [("get-time", "{}"), BERN_CALL]),
    ('{"n": 3}', '{"n": 3}', []),
]


@pytest.mark.parametrize(("answer", "text", "calls"), JSON_PARSED)
def test_json_stays_whole(answer, text, calls):
    tools = Tools([WEATHER, CLOCK])
    assert parsed(tools, answer, content_is_json=True) == (text, calls)
    assert parsed(tools, *answer, content_is_json=True) == (text, calls)


@settings(max_examples=200)
@given(
    is_json=st.booleans(),
    parts=st.lists(
        st.sampled_from(
            [IN_BERN, TIME, "\n", "```json\n", "\n```", "text", '{"name"', '{"name": "get-', " ", '"}', "```"]
        ),
        max_size=6,
    ),
    data=st.data(),
)
def test_the_pieces_of_an_answer_make_no_difference(is_json, parts, data):
    answer, tools = "".join(parts), Tools([WEATHER, CLOCK])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    pieces = [answer[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert parsed(tools, *pieces, content_is_json=is_json) == parsed(tools, answer, content_is_json=is_json)


def test_text_that_can_be_no_call_is_not_held_back():
    parser = Tools([CLOCK]).parser()
    assert parser.push("Hel") == [{"content": "Hel"}]
    assert parser.push("lo {") == [{"content": "lo {"}]
    assert parser.push("\n") == [{"content": "\n"}]
    assert parser.push('{"na') == []  # may be one
    assert parser.push("ture") == [{"content": '{"nature'}]


# What the model reads.


def test_the_convention_in_the_prompt():
    tools = Tools([WEATHER, CLOCK])
    lines = tools.system_text().split("\n")
    assert json.loads(lines[-2]) == WEATHER
    assert json.loads(lines[-1])["name"] == "get-time"
    assert "Now call a function." in Tools([CLOCK], REQUIRED).system_text()
    assert "Now call get-time." in Tools([CLOCK, WEATHER], named="get-time").system_text()
    assert "several" not in Tools([CLOCK], parallel=False).system_text()


def test_calls_and_results_in_the_prompt():
    call = {"id": "1", "function": {"name": "get_weather", "arguments": '{"town": "Bern", "days": 3}'}}
    broken = {"id": "2", "function": {"name": "get-time", "arguments": "{"}}
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    turns = template_messages(
        [
            Message(role="user", content="Well?"),
            Message(role="assistant", content="I look.", tool_calls=[call, broken]),
            Message(role="tool", tool_call_id="1", content="sunny"),
            Message(role="tool", tool_call_id="unknown", content=[{"type": "text", "text": "```\nnoon\n```"}, picture]),
        ],
        "SYSTEM",
    )
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    said, *calls = turns[2]["content"][0]["text"].split("\n\n", 1)
    assert said == "I look."
    assert calls == [f'{IN_BERN}\n{{"name": "get-time", "parameters": "{{"}}']
    assert turns[3]["content"][0]["text"] == (
        "Result of get_weather:\n```tool_output\nsunny\n```\n\n"
        "Result of the function:\n````tool_output\n```\nnoon\n```\n````"
    )
    assert turns[3]["content"][1]["type"] == "image_url"


def test_the_documented_convention_is_true(repository, model):
    """docs/tools.md shows what the model reads."""
    text = (repository / "docs/tools.md").read_text("utf-8")
    found = re.findall(r"<!-- test: ([a-z ]+) -->\n(`{3,})\n(.*?)\n\2\n", text, re.DOTALL)
    blocks = {name: block for name, _, block in found}
    functions = [json.loads(line) for line in blocks["system text"].split("\n")[-2:]]
    assert Tools(functions).system_text() == blocks["system text"]
    calls = [
        {"id": "1", "function": {"name": "get_weather", "arguments": '{"town": "Bern", "days": 3}'}},
        {"id": "2", "function": {"name": "get_time", "arguments": "{}"}},
    ]
    messages = [
        Message(role="user", content="Well?"),
        Message(role="assistant", content="I look.", tool_calls=calls),
        Message(role="tool", tool_call_id="1", content="sunny"),
        Message(role="tool", tool_call_id="2", content="12:30"),
    ]
    prompt = model.tokenizer.decode(model.prepare(template_messages(messages, None)).token_ids, skip_special=False)
    assert blocks["turns"] in prompt


# By the official client, over a socket.


def wired(functions):
    return [
        {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in functions.items()
    ]


def ask(client, functions=FUNCTIONS, **options):
    options = {"max_tokens": 300, "temperature": 1, "messages": [{"role": "user", "content": "Well?"}], **options}
    return client.chat.completions.create(model="default", tools=wired(functions), **options)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(functions=TOOLS, seed=st.integers(0, 99), parallel=st.booleans(), data=st.data())
def test_required_and_named_calls_of_the_model_validate(client, functions, seed, parallel, data):
    named = data.draw(st.none() | st.sampled_from(sorted(functions)))
    choice = "required" if named is None else {"type": "function", "function": {"name": named}}
    answer = ask(
        client, functions, tool_choice=choice, seed=seed, parallel_tool_calls=parallel, max_tokens=200
    ).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls or []]
    if answer.finish_reason == "length":  # then the last one was cut
        assert len(calls) < 2 or not check(calls[:-1], functions)
        return
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    check(calls, functions)
    assert len({call.id for call in answer.message.tool_calls}) == len(calls)
    if named is not None:
        assert [name for name, _ in calls] == [named]
    elif not parallel:
        assert len(calls) == 1


def test_streamed_deltas_add_up(client):
    options = {"tool_choice": "required", "seed": 3}
    whole = ask(client, **options).choices[0].message.tool_calls
    with client.chat.completions.stream(
        model="default",
        messages=[{"role": "user", "content": "Well?"}],
        tools=wired(FUNCTIONS),
        temperature=1,
        max_tokens=400,
        **options,
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert [(call.function.name, call.function.arguments) for call in final.message.tool_calls] == [
        (call.function.name, call.function.arguments) for call in whole
    ]
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [event.arguments for event in done] == [call.function.arguments for call in whole]
    assert sum(event.type == "tool_calls.function.arguments.delta" for event in events) > len(done)


def test_the_clients_own_models_of_arguments(client):
    class Order(pydantic.BaseModel):
        size: int = pydantic.Field(ge=1, le=3)
        kinds: list[bool] = pydantic.Field(max_length=2)

    answer = client.chat.completions.parse(
        model="default",
        messages=[{"role": "user", "content": "Two, please"}],
        tools=[openai.pydantic_function_tool(Order)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
        temperature=1,
        seed=1,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Order)


def test_a_conversation_with_calls(client, server):
    """A call, its result, and the next answer, for which tools may be there but none need be called."""
    messages = [{"role": "user", "content": "Well?"}]
    message = ask(client, tool_choice="required", seed=5).choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "42"} for call in message.tool_calls]
    for choice in ("auto", "none", "required"):
        answer = ask(client, messages=messages, tool_choice=choice, max_tokens=30)
        assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")
        if choice == "none":
            assert answer.choices[0].message.tool_calls is None
    with server.http() as http:
        tokens = http.post("/v1/tokenize", json={"messages": messages}).json()["tokens"]
        prompt = http.post("/v1/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert prompt.count("```tool_output\n42\n```") == len(message.tool_calls)


def test_refusals_say_why(client):
    unkept = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}
    wrong = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "text"}}}}}
    for tool, reason in ((unkept, '"not"'), (wrong, "Invalid type: text")):
        with pytest.raises(openai.BadRequestError, match="the parameters of f") as refused:
            client.chat.completions.create(
                model="default", messages=[{"role": "user", "content": "Well?"}], tools=[tool]
            )
        assert reason in refused.value.message
        assert refused.value.param == "tools"


@pytest.mark.parametrize("depth", [980, 990, 991, 992, 993, 1000, 5000])
def test_arguments_of_any_depth_come_back_into_the_prompt(depth):
    assert calls_text([("f", "[" * depth + "]" * depth)])


def test_an_open_schema_gets_no_properties_of_its_own(client):
    """Of twenty draws of a model that likes to go on, none has a property that the schema doesn't list."""
    listed = {"type": "object", "properties": {"in": {"type": "object", "properties": {"a": {"enum": [1, 2]}}}}}
    for seed in range(20):
        done = client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Write some JSON."}],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": listed}},
            temperature=2,
            seed=seed,
            max_tokens=200,
        )
        found = json.loads(done.choices[0].message.content)
        assert found.keys() <= {"in"}
        assert found.get("in", {}).keys() <= {"a"}
