"""The tools by the official client: a real process over stdin and stdout, and one over a real socket."""

import base64
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from devices import served_backend

pytest.importorskip("mcp")


import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.mcp.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
MEDIA = ROOT / "examples" / "media"
TOOLS = {"ask", "describe_image", "watch_video", "transcribe"}

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
def model():
    return load(demo_folder(), backend=served_backend())


def arguments(*flags):
    return ["-m", "g3n_mlx.mcp", "--model", "demo", "--backend", served_backend(), *flags]


def client_of(*flags):
    return Client(StdioServerParameters(command=sys.executable, args=arguments(*flags), cwd=ROOT))


@contextmanager
def listening(*flags):
    """Yields the URL of the tools of a process that listens."""
    command = [sys.executable, *arguments("--http", "--port", "0", *flags)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as running:
        try:
            while not (found := re.search(r"tools at (http://\S+)", line := running.stderr.readline())):
                assert line, "it has ended"
            wait_for(urlsplit(found[1]).port)
            yield found[1]
        finally:
            running.terminate()
            running.stderr.read()


def wait_for(port):
    """The process binds its port before it has read the model, and listens after."""
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("it does not listen")


async def told(client, tool, **given):
    result = await client.call_tool(tool, given)
    (block,) = result.content
    return block.text if not result.is_error else f"error: {block.text}"


async def test_a_process_of_its_own(model):
    async with client_of() as client:
        assert {tool.name for tool in (await client.list_tools()).tools} == TOOLS
        sum_ = await told(client, "ask", prompt="What is 12 + 34?", temperature=0)
        assert sum_ == model.generate("What is 12 + 34?", temperature=0.0).text
        shapes = str(MEDIA / "shapes.png")
        asked = "How many circles are there?"
        seen = await told(client, "ask", prompt=asked, images=[shapes], temperature=0)
        assert seen == model.generate(asked, images=shapes, temperature=0.0).text
        assert await told(client, "describe_image", image=shapes)
        assert await told(client, "watch_video", video=str(MEDIA / "clip.mp4"))
        words = model.transcribe(str(MEDIA / "digits.ogg"))
        assert await told(client, "transcribe", audio=str(MEDIA / "digits.ogg")) == f"{words.text}\n"
        assert "-->" in await told(client, "transcribe", audio=str(MEDIA / "digits.ogg"), format="srt")

        # What is wrong is an answer too: the agent reads it and can do better.
        assert re.match("error: .*nowhere.png", await told(client, "describe_image", image="/nowhere.png"))
        assert re.match("error: .*not an image", await told(client, "describe_image", image=__file__))
        assert re.match("error: .*max_tokens", await told(client, "ask", prompt="Hi", max_tokens=-5))
        assert await told(client, "ask", prompt="Hi", max_tokens=3)


async def test_over_http(model):
    """Files below --media-root alone, and no address of a private network."""
    with listening("--media-root", str(MEDIA)) as url:
        async with Client(url) as client:
            assert {tool.name for tool in (await client.list_tools()).tools} == TOOLS
            assert await told(client, "transcribe", audio="digits.ogg") == "3 1 4\n"
            data = base64.b64encode((MEDIA / "shapes.png").read_bytes()).decode()
            seen = await told(client, "ask", prompt="Look.", images=[f"data:;base64,{data}"], temperature=0)
            assert seen == model.generate("Look.", images=str(MEDIA / "shapes.png"), temperature=0.0).text
            assert (await told(client, "describe_image", image=__file__)).startswith("error: ")
            assert (await told(client, "describe_image", image=url)).startswith("error: ")
        for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
            assert httpx2.post(url, json={}, headers=headers).status_code == 403


async def test_a_key_and_no_files_unasked():
    with listening("--api-key", "k") as url:
        assert httpx2.post(url, json={}).status_code == 401
        keyed = httpx2.AsyncClient(headers={"Authorization": "Bearer k"}, timeout=120)
        async with keyed, Client(streamable_http_client(url, http_client=keyed)) as client:
            refused = await told(client, "describe_image", image=str(MEDIA / "shapes.png"))
            assert refused.startswith("error: ")
            assert "circle" not in refused


def test_wrong_flags(capsys):
    for flags, words in ((["--port", "99999"], "65535"), (["--media-root", "nowhere"], "is no folder")):
        with pytest.raises(SystemExit):
            main(flags)
        assert words in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_ctrl_c_ends_it_in_a_terminal():
    pexpect = pytest.importorskip("pexpect")
    child = pexpect.spawn(sys.executable, arguments(), cwd=ROOT, timeout=300, encoding="utf-8")
    child.expect("waiting for an MCP client on stdin")
    while child.isalive():
        child.sendintr()
        time.sleep(0.2)
    assert child.signalstatus == signal.SIGINT or child.exitstatus == 0
