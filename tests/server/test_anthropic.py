"""Anthropic's API, by its own client over a real socket; what it asks for holds whatever the model says."""

import base64
import json

import anthropic
import pytest
from running import WAIT_S, picture

SUM = {"role": "user", "content": "What is 12 + 34?"}
ASKED = {"model": "default", "messages": [SUM], "max_tokens": 24, "extra_body": {"temperature": 0}}
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a town",
    "input_schema": {"type": "object", "properties": {"town": {"enum": ["Bern", "Rome"]}}, "required": ["town"]},
}
FORCED = {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "get_weather"}, "max_tokens": 80}


def connected(server, key="x"):
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=WAIT_S)


@pytest.fixture(scope="module")
def remote(server):
    return connected(server)


def tokens(server, body):
    with server.http() as http:
        return http.post("/v1/tokenize", json=body).json()["count"]


def said(client, messages, **options):
    given = {"temperature": 0, "max_tokens": 24, **options}
    return client.chat.completions.create(model="default", messages=messages, **given).choices[0].message.content


def test_a_message_is_the_same_chat(server, client, remote):
    message = remote.messages.create(**ASKED)
    assert message.content[0].text == said(client, [SUM])
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "end_turn", None)
    counted = remote.messages.count_tokens(model="default", messages=[SUM]).input_tokens
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == counted
    assert counted == tokens(server, {"messages": [SUM]})
    brief = remote.messages.create(**ASKED, system=[{"type": "text", "text": "Be brief."}])
    assert brief.content[0].text == said(client, [{"role": "system", "content": "Be brief."}, SUM])


def test_a_stream(remote):
    """The events in Anthropic's order; they add up to the message that comes whole."""
    events = list(remote.messages.create(**ASKED, stream=True))
    deltas = [event for event in events if event.type == "content_block_delta"]
    assert [event.type for event in events] == [
        *("message_start", "content_block_start"),
        *["content_block_delta"] * len(deltas),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    assert len(deltas) > 1
    whole = remote.messages.create(**ASKED)
    assert "".join(event.delta.text for event in deltas) == whole.content[0].text
    with remote.messages.stream(**ASKED) as stream:  # the client's own accumulation
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason) == (whole.content[0].text, "end_turn")
    assert final.usage.output_tokens == whole.usage.output_tokens > 0


def test_why_it_stops(remote):
    text = remote.messages.create(**ASKED).content[0].text
    assert remote.messages.create(**{**ASKED, "max_tokens": 1}).stop_reason == "max_tokens"
    stopped = remote.messages.create(**ASKED, stop_sequences=["never", text[1:3]])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[1:3])
    assert stopped.content[0].text == text[:1]


def test_a_last_message_of_the_assistant_is_continued(server, client, remote):
    """By a prompt that ends in it: its tokens, and no new turn behind them."""
    begun = {"role": "assistant", "content": "The sum"}
    body = {"messages": [SUM, begun], "continue_final_message": True}
    counted = remote.messages.count_tokens(model="default", messages=[SUM, begun]).input_tokens
    assert counted == tokens(server, body) < tokens(server, {"messages": [SUM, begun]})
    with server.http() as http:
        ids = http.post("/v1/tokenize", json=body).json()["tokens"]
        assert http.post("/v1/detokenize", json={"tokens": ids}).json()["prompt"].endswith("model\nThe sum")
    continued = said(client, [SUM, begun], extra_body={"continue_final_message": True})
    assert remote.messages.create(**{**ASKED, "messages": [SUM, begun]}).content[0].text == continued
    with pytest.raises(Exception, match="not the assistant's"):
        said(client, [SUM], extra_body={"continue_final_message": True})


