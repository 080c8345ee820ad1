"""Chat completions by the official client over a socket: every field that the endpoint knows."""

import json
import re

import jsonschema
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# As random as a trained model gets.
FREE = {"temperature": 5, "top_p": 1, "extra_body": {"top_k": 0}}
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Bern", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["town", "days"],
            "additionalProperties": False,
        },
    },
}
BAD = {"type": 3}
CLOCK = {"type": "function", "function": {"name": "get_time"}}


def ask(client, messages=HELLO, **options):
    return client.chat.completions.create(
        **{"model": "default", "messages": messages, "max_tokens": 12, "temperature": 0, **options}
    )


def text_of(chunks, index=0):
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == index)


def endless(model):
    """An option that keeps an answer from ending before its limit."""
    return {"logit_bias": {str(token_id): -100 for token_id in model.eos_token_ids}}


def test_the_answer_is_the_models_own(client, model):
    answer = ask(client)
    expected = model.generate("Hello", max_tokens=12, temperature=0.0)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    usage = answer.usage
    assert usage.prompt_tokens == expected.usage.prompt_tokens
    assert usage.completion_tokens == expected.usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.avg_prompt_tok_per_sec > 0
    assert (usage.avg_compl_tok_per_sec > 0) == (usage.completion_tokens > 1)
    assert usage.time_to_first_token_s > 0


def test_a_stream_is_the_same_answer_in_pieces(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert text_of(chunks) == whole.choices[0].message.content
    *others, last = chunks
    assert others[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert [c.choices[0].finish_reason for c in others[:-1]] == [None] * (len(others) - 1)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {last.id}
    assert all(chunk.usage is None for chunk in ask(client, stream=True))


def test_a_stream_ends_with_done(server):
    body = {"messages": HELLO, "max_tokens": 2, "stream": True}
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_content_as_parts_roles_and_turns_are_one_prompt(client, model):
    """Strings and parts, developer and system, several turns of one role: what the model reads is the same."""
    one = [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "A\n\nB"},
        {"role": "assistant", "content": "C"},
        {"role": "user", "content": "D\n\nNow loudly.\n\nE"},
    ]
    other = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "A"}]},
        {"role": "user", "content": "B"},
        {"role": "assistant", "content": "C"},
        {"role": "user", "content": "D"},
        {"role": "system", "content": "Now loudly."},
        {"role": "user", "content": "E"},
    ]
    answers = [ask(client, messages) for messages in (one, other)]
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens == len(model.prepare(one).token_ids)
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_seeds(client):
    def drawn(**options):
        return ask(client, **FREE, **options).choices[0].message.content

    assert drawn(seed=7) == drawn(seed=7)
    assert drawn(seed=-7) == drawn(seed=-7)
    assert len({drawn(seed=seed) for seed in range(4)}) > 1


def test_several_choices(client, model):
    options = {**FREE, **endless(model), "seed": 3}
    answer = ask(client, n=3, **options)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert texts[0] == ask(client, **options).choices[0].message.content
    assert answer.usage.completion_tokens == 36
    assert answer.usage.prompt_tokens == ask(client).usage.prompt_tokens
    chunks = list(ask(client, n=3, **options, stream=True))
    assert [text_of(chunks, index) for index in range(3)] == texts


