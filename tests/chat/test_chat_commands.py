"""What a chat says of files, commands and settings that are not as they should be."""

import re
import shutil
import sys
import types
from pathlib import Path

import pytest
from test_chat import echo, session, talk  # noqa: F401 - fixtures among them

from g3n_mlx.chat.commands import COMMANDS

MEDIA = Path(__file__).resolve().parents[2] / "examples" / "media"


def test_the_manual_names_every_command(repository):
    manual = (repository / "docs" / "chat.md").read_text("utf-8")
    assert not [name for name in COMMANDS if not re.search(rf"`/{name}[ `]", manual)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("two.png", "a b.png"):
        shutil.copy(MEDIA / "shapes.png", tmp_path / name)
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def last(echo) -> list:  # noqa: F811
    content = echo.asked[-1][0][-1]["content"]
    return [content] if isinstance(content, str) else [p if isinstance(p, str) else p["type"] for p in content]


@pytest.mark.parametrize(
    ("line", "asked", "said"),
    [
        ("FOLDER/two.png What is this?", ["image", "What is this?"], "with two.png"),
        ("What is in FOLDER/two.png?", ["What is in", "image", "?"], "with two.png"),
        ("'FOLDER/a b.png' what?", ["image", "what?"], "with a b.png"),
        ("FOLDER/a\\ b.png what?", ["image", "what?"], "with a b.png"),
        ("two.png What is this?", ["two.png What is this?"], ""),
        ("What is in two.png?", ["What is in two.png?"], ""),
        ("./two.png what?", ["./two.png what?"], ""),
        ("http://h/c.png ?", ["http://h/c.png ?"], ""),
        ("/image a b.png QUESTION", ["image", "QUESTION"], ""),
        ("/image two.png two words", ["image", "two words"], ""),
    ],
)  # fmt: skip
def test_dropped_files_are_taken_and_names_are_text(session, echo, folder, capsys, line, asked, said):  # noqa: F811
    talk(session, line.replace("FOLDER", str(folder)))
    assert last(echo) == asked
    assert capsys.readouterr().err.strip() == said


def test_a_missing_file_before_a_question_is_named_alone(session, folder, capsys):  # noqa: F811
    talk(session, "/image six.png What is it?")
    assert capsys.readouterr().err == f"error: '{folder}/six.png' does not exist\n"


def test_commands_that_take_nothing_say_so(session, echo, folder, capsys):  # noqa: F811
    talk(session, "/quit now", "/clear the table", "hello", "/exit", "never asked")
    assert capsys.readouterr().err.splitlines() == [
        "error: /exit takes no argument, and got 'now'",
        "error: /clear takes no argument, and got 'the table'",
    ]
    assert last(echo) == ["hello"]


def test_clear_names_the_pictures_that_nobody_asked_about(session, folder, capsys):  # noqa: F811
    talk(session, "/image two.png", "/clear", "/clear")
    assert capsys.readouterr().err.splitlines()[1:] == [
        "the conversation is empty; not asked about and forgotten too: two.png",
        "the conversation is empty",
    ]


def test_save_and_load_in_clear_words(session, folder, capsys):  # noqa: F811
    talk(session, f"/save {folder}", "/save no/talk.json", f"/load {folder}", "/load no.json", "/load two.png")
    assert capsys.readouterr().err.splitlines() == [
        f"error: {folder}: is a directory",
        f"error: no/talk.json can't be written: there is no folder {folder}/no",
        f"error: {folder}: is a directory",
        "error: no.json: no such file or directory",
        "error: two.png is no saved conversation; expected JSON with a list of messages",
    ]


def test_a_microphone_that_can_not_be_opened_does_not_record(session, capsys, monkeypatch):  # noqa: F811
    class PortAudioError(Exception):
        pass

    def stream(**_: object) -> None:
        raise PortAudioError("no device")

    fake = types.SimpleNamespace(InputStream=stream, PortAudioError=PortAudioError)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    talk(session, "/mic")
    assert capsys.readouterr().err == "error: the microphone can't be opened: no device\n"


def test_out_of_memory_does_not_end_the_chat(session, echo, capsys, monkeypatch):  # noqa: F811
    def stream(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(type(echo), "stream", stream)
    talk(session, "hello")
    assert capsys.readouterr().err.startswith("error: out of memory (CUDA out of memory.")