def test_calls(remote):
    message = remote.messages.create(**{**ASKED, **FORCED})
    (block,) = message.content
    assert (message.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "get_weather")
    assert block.input["town"] in ("Bern", "Rome")
    with remote.messages.stream(**{**ASKED, **FORCED}) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.input == block.input
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "sunny"}]}
    turns = [SUM, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert remote.messages.create(**{**ASKED, "messages": turns}).content[0].type == "text"


def test_blocks_make_the_same_prompt_as_parts(server, remote):
    image = base64.b64encode(picture()).decode()
    source = {"type": "base64", "media_type": "image/png", "data": image}
    blocks = [
        {"type": "image", "source": source},
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Seven."}, "title": "a"},
        {"type": "text", "text": "What?", "cache_control": {"type": "ephemeral"}},
    ]
    parts = [
        {"type": "image_url", "image_url": f"data:image/png;base64,{image}"},
        {"type": "text", "text": "a\nSeven."},
        {"type": "text", "text": "What?"},
    ]
    counted = remote.messages.count_tokens(model="default", messages=[{"role": "user", "content": blocks}])
    assert counted.input_tokens == tokens(server, {"messages": [{"role": "user", "content": parts}]})
    call = {"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}}
    result = {"type": "tool_result", "tool_use_id": "c", "content": "sunny"}
    turns = [
        SUM,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
    ]
    same = [
        SUM,
        {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
        {"role": "user", "content": "And now?"},
    ]
    counted = remote.messages.count_tokens(model="default", messages=turns)
    assert counted.input_tokens == tokens(server, {"messages": same})


def test_a_schema(remote):
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    message = remote.messages.create(**ASKED, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(message.content[0].text) == {"a": 1}


def test_errors_have_anthropics_shape(server, serve, remote):
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        remote.messages.create(**{**ASKED, "model": "claude"})
    with pytest.raises(anthropic.BadRequestError, match="only custom is"):
        remote.messages.create(**ASKED, tools=[{"type": "web_search_20250305", "name": "web_search"}])
    with server.http() as http:
        reply = http.post("/v1/messages", json={"messages": [SUM]})
    assert (reply.status_code, reply.json()["type"]) == (400, "error")
    assert reply.json()["error"]["type"] == "invalid_request_error"
    guarded = serve(api_key="secret")
    assert connected(guarded, "secret").messages.create(**ASKED).content
    with pytest.raises(anthropic.AuthenticationError):
        connected(guarded, "other").messages.create(**ASKED)


def test_a_failed_tool_says_so(server, client, remote):
    """The result of a tool that failed is the chat's result with a line in front."""
    call = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"town": "Bern"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "no such town", "is_error": True}
    messages = [SUM, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    function = {"name": "get_weather", "arguments": '{"town": "Bern"}'}
    same = [
        SUM,
        {"role": "assistant", "tool_calls": [{"id": "t1", "function": function}]},
        {"role": "tool", "tool_call_id": "t1", "content": "Error:\nno such town"},
    ]
    counted = remote.messages.count_tokens(model="default", messages=messages).input_tokens
    assert counted == tokens(server, {"messages": same})


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png"}}, "has no data"),
        ({"type": "image", "source": {"type": "url"}}, "has no url"),
        ({"type": "document", "source": {"type": "base64"}}, "has no data"),
        ({"type": "document", "source": {"type": "text"}}, "has no data"),
        ({"type": "image"}, "no source"),
    ],
)
def test_sources_without_data(server, block, words):
    with server.http() as http:
        reply = http.post("/v1/messages", json={"messages": [{"role": "user", "content": [block]}], "max_tokens": 1})
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


def test_a_last_turn_of_thoughts_is_not_continued(remote):
    """The thoughts of another model are left out: what is left ends with the user's turn."""
    thoughts = {"role": "assistant", "content": [{"type": "thinking", "thinking": "12 + 34", "signature": "x"}]}
    answered = remote.messages.create(**{**ASKED, "messages": [SUM, thoughts]})
    assert answered.content == remote.messages.create(**ASKED).content


@pytest.mark.parametrize(
    ("body", "start"),
    [
        ({"top_p": 7}, "top_p"),
        ({"tools": [{**WEATHER, "name": "two words"}]}, "tools[0].name: "),
        ({"output_config": {"format": {"type": "json_schema", "schema": 7}}}, "output_config.format"),
    ],
)
def test_errors_name_the_fields_that_were_sent(server, body, start):
    with server.http() as http:
        reply = http.post("/v1/messages", json={"messages": [SUM], "max_tokens": 1, **body})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(start)
    assert "response_format" not in reply.text
