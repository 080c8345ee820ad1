"""The commands' common side: model flags, --version, and names as they were called."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from g3n_mlx import __main__ as umbrella
from g3n_mlx import loading
from g3n_mlx.chat import __main__ as chat
from g3n_mlx.checkpoint import hub
from g3n_mlx.commands import MODEL_FLAGS, load_from, model_of

LOADING = ["chat", "bench", "eval", "serve", "batch", "mcp"]


def command_line(name):
    return import_module(f"{umbrella.COMMANDS[name][0]}.__main__").command_line


def flags_of(name):
    return {flag: action for action in command_line(name)("x")._actions for flag in action.option_strings}


@pytest.mark.parametrize("name", LOADING)
def test_every_command_that_loads_a_model_has_all_flags(name):
    missing = MODEL_FLAGS.keys() - flags_of(name).keys()
    assert missing == (set(chat.LEFT_OUT) if name == "chat" else set())


def test_a_shared_flag_is_the_same_everywhere():
    for flag in MODEL_FLAGS:
        commands = [flags_of(name) for name in LOADING if name != "eval"]  # eval's are repeatable
        first, *others = [flags[flag] for flags in commands if flag in flags]
        for other in others:
            assert (first.help, first.dest, first.type, first.default) == (
                other.help,
                other.dest,
                other.type,
                other.default,
            )
    convert = flags_of("convert")
    for flag in ("--revision", "--matformer-config"):
        assert convert[flag].help == flags_of("serve")[flag].help
    assert convert["--model"] is convert["--hf-path"]


def test_all_flags_reach_load(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(loading, "load", lambda source, **options: given.update(source=source, **options))
    flags = {
        "--model": "a/b",
        "--revision": "v1",
        "--matformer": "e2b",
        "--matformer-config": str(tmp_path / "own.csv"),
        "--q-bits": "4",
        "--backend": "torch",
        "--device": "cpu",
        "--dtype": "float32",
        "--chat-template": "own",
        "--activations": "int8",
        "--adapter": "tuned=0.5",
    }
    assert flags.keys() == MODEL_FLAGS.keys()
    words = [word for pair in flags.items() for word in pair]
    load_from(command_line("serve")().parse_args([*words, "--fits", "off"]))
    assert given == {
        "source": "a/b",
        "revision": "v1",
        "matformer": "e2b",
        "matformer_config": tmp_path / "own.csv",
        "q_bits": 4,
        "backend": "torch",
        "device": "cpu",
        "dtype": "float32",
        "chat_template": "own",
        "activations": "int8",
        "adapter": {"tuned": 0.5},
    }


def test_the_default_model_is_told(monkeypatch, capsys):
    monkeypatch.setattr(hub, "default_model", lambda: (Path("found"), "using found"))
    arguments = command_line("chat")().parse_args([])
    assert model_of(arguments) == Path("found")
    assert capsys.readouterr().err == "using found\n"
    told = []
    assert model_of(arguments, told.append) == Path("found")
    assert told == ["using found"]
    assert capsys.readouterr().err == ""


def test_numbers_of_flags():
    serve, bench = command_line("serve")(), command_line("bench")()
    assert serve.parse_args(["--max-queue", "0"]).max_queue == 0
    for parser, flags in (
        (serve, ["--max-queue", "-1"]),
        (serve, ["--cache-memory", "inf"]),
        (serve, ["--cache-memory", "0"]),
        (bench, ["--num-trials", "0"]),
        (bench, ["--num-trials", "many"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(flags)
        assert stopped.value.code == 2


@pytest.mark.parametrize("name", [None, *umbrella.COMMANDS, *umbrella.ALIASES])
def test_version_everywhere(name, capsys, repository):
    with pytest.raises(SystemExit) as stopped:
        umbrella.main(["--version"] if name is None else [name, "--version"])
    assert stopped.value.code == 0
    project = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]
    assert capsys.readouterr().out == f"g3n-mlx {project['version']}\n"


@pytest.mark.parametrize("name", [*umbrella.COMMANDS, *umbrella.ALIASES])
def test_usage_says_how_a_command_was_called(name, capsys):
    for prog in ("g3n", "python -m g3n_mlx"):
        with pytest.raises(SystemExit):
            umbrella.main([name, "--frobnicate"], prog)
        assert f"\n{prog} {name}: error: " in capsys.readouterr().err.replace("usage:", "\nusage:", 1)


def test_failures_say_how_a_command_was_called(capsys):
    assert umbrella.main(["chat", "-p", ""]) == 1
    assert capsys.readouterr().err == "g3n chat: the prompt is empty\n"


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "g3n_mlx"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m g3n_mlx COMMAND [FLAGS]\n")
    assert "\n  chat " in done.stdout
