"""`python -m g3n_mlx.server` as its users run it: help, errors, a real process, SIGTERM."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from running import wait_until

from g3n_mlx.server.__main__ import main

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-u", "-m", "g3n_mlx.server"]


class Process:
    """A server in a process of its own."""

    def __init__(self, folder, *flags, cwd):
        command = [*COMMAND, "--model", str(folder), "--port", "0", *flags]
        self.running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=cwd)
        self.lines = []
        while not (found := re.search(r"listening at (http://\S+)", self.line())):
            pass
        self.url = found[1]
        wait_until(self.answers)

    def line(self):
        line = self.running.stderr.readline()
        assert line, "".join(self.lines)
        self.lines.append(line)
        return line

    def answers(self):
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    def end(self, sign):
        self.running.send_signal(sign)
        self.lines += self.running.stderr.readlines()
        return self.running.wait(120)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGTERM")
def test_a_process_of_its_own(demo, tmp_path):
    """It says where it is, answers, and ends what it has begun before it goes."""
    flags = [
        "--served-model-name",
        "gemma",
        "--served-model-name",
        "gpt-4o",
        "--slices",
        "half,skip",
        "--shed",
        "quarter",
        "--shed-after",
        "60",
    ]
    (tmp_path / "key").write_text("k\n")
    process = Process(demo, *flags, "--api-key-file", str(tmp_path / "key"), "--log-level", "info", cwd=tmp_path)
    client = openai.OpenAI(api_key="k", base_url=f"{process.url}/v1", max_retries=0, timeout=120)
    ids = [entry.id for entry in client.models.list()]
    assert ids == ["gemma", "gpt-4o", "gemma:whole", "gemma:half", "gemma:quarter", "gemma:skip"]
    manual = (REPOSITORY / "docs" / "server.md").read_text("utf-8")
    (code,) = re.findall(r"<!-- test: openai -->\n```python\n(.*?)```", manual, re.DOTALL)
    code = code.replace("http://127.0.0.1:8080", process.url).replace('"none"', '"k"')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    answer = client.chat.completions.create(
        model="gemma", messages=[{"role": "user", "content": "Hi"}], max_tokens=40, stream=True
    )
    first = next(iter(answer))
    assert first.choices[0].delta.role == "assistant"
    process.running.send_signal(signal.SIGTERM)
    assert list(answer)[-1].choices[0].finish_reason  # begun before, and finished
    assert process.end(signal.SIGTERM) in (0, -signal.SIGTERM)
    assert not [line for line in process.lines if "Traceback" in line]


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for flag in ("--model", "--matformer", "--host", "--api-key", "--media-root", "--allow-media-host", "--max-queue"):
        assert flag in told
    known = set(re.findall(r"--[a-z][a-z-]*", told))
    assert len(known) <= 36
    manual = (REPOSITORY / "docs" / "server.md").read_text("utf-8")
    others = {"--tasks", "--model_args"}  # of lm_eval
    others |= {"--profile", "--constraint", "--data", "--tokenizer", "--output"}  # of guidellm
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", manual)) - others <= known


def test_the_manual_has_every_endpoint(server):
    manual = (REPOSITORY / "docs" / "server.md").read_text("utf-8")
    with server.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    for path in paths:
        if path.startswith("/v1/") and "{" not in path:
            assert path.removeprefix("/v1") in manual, path


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "99999"], "65535"),
        (["--parallel", "0"], "at least 1"),
        (["--cache-memory", "nan"], "number above 0"),
        (["--media-root", "nowhere"], "is no folder"),
        (["--request-timeout", "x"], "invalid"),
        (["--shed", "e2b,"], "empty name"),
    ],
)
def test_wrong_flags(flags, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_failures_are_one_line(demo, capsys, tmp_path):
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    for flags, words in (
        (["--model", str(demo), "--port", port], "can't listen at"),
        (["--model", str(tmp_path / "nowhere"), "--port", "0"], "nowhere"),
        (["--model", str(demo), "--matformer", "e9b", "--port", "0"], "e9b"),
        (["--model", str(demo), "--slices", "halv", "--port", "0"], "did you mean 'half'"),
        (["--model", str(demo), "--matformer", "eighth-skip", "--shed", "half", "--port", "0"], "no slices to answer"),
        (["--model", str(demo), "--host", "no.such.host.invalid"], "no.such.host.invalid"),
    ):
        assert main(flags) == 1
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("g3n-server: ")]
        assert len(errors) == 1
        assert words in errors[0]
    taken.close()


def test_a_wide_open_server_is_warned_about(caplog, tmp_path):
    missing = ["--model", str(tmp_path / "nowhere"), "--port", "0"]
    for flags, warned in (
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--api-key", "k"], False),
        (["--host", "localhost"], False),
    ):
        caplog.clear()
        assert main([*missing, *flags]) == 1
        assert any("without --api-key" in record.getMessage() for record in caplog.records) == warned


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key", " "], "--api-key is empty"),
        (["--cors-origin", "example"], "--cors-origin 'example' is no origin"),
        (["--cors-origin", "https://a.b/page"], "--cors-origin 'https://a.b/page' is no origin"),
    ],
)
def test_flags_that_would_let_everybody_or_nobody_in(capsys, flags, expected):
    with pytest.raises(SystemExit):
        main(["--model", "demo", *flags])
    assert expected in capsys.readouterr().err
