"""A line in the terminal that says what is waited for, and how long: it comes after a moment and leaves no trace."""

import shutil
import sys
import threading
import time
from contextlib import suppress
from typing import Any, TextIO

from g3n_mlx.chat.terminal import takes_styles
from g3n_mlx.commands import printable

MOMENT_S = 0.5  # what takes less is not worth a line
TICK_S = 1.0


class Waiting:
    """A context with a line on stderr; what others write there meanwhile stands above it.

    Nothing is shown where stdout or stderr is no terminal: a pipe and a file are no place for it.
    """

    def __init__(self, text: str) -> None:
        self._text, self.shown = text, takes_styles()
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._drawn = False

    def __enter__(self) -> "Waiting":
        if self.shown:
            self._begun, self._stderr = time.monotonic(), sys.stderr
            self._others = _Others(self, sys.stderr)
            sys.stderr = self._others
            threading.Thread(target=self._tick, name="waiting", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def says(self, text: str) -> None:
        """Changes what the line says."""
        with self._lock:
            self._text = text
            if self._drawn:
                self._draw()

    def read(self, tokens: int, of: int) -> None:
        """Says how far a prompt is read."""
        self.says(f"reading: {tokens:,} of {of:,} tokens")

    def end(self) -> None:
        """Takes the line away; ends once."""
        if not self.shown or self._ended.is_set():
            return
        self._ended.set()
        if sys.stderr is self._others:
            sys.stderr = self._stderr
        with self._lock:
            self.erase()

    def _tick(self) -> None:
        wait = MOMENT_S
        while not self._ended.wait(wait):
            with self._lock:
                if not self._ended.is_set():
                    self._draw()
            wait = TICK_S

    def _draw(self) -> None:
        if not self._others.at_line_start:
            return  # somebody's bar or question stands there
        line = printable(f"{self._text}, {time.monotonic() - self._begun:.0f} s")
        with suppress(OSError):
            self._stderr.write(f"\r\x1b[2m{line[: shutil.get_terminal_size().columns - 1]}\x1b[22m\x1b[K")
            self._stderr.flush()
        self._drawn = True

    def erase(self) -> None:
        """Makes room for another line."""
        with self._lock, suppress(OSError):
            if self._drawn:
                self._stderr.write("\r\x1b[K")
                self._stderr.flush()
            self._drawn = False

    def write(self, text: str) -> int:
        """Another's text, above the line."""
        with self._lock:
            self.erase()
            return self._stderr.write(text)


class _Others:
    """Stderr for everybody else while the line is there. Whoever keeps it writes to stderr still when it has gone."""

    def __init__(self, waiting: Waiting, stderr: TextIO) -> None:
        self._waiting, self._stderr = waiting, stderr
        self.at_line_start = True

    def write(self, text: str) -> int:
        if text:
            self.at_line_start = text[-1] in "\r\n"
        return self._waiting.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stderr, name)
