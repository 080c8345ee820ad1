"""The terminal's side of a chat: messages piped in, dim notes, and Ctrl-C while an answer comes."""

import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from g3n_mlx.commands import printable

if TYPE_CHECKING:
    from types import FrameType


class Interruption:
    """Ctrl-C and Ctrl-Z while an answer comes: a context that notes the first Ctrl-C and leaves the chunk whole.

    Before the first chunk (a long prompt may take its time) and at the second Ctrl-C it raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.noted = False
        self.resumed = False  # after Ctrl-Z: other lines stand in the terminal now; the caller takes it back
        self.answering = False  # the caller sets it once a chunk has come

    def __enter__(self) -> "Interruption":
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        if hasattr(signal, "SIGCONT"):
            self._continued = signal.signal(signal.SIGCONT, self._on_resumption)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)
        if hasattr(signal, "SIGCONT"):
            signal.signal(signal.SIGCONT, self._continued)

    def _on_signal(self, _number: int, _frame: "FrameType | None") -> None:
        if self.noted or not self.answering:
            raise KeyboardInterrupt
        self.noted = True

    def _on_resumption(self, _number: int, _frame: "FrameType | None") -> None:
        self.resumed = True


def takes_styles() -> bool:
    """Whether answers may be drawn and notes dimmed: everything goes to a terminal that can do that."""
    return sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def say_wrapped(line: str, *, dim: bool) -> None:
    """Writes a line to stderr, broken between words at the terminal's width. dim: in a weaker colour."""
    columns, text = shutil.get_terminal_size().columns, printable(line)
    first = re.match(r" *\S.*?  +(?=\S)", text)  # of a table's columns, which the second keeps where it can
    indent = len(first[0]) if first and len(first[0]) <= columns / 2 else 4 if text.startswith(" ") else 0
    lines = textwrap.wrap(text, columns, break_on_hyphens=False, subsequent_indent=" " * indent)
    with suppress(OSError):
        shown = "\n".join(lines)
        sys.stderr.write(f"\x1b[2m{shown}\x1b[22m\n" if dim else f"{shown}\n")
        sys.stderr.flush()


# Begins and ends a message of several lines.
QUOTES = '"""'


def is_unfinished(message: str) -> bool:
    """Whether quotes have begun that have not ended."""
    text = message.strip()
    return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))


def quoted(message: str) -> str | None:
    """What stands between quotes, even where it looks like a command; None for a message without them."""
    text = message.strip()
    if not text.startswith(QUOTES):
        return None
    inner = text.removeprefix(QUOTES)
    return inner.removesuffix(QUOTES).removeprefix("\n").removesuffix("\n")


def message_lines() -> Iterator[str]:
    """Messages from a pipe: one a line; a backslash at a line's end continues it, and quotes span lines."""
    message = ""
    for line in sys.stdin:
        message += line.rstrip("\n")
        if is_unfinished(message):
            message += "\n"
            continue
        if message.endswith("\\"):
            message = message[:-1] + "\n"
            continue
        yield message
        message = ""
    if message:
        yield message
