"""Nothing that a client sends gives a 500: our own OpenAPI schema by schemathesis, and messages of any shape."""

import base64
import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import picture, sound, wait_until
from schemathesis.checks import not_a_server_error

QUIET = [
    HealthCheck.function_scoped_fixture,
    HealthCheck.too_slow,
    HealthCheck.filter_too_much,
    HealthCheck.data_too_large,
]


def check_error(answer):
    """What is refused says why, in OpenAI's shape or in Ollama's."""
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error if isinstance(error, str) else error["message"] and error["type"]


def short(body):
    """Answers of two tokens by the model that there is, since it is the requests that are tried."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        body["model"] = "default"
    if isinstance(body, dict) and ("messages" in body or "prompt" in body):
        body["max_tokens"] = 2
        body.pop("max_completion_tokens", None)
    return body


@pytest.fixture(scope="module")
def cases(server):
    """Requests of every kind that our OpenAPI schema knows, and of some that it does not allow."""
    with server.http() as http:
        schema = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 10
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    return st.one_of([operation.as_strategy(generation_mode=mode) for operation in operations for mode in modes])


@settings(max_examples=150, deadline=None, suppress_health_check=QUIET, database=None, derandomize=True)
@given(data=st.data())
def test_our_own_openapi_schema(server, cases, data):
    case = data.draw(cases)
    case.body = short(case.body)
    answer = case.call(base_url=server.url, timeout=120)
    case.validate_response(answer, checks=[not_a_server_error])
    check_error(answer)


URI = "data:image/png;base64," + base64.b64encode(picture()).decode()
WAVE = base64.b64encode(sound(0.1)).decode()
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
texts = st.text(max_size=20) | st.sampled_from(["", " ", "<end_of_turn>\n", "\ud800", "\0", "<image_soft_token>"])
urls = st.sampled_from(
    [
        URI,
        "data:,",
        "data:image/png;base64,AAAA",
        "http://127.0.0.1:1/x",
        "http://[",
        "file:///etc/passwd",
        "//",
        "\0",
        "~x",
    ]
)
parts = st.one_of(
    texts,
    st.fixed_dictionaries({"type": st.just("text"), "text": texts}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": urls | st.fixed_dictionaries({"url": urls})}),
    st.fixed_dictionaries({"type": st.sampled_from(["audio_url", "video_url"]), "audio_url": urls, "video_url": urls}),
    st.fixed_dictionaries(
        {
            "type": st.just("input_audio"),
            "input_audio": st.fixed_dictionaries({"data": st.sampled_from([WAVE, "", "x"])}),
        }
    ),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image", "image_url", "x"])}, optional={"text": junk, "url": junk}
    ),
    junk,
)
calls = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": texts, "arguments": texts | st.just('{"a": 1}')})},
    optional={"id": texts},
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "user", "assistant", "tool"])},
        optional={
            "content": texts | st.lists(parts, max_size=4) | junk,
            "tool_calls": st.lists(calls, max_size=2) | junk,
            "tool_call_id": texts,
            "name": junk,
        },
    )
    | junk,
    max_size=4,
)
options = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2) | junk,
        "top_p": st.floats(0, 1) | junk,
        "top_k": st.integers(-1, 10) | junk,
        "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.floats(-100, 100), max_size=2) | junk,
        "stop": texts | st.lists(texts, max_size=2) | junk,
        "n": st.integers(1, 3) | junk,
        "seed": st.integers() | junk,
        "stream": st.booleans(),
        "stream_options": junk,
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(0, 3),
        "response_format": st.fixed_dictionaries(
            {"type": st.sampled_from(["text", "json_object", "json_schema"])},
            optional={"json_schema": st.fixed_dictionaries({"schema": junk})},
        )
        | junk,
        "grammar": st.fixed_dictionaries({"type": st.sampled_from(["regex", "lark"]), "value": texts}),
        "tools": st.lists(
            st.fixed_dictionaries(
                {
                    "function": st.fixed_dictionaries(
                        {"name": st.sampled_from(["f", "g"])}, optional={"parameters": junk}
                    )
                }
            ),
            max_size=2,
        ),
        "tool_choice": st.sampled_from(["auto", "none", "required"]) | junk,
    },
)


@settings(max_examples=120, deadline=None, suppress_health_check=QUIET, database=None, derandomize=True)
@given(messages=messages, options=options)
def test_messages_of_any_shape(server, messages, options):
    body = json.dumps({**options, "messages": messages, "max_tokens": 2})
    with server.http() as http:
        check_error(http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}))


def test_the_server_still_answers(server, client):
    answer = client.chat.completions.create(model="default", messages=[{"role": "user", "content": "Hi"}], max_tokens=2)
    assert answer.choices
    wait_until(lambda: server.engine.places_taken == 0)
