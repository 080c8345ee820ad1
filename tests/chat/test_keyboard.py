"""Keys: what Tab completes, messages in quotes, and Ctrl-Z under a shell."""

import io
import os
import sys
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from test_chat import Typist, echo, session, talk, terminal  # noqa: F401 - fixtures among them

from g3n_mlx.chat.completer import ChatCompleter
from g3n_mlx.chat.terminal import is_unfinished, message_lines, quoted, say_wrapped

if os.name == "posix":
    import pexpect


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("a b.png", "ab.wav", "abc.txt", ".hidden.png", "bad\nname.png"):
        (tmp_path / name).touch()
    (tmp_path / "album").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def completed(before: str) -> list[str]:
    found = ChatCompleter().get_completions(Document(before), CompleteEvent(completion_requested=True))
    return [before[: len(before) + completion.start_position] + completion.text for completion in found]


def test_commands_and_settings_are_completed():
    assert completed("/fi") == ["/file "]
    assert completed("/s") == ["/system ", "/slice ", "/show", "/save ", "/stats", "/set "]
    assert "/image " in completed("/")
    assert completed("/set top") == ["/set top_p ", "/set top_k "]
    assert completed("/set top_p 0") == completed("") == completed("he") == completed("/nonsense ") == []


@pytest.mark.skipif(os.name == "nt", reason="names aren't escaped there")
def test_files_are_completed(folder):
    assert completed("/image a") == ["/image a\\ b.png", "/image album/"]
    assert completed("/image a\\ ") == ["/image a\\ b.png"]
    assert completed("/audio ") == ["/audio ab.wav", "/audio album/"]
    assert completed("/load ab") == ["/load ab.wav", "/load abc.txt"]
    assert completed("/image .h") == ["/image .hidden.png"]
    assert completed(f"What is {folder}/a") == [
        f"What is {folder}/{name}" for name in ("a\\ b.png", "ab.wav", "album/")
    ]
    assert completed("/image no/such/") == completed("What is a") == []


def test_quotes_hold_many_lines_even_those_that_look_like_commands(session, echo, monkeypatch, capsys):  # noqa: F811
    lines = '"""one\n/clear\\\n\ntwo"""\n"""\n/clear\n"""\n""""""\n"""not closed'
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    session.run(message_lines())
    asked = [message["content"] for message in echo.asked[-1][0] if message["role"] == "user"]
    assert asked == ["one\n/clear\\\n\ntwo", "/clear", "not closed"]
    assert capsys.readouterr().err == ""


def test_where_quotes_end():
    for text in ('"""', '""""', '"""a', '"""a"" "', '"""a\n""" b'):
        assert is_unfinished(text)
    for text in ('""""""', '"""a"""', ' """\na\n"""\n', 'say """', "/system"):
        assert not is_unfinished(text)
    assert quoted('say """') is None


@terminal
def test_tab_and_quotes_in_a_real_terminal(tmp_path):
    with Typist(tmp_path, "--model", "demo") as typist:
        typist.child.send("/sy\t")
        typist.child.expect("stem")
        typist.type("Be brief.\r", "system prompt: Be brief.")
        typist.type('"""What is\r12 + 34?\r"""\r', "12 [+] 34 = 46")
        typist.end("\x04")


@terminal
def test_ctrl_z_suspends_at_the_prompt_and_in_an_answer(tmp_path, tiny_folder):
    environment = {**os.environ, "PS1": "shell$ ", "TERM": "xterm", "XDG_STATE_HOME": str(tmp_path)}
    shell = pexpect.spawn(
        "bash", ["--norc", "--noprofile", "-i"], env={**environment, "PROMPT_TOOLKIT_NO_CPR": "1"},
        encoding="utf-8", timeout=60, dimensions=(40, 200),
    )  # fmt: skip
    shell.sendline(f"{sys.executable} -m g3n_mlx.chat --model {tiny_folder} --seed 1")
    shell.expect(r"\x1b\[\?2004h.*Ctrl-D ends(?s:.*)\x1b\[\?2004h")
    shell.send("Tell me\x1a")
    shell.expect(r"Stopped(?s:.*)shell\$ ")
    shell.sendline("fg")
    shell.expect(r"> (?s:.*)Tell me")
    shell.send(" everything.\r")
    shell.expect(r"\x1b\[\?2004l")  # the prompt is over
    shell.expect("[A-Za-z]{2}")
    shell.send("\x1a")
    shell.expect(r"Stopped(?s:.*)shell\$ ")
    shell.sendline("fg")
    shell.expect(r"g3n_mlx.chat --model .*\r\n")
    shell.expect("[A-Za-z]{2}")
    shell.send("\x03")
    shell.expect(r"\[stopped\](?s:.*)\x1b\[\?2004h")
    shell.send("\x04")
    shell.expect(r"shell\$ ")
    shell.close(force=True)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("44", ["  /undo               forget the last", "                      question"]),
        ("30", ["  /undo               forget", "    the last question"]),
    ],
)
def test_a_tables_second_column_stays_one_where_it_has_room(monkeypatch, capsys, columns, expected):
    monkeypatch.setenv("COLUMNS", columns)
    say_wrapped("  /undo               forget the last question", dim=False)
    assert capsys.readouterr().err.splitlines() == expected
