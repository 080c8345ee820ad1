"""What Home Assistant's integrations OpenAI and Ollama send, by the clients that they use.

Sources: entity.py of homeassistant/components/openai_conversation and homeassistant/components/ollama, November 2026.
"""

import base64
import json
from typing import Any

import ollama
import openai
import pytest
from running import WAIT_S, picture, sound

# As voluptuous schemas are written out: unlisted formats, null by two spellings, nothing required.
INTENT = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "floor": {"type": "string", "format": "lower"},
        "domain": {"type": "array", "items": {"type": "string"}},
        "device_class": {"type": "array", "items": {"type": "string", "enum": ["outlet", "switch"]}},
        "brightness": {"type": "integer", "minimum": 0, "maximum": 100, "description": "In percent"},
        "color": {"type": "string", "nullable": True},
        "at": {"anyOf": [{"type": "string", "format": "time"}, {"type": "number", "format": "float"}]},
    },
    "required": [],
}
CLOCK = {"type": "object", "properties": {}}
# A task's structure: "strict" stands inside of the schema.
TASK = {
    "type": "object",
    "properties": {"on": {"type": "boolean", "description": "Whether"}, "room": {"enum": ["hall", None]}},
    "required": ["on", "room"],
    "strict": True,
    "additionalProperties": False,
}
CALLED = {"name": "light"}
RESULT = json.dumps({"data": {"speech": {}}, "error": None})


async def events(remote: Any, content: Any, *history: Any, **options: Any) -> list[Any]:
    system = {"type": "message", "role": "developer", "content": "You are a voice assistant."}
    stream = await remote.responses.create(
        model="default",
        input=[system, {"type": "message", "role": "user", "content": content}, *history],
        max_output_tokens=60,
        top_p=1.0,
        temperature=1.0,
        user="01JABC",
        store=False,
        stream=True,
        **options,
    )
    return [event async for event in stream]


@pytest.mark.anyio
async def test_the_openai_integration(server):
    tools = [
        {"type": "function", "name": "HassTurnOn", "parameters": INTENT, "description": "Turns on", "strict": False},
        {"type": "function", "name": "GetDateTime", "parameters": CLOCK, "description": None, "strict": False},
    ]
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=WAIT_S) as remote:
        assert (await remote.with_options(timeout=WAIT_S).models.list()).data
        ended = {"response.completed", "response.incomplete"}
        assert {(await events(remote, "Hi", tools=tools))[-1].type} <= ended
        clock = {"tools": tools[1:], "tool_choice": "required", "parallel_tool_calls": False}
        forced = await events(remote, "What time is it?", **clock)
        added = [event.item for event in forced if event.type == "response.output_item.added"]
        assert added[0].type == "function_call"
        (done,) = [event for event in forced if event.type == "response.function_call_arguments.done"][:1]
        pieces = [event.delta for event in forced if event.type == "response.function_call_arguments.delta"]
        assert json.loads("".join(pieces)) == json.loads(done.arguments)
        call = {"type": "function_call", "name": "HassTurnOn", "arguments": json.dumps(CALLED), "call_id": "1"}
        result = {"type": "function_call_output", "call_id": "1", "output": RESULT}
        assert (await events(remote, "Turn on the light", call, result, tools=tools))[-1].type in ended
        structure = {"format": {"type": "json_schema", "name": "task", "schema": TASK}}
        written = await events(remote, "Is it on?", text=structure)
        assert json.loads(written[-1].response.output_text).keys() == {"on", "room"}
        url = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
        shown = [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": url, "detail": "auto"}]
        assert (await events(remote, shown))[-1].response.usage.input_tokens > 0
        file = ("a.wav", sound())
        heard = {"model": "gpt-4o-mini-transcribe", "file": file, "response_format": "json", "language": "en"}
        assert isinstance((await remote.audio.transcriptions.create(**heard, prompt="")).text, str)


@pytest.mark.anyio
async def test_the_ollama_integration(server):
    remote = ollama.AsyncClient(host=server.url, timeout=WAIT_S)
    (model,) = [entry.model for entry in (await remote.list()).models]
    tools = [
        {"type": "function", "function": {"name": "HassTurnOn", "parameters": INTENT, "description": "Turns on"}},
        {"type": "function", "function": {"name": "GetDateTime", "parameters": CLOCK}},
    ]
    call = ollama.Message.ToolCall(function=ollama.Message.ToolCall.Function(name="HassTurnOn", arguments=CALLED))
    asked = [
        ollama.Message(role="system", content="You are a voice assistant."),
        ollama.Message(role="user", content="Turn on the light", images=[ollama.Image(value=picture())]),
    ]
    history = [
        ollama.Message(role="assistant", content=None, thinking=None, tool_calls=[call]),
        ollama.Message(role="tool", content=RESULT),
    ]

    async def ends(messages: list[ollama.Message], **options: Any) -> tuple[str, str | None]:
        given = {"stream": True, "options": {"num_ctx": 8192, "num_predict": 60}, **options}
        lines = [line async for line in await remote.chat(model=model, messages=messages, **given)]
        return "".join(line.message.content or "" for line in lines), lines[-1].done_reason

    ended = ("stop", "length")
    assert (await ends(asked, tools=tools, keep_alive=-1, think=False, format=None))[1] in ended
    assert (await ends([*asked, *history], tools=tools, keep_alive="30s", think=None, format=None))[1] in ended
    text, _ = await ends(asked, tools=None, keep_alive=-1, format=TASK)
    assert json.loads(text).keys() == {"on", "room"}


@pytest.fixture
def anyio_backend():
    return "asyncio"
