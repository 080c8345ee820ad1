"""Ollama's API, by its own client over a real socket; what it asks for holds whatever the model says."""

import json

import ollama
import pytest
from running import WAIT_S, picture

SUM = {"role": "user", "content": "What is 12 + 34?"}
GREEDY = {"temperature": 0, "num_predict": 24}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"enum": ["Bern", "Rome"]}}, "required": ["town"]},
    },
}


@pytest.fixture(scope="module")
def remote(server):
    return ollama.Client(host=server.url, timeout=WAIT_S)


def test_chat_is_the_same_chat(client, remote):
    same = client.chat.completions.create(model="default", messages=[SUM], temperature=0, max_tokens=24)
    answer = remote.chat("tiny", [SUM], options=GREEDY)
    assert answer.message.content == same.choices[0].message.content
    assert (answer.prompt_eval_count, answer.eval_count) == (same.usage.prompt_tokens, same.usage.completion_tokens)
    assert (answer.done, answer.done_reason, answer.model) == (True, "stop", "tiny")
    assert answer.total_duration > 0
    lines = list(remote.chat("tiny:latest", [SUM], options=GREEDY, stream=True, keep_alive="5m"))
    assert "".join(line.message.content for line in lines) == answer.message.content
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1].eval_count == answer.eval_count


def test_generate(server, remote):
    answer = remote.generate("tiny", SUM["content"], system="Be brief.", options=GREEDY)
    messages = [{"role": "system", "content": "Be brief."}, SUM]
    assert answer.response == remote.chat("tiny", messages, options=GREEDY).message.content
    lines = list(remote.generate("tiny", SUM["content"], system="Be brief.", options=GREEDY, stream=True))
    assert "".join(line.response for line in lines) == answer.response
    assert remote.generate("tiny").done_reason == "load"
    assert remote.generate("tiny", keep_alive=0).done_reason == "unload"
    with server.http() as http:  # as the manual's curl sends it
        body = json.dumps({"model": "tiny", "prompt": SUM["content"], "options": {"num_predict": 1}})
        reply = http.post("/api/generate", content=body, headers={"Content-Type": "application/x-www-form-urlencoded"})
        assert [json.loads(line)["done"] for line in reply.text.splitlines()][-1] is True
        assert reply.headers["content-type"] == "application/x-ndjson"


def test_a_limit_is_a_length(remote):
    assert remote.generate("tiny", "Hi", options={"num_predict": 1}).done_reason == "length"
    assert remote.generate("tiny", SUM["content"], options={"num_predict": -1, "temperature": 0}).done_reason == "stop"


def test_images(remote):
    with_image = remote.chat("tiny", [{**SUM, "images": [picture()]}], options=GREEDY)
    assert with_image.prompt_eval_count > remote.chat("tiny", [SUM], options=GREEDY).prompt_eval_count
    assert remote.generate("tiny", "What?", images=[picture()], options=GREEDY).prompt_eval_count > 0


def test_formats(remote):
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    for stream in (False, True):
        found = remote.chat("tiny", [SUM], format=schema, options=GREEDY, stream=stream)
        text = "".join(line.message.content for line in found) if stream else found.message.content
        assert json.loads(text) == {"a": 1}
    answer = remote.chat("tiny", [SUM], format="json", options={"temperature": 0, "num_predict": 8})
    assert answer.message.content.lstrip().startswith("{")


def test_tools(server, remote):
    """The model's call, and the prompt that the call and its result make: the same as in a chat of OpenAI's."""
    name, arguments = "get_weather", {"town": "Bern"}
    messages = [
        SUM,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
        {"role": "tool", "content": "sunny", "tool_name": name},
    ]
    done = remote.chat("tiny", messages, options=GREEDY)
    call = {"id": "c", "function": {"name": name, "arguments": json.dumps(arguments)}}
    same = [
        SUM,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c"},
    ]
    with server.http() as http:
        assert done.prompt_eval_count == http.post("/v1/tokenize", json={"messages": same}).json()["count"]
    offered = remote.chat("tiny", [SUM], tools=[TOOL], options=GREEDY)
    assert offered.prompt_eval_count > 100  # the tools are in the prompt


