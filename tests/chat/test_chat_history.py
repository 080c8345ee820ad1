"""A chat's conversation is kept while it goes on, and an earlier one is taken up again."""

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from test_chat import Typist, echo, talk, terminal  # noqa: F401 - a fixture among them

from g3n_mlx.chat import __main__ as command
from g3n_mlx.chat import kept, models
from g3n_mlx.chat.keyboard import typed_messages
from g3n_mlx.chat.session import Session
from g3n_mlx.history.record import Record
from g3n_mlx.history.store import History

if os.name == "posix":
    import resource

MEDIA = Path(__file__).resolve().parents[2] / "examples" / "media"
DEMO = ("--model", "demo", "--max-tokens", "4", "--seed", "1")


@pytest.fixture
def history(tmp_path, monkeypatch) -> History:
    """A history of the test's own, for the commands that it starts too."""
    for name in ("XDG_DATA_HOME", "WIN_PD_OVERRIDE_LOCAL_APPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "data"))
    return History()


@pytest.fixture
def session(echo, history) -> Session:  # noqa: F811
    return Session(echo, None, {}, record=Record(history))


def questions(history: History, name: str = "1") -> list[str]:
    return [turn.question for turn in history.find(name).turns]


def test_a_turn_is_kept_when_its_answer_ends(session, history):
    talk(session, "/system Be kind.", "a")
    assert (history.last().system, history.last().messages) == ("Be kind.", session.messages)
    talk(session, "b", "/undo")
    assert questions(history) == ["a"]
    talk(session, "/retry", "c", "/system -", "d")
    assert questions(history) == ["a", "c", "d"]
    assert history.last().system is None
    talk(session, "/undo", "/undo", "/undo")
    assert history.entries() == []


def test_clear_begins_a_new_conversation(session, history, capsys):
    talk(session, "a", "/clear", "b", "/clear", "/clear")
    assert (questions(history, "1"), questions(history, "2")) == (["a"], ["b"])
    assert "the conversation is empty; /resume 1 goes back to the one before" in capsys.readouterr().err


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["a", "b", "/undo", "/retry", "/system x", "/clear", "/resume 1"]), max_size=8))
def test_the_history_has_what_the_chat_has(echo, history, lines):  # noqa: F811
    history.path.unlink(missing_ok=True)
    session = Session(echo, None, {}, record=Record(history))
    talk(session, *lines)
    assert session.record is not None
    if session.messages:
        assert history.find(str(session.record.id)).messages == session.messages
    else:
        assert session.record.id is None


def test_a_saved_file_is_kept_once_it_goes_on(session, history, tmp_path):
    talk(session, "a", f"/save {tmp_path / 'a.json'}", f"/load {tmp_path / 'a.json'}")
    assert len(history.entries()) == 1
    talk(session, "b")
    assert (questions(history, "1"), questions(history, "2")) == (["a"], ["a", "b"])


def test_resume(session, history, echo, capsys):  # noqa: F811
    talk(session, "/resume")
    assert "no conversations are kept in" in capsys.readouterr().err
    talk(session, "/system Be kind.", "why blue?", "/clear", "/system -", "why red?", "/resume")
    err = capsys.readouterr().err
    assert "2  " in err
    assert "why blue?\n/resume ID goes on with one; `g3n history` lists 2\n" in err
    talk(session, "/resume blue", "more")
    assert [message["content"] for message in echo.asked[-1][0]] == ["Be kind.", "why blue?", "WHY BLUE?", "more"]
    assert "going on with conversation 1, 1 question; the last one:\n  > why blue?\n  WHY" in capsys.readouterr().err
    assert questions(history, "1") == ["why blue?", "more"]
    talk(session, "/resume why", "/resume 9")
    err = capsys.readouterr().err
    assert "take the id, of 1, 2" in err
    assert "there is no conversation '9'" in err
    assert len(session.messages) == 4


def test_without_a_record_nothing_is_kept_and_the_kept_can_be_read(session, history, echo):  # noqa: F811
    talk(session, "a")
    silent = Session(echo, None, {})
    talk(silent, "x", "/undo", "/clear", "/resume 1", "b")
    assert questions(history) == ["a"]
    assert len(silent.messages) == 4


def test_media_whose_file_is_gone(session, history, echo, tmp_path, capsys):  # noqa: F811
    stays, goes = (Path(shutil.copy(MEDIA / "shapes.png", tmp_path / name)) for name in ("stays.png", "goes.png"))
    notes = tmp_path / "notes.txt"
    notes.write_text("notes")
    talk(session, f"/image {stays}", f"/file {notes}", f"/image {goes} what?")
    session.attached.append({"type": "image", "image": f"data:image/png;base64,{'A' * 100}"})
    session.messages[0]["content"].append(session.attached.pop())  # as from the clipboard
    session.record.begin()
    kept.keep(session)
    goes.rename(tmp_path / "gone.png")
    notes.unlink()
    capsys.readouterr()
    talk(session, "/resume 2", "and now?")
    err = capsys.readouterr().err
    assert "goes.png" in err
    assert "the image came from no file, so it is not kept; the conversation goes on without it" in err
    assert err.count("note: ") == 3
    first = echo.asked[-1][0][0]["content"]
    assert [part if isinstance(part, str) else part["type"] for part in first] == [
        "image",
        "[notes.txt is no longer there]\n\n[goes.png is no longer there]\n\nwhat?",
        "[the image is no longer there]",
    ]
    (tmp_path / "gone.png").rename(goes)  # it is back, as a disk that was not connected
    talk(session, "/resume 2")
    assert capsys.readouterr().err.count("note: ") == 2
    assert len(history.entries()) == 2


