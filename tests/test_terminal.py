"""What a terminal is shown: nothing out of a file, a name or an argument that it would obey, by any command."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import checkpoint_files as files
import numpy as np
import pytest

# OSC 0 renames the window, OSC 52 fills the clipboard, CSI 2J clears the screen; the last is CSI as a single letter.
EVIL = "\x1b]0;pwned\x07\x1b]52;c;cm0=\x07\x1b[2J\x9b31m"


def run(arguments: list[str], home: Path, text: bytes = b"") -> tuple[int, bytes]:
    """Exit code and output of `g3n` in a terminal of its own."""
    controller, terminal = pty.openpty()
    environment = {**os.environ, "XDG_CACHE_HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    environment["XDG_DATA_HOME"] = str(home)
    command = [sys.executable, "-m", "g3n_mlx", *arguments]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    assert child.stdin is not None
    child.stdin.write(text)
    child.stdin.close()
    output = b""
    with suppress(OSError):  # Linux's way to say that the last one has closed its end
        while block := os.read(controller, 65536):
            output += block
    os.close(controller)
    return child.wait(), output


@pytest.fixture
def evil(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint in a folder whose name is what a terminal obeys."""
    return shutil.copytree(tiny_folder, tmp_path / f"a{EVIL}b")


def a_tensors_name(folder: Path) -> None:
    tensors = files.read_folder(folder)
    files.write_safetensors(folder / "model.safetensors", {**tensors, f"a{EVIL}": np.zeros(1, np.float32)})


def a_shards_name(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": f"a{EVIL}.safetensors"}}))


def a_key(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": EVIL, "text_config": {EVIL: EVIL}}))


def a_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('" + EVIL + "') }}")


def nothing(_folder: Path) -> None:
    pass


@pytest.mark.parametrize("damage", [a_tensors_name, a_shards_name, a_key, a_template, nothing])
@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "-p", "hi", "--max-tokens", "2", "--model"],
        ["convert", "-o", "OUT", "--model"],
    ],
)
def test_names_in_a_checkpoint(evil: Path, tmp_path: Path, damage: Callable[[Path], None], arguments) -> None:
    damage(evil)
    out = str(tmp_path / f"out{EVIL}")
    _, output = run([out if word == "OUT" else word for word in arguments] + [str(evil)], tmp_path)
    assert output.strip()
    assert_harmless(output)


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--model", "FOLDER", "--prompt-tokens", "99999999"],
        ["eval", "--model", "FOLDER", "--examples", f"no{EVIL}"],
        ["serve", "--model", f"no{EVIL}"],
        ["serve", "--model", "FOLDER", "--matformer", EVIL, "--port", "0"],
        ["chat", "-p", "hi", "--model", "FOLDER", "--matformer", EVIL],
        ["convert", "--list-slices", "--model", "FOLDER"],
        ["chat", "-p", "hi", EVIL],
        ["chat", "--max-tokens", EVIL],
        ["chat", "-p", "hi", "--model", "demo", "--image", f"no{EVIL}.png"],
        ["completion", EVIL],
        ["history", "show", EVIL],
        ["doctor", EVIL],
        [EVIL],
    ],
)
def test_arguments_and_files(evil: Path, tmp_path: Path, arguments) -> None:
    code, output = run([str(evil) if word == "FOLDER" else word for word in arguments], tmp_path)
    assert code in (1, 2)
    assert output.strip()
    assert_harmless(output)


def test_tables(evil: Path, tmp_path: Path) -> None:
    dims = "[" + ", ".join(["128"] * 10) + "]"
    head = "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
    (evil / "matformer.csv").write_text(head + f'a{EVIL},10,,,"{dims}",\n', encoding="utf-8")
    example = {"skill": EVIL, "metric": "exact", "answer": "x", "messages": [{"role": "user", "content": "x"}]}
    (evil / "sample.jsonl").write_text(json.dumps(example) + "\n")
    for arguments in (["convert", "--list-slices"], ["eval"]):
        code, output = run([*arguments, "--model", str(evil)], tmp_path)
        assert code == 0
        assert_harmless(output)


