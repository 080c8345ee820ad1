"""What a terminal shows while a model loads and reads, and that nothing of it stays."""

import os
import sys

import pytest

from g3n_mlx.chat import waiting

pyte = pytest.importorskip("pyte")
if os.name == "posix":
    import pexpect

EAGER = "import sys; from g3n_mlx.chat import __main__, waiting; waiting.MOMENT_S = 0; sys.exit(__main__.main())"


class Terminal:
    """A terminal emulator as a stream."""

    def __init__(self) -> None:
        self.screen = pyte.Screen(40, 6)
        self.screen.set_mode(pyte.modes.LNM)
        self.stream = pyte.Stream(self.screen)

    def write(self, text: str) -> int:
        self.stream.feed(text)
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True

    def rows(self) -> list[str]:
        return [row.rstrip() for row in self.screen.display if row.strip()]


def terminal(monkeypatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(waiting, "MOMENT_S", 3600)  # the line is drawn by hand
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    return sys.stderr


def test_others_write_above_the_line_which_leaves_no_trace(monkeypatch):
    stderr = terminal(monkeypatch)
    with waiting.Waiting("loading") as line:
        kept = sys.stderr
        line._draw()
        assert stderr.rows() == ["loading, 0 s"]
        print("a warning", file=sys.stderr)
        assert stderr.rows() == ["a warning"]
        line._draw()
        line.read(512, 2500)
        assert stderr.rows() == ["a warning", "reading: 512 of 2,500 tokens, 0 s"]
        line.says("x" * 100)
        assert stderr.rows() == ["a warning", "x" * 39]
    assert stderr.rows() == ["a warning"]
    assert sys.stderr is stderr
    kept.write("still here\n")
    assert stderr.rows() == ["a warning", "still here"]


def test_a_bar_of_somebody_else_is_left_alone(monkeypatch):
    stderr = terminal(monkeypatch)
    with waiting.Waiting("loading") as line:
        sys.stderr.write("\rdownloading: 40 %")
        line._draw()
        assert stderr.rows() == ["downloading: 40 %"]
        sys.stderr.write("\n")
        line._draw()
        assert stderr.rows() == ["downloading: 40 %", "loading, 0 s"]


@pytest.mark.parametrize(("stream", "term"), [("stdout", "xterm"), ("stderr", "xterm"), ("", "dumb")])
def test_nothing_is_shown_elsewhere(monkeypatch, stream, term):
    stderr = terminal(monkeypatch)
    monkeypatch.setenv("TERM", term)
    if stream:
        monkeypatch.setattr(getattr(sys, stream), "isatty", lambda: False)
    with waiting.Waiting("loading") as line:
        assert sys.stderr is stderr
        assert not line.shown


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_loading_and_reading_in_a_real_terminal(tmp_path, tiny_folder):
    arguments = ["--model", str(tiny_folder), "--max-tokens", "2", "--seed", "1"]
    environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn(
        sys.executable, ["-c", EAGER, *arguments], env=environment, encoding="utf-8", timeout=60, dimensions=(24, 80)
    )
    written = ""
    for line in ("/set prefill_step_size 16\r", "one two three " * 200 + "\r", "\x04"):
        child.expect(r"\x1b\[\?2004h")  # the prompt is ready
        written += child.before + child.after
        child.send(line)
    child.expect(pexpect.EOF)
    written += child.before
    child.close()
    assert child.exitstatus == 0
    assert "loading the model, 0 s" in written
    read = [int(part.split(" ")[0].replace(",", "")) for part in written.split("reading: ")[1:]]
    assert len(read) > 5
    assert read == sorted(read)
    screen = pyte.Screen(80, 100)
    pyte.Stream(screen).feed(written)
    rows = [row.strip() for row in screen.display]
    assert "[cut off: the limit of tokens was reached]" in rows
    assert not [row for row in rows if row.startswith(("loading", "reading"))]
