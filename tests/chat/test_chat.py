"""The chat: a session over a small fake model, the real program, and the real program in a real terminal."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from g3n_mlx import __main__ as umbrella
from g3n_mlx import commands
from g3n_mlx.chat import __main__ as command
from g3n_mlx.chat import models
from g3n_mlx.chat import session as sessions
from g3n_mlx.chat import terminal as console
from g3n_mlx.chat.settings import SETTINGS
from g3n_mlx.commands import PIPE_CLOSED
from g3n_mlx.config.fields import read_json
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.media.opener import MediaOpener
from g3n_mlx.prompt.preparer import Preparer
from g3n_mlx.prompt.prompt import Prompt
from g3n_mlx.prompt.tokenizer import Tokenizer

if os.name == "posix":
    import pexpect
terminal = pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 3
    time_to_first_token_s: float = 0.25
    avg_prompt_tok_per_sec: float = 10.0
    avg_compl_tok_per_sec: float = 5.0
    peak_memory_bytes: int = 2**30
    drafted_tokens: int = 4
    accepted_tokens: int = 1


@dataclass(frozen=True)
class Chunk:
    text: str
    token: int | None
    finish_reason: str | None = None
    usage: Usage | None = None


@dataclass
class Echo:
    """A model that answers with the last question in capitals, a letter a token."""

    tokenizer: Tokenizer
    opener: MediaOpener
    name: str = "echo"
    backend: str = "none"
    device: str = "cpu"
    asked: list[tuple[list[dict], dict[str, Any]]] = field(default_factory=list)
    interrupt_at: int | None = None  # sends itself Ctrl-C before this token
    closed: int = 0
    warmed_up: int = 0

    def checked_draft(self, draft: str) -> str:
        return draft

    def warm_up(self) -> None:
        self.warmed_up += 1

    def prepare(self, messages: list[dict]) -> Prompt:
        return Preparer(self.tokenizer, self.opener, 10_000).prepare(messages)

    def stream(self, messages: list[dict], **sampling: Any) -> Iterator[Chunk]:
        self.asked.append((messages, sampling))
        prompt = self.prepare(messages)
        if len(prompt.token_ids) > 400:
            raise ValueError(f"the prompt has {len(prompt.token_ids)} tokens,\n400 is the limit")
        try:
            content = messages[-1]["content"]
            text = content if isinstance(content, str) else " ".join(p for p in content if isinstance(p, str))
            for index, letter in enumerate(text.upper()):
                if index == self.interrupt_at:
                    self.interrupt_at = None
                    os.kill(os.getpid(), signal.SIGINT)
                yield Chunk(letter, 5)
            yield Chunk("", None, "stop", Usage(len(prompt.token_ids)))
        finally:
            self.closed += 1


@pytest.fixture
def echo(tiny_folder) -> Echo:
    config = ModelConfig.from_dict(read_json(tiny_folder / "config.json"))
    return Echo(Tokenizer.from_folder(tiny_folder), MediaOpener(tiny_folder, config))


@pytest.fixture
def session(echo) -> sessions.Session:
    return sessions.Session(echo, None, {})


def talk(session: sessions.Session, *lines: str) -> None:
    session.run(iter(lines))


def test_answers_go_to_stdout_and_the_conversation_grows(session, echo, capsys):
    talk(session, "hello", "", "  ", "again")
    assert capsys.readouterr().out == "HELLO\nAGAIN\n"
    assert [message["content"] for message in echo.asked[1][0]] == ["hello", "HELLO", "again"]
    assert echo.closed == 2


def test_system_prompt(session, echo, capsys):
    talk(session, "/system Be kind.", "a", "/system", "/system -", "b")
    assert echo.asked[0][0][0] == {"role": "system", "content": "Be kind."}
    assert echo.asked[1][0][0]["role"] == "user"
    assert capsys.readouterr().err.splitlines() == [
        "system prompt: Be kind.",
        "system prompt: Be kind.",
        "system prompt: none",
    ]


def test_undo_retry_and_clear(session, echo, capsys):
    talk(session, "a", "b", "/undo", "/retry")
    assert [message["content"] for message in echo.asked[-1][0]] == ["a"]
    assert len(session.messages) == 2
    talk(session, "/clear", "/undo", "/retry", "c")
    assert [message["content"] for message in echo.asked[-1][0]] == ["c"]
    assert capsys.readouterr().err.count("error: there is no question yet") == 2


def test_settings(session, echo, capsys):
    talk(session, "/set temperature 0.7", "/set top-k 5", "/set", "a", "/set top_k default", "b")
    assert echo.asked[0][1] == {"temperature": 0.7, "top_k": 5, "draft": "auto"}
    assert echo.asked[1][1] == {"temperature": 0.7, "draft": "auto"}
    assert "temperature 0.7, top_k 5\n" in capsys.readouterr().err
    talk(session, "/set top_p 3", "/set colour red", "/set seed", "/set seed x", "c")
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "error: top_p is 3.0, expected above 0 and at most 1"
    assert errors[1].startswith("error: there is no setting 'colour'; there are temperature, ")
    assert errors[2] == "error: /set seed needs a value, a number or 'default'"
    assert errors[3].startswith("error: ")
    assert echo.asked[2][1] == {"temperature": 0.7, "draft": "auto"}


def test_every_setting_is_a_sampling_keyword():
    from g3n_mlx.sampling import SamplingParams

    SamplingParams(**{name: kind("1") for name, kind in SETTINGS.items()})


def test_save_and_load(session, echo, tmp_path, capsys):
    path = tmp_path / "my talk.json"
    talk(session, "/system S", "ä", f"/save {path}", "/clear", "/system -", f"/load {path}", "b", f"/save {path}")
    assert [message["content"] for message in echo.asked[-1][0]] == ["S", "ä", "Ä", "b"]
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert not [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("not JSON", "is no saved conversation"),
        ("[" * 100_000, "is no saved conversation"),
        ("[]", "is no saved conversation"),
        ('{"messages": []}', "is no saved conversation"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "ends with a question"),
        ('{"messages": [{"role": "judge", "content": "a"}]}', "has the role 'judge'"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "messages[0].content[0]: the image part has none of the keys 'image', 'url', 'path' and 'base64'",
        ),
    ],
)
def test_what_can_not_be_loaded_changes_nothing(session, tmp_path, capsys, content, expected):
    path = tmp_path / "talk.json"
    path.write_text(content)
    talk(session, "a", f"/load {path}")
    assert expected in capsys.readouterr().err
    assert [message["content"] for message in session.messages] == ["a", "A"]


def test_a_save_that_fails_keeps_the_one_before(session, tmp_path, monkeypatch):
    path = tmp_path / "talk.json"
    session.run(iter(["Hello", f"/save {path}"]))
    before = path.read_bytes()
    write = Path.write_text

    def full_disk(self, text, **options):
        write(self, text[:5], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    session.run(iter(["Hello again", f"/save {path}"]))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_save_and_load_errors_are_one_line(session, tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear aunt")
    talk(
        session,
        f"/save {tmp_path / 'letter.txt'}",
        f"/save {tmp_path / 'no' / 'x'}",
        "/load /no/such",
        "/save",
        "/load",
    )
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 5
    assert all(line.startswith("error: ") for line in errors)
    assert (tmp_path / "letter.txt").read_text() == "dear aunt"


def test_help_and_unknown_commands(session, echo, capsys):
    talk(session, "/help", "/frobnicate", "/exit", "never asked")
    written = capsys.readouterr().err
    for name in ["help", "system", "clear", "undo", "retry", "save", "load", "stats", "set", "exit"]:
        assert f"/{name}" in written
    assert "error: there is no command /frobnicate; /help lists them" in written
    assert not echo.asked


def test_a_path_is_a_question(session, capsys):
    talk(session, "/usr/bin is what?", "/", "//")
    assert capsys.readouterr().out == "/USR/BIN IS WHAT?\n/\n//\n"


def test_stats(session, capsys):
    talk(session, "/stats", "hello", "/stats")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("no figures")
    assert "prompt tokens (0 of them cached), 3 in the answer; first token after 0.25 s" in lines[1]
    assert "1 of 4 drafted tokens accepted, peak memory 1.07 GB" in lines[1]


def test_a_failed_answer_keeps_the_conversation_and_can_be_retried(session, echo, capsys):
    talk(session, "a", "x" * 2000, "/retry", "b")
    captured = capsys.readouterr()
    assert captured.out == "A\nB\n"
    assert len(captured.err.splitlines()) == 2
    assert captured.err.startswith("error: the prompt has 2")
    assert session.failures == 2
    assert [message["content"] for message in session.messages] == ["a", "A", "b", "B"]


@pytest.mark.skipif(os.name != "posix", reason="a process can't send itself Ctrl-C")
def test_ctrl_c_keeps_what_was_said(session, echo, capsys):
    echo.interrupt_at = 3
    talk(session, "interrupted", "more")
    captured = capsys.readouterr()
    assert captured.out == "INTE\nMORE\n"
    assert captured.err == "[stopped]\n"
    assert [message["content"] for message in echo.asked[1][0]] == ["interrupted", "INTE", "more"]
    assert echo.closed == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(os.name != "posix", reason="a process can't send itself Ctrl-C")
def test_ctrl_c_before_the_answer_gives_up_the_question(session, echo, capsys):
    echo.interrupt_at = 0
    talk(session, "never mind")
    assert session.messages == []
    assert "[stopped before the answer began; /retry asks again]" in capsys.readouterr().err
    assert echo.closed == 1
    talk(session, "/retry")
    assert capsys.readouterr().out == "NEVER MIND\n"


def test_the_model_warms_up_before_a_chat_and_not_for_one_question(echo, monkeypatch, capsys):
    monkeypatch.setattr(models, "load_from", lambda arguments, **_: echo)
    monkeypatch.setattr(command, "message_lines", lambda: iter(["hello"]))
    assert command.main(["--prompt", "hello"]) == 0
    assert echo.warmed_up == 0
    assert command.main([]) == 0
    assert echo.warmed_up == 1
    assert capsys.readouterr().out == "HELLO\nHELLO\n"


def test_lines_from_a_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\\\nthree\n\nfour\\"))
    assert list(console.message_lines()) == ["one", "two\nthree", "", "four\n"]


def test_control_letters_do_not_reach_a_terminal(monkeypatch, capsys):
    text = "a\x1b[2J\x07\x9b\x7f\r\n\tü 👩\u200d👧"
    shown = "a\\x1b[2J\\x07\\x9b\\x7f\\x0d\n\tü 👩\u200d👧"
    assert commands.printable(text) == shown
    commands.tell(text, end="")
    assert capsys.readouterr().out == text  # as it is in a pipe
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    commands.tell(text)
    assert capsys.readouterr().out == shown + "\n"


def program(*arguments: str, home: Path, text: str | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home), "HF_HOME": str(home / "hf")}
    return subprocess.run(
        [sys.executable, "-m", "g3n_mlx.chat", *arguments],
        input=text,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**environment, "HF_HUB_OFFLINE": "1", "XDG_STATE_HOME": str(home)},
        check=False,
        timeout=300,
    )


ANSWER = ("--max-tokens", "8", "--seed", "7", "--system-prompt", "Be brief.")


def test_one_shot(backend, tmp_path, tiny_folder):
    done = program("--model", str(tiny_folder), "--backend", backend, "-p", "Hello", *ANSWER, home=tmp_path)
    assert (done.returncode, done.stderr) == (0, "[cut off: the limit of tokens was reached]\n")
    assert done.stdout.endswith("\n")
    from_stdin = program(
        "--model", str(tiny_folder), "--backend", backend, "-p", "-", *ANSWER, home=tmp_path, text="Hello"
    )
    assert (from_stdin.returncode, from_stdin.stdout) == (0, done.stdout)


def test_without_a_model_the_demo_answers_and_says_so(tmp_path):
    done = program("-p", "Hello", "--max-tokens", "4", "--verbose", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("no --model given and no Gemma 3n on this machine: using the embedded demo model")
    assert "tok/s" in done.stderr
    assert done.stdout


def test_a_session_over_a_pipe(tmp_path, tiny_folder):
    lines = "hi\n/stats\n/frobnicate\n/exit\n"
    done = program("--model", str(tiny_folder), "--max-tokens", "4", home=tmp_path, text=lines)
    assert "tok/s" in done.stderr
    assert "error: there is no command /frobnicate" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model", "/no/such"], "no model folder at '/no/such'"),
        (["--model", "google/gemma-3n-E2B-it"], "HF_HUB_OFFLINE is set"),
        (["--temperature", "-1"], "temperature is -1.0, expected at least 0"),
        (["--matformer", "e9b"], "e9b"),
        (["--device", "mps"], "mps"),
        (["--q-bits", "7"], "7"),
        (["-p", " "], "the prompt is empty"),
    ],
)
def test_expected_failures_are_one_line_and_exit_1(tmp_path, tiny_folder, flags, expected):
    flags = flags if "-p" in flags else [*flags, "-p", "Hello"]
    flags = flags if "--model" in flags else [*flags, "--model", str(tiny_folder)]
    done = program(*flags, home=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("g3n-chat: ")
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_prompt_beyond_the_context(tmp_path, tiny_folder):
    done = program("--model", str(tiny_folder), "-p", "-", home=tmp_path, text="one two " * 20_000)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"g3n-chat: the prompt has \d+ tokens, \d+ too many for the context of 32768 .*\n", done.stderr)


def test_stdin_that_is_no_text(tmp_path, tiny_folder):
    done = program("--model", str(tiny_folder), "-p", "-", home=tmp_path, text="")
    assert (done.returncode, done.stderr) == (1, "g3n-chat: the prompt is empty: stdin had no text\n")


def asked_once(echo, monkeypatch, *arguments: str, piped: bytes = b"") -> str:
    """What the model is asked by a command with something piped in."""
    monkeypatch.setattr(models, "load_from", lambda arguments, **_: echo)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
    assert command.main(arguments) == 0
    return echo.asked[-1][0][-1]["content"]


def test_what_is_piped_in_stands_before_the_prompt(echo, monkeypatch):
    for prompt in (["-p", "Summarise."], ["Summarise."]):
        assert asked_once(echo, monkeypatch, *prompt) == "Summarise."
        assert asked_once(echo, monkeypatch, *prompt, piped=b"\n") == "Summarise."
        assert asked_once(echo, monkeypatch, *prompt, piped=b"One.\nTwo.\n") == "One.\nTwo.\n\nSummarise."
    assert asked_once(echo, monkeypatch, "-", piped=b"One.\n") == "One.\n"


def test_a_bare_argument_is_asked_in_a_real_pipe(tmp_path):
    asked = ("--model", "demo", "What is 12 + 34?")
    assert program(*asked, home=tmp_path, text="").stdout == "12 + 34 = 46\n"
    assert program("--model", "demo", "-", home=tmp_path, text="What is 12 + 34?").stdout == "12 + 34 = 46\n"


def test_piped_bytes_that_are_no_text_are_refused(echo, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert command.main(["-p", "What is this?"]) == 1
    assert capsys.readouterr().err.startswith("g3n-chat: stdin is not UTF-8 text: ")


def test_a_schema_shapes_the_one_answer(tmp_path):
    schema = tmp_path / "sum.json"
    schema.write_text('{"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}')
    done = program("--model", "demo", "--schema", str(schema), "What is 12 + 34?", "--seed", "1", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"sum"}


@pytest.mark.parametrize(("text", "expected"), [("{", "is not JSON"), ("[1]", "expected an object")])
def test_a_file_that_is_no_schema_is_told_before_the_model_is_loaded(tmp_path, capsys, text, expected):
    (tmp_path / "bad.json").write_text(text)
    assert command.main(["--model", "/no/such", "--schema", str(tmp_path / "bad.json"), "-p", "a"]) == 1
    assert expected in capsys.readouterr().err


def test_drafts_are_a_setting(session, echo, capsys):
    talk(session, "/set draft off", "a", "/set draft default", "b")
    assert [options["draft"] for _, options in echo.asked] == ["off", "auto"]


def test_a_question_needs_no_quotes():
    words = ["What", "is", "3", "+", "4"]
    assert command.command_line().parse_args([*words, "--seed", "1"]).asked == words


def test_usage_errors_exit_2(tmp_path):
    twice, no_prompt = ["-p", "a", "b"], ["--schema", "a.json"]
    for flags in (["--frobnicate"], ["--seed", "many"], ["--backend", "jax"], twice, no_prompt):
        done = program(*flags, home=tmp_path)
        assert done.returncode == 2
        assert "g3n-chat: error: " in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="Windows reports a closed pipe in another way")
def test_a_reader_that_goes_away_is_no_error(tmp_path, tiny_folder):
    arguments = ["--model", str(tiny_folder), "-p", "Hello", "--max-tokens", "400", "--seed", "1"]
    child = subprocess.Popen(
        [sys.executable, "-m", "g3n_mlx.chat", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    child.stdout.close()
    _, errors = child.communicate(timeout=300)
    assert (child.returncode, errors) == (PIPE_CLOSED, b"")


class Typist:
    """The program in a pseudo-terminal."""

    def __init__(self, home: Path, *arguments: str):
        environment = {
            **os.environ,
            "HOME": str(home),
            "XDG_STATE_HOME": str(home),
            "TERM": "xterm",
            "PROMPT_TOOLKIT_NO_CPR": "1",
        }
        self.child = pexpect.spawn(
            sys.executable, ["-m", "g3n_mlx.chat", *arguments], env=environment, encoding="utf-8", timeout=300,
            dimensions=(40, 200),
        )  # fmt: skip

    def __enter__(self) -> "Typist":
        self.reads("/help lists the commands, Ctrl-D ends")
        return self

    def __exit__(self, *_: object) -> None:
        self.child.close(force=True)

    def reads(self, *words: str) -> None:
        """Waits for what the program writes, and until its prompt takes keys."""
        for expected in (*words, r"\x1b\[\?2004h"):  # bracketed paste is on: the prompt is ready
            self.child.expect(expected)

    def type(self, text: str, *then: str) -> None:
        self.child.send(text)
        self.reads(*then)

    def end(self, text: str) -> None:
        self.child.send(text)
        self.child.expect(pexpect.EOF)
        self.child.close()
        assert self.child.exitstatus == 0


@terminal
def test_terminal_session(tmp_path, tiny_folder):
    saved = tmp_path / "talk.json"
    with Typist(tmp_path, "--model", str(tiny_folder), "--max-tokens", "4", "--seed", "1") as typist:
        typist.type("first\\\rline two\r", "cut off")  # a backslash and Enter
        typist.type("third\x1b\rline four\r", "cut off")  # Alt-Enter
        typist.type("\x1b[200~pasted\nlines\n\x1b[201~\r", "cut off")  # a bracketed paste
        typist.type("wrogn\x7f\x7f\x7fong\x1b[D\x1b[Dx\r", "cut off")  # line editing
        typist.type("/stats\r", "tok/s")
        typist.type("/nonsense\r", "error: there is no command /nonsense")
        typist.type(f"/save {saved}\r", "saved 8 messages")
        typist.type("discarded\x03", "Ctrl-D or /exit ends")  # Ctrl-C at the prompt
        typist.end("\x04")
    questions = [m["content"] for m in json.loads(saved.read_text())["messages"] if m["role"] == "user"]
    assert questions == ["first\nline two", "third\nline four", "pasted\nlines\n", "wroxng"]
    with Typist(tmp_path, "--model", str(tiny_folder), "--max-tokens", "4") as typist:
        typist.type("\x1b[A\x1b[A\x1b[A\x1b[A\r", "cut off|error")  # history of the last session, four entries back
        typist.end("/exit\r")
    (history,) = tmp_path.rglob("chat_history")
    assert history.stat().st_mode & 0o077 == 0


@terminal
def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path, tiny_folder):
    with Typist(tmp_path, "--model", str(tiny_folder), "--seed", "1") as typist:
        # Without an end of sequence the tiny model would go on to its context limit.
        typist.child.send("Tell me everything.\r")
        typist.child.expect(r"\x1b\[\?2004l")  # the prompt is over: Ctrl-C is a signal, and no key
        typist.child.expect("[A-Za-z]{2}")  # and the answer comes
        typist.type("\x03", r"\[stopped")
        typist.type("/undo\r", "forgotten; 0 questions are left")
        typist.end("/exit\r")


def test_table_of_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        umbrella.main(["--help"])
    assert stopped.value.code == 0
    written = capsys.readouterr().out
    assert all(name in written for name in umbrella.COMMANDS)
    assert umbrella.main([]) == 0
    assert capsys.readouterr().out == written
    with pytest.raises(SystemExit) as stopped:
        umbrella.main(["frobnicate"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        umbrella.main(["chat", "--help"])
    assert stopped.value.code == 0
    assert "--system-prompt" in capsys.readouterr().out


def test_at_most_25_flags():
    flags = [action for action in command.command_line()._actions if action.option_strings]
    assert len(flags) <= 25
