"""`/model`, `/show` and `/edit`: another model, what a session is about, and a message from an editor."""

import os
import stat
import sys
from pathlib import Path

import pytest
from test_chat import echo, session, talk  # noqa: F401 - fixtures among them

from g3n_mlx.chat import __main__ as command
from g3n_mlx.chat.models import Models
from g3n_mlx.chat.session import Session

GREEDY = {"temperature": 0.0, "max_tokens": 12}


@pytest.fixture
def chat():
    pytest.importorskip("torch")
    flags = ["--model", "demo", "--backend", "torch", "--device", "cpu"]
    models = Models(command.command_line().parse_args(flags))
    chat = Session(models.load(), "Be brief.", GREEDY, models=models)
    yield chat
    chat.sizes.close()


def test_another_model_goes_on_with_the_conversation(chat, tiny_folder, capsys):
    talk(chat, "What is 12 + 34?", "/slice half", "/set draft half")
    demo, half = chat.sizes._taken.values()
    before = chat.messages
    talk(chat, f"/model {tiny_folder}", "And now?", "/model")
    assert chat.failures == 0
    assert demo.runner.closed
    assert half.runner.closed
    assert chat.model.name == "tiny-gemma3n"
    assert chat.messages[:2] == before
    assert len(chat.messages) == 4
    lines = capsys.readouterr().err.splitlines()
    assert "tiny-gemma3n on torch (cpu) answers from now on" in lines
    assert lines[-1] == "tiny-gemma3n on torch (cpu) answers"


def test_a_name_that_is_none_changes_nothing(chat, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    model = chat.model
    talk(chat, "Hello", "/model /no/such", f"/model {tmp_path}", "Hello again")
    assert chat.failures == 2
    assert chat.model is model
    assert len(chat.messages) == 4
    assert "error: no model folder at '/no/such'" in capsys.readouterr().err


def test_a_model_that_fails_to_load_brings_the_old_one_back(chat, tiny_folder, monkeypatch, capsys):
    talk(chat, "Hello", "/slice half")
    load = Models.load

    def failing(models):
        if models._arguments.model != "demo":
            raise ValueError("its weights are damaged")
        return load(models)

    monkeypatch.setattr(Models, "load", failing)
    talk(chat, f"/model {tiny_folder}", "Hello again", "/show")
    assert chat.failures == 1
    assert chat.model.slice_name == "Half"
    assert len(chat.messages) == 4
    assert "error: its weights are damaged" in capsys.readouterr().err


def test_the_session_is_shown(chat, capsys):
    talk(chat, "/show", "Hello", "/set top_k 5", "/set draft off", "/show")
    err = capsys.readouterr().err
    assert "model     demo\nslice     whole\nbits      " in err
    assert "runs on   torch on cpu, " in err
    assert "context   0 of " in err
    assert "top_p 0.95, top_k 64, " in err
    assert "draft auto; * by you" in err
    assert "top_p 0.95, top_k 5*, " in err
    assert "draft off; * by you" in err
    assert "system    Be brief." in err
    used = int(err.rsplit("context", 1)[1].split()[0].replace(",", ""))
    assert used == chat.model.count_tokens([*chat.system_message(), *chat.messages])


@pytest.fixture
def editor(tmp_path, monkeypatch):
    """Sets $EDITOR to a program of these lines of Python; `path` is the file."""

    def write(lines: str) -> None:
        script = tmp_path / "an editor"
        script.write_text(f"#!{sys.executable}\nimport sys, pathlib\npath = pathlib.Path(sys.argv[1])\n{lines}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.delenv("VISUAL", raising=False)
        monkeypatch.setenv("EDITOR", f"'{script}'")

    return write


@pytest.mark.skipif(os.name != "posix", reason="its editor is a script")
def test_messages_come_from_an_editor(session, echo, editor, capsys):  # noqa: F811
    editor("path.write_text('one\\n/two\\n', 'utf-8')")
    talk(session, "/edit")
    assert session.messages[0]["content"] == "one\n/two"
    assert "one\n/two" in capsys.readouterr().err
    picture = Path(__file__).resolve().parents[2] / "examples" / "media" / "shapes.png"
    talk(session, f"/image {picture} what?")
    editor("path.write_text(path.read_text('utf-8') + ' And why?', 'utf-8')")
    talk(session, "/edit last")
    assert capsys.readouterr().out.endswith("WHAT? AND WHY?\n")
    assert len(session.messages) == 4
    part, text = session.messages[2]["content"]
    assert (part["type"], text) == ("image", "what? And why?")


@pytest.mark.skipif(os.name != "posix", reason="its editor is a script")
def test_an_editor_that_gives_nothing_asks_nothing(session, editor, monkeypatch, capsys):  # noqa: F811
    talk(session, "/edit last", "one", "/edit two")
    editor("path.write_text(' ')")
    talk(session, "/edit", "/edit last")
    editor("pass")
    talk(session, "/edit last")
    editor("sys.exit(3)")
    talk(session, "/edit last")
    monkeypatch.setenv("VISUAL", "/no/such/editor -w")
    talk(session, "/edit last")
    assert [message["content"] for message in session.messages] == ["one", "ONE"]
    lines = [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines()]
    assert lines[:5] == [
        "there is no question yet",
        "/edit takes the word last, and got 'two'",
        "the message is empty: nothing was asked",
        "the message is empty: nothing was asked",
        "the question is as it was: nothing was asked; /retry asks it again",
    ]
    assert lines[5].endswith("an editor ended with the code 3: nothing was asked")
    assert lines[6] == "there is no editor '/no/such/editor': set the environment variable EDITOR to one"
