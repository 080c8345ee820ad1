"""Open WebUI in a process of its own, in front of a real server: its connections to OpenAI's and to Ollama's API.

It is heavy, so it has an environment for itself, `open_webui` in the folder that `G3N_TEST_CLIENTS` names
(test_recipes.py), or the test is skipped.
"""

import base64
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from running import WAIT_S, picture

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def open_webui(folder: Path, connection: dict[str, str]) -> Iterator[httpx2.Client]:
    """A client of Open WebUI's own interface, signed in. connection: variables that say where the models are."""
    program = Path(os.environ.get("G3N_TEST_CLIENTS", "/nowhere")) / "open_webui" / "bin" / "open-webui"
    if not program.exists():
        pytest.skip("Open WebUI is not in the folder that G3N_TEST_CLIENTS names")
    port = free_port()
    environment = {
        **os.environ,
        "DATA_DIR": str(folder),
        "WEBUI_SECRET_KEY": "secret",
        "WEBUI_AUTH": "False",
        **connection,
        "OFFLINE_MODE": "True",
        "HF_HUB_OFFLINE": "1",
        "BYPASS_EMBEDDING_AND_RETRIEVAL": "True",
        "RAG_EMBEDDING_ENGINE": "openai",
    }
    command = [program, "serve", "--host", "127.0.0.1", "--port", str(port)]
    log = (folder / "log").open("wb")
    with log, subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder) as running:
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as client:
                wait_for(client, running, folder / "log")
                found = client.post("/api/v1/auths/signin", json={"email": "", "password": ""})
                assert found.status_code == 200, found.text
                client.headers["Authorization"] = f"Bearer {found.json()['token']}"
                yield client
        finally:
            running.terminate()


def wait_for(client: httpx2.Client, running: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 2 * WAIT_S
    while True:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx2.TransportError:
            pass
        assert running.poll() is None, log.read_text("utf-8", "replace")[-3000:]
        assert time.monotonic() < until, "Open WebUI does not answer"
        time.sleep(0.5)


@pytest.mark.parametrize("owner", ["openai", "ollama"])
def test_answers_and_pictures_through_a_connection(server, tmp_path, owner):
    connection = {
        "openai": {"OPENAI_API_BASE_URLS": f"{server.url}/v1", "OPENAI_API_KEYS": "none", "ENABLE_OLLAMA_API": "False"},
        "ollama": {"OLLAMA_BASE_URLS": server.url, "ENABLE_OPENAI_API": "False"},
    }[owner]
    url = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    image = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    with open_webui(tmp_path, connection) as client:
        models = [model["id"] for model in client.get("/api/models").json()["data"] if model["owned_by"] == owner]
        assert models

        def asked(content: object, *, stream: bool) -> httpx2.Response:
            messages = [{"role": "user", "content": content}]
            body = {"model": models[0], "messages": messages, "max_tokens": 8, "stream": stream}
            reply = client.post("/api/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            return reply

        for content in ("What is 12 + 34?", image):
            reply = asked(content, stream=False)
            assert reply.json()["choices"][0]["message"]["content"].strip(), reply.text
        streamed = asked("What is 12 + 34?", stream=True).text
        events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        pieces = [choice["delta"].get("content") or "" for event in events for choice in event.get("choices", ())]
        assert "".join(pieces).strip(), streamed