def test_a_conversation(tmp_path: Path, evil: Path) -> None:
    lines = [
        f"/load {EVIL}",
        f"/image no{EVIL}.png",
        f"/{EVIL}",
        f"/set temperature {EVIL}",
        f"/system {EVIL}",
        "/stats",
        EVIL,
        "/resume",
        "/resume 1",
    ]
    _, output = run(["chat", "--model", str(evil), "--max-tokens", "2"], tmp_path, "\n".join(lines).encode())
    assert b"system prompt: " in output
    assert_harmless(output)
    for arguments in (["list"], ["show", "1"], ["show", "1", "--json"], ["rm", "1"]):
        code, output = run(["history", *arguments], tmp_path)
        assert code == 0
        assert b"pwned" in output
        assert_harmless(output)


def test_the_doctor_lists_models(evil: Path, tmp_path: Path) -> None:
    conversions = tmp_path / "g3n_mlx" / "conversions"
    conversions.mkdir(parents=True)
    evil.rename(conversions / evil.name)
    _, output = run(["doctor"], tmp_path)
    assert b"pwned" in output
    assert_harmless(output)


def assert_harmless(output: bytes) -> None:
    """A progress bar may move within its line, an answer be drawn anew and in colours; all else is text."""
    text = re.sub(r"\x1b\[(\d*A|[JK]|(?!31m)[\d;]*m)|\r", "", output.decode())
    obeyed = {letter for letter in text if letter not in "\n\t" and (letter < " " or "\x7f" <= letter <= "\x9f")}
    assert not obeyed, output


# Streams that the caller has closed, and signals.


def shell(line: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(home), "HF_HOME": str(home / "hf"), "PYTHON": sys.executable}
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("-m g3n_mlx.chat --model demo -p - <&-", "g3n-chat: the prompt is empty: stdin had no text"),
        ("-m g3n_mlx.chat --model demo -p hi >&-", "g3n-chat: stdout is closed, so there is nowhere to write to"),
        ("-m g3n_mlx.convert --list-slices --model demo >&-", "g3n-convert: stdout is closed, so there is"),
        ("-m g3n_mlx.doctor >&-", "g3n doctor: stdout is closed"),
        ("-m g3n_mlx.chat --model demo -p hi >/dev/full", "g3n-chat: no space left on device"),
        ("-m g3n_mlx.convert --list-slices --model demo >/dev/full", "g3n-convert: no space left on device"),
    ],
)
def test_a_closed_or_full_stream_is_one_line(line: str, error: str, tmp_path: Path) -> None:
    done = shell(f'"$PYTHON" {line}', tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(error)


def test_what_needs_no_stdin_or_stderr_goes_on_without(tmp_path: Path) -> None:
    done = shell('"$PYTHON" -m g3n_mlx.chat --model demo -p "What is 12 + 34?" <&- 2>&-', tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "12 + 34 = 46")
    assert shell('"$PYTHON" -m g3n_mlx.chat --model demo <&-', tmp_path).returncode == 0
    assert shell('"$PYTHON" -m g3n_mlx.chat --model nowhere -p hi 2>&-', tmp_path).returncode == 1


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_command_and_cleans_up(tiny_folder: Path, tmp_path: Path, name: str, code: int) -> None:
    script = (
        "import os, sys, time\n"
        "from g3n_mlx.convert import __main__ as command, write\n"
        # In one call of the system, for several threads write.
        "write._Block.run = lambda block: (os.write(1, b'writing\\n'), time.sleep(8))\n"
        "sys.exit(command.main(sys.argv[1:]))\n"
    )
    out = tmp_path / "out" / "model"
    out.parent.mkdir()
    command = [sys.executable, "-c", script, "--model", str(tiny_folder), "-o", str(out)]
    for ignored in (False, True):
        child = subprocess.Popen(
            ["nohup", *command] if ignored and name == "SIGHUP" else command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Whoever runs the tests may ignore it, under nohup for example.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        assert list(out.parent.iterdir())
        child.send_signal(getattr(signal, name))
        if ignored and name == "SIGHUP":
            time.sleep(0.5)
            assert child.poll() is None
            child.send_signal(signal.SIGTERM)
        child.communicate()
        assert child.returncode in (code, 143 if ignored else code)
        assert not list(out.parent.iterdir())
