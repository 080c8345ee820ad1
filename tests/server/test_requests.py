"""Requests as clients of other servers send them: what would change an answer does its work or is refused by name."""

import base64
import importlib.util
import io
import json

import pytest
from PIL import Image
from running import picture, sound

SUM = {"role": "user", "content": "What is 12 + 34?"}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}


def post(server, body, path="/v1/chat/completions", **headers):
    with server.http() as http:
        return http.post(path, json={"temperature": 0, **body}, headers=headers)


def answer(server, body):
    reply = post(server, {"max_tokens": 40, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def sent(content):
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "assistant", "content": "Hello, how can I help?"}, SUM]},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Hello!"}, SUM]},
        {"messages": [SUM], "max_tokens": -1},
        {"messages": [SUM], "max_completion_tokens": -1},
        {"messages": [SUM], "stop": ""},
        {"messages": [SUM], "stop": ["", "!"]},
        {"messages": [SUM], "model": None},
        sent([{"type": "text", "text": None}, {"type": "text", "text": SUM["content"]}]),
        {"messages": [SUM], "modalities": ["text"], "functions": [], "guided_json": None, "typical_p": 1.0},
        {"messages": [{**SUM, "images": []}]},
        {"messages": [SUM, {"role": "assistant", "content": None, "refusal": "No."}, SUM]},
        {"messages": [SUM, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, SUM]},
    ],
)
def test_what_clients_mean_is_answered(server, body):
    assert "46" in answer(server, body)


def test_arguments_of_a_call_may_be_an_object(server):
    def prompt(arguments):
        call = {"id": "a", "type": "function", "function": {"name": "sum", "arguments": arguments}}
        messages = [SUM, {"role": "assistant", "content": None, "tool_calls": [call]}]
        reply = post(
            server, {"messages": [*messages, {"role": "tool", "tool_call_id": "a", "content": "46"}]}, "/v1/tokenize"
        )
        return reply.json()["tokens"]

    assert prompt({"a": 12, "b": "é"}) == prompt(json.dumps({"a": 12, "b": "é"}))


