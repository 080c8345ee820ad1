"""Answers drawn as Markdown: what stands on the screen of a real terminal emulator, however the text came in."""

import io
import sys
from itertools import pairwise

import pytest
from rich.console import Console

from g3n_mlx.chat.markdown import MarkdownStream, blocks

pyte = pytest.importorskip("pyte")

ANSWER = """# Title

A paragraph with **bold words** that is longer than the screen is wide,
and a second line.

1. one
2. two

```python
x = 1
```

| a | b |
|---|---|
| 1 | 22 |

The end, with <b>tags</b> & `code`.
"""


class Screen:
    """A terminal of some columns and lines, as stdout."""

    def __init__(self, monkeypatch, columns: int, lines: int):
        self.screen = pyte.HistoryScreen(columns, lines, history=1000)
        self.screen.set_mode(pyte.modes.LNM)
        self.stream, self.written = pyte.Stream(self.screen), ""
        monkeypatch.setattr(sys, "stdout", self)
        console = Console(file=io.StringIO(), force_terminal=True, width=columns, height=lines, color_system="standard")
        self.console, self.answer = console, MarkdownStream(console)

    def write(self, text: str) -> None:
        self.written += text
        self.stream.feed(text)

    def flush(self) -> None:
        pass

    def show(self, *pieces: str) -> list[str]:
        for piece in pieces:
            self.answer._next_drawing = 0.0  # as if they came slowly
            self.answer.write(piece)
        self.answer.end()
        return self.rows()

    def rows(self) -> list[str]:
        above = ["".join(row[x].data for x in range(self.screen.columns)) for row in self.screen.history.top]
        rows = [row.rstrip() for row in [*above, *self.screen.display]]
        while rows and not rows[-1]:
            rows.pop()
        return rows


@pytest.mark.parametrize("lines", [60, 12])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_however_an_answer_comes_it_looks_the_same(monkeypatch, lines, step):
    whole = Screen(monkeypatch, 40, 60).show(ANSWER)
    assert whole[0] == "Title"
    assert "A paragraph with bold words that is" in whole
    assert "x = 1" in whole
    assert "The end, with <b>tags</b> & code." in whole
    assert all(first or second for first, second in pairwise(whole)), "no two empty lines"
    pieces = [ANSWER[at : at + step] for at in range(0, len(ANSWER), step)]
    assert Screen(monkeypatch, 40, lines).show(*pieces) == whole


def test_words_wrap_at_the_width_that_a_terminal_has_got(monkeypatch):
    shown = Screen(monkeypatch, 20, 10)
    shown.answer.write("alpha beta gamma delta ")
    assert shown.rows() == ["alpha beta gamma", "delta"]
    shown.screen.resize(10, 40)
    shown.console.width = 40
    assert shown.show("epsilon zeta eta theta") == ["alpha beta gamma delta epsilon zeta eta", "theta"]


@pytest.mark.parametrize(
    "evil", ["\x1b[2Jx", "\x9b31mx", "`\x1b]0;x\x07`", "&#x1b;[2J", "&#12;", "```\n\x1b[2J\n```", "a\rb"]
)
def test_nothing_of_an_answer_is_obeyed(monkeypatch, evil):
    shown = Screen(monkeypatch, 40, 10)
    shown.show(evil)
    for allowed in ("\x1b[J", "\x1b[1;", "\n"):
        shown.written = shown.written.replace(allowed, "")
    assert "\x1b[2J" not in shown.written
    assert "\x1b]" not in shown.written
    assert not set("\x07\x9b\r\x0c") & set(shown.written)


def test_links_show_where_they_lead(monkeypatch):
    shown = Screen(monkeypatch, 60, 10)
    assert shown.show("[here](http://a.example) ![there](http://b.example)") == [
        "here (http://a.example) !there (http://b.example)"
    ]
    assert "\x1b]8" not in shown.written


def test_an_answer_is_cut_into_blocks():
    assert blocks("") == [""]
    assert blocks("one") == ["one"]
    assert blocks("\none\n\n- two\n- three\n\nfour") == ["\none\n\n", "- two\n- three\n\n", "four"]
    assert blocks("```\none\n\ntwo") == ["```\none\n\ntwo"]


def test_what_others_wrote_meanwhile_stays(monkeypatch):
    screen = Screen(monkeypatch, 40, 12)
    screen.answer.write("A paragraph.\n\none two")
    screen.write("[1]+ Stopped\n$ fg\n")
    screen.answer.begin_anew()
    rows = screen.show(" three")
    assert rows == ["A paragraph.", "", "one two", "[1]+ Stopped", "$ fg", "", "one two three"]
