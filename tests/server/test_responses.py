"""The Responses API, by the official client over a real socket; what it asks for holds whatever the model says."""

import base64
import json
import re

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from running import picture, sound

from g3n_mlx.server.errors import ApiError
from g3n_mlx.server.exchange import Choices

ASKED = {"model": "default", "input": "What is 12 + 34?", "temperature": 0, "max_output_tokens": 24}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a town",
    "parameters": {"type": "object", "properties": {"town": {"enum": ["Bern", "Rome"]}}, "required": ["town"]},
}
EVENT = pydantic.TypeAdapter(ResponseStreamEvent)


def checked(server, body):
    """The response's JSON, which the official types take as it stands."""
    with server.http() as http:
        reply = http.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    Response.model_validate(reply.json())
    return reply.json()


def refusal(server, body):
    with server.http() as http:
        reply = http.post("/v1/responses", json={**ASKED, **body})
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


def tokens(server, messages):
    with server.http() as http:
        return http.post("/v1/tokenize", json={"messages": messages}).json()["count"]


def test_text(server, client):
    response = client.responses.create(**ASKED)
    chat = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": ASKED["input"]}], temperature=0, max_tokens=24
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.status == "completed"
    raw = checked(server, ASKED)
    assert raw["store"] is False
    assert raw["output"][0]["content"][0]["text"] == response.output_text


def test_a_conversation_of_items(server):
    """Items with and without a type, instructions, calls and results make the prompt that the same messages make."""
    call = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"town": "Bern"}'}
    items = [
        {"role": "user", "content": "Hello"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hi!", "annotations": []}],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "r", "summary": []},
        call,
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "sunny"}]},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c1", "function": {"name": "get_weather", "arguments": '{"town": "Bern"}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    found = checked(server, {**ASKED, "input": items, "instructions": "Be brief."})
    assert found["usage"]["input_tokens"] == tokens(server, messages)


def test_media_and_files(server):
    image = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    voice = {"data": base64.b64encode(sound()).decode(), "format": "wav"}
    text = base64.b64encode("été\n".encode()).decode()
    parts = [
        {"type": "input_image", "image_url": image, "detail": "auto"},
        {"type": "input_audio", "input_audio": voice},
        {"type": "input_file", "filename": "a.txt", "file_data": f"data:text/plain;base64,{text}"},
        {"type": "input_text", "text": "What is this?"},
    ]
    same = [
        {"type": "image_url", "image_url": image},
        {"type": "input_audio", "input_audio": voice},
        {"type": "text", "text": "a.txt:\n```\nété\n```\n\nWhat is this?"},
    ]
    found = checked(server, {**ASKED, "max_output_tokens": 1, "input": [{"role": "user", "content": parts}]})
    assert found["usage"]["input_tokens"] == tokens(server, [{"role": "user", "content": same}])


def test_a_stream(server, client):
    """The events of the official types in the official order; they add up to the response that comes whole."""
    events = list(client.responses.create(**ASKED, stream=True))
    for event in events:
        EVENT.validate_python(event.model_dump(exclude_unset=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 1
    assert kinds == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *["response.output_text.delta"] * deltas,
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == client.responses.create(**ASKED).output_text
    with client.responses.stream(**ASKED) as stream:  # the client's own accumulation
        assert stream.get_final_response().output_text == text


def test_a_truncated_response_is_incomplete(client):
    response = client.responses.create(**{**ASKED, "max_output_tokens": 1})
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    *_, last = client.responses.create(**{**ASKED, "max_output_tokens": 1}, stream=True)
    assert last.type == "response.incomplete"


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
    ],
)
def test_calls(client, choice):
    given = {
        **ASKED,
        "max_output_tokens": 60,
        "tools": [WEATHER, {"type": "function", "name": "clock", "parameters": None}],
    }
    given |= {"tool_choice": choice, "parallel_tool_calls": False}
    response = client.responses.create(**given)
    (call,) = response.output
    assert (call.type, call.status) == ("function_call", "completed")
    if choice != "required":
        assert call.name == "get_weather"
    events = list(client.responses.create(**given, stream=True))
    for event in events:
        EVENT.validate_python(event.model_dump(exclude_unset=True))
    kinds = [event.type for event in events if not event.type.endswith(".delta")]
    assert kinds[2:] == [
        *("response.output_item.added", "response.function_call_arguments.done", "response.output_item.done"),
        "response.completed",
    ]
    assert events[-1].response.output[0].arguments == call.arguments
    follow_up = [{"role": "user", "content": "Hi"}, *response.output]
    follow_up.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    assert client.responses.create(**{**given, "tool_choice": "none", "input": follow_up}).output[0].type == "message"