REFUSED = [
    ({"messages": [{**SUM, "images": ["iVBORw0KGgo="]}]}, "messages[0].images"),
    ({"messages": [SUM, {"role": "assistant", "content": "12", "prefix": True}]}, "messages[1].prefix"),
    ({"messages": [SUM], "guided_json": EMPTY}, "guided_json"),
    ({"messages": [SUM], "guided_choice": ["a"]}, "guided_choice"),
    ({"messages": [SUM], "structured_outputs": {"json": EMPTY}}, "structured_outputs"),
    ({"messages": [SUM], "format": "json"}, "format"),
    ({"messages": [SUM], "json_schema": EMPTY}, "json_schema"),
    ({"messages": [SUM], "functions": [{"name": "f"}]}, "functions"),
    ({"messages": [SUM], "modalities": ["text", "audio"]}, "modalities"),
    ({"messages": [SUM], "audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"messages": [SUM], "options": {"temperature": 1}}, "options"),
    ({"messages": [SUM], "system": "Be rude."}, "system"),
    ({"messages": [SUM], "mirostat": 2}, "mirostat"),
    ({"messages": [SUM], "repeat_penalty": 1.3}, "repeat_penalty"),
    ({"messages": [SUM], "chat_template": "{{ x }}"}, "chat_template"),
    ({"messages": [SUM], "response_format": {"type": "text", "regex": "a"}}, "response_format.regex"),
    (sent([{"type": "text", "text": "Hi", "image": "a.png"}]), "messages[0].content[0].image"),
    (sent([{"type": "video_url", "video_url": {"url": "data:,a", "fps": 2}}]), "messages[0].content[0].video_url.fps"),
    (
        {"messages": [SUM], "tools": [{"type": "function", "function": {"name": "f", "input_schema": EMPTY}}]},
        "tools[0].function.input_schema",
    ),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_would_change_the_answer_is_refused_by_name(server, body, param):
    reply = post(server, body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert reply.json()["error"]["message"].startswith(f"{param} is not supported: ")


@pytest.mark.parametrize(
    "fields",
    [{"response_format": {"type": "json_object"}}, {"grammar": "root"}, {"guided_regex": "a"}, {"images": ["a"]}],
)
def test_completions_refuse_what_they_do_not_do(server, fields):
    assert post(server, {"prompt": "Hi", **fields}, "/v1/completions").json()["error"]["param"] == next(iter(fields))


def test_a_transcription_refuses_what_it_does_not_do(server):
    with server.http() as http:
        reply = http.post("/v1/audio/transcriptions", files={"file": ("a.wav", sound())}, data={"to_language": "fr"})
    assert reply.json()["error"]["param"] == "to_language"


def test_a_part_of_two_kinds_is_refused(server):
    reply = post(server, sent([{"type": "text", "text": "What?", "image_url": {"url": "data:,a"}}]))
    assert reply.status_code == 400
    assert "also has image_url" in reply.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_schema_in_llama_cpps_place_is_followed(server, kind):
    schema = {"type": "object", "properties": {"zz": {"type": "boolean"}}, "required": ["zz"]}
    body = {"messages": [SUM], "response_format": {"type": kind, "schema": {**schema, "additionalProperties": False}}}
    assert set(json.loads(answer(server, body))) == {"zz"}


def test_stop_token_ids_stop(server):
    whole = post(server, {"messages": [SUM], "logprobs": True}).json()["choices"][0]
    text = whole["logprobs"]["content"][1]["token"]
    (token_id,) = post(server, {"prompt": text, "add_special_tokens": False}, "/v1/tokenize").json()["tokens"]
    assert text not in answer(server, {"messages": [SUM], "stop_token_ids": [token_id]})


@pytest.mark.parametrize(
    "change", [lambda text: text.rstrip("="), lambda text: text.replace("+", "-").replace("/", "_")]
)
def test_base64_of_every_dialect(server, change):
    encoded = base64.b64encode(picture("PNG", (250, 251, 254)) + b"\0").decode()
    assert encoded.endswith("=") or len(encoded) % 4 == 0
    url = "data:image/png;base64," + change(encoded)
    assert answer(server, sent([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]))


def test_an_animated_gif_is_a_video(server):
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "green", "blue")]
    written = io.BytesIO()
    frames[0].save(written, "GIF", save_all=True, append_images=frames[1:], duration=1000, loop=0)
    url = "data:image/gif;base64," + base64.b64encode(written.getvalue()).decode()
    as_video = sent([{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What?"}])
    as_image = sent([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}])
    counts = [post(server, {**body, "max_tokens": 1}).json()["usage"]["prompt_tokens"] for body in (as_video, as_image)]
    assert counts[0] > 2 * counts[1]


def test_models_and_head(server):
    with server.http() as http:
        assert http.get("/v1/models/").json() == http.get("/v1/models").json()
        for path in ("/v1/models", "/v1/models/", "/v1/models/tiny", "/health", "/metrics", "/"):
            reply = http.head(path)
            assert (reply.status_code, reply.content) == (200, b""), path
        assert http.head("/v1/models/other").status_code == 404


@pytest.mark.parametrize("name", ["nope.png", "folder", "secret.png", "loop", "../x"])
def test_errors_do_not_hold_the_servers_paths(serve, tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    server = serve(paths=tmp_path)
    for url in (name, f"file://{tmp_path.name}/{name}"):
        reply = post(server, sent([{"type": "image_url", "image_url": {"url": url}}]))
        assert reply.status_code == 400
        assert str(tmp_path) not in reply.text


def chosen(server, model):
    return post(server, {"model": model, "messages": [SUM], "max_tokens": 1})


def test_names_of_the_model(server, serve):
    assert chosen(server, "tiny:latest").json()["model"] == "tiny"
    assert chosen(server, "gpt-4o").status_code == 404
    named = serve(other_names=("gpt-4o",))
    assert [chosen(named, name).json().get("model") for name in ("gpt-4o", "tiny", "x")] == ["gpt-4o", "tiny", None]
    anything = serve(any_name=True, slices=["half"])
    assert [chosen(anything, name).json()["model"] for name in ("x", "tiny:half")] == ["x", "tiny:half"]
    assert chosen(anything, "tiny:half").headers["x-g3n-slice"] == "half"
    with anything.http() as http:  # a name that no response could repeat
        sent = json.dumps({"model": "\ud800", "messages": [SUM]})
        headers = {"Content-Type": "application/json"}
        assert http.post("/v1/chat/completions", content=sent, headers=headers).status_code == 404


def test_a_transcription_by_the_name_that_programs_send(client):
    assert client.audio.transcriptions.create(model="whisper-1", file=("a.wav", sound())).usage.seconds == 0.5


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", {"messages": [SUM]}), ("/v1/completions", {"prompt": "12 + 34"})]
)
def test_an_answer_of_at_least_some_tokens(server, path, body):
    """The model's own end comes sooner, so an answer this long has waited for it."""
    free = post(server, {**body, "max_tokens": 60}, path).json()["usage"]["completion_tokens"]
    assert free < 60
    fields = {**body, "max_tokens": 60, "min_tokens": free + 5}
    assert free + 5 <= post(server, fields, path).json()["usage"]["completion_tokens"] <= 60
    usage = post(server, {**body, "max_tokens": free + 9, "ignore_eos": True}, path).json()["usage"]
    assert usage["completion_tokens"] == free + 9


def test_a_schema_goes_before_the_least_tokens(server):
    schema = {"type": "json_schema", "json_schema": {"schema": {"const": 1}}}
    assert answer(server, {"messages": [SUM], "response_format": schema, "min_tokens": 30}).strip() == "1"


def test_props(server):
    with server.http() as http:
        found = http.get("/props").json()
    video = importlib.util.find_spec("av") is not None
    assert found["modalities"] == {"vision": True, "audio": True, "video": video}
    assert found["default_generation_settings"]["n_ctx"] > 0
    assert found["limits"]["max_queue"] == 64