def test_logprobs(client):
    answer = ask(client, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy
        assert len(entry.top_logprobs) == 3
    text = b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace")
    assert text == ask(client).choices[0].message.content
    streamed = [
        entry
        for chunk in ask(client, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == content
    assert ask(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_penalties_bias_and_filters(client, model):
    """The options reach the sampler as they are named."""
    options = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "top_p": 0.9, "seed": 5, "temperature": 0.8}
    extra = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.3}
    answer = ask(client, **options, logit_bias={"300": 5}, extra_body=extra)
    expected = model.generate("Hello", max_tokens=12, logit_bias={300: 5.0}, **options, **extra)
    assert answer.choices[0].message.content == expected.text
    assert ask(client, logit_bias={"300": 100}, max_tokens=2).choices[0].message.content == model.tokenizer.decode(
        [300, 300]
    )


def test_stop_strings_and_limits(client, model):
    whole = ask(client, **endless(model)).choices[0].message.content
    stop = whole[3:5]
    answer = ask(client, stop=[stop, "never in there"], **endless(model)).choices[0]
    assert answer.message.content == whole[: whole.find(stop)]
    assert answer.finish_reason == "stop"
    assert ask(client, stop=stop, **endless(model)).choices[0].message.content == answer.message.content
    cut = ask(client, max_tokens=5, max_completion_tokens=3, **endless(model))
    assert cut.usage.completion_tokens == 3
    assert cut.choices[0].finish_reason == "length"


def test_unknown_fields_are_ignored_with_one_log_line(client, caplog):
    caplog.set_level("INFO", logger="g3n_mlx.server")
    content = [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]
    messages = [{"role": "user", "content": content, "na\nme": "Anna"}]
    answer = ask(client, messages=messages, user="me", extra_body={"mirostat": 0, "guided": {"a": 1}})
    assert answer.choices[0].message.content
    lines = [record.getMessage() for record in caplog.records if "ignored fields" in record.getMessage()]
    assert lines == [
        "ignored fields: 'user', 'mirostat', 'guided', 'messages[0].na\\\\nme', 'messages[0].content[0].cache_control'"
    ]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 99}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": 3}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stop": ["a" * 300]}, "stop[0]"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}}, "response_format"),
        ({"extra_body": {"grammar": {"type": "regex", "value": "("}}}, "grammar"),
        ({"extra_body": {"grammar": {"type": "lark", "value": "start: nowhere"}}}, "grammar"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tools"),
        ({"tools": [CLOCK], "extra_body": {"grammar": {"type": "regex", "value": "a"}}}, "tools"),
        (
            {"tools": [CLOCK], "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": BAD}}},
            "response_format",
        ),
    ],
)
def test_what_is_wrong_is_a_400_that_says_why(client, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **options)
    assert refused.value.status_code == 400
    assert refused.value.type == "invalid_request_error"
    assert len(refused.value.body["message"]) > 10
    if param is not None:
        assert refused.value.param == param


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b'{"messages": [}', "application/json", r"the body is not JSON: .* at character 14"),
        (b'{"messages": []}', "", "Content-Type: application/json"),
        (b'{"messages": []}', "application/x-www-form-urlencoded", "Content-Type: application/json"),
        (b"", "application/json", "the body"),
        (b"[]", "application/json", "the body"),
        (b"\xff{}", "application/json", "the body"),
    ],
)
def test_a_body_that_is_no_json_object(server, body, kind, words):
    with server.http() as http:
        answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": kind} if kind else {})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert re.search(words, error["message"])
    assert error["param"] is None
    assert error["type"] == "invalid_request_error"


def test_a_prompt_too_long(client):
    with pytest.raises(openai.BadRequestError, match="shorten it") as refused:
        ask(client, [{"role": "user", "content": "no " * 33000}])
    assert refused.value.code == "context_length_exceeded"


def test_a_text_beyond_any_context_is_not_tokenized(server, client, monkeypatch):
    def refuse(text):
        raise AssertionError(f"{len(text)} characters were tokenized")

    monkeypatch.setattr(server.engine.model.tokenizer, "encode", refuse)
    text = "no " * 1_000_000
    ways = [
        lambda: ask(client, [{"role": "user", "content": text}]),
        lambda: ask(client, [{"role": "user", "content": [{"type": "text", "text": text[: 1 << 19]}] * 3}]),
        lambda: client.completions.create(model="default", prompt=text),
        lambda: client.post("/tokenize", body={"prompt": text}, cast_to=object),
        lambda: client.post("/tokenize", body={"messages": [{"role": "user", "content": text}]}, cast_to=object),
    ]
    for way in ways:
        with pytest.raises(openai.BadRequestError, match=r"bytes.*shorten it") as refused:
            way()
        assert refused.value.code == "context_length_exceeded"


def test_tokens_of_messages_are_counted_beyond_the_context(client):
    messages = [{"role": "user", "content": "no " * 33000}]
    assert client.post("/tokenize", body={"messages": messages}, cast_to=object)["count"] > 33000