class Town(pydantic.BaseModel):
    name: str = pydantic.Field(pattern="^[a-z]{1,8}$")
    size: int = pydantic.Field(ge=1, le=9)


def test_schemas(client):
    response = client.responses.parse(**{**ASKED, "max_output_tokens": 80}, text_format=Town)
    assert 1 <= response.output_parsed.size <= 9
    given = {
        "format": {
            "type": "json_schema",
            "name": "town",
            "schema": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
        }
    }
    assert json.loads(client.responses.create(**ASKED, text=given).output_text) == {"a": 1}


def test_logprobs(client):
    scored = client.responses.create(**ASKED, include=["message.output_text.logprobs"], top_logprobs=2)
    (part,) = scored.output[0].content
    assert "".join(token.token for token in part.logprobs).startswith(part.text)
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"previous_response_id": "resp_1"}, "stores no responses"),
        ({"conversation": "conv_1"}, "stores no responses"),
        ({"background": True}, "background is not supported"),
        ({"prompt": {"id": "pmpt_1"}}, "stores no prompts"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "stores no items"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "computer_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "stores no files"),
        ({"input": [{"content": "Hi"}]}, "no role"),
        ({"input": []}, "input"),
        ({"tools": [{"type": "web_search"}]}, "only functions"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "no schema"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_data": "AAECAw=="}]}]}, "neither"),
    ],
)
def test_what_is_refused(server, field, words):
    assert words in refusal(server, field)["message"]


def test_errors_reach_the_official_client(client):
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**{**ASKED, "model": "gpt-4o"})
    with pytest.raises(openai.BadRequestError, match="stores no responses"):
        client.responses.create(**ASKED, previous_response_id="resp_1")


def test_lone_surrogates_are_sent_back_as_they_came(server):
    odd = {"metadata": {"a": "\ud800"}, "tools": [{**WEATHER, "description": "\ud800"}], "tool_choice": "none"}
    with server.http() as http:  # whose own JSON is UTF-8
        headers = {"Content-Type": "application/json"}
        reply = http.post("/v1/responses", content=json.dumps({**ASKED, **odd}), headers=headers)
    assert reply.status_code == 200, reply.text
    assert reply.json()["metadata"] == odd["metadata"]


async def aenumerate(pieces):
    number = 0
    async for piece in pieces:
        yield number, piece
        number += 1


PICTURE = {"type": "input_image", "image_url": "data:;base64,AAAA"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": [{"role": "user", "content": [PICTURE]}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "no"}}}}, "text.format"),
        ({"tools": [{"type": "function", "name": "two words"}]}, "tools[0].name"),
    ],
)
def test_errors_name_the_fields_that_were_sent(server, body, field):
    """Not those of the chat that the request becomes, whose messages are counted in another way."""
    found = refusal(server, body)
    assert found["param"] == field
    assert not {"messages", "response_format", "max_tokens", "function"} & set(re.findall(r"\w+", found["message"]))


def test_a_failure_keeps_what_was_said(server, monkeypatch):
    """A stream that fails ends with the output so far, its item incomplete."""
    whole = Choices.pieces

    async def cut(choices):
        async for number, piece in aenumerate(whole(choices)):
            if number == 3:
                raise ApiError(503, "it is too late")
            yield piece

    monkeypatch.setattr(Choices, "pieces", cut)
    with server.http() as http:
        text = http.post("/v1/responses", json={**ASKED, "stream": True}).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    last = EVENT.validate_python(events[-1])
    assert last.type == "response.failed"
    said = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert said
    (item,) = last.response.output
    assert item.status == "incomplete"
    assert last.response.output_text == said
    assert last.response.error.message == "it is too late"
