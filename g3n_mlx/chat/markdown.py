"""An answer's Markdown, drawn while it comes: what is finished stays as it is, the last block is drawn anew.

Words wrap at the terminal's width, also after it has changed. Control characters of the answer never reach the terminal
as such: what rich has made of the text goes through `printable` before colours are added.
"""

import sys
import time
from itertools import dropwhile, pairwise, takewhile
from typing import Any, ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.segment import Segment, Segments
from rich.syntax import Syntax
from rich.text import Text

from g3n_mlx.commands import printable

# Drawing takes at most a third of the time.
PAUSE_PER_DRAWING = 2.0
LEAST_PAUSE_S = 0.04


class _Code(CodeBlock):
    """Code without a border, so that it can be copied."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme="ansi_dark", word_wrap=True, background_color="default")


class _Heading(Heading):
    """A heading at the left, in bold."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        self.text.stylize("bold underline" if self.tag == "h1" else "bold")
        yield self.text


class _Answer(Markdown):
    elements: ClassVar[Any] = {**Markdown.elements, "fence": _Code, "code_block": _Code, "heading_open": _Heading}

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.markup, self.parsed = text, parsed(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":  # a model ends a line where it wants one
                    child.type, child.tag = "hardbreak", "br"


def parsed(text: str) -> list[Any]:
    """Tokens of Markdown without HTML, which would not be shown, and without images, whose address would not be."""
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("image")
    return parser.parse(text)


def blocks(text: str) -> list[str]:
    """The text cut into its paragraphs, lists, tables and so on; nothing that follows can change any but the last."""
    starts = [token.map[0] for token in parsed(text) if token.level == 0 and token.map and token.nesting >= 0]
    lines = text.splitlines(keepends=True)
    return ["".join(lines[start:end]) for start, end in pairwise([0, *starts[1:], len(lines)])]


class MarkdownStream:
    """Draws one answer on stdout."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._text = ""  # that may still be drawn anew
        self._lines: list[str] = []  # of it, as they stand on the screen
        self._width = 0  # that they were drawn for
        self._after_block = False
        self._next_drawing = 0.0

    def write(self, text: str) -> None:
        """Adds a piece of the answer; what comes in quick succession is drawn together."""
        self._text += text.replace("\r\n", "\n")
        begun = time.monotonic()
        if begun < self._next_drawing:
            return
        *finished, self._text = blocks(self._text)
        for block in finished:
            self._draw(block)
            self._after_block = self._after_block or bool(self._lines)
            self._lines = []
        self._draw(self._text)
        now = time.monotonic()
        self._next_drawing = now + max(LEAST_PAUSE_S, PAUSE_PER_DRAWING * (now - begun))

    def begin_anew(self) -> None:
        """Forgets what stands on the screen: others have written below it, so the last block is drawn once more."""
        self._lines = []

    def end(self) -> None:
        """Draws all that has come."""
        self._next_drawing = 0.0
        self.write("")
        if not self._lines and not self._after_block:
            sys.stdout.write("\n")  # an empty answer
        sys.stdout.flush()

    def _draw(self, text: str) -> None:
        """Draws a text in the place of the lines that stand there, from the first one that is different."""
        width, height = self._console.size
        lines = self._rendered(text, width)
        if len(self._lines) >= height:  # the first of them have left the screen and can't be changed
            gone = len(self._lines) - height + 1
            lines = [*self._lines[:gone], *lines[gone:]]
        same = 0
        if width == self._width:
            same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(self._lines, lines, strict=False))))
        up = sum(self._rows(line, width) for line in self._lines[same:])
        changed = "".join(f"{line}\n" for line in lines[same:])
        if up or changed:
            sys.stdout.write((f"\x1b[{up}A\x1b[J" if up else "") + changed)
            sys.stdout.flush()
        self._lines, self._width = lines, width

    def _rows(self, line: str, width: int) -> int:
        """Of the screen, that a line takes: terminals break a line that was drawn for a wider one."""
        return max(1, -(-Text.from_ansi(line).cell_len // width))

    def _rendered(self, text: str, width: int) -> list[str]:
        if not text.strip():
            return []
        options = self._console.options.update(width=width, height=None)
        rows = self._console.render_lines(_Answer(text), options, pad=False)
        kept = [_stripped([piece for piece in row if not piece.control]) for row in rows]
        while kept and not kept[-1]:
            kept.pop()
        kept = list(dropwhile(lambda row: not row, kept))
        with self._console.capture() as capture:
            for row in kept:
                shown = [Segment(printable(piece.text), piece.style) for piece in row]
                self._console.print(Segments([*shown, Segment.line()]), end="", soft_wrap=True)
        lines = capture.get().split("\n")[:-1]
        return ["", *lines] if self._after_block else lines


def _stripped(row: list[Segment]) -> list[Segment]:
    """A row without the spaces that rich has filled it up with."""
    while row and not row[-1].text.strip():
        row = row[:-1]
    return [*row[:-1], Segment(row[-1].text.rstrip(), row[-1].style)] if row else []