def test_calls_are_whole_in_a_stream():
    """Calls that come in pieces are sent when they are complete."""
    import asyncio
    from types import SimpleNamespace

    from g3n_mlx.server.ollama import _Answer, _chat_fields
    from g3n_mlx.server.schemas.chat import ChatChoice

    def piece(reason=None, **delta):
        return ChatChoice(index=0, delta=delta, finish_reason=reason)

    def call(index, identity=None, **function):
        return {"tool_calls": [{"index": index, **({"id": identity} if identity else {}), "function": function}]}

    async def pieces():
        yield piece(content="So:")
        yield piece(**call(0, "a", name="f", arguments=""))
        yield piece(**call(0, arguments='{"x"'))
        yield piece(**call(0, arguments=": 1}"))
        yield piece(**call(1, "b", name="g", arguments="{}"))
        yield piece("tool_calls")

    usage = SimpleNamespace(
        prompt_tokens=3,
        completion_tokens=2,
        prompt_tokens_details=SimpleNamespace(cached_tokens=0),
        avg_prompt_tok_per_sec=1.0,
        avg_compl_tok_per_sec=1.0,
    )
    place = SimpleNamespace(served=SimpleNamespace(model_id="m"), arrived=0.0)

    async def lines():
        answer = _Answer(SimpleNamespace(usage=usage, place=place), {}, _chat_fields)  # pyright: ignore[reportArgumentType]
        return [json.loads(line) async for line in answer.events(pieces())]

    found = asyncio.run(lines())
    calls = [one["function"] for line in found for one in line["message"].get("tool_calls", ())]
    assert calls == [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]
    assert [line["message"]["content"] for line in found] == ["So:", "", "", ""]


def test_the_models(server, remote):
    (listed,) = remote.list().models
    assert (listed.model, listed.details.family) == ("tiny", "gemma3n")
    assert listed.size > 0
    shown = remote.show("tiny")
    assert {"completion", "vision", "audio", "tools"} <= set(shown.capabilities)
    assert shown.modelinfo["gemma3n.context_length"] > 0
    assert remote.ps().models[0].model == "tiny"


def test_editors_take_the_server_for_a_recent_ollama(server):
    """VS Code's Copilot compares numbers with 0.6.4, and asks what a model is called and holds by these names."""
    with server.http() as http:
        told = http.get("/api/version").json()["version"]
        shown = http.post("/api/show", json={"model": "tiny"}).json()
    assert [int(part) for part in told.split(".")] >= [0, 6, 4]
    info = shown["model_info"]
    assert info["general.basename"] == "tiny"
    assert info[f"{info['general.architecture']}.context_length"] > 0
    assert "tools" in shown["capabilities"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"think": True}, "does not think"),
        ({"options": {"mirostat": 2}}, "options.mirostat"),
        ({"options": {"temperature": -1}}, "temperature"),
        ({"format": {"type": "no such type"}}, "no such type"),
    ],
)
def test_what_is_refused(server, fields, words):
    with server.http() as http:
        reply = http.post("/api/chat", json={"model": "tiny", "messages": [SUM], **fields})
    assert reply.status_code == 400
    assert list(reply.json()) == ["error"]
    assert words in reply.json()["error"]


def test_errors_reach_the_client(remote):
    with pytest.raises(ollama.ResponseError, match="does not exist") as raised:
        remote.chat("llama3", [SUM])
    assert raised.value.status_code == 404
    with pytest.raises(ollama.ResponseError):
        remote.pull("llama3")


def test_paths_without_v1(server):
    with server.http() as http:
        assert http.get("/models").json() == http.get("/v1/models").json()
        for path, body in (("/chat/completions", {"messages": [SUM]}), ("/completions", {"prompt": "a"})):
            assert http.post(path, json={**body, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "start"),
    [
        ("chat", {"options": {"temperature": 999}}, "options.temperature: "),
        ("chat", {"options": {"num_predict": 2**40}}, "options.num_predict: "),
        ("generate", {"images": ["AAAA"]}, "prompt: "),
    ],
)
def test_errors_name_the_fields_that_were_sent(server, path, body, start):
    asked = {"messages": [{"role": "user", "content": "Hi"}]} if path == "chat" else {"prompt": "Hi"}
    with server.http() as http:
        reply = http.post(f"/api/{path}", json={**asked, **body})
    assert reply.status_code == 400
    assert reply.json()["error"].startswith(start)
    assert "response_format" not in reply.text