def test_json_object(client, model):
    """Strings and the object are closed as soon as the grammar allows it: by itself the model goes on for pages."""
    closing = {str(model.tokenizer.encode(text)[0]): bias for text, bias in (('"', 30), ("}", 20))}
    options = {"response_format": {"type": "json_object"}, "temperature": 1, "logit_bias": closing, "stop": None}
    for seed in range(3):
        answer = ask(client, **options, max_tokens=60, seed=seed)
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


leaves = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["red", 3, None]},
        {"type": "integer", "minimum": 0, "maximum": 99},
    ]
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.dictionaries(st.sampled_from(["a", "bc", "d e"]), inner, min_size=1),
                "additionalProperties": st.just(False),
            }
        ),
        st.fixed_dictionaries({"type": st.just("array"), "items": inner, "maxItems": st.integers(0, 2)}),
    ),
    max_leaves=5,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=schemas, seed=st.integers(0, 99))
def test_every_answer_under_a_schema_is_valid(client, schema, seed):
    wanted = {"type": "json_schema", "json_schema": {"name": "any", "schema": schema}}
    choice = ask(client, response_format=wanted, max_tokens=300, temperature=1, seed=seed).choices[0]
    if choice.finish_reason == "stop":
        jsonschema.validate(json.loads(choice.message.content), schema)


def test_grammars(client):
    regex = {"type": "regex", "value": "(yes|no), [0-9]{3}"}
    answer = ask(client, extra_body={"grammar": regex}, temperature=1, seed=2).choices[0]
    assert answer.finish_reason == "stop"
    word, digits = answer.message.content.split(", ")
    assert word in ("yes", "no")
    assert len(digits) == 3
    lark = {"type": "lark", "value": 'start: "a" start "b" | "c"'}
    text = ask(client, extra_body={"grammar": lark}, max_tokens=60, seed=1, temperature=1).choices[0].message.content
    depth = text.count("a")
    assert text == "a" * depth + "c" + "b" * depth or "b" not in text


def test_required_and_named_calls(client):
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = ask(client, tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=300, temperature=1, seed=4)
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content is None
        calls = answer.choices[0].message.tool_calls
        assert calls
        for call in calls:
            if call.function.name == "get_weather":
                jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
            else:
                assert call.function.name == "get_time"
                assert json.loads(call.function.arguments) == {}
        if choice != "required":
            assert calls[0].function.name == "get_weather"


def test_calls_are_streamed_and_may_be_kept_to_one(client):
    options = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 300, "temperature": 1, "seed": 4}
    # The first one fills the prefix cache; from then on the same prompt takes the same way, to the last bit.
    _, answer = (ask(client, **options, parallel_tool_calls=False) for _ in range(2))
    whole = answer.choices[0].message.tool_calls
    assert len(whole) == 1
    arguments, name = "", ""
    for chunk in ask(client, **options, parallel_tool_calls=False, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            assert call.index == 0
            name += call.function.name or ""
            arguments += call.function.arguments or ""
        reason = chunk.choices[0].finish_reason
    assert (name, arguments) == (whole[0].function.name, whole[0].function.arguments)
    assert reason == "tool_calls"


def test_results_of_calls_go_back(client, server):
    asked = ask(client, tools=[WEATHER], tool_choice="required", max_tokens=300, parallel_tool_calls=False)
    message = asked.choices[0].message
    call = message.tool_calls[0]
    conversation = [
        *HELLO,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert ask(client, conversation, tools=[WEATHER], tool_choice="none").choices[0].message.tool_calls is None
    with server.http() as http:
        tokens = http.post("/v1/tokenize", json={"messages": conversation}).json()["tokens"]
        prompt = http.post("/v1/detokenize", json={"tokens": tokens}).json()["prompt"]
    _, model_turn, user_turn, _ = prompt.split("<end_of_turn>\n")
    assert json.loads(model_turn.partition("\n")[2]) == {
        "name": "get_weather",
        "parameters": json.loads(call.function.arguments),
    }
    assert "Result of get_weather" in user_turn
    assert "sunny" in user_turn


def test_auto_leaves_the_answer_free(client):
    answer = ask(client, tools=[WEATHER], tool_choice="auto")
    assert answer.usage.completion_tokens <= 12
    assert answer.choices[0].finish_reason in ("stop", "length")