def test_what_can_not_be_kept_is_said_once(session, history, capsys):
    history.path.parent.parent.mkdir(parents=True)
    history.path.parent.write_text("a file in the folder's place")
    talk(session, "a", "b")
    out, err = capsys.readouterr()
    assert out == "A\nB\n"
    assert err.count("[what is said is not kept for now: ") == 1
    history.path.parent.unlink()
    talk(session, "c")
    assert questions(history) == ["a", "b", "c"]
    assert session.failures == 0


@pytest.fixture
def chat(echo, history, monkeypatch):  # noqa: F811
    """The command with the small fake model; returns its exit code."""
    monkeypatch.setattr(models, "load_from", lambda arguments, **_: echo)

    def run(*arguments: str, piped: str = "") -> int:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped.encode())))
        return command.main(list(arguments))

    return run


def test_one_shots_and_piped_questions(chat, history, echo, monkeypatch, capsys):  # noqa: F811
    assert chat("-p", "hello", piped="from a pipe") == 0
    assert questions(history) == ["from a pipe\n\nhello"]
    assert chat("--no-history", "-c", "more") == 0
    assert [message["content"] for message in echo.asked[-1][0][::2]] == ["from a pipe\n\nhello", "more"]
    monkeypatch.setenv("G3N_HISTORY", "off")
    assert chat("-c", "more") == 0
    monkeypatch.delenv("G3N_HISTORY")
    assert questions(history) == ["from a pipe\n\nhello"]
    assert chat("-c", "--system-prompt", "Be kind.", "more") == 0
    assert "going on with" not in capsys.readouterr().err
    assert chat("--continue", piped="one\ntwo\n") == 0
    assert "going on with conversation 1, 2 questions" in capsys.readouterr().err
    assert questions(history) == ["from a pipe\n\nhello", "more", "one", "two"]
    assert echo.asked[-1][0][0] == {"role": "system", "content": "Be kind."}


def test_what_is_wrong_is_said_before_the_model_loads(chat, history, monkeypatch, capsys):
    monkeypatch.setattr(models, "load_from", lambda arguments, **_: pytest.fail("it was loaded"))
    assert chat("-p", "hello", "--continue") == 1
    assert "there is no conversation to go on with" in capsys.readouterr().err
    history.path.parent.mkdir(parents=True)
    history.path.write_text("no database\n" * 100)
    assert chat("-p", "hello") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "history.db is damaged" in line
    assert "chat with --no-history" in line


def test_a_damaged_history_is_no_matter_to_a_chat_that_keeps_none(chat, history):
    history.path.parent.mkdir(parents=True)
    history.path.write_text("no database\n" * 100)
    assert chat("-p", "hello", "--no-history") == 0


@pytest.mark.skipif(os.name != "posix", reason="limits of Unix")
def test_a_full_disk(history):
    """As one: no file may grow beyond two pages of the database."""
    full = subprocess.run(
        [sys.executable, "-m", "g3n_mlx", "chat", *DEMO, "-p", "hello"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )
    assert full.returncode == 0, full.stderr
    assert full.stdout.strip()
    assert full.stderr.count("[what is said is not kept for now: ") == 1
    assert history.entries() == []
    Record(history).update(None, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "m")
    assert questions(history) == ["a"]


@pytest.mark.parametrize("keep", [True, False])
def test_what_was_typed_is_kept_with_the_conversation_alone(tmp_path, monkeypatch, keep):
    for name in ("XDG_STATE_HOME", "WIN_PD_OVERRIDE_LOCAL_APPDATA"):
        monkeypatch.setenv(name, str(tmp_path))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("a secret\r")
        assert next(typed_messages(keep)) == "a secret"
    assert [path.read_text().count("secret") for path in tmp_path.rglob("chat_history")] == ([1] if keep else [])


@terminal
def test_two_chats_at_once_of_which_one_is_killed(tmp_path, history):
    with Typist(tmp_path, *DEMO) as one, Typist(tmp_path, "--model", "demo", "--seed", "1") as two:
        one.type("first of one\r", "cut off")
        two.type("What is 2 + 3?\r", r"\d")
        one.type("second of one\r", "cut off")
        two.child.send("Tell me a story.\r")
        two.child.expect(r"\x1b\[\?2004l")  # it has been asked
        two.child.kill(signal.SIGKILL)
        one.type("/resume\r", "What is 2")
        one.end("/exit\r")
    one_said = questions(history, "first of one")
    assert one_said == ["first of one", "second of one"]
    assert questions(history, "2 + 3")[:1] == ["What is 2 + 3?"]


@terminal
def test_continue_in_a_terminal(tmp_path, history, monkeypatch):
    record = Record(history)
    record.update("Be brief.", [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hi."}], "m")
    monkeypatch.setattr(Typist, "__enter__", lambda self: self)
    with Typist(tmp_path, *DEMO, "--continue") as typist:
        typist.reads("going on with conversation 1, 1 question", "hello", "Hi.")
        typist.type("/system\r", "system prompt: Be brief.")
        typist.type("more\r", "cut off")
        typist.end("/exit\r")
    assert questions(history) == ["hello", "more"]
