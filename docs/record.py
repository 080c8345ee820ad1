"""Records docs/chat.svg, the animated terminal of the README: python docs/record.py [FILE.svg]

A real shell runs the real program in a pseudo-terminal, and what both write is drawn by a terminal emulator that speaks
kitty's graphics protocol, so that the chat shows its images. Only the pace is made up: keys and answers appear at the
same speed on every machine, so that two recordings of one program are equal.

Needs `pip install -e ".[pictures]" --group docs`, and bash.
"""

import base64
import fcntl
import os
import pty
import re
import select
import struct
import sys
import tempfile
import termios
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from animation import CELL_HEIGHT, CELL_WIDTH, Frame, Picture, Text, animated_svg

DOCS = Path(__file__).resolve().parent
MEDIA = DOCS.parent / "examples" / "media"
COLUMNS, LINES = 80, 24
START = "g3n chat --model demo"
MESSAGES = (
    "/image shapes.png",
    "What is in this picture?",
    "/audio digits.ogg Transcribe this.",
    "/image circle.jpg",
    "/audio red_circle.ogg Does the voice name what the picture shows?",
)
SHELL_PROMPT, CHAT_PROMPT = "$", ">"

KEY_SECONDS, WORD_SECONDS, READING_SECONDS, LAST_SECONDS = 0.04, 0.08, 1.0, 5.0
PATIENCE_SECONDS = 120.0  # for the program's start, and for an answer

GRAPHICS, GRAPHICS_END = b"\x1b_G", b"\x1b\\"
WORD = re.compile(rb"\x1b_G.*?\x1b\\|(?:(?!\x1b_G)[^ \n])*[ \n]|(?:(?!\x1b_G)[^ \n])+", re.DOTALL)
UNFINISHED = re.compile(rb"\x1b_(?:(?!\x1b\\).)*\Z|\x1b\Z", re.DOTALL)
# Kitty's placeholder: a cell that shows a piece of an image. Its colour is the image's number; the marks above it are
# the piece's row and column, of which the chat's images have at most as many as there are marks here.
PLACEHOLDER = "\U0010eeee"
MARKS = (
    "\u0305\u030d\u030e\u0310\u0312\u033d\u033e\u033f\u0346\u034a\u034b\u034c\u0350\u0351\u0352\u0357"
    "\u035b\u0363\u0364\u0365\u0366\u0367\u0368\u0369\u036a\u036b\u036c\u036d\u036e\u036f\u0483\u0484"
)


class Terminal:
    """A pseudo-terminal with a shell in it, and the screen that the shell's programs draw."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]):
        import pyte

        process, self._master = pty.fork()
        if process == 0:
            size = struct.pack("HHHH", LINES, COLUMNS, COLUMNS * CELL_WIDTH, LINES * CELL_HEIGHT)
            fcntl.ioctl(0, termios.TIOCSWINSZ, size)
            os.chdir(folder)
            os.execvpe(command[0], command, environment)
        self._screen = pyte.Screen(COLUMNS, LINES)
        self._screen.write_process_input = self.type  # answers to a program's questions: where the cursor is
        self._stream = pyte.ByteStream(self._screen)
        self._images: dict[int, bytes] = {}  # PNG files by kitty's number
        self._parts: list[bytes] = []
        self._read, self._words = b"", deque[bytes]()  # the beginning of an escape sequence; what is not drawn yet

    def type(self, text: str) -> None:
        """Sends keys."""
        os.write(self._master, text.encode())

    def words(self, patience: float) -> Iterator[bool]:
        """Draws what the programs write, a word or less at a time, until they have been silent for so many seconds.

        True at the end of a word: how words fall into pieces depends on the machine's speed.
        """
        while self._words or select.select([self._master], [], [], patience)[0]:
            if not self._words:
                data = self._read + os.read(self._master, 65536)
                cut = UNFINISHED.search(data)
                end = cut.start() if cut else len(data)
                self._words.extend(WORD.findall(data[:end]))
                self._read = data[end:]
                continue
            word = self._words.popleft()
            if word.startswith(GRAPHICS):
                self._take_graphics(word[len(GRAPHICS) : -len(GRAPHICS_END)])
                continue
            self._stream.feed(word)
            if not self._screen.cursor.hidden:  # it is while a line is drawn anew
                yield word.endswith((b" ", b"\n"))

    def _take_graphics(self, command: bytes) -> None:
        """As much of kitty's protocol as the chat uses: a question whether we know it, and PNG files in parts."""
        keys, _, payload = command.partition(b";")
        options = dict(option.split("=") for option in keys.decode().split(","))
        if options.get("a") == "q":
            self.type(f"\x1b_Gi={options['i']};OK\x1b\\")
        elif "f" in options:
            self._parts.append(payload)
            if options["m"] == "0":
                self._images[int(options["i"]) & 0xFFFFFF] = base64.b64decode(b"".join(self._parts))
                self._parts = []

    def waits_at(self, prompt: str) -> bool:
        """Whether a program wants the next line."""
        cursor = self._screen.cursor
        return self._screen.display[cursor.y].rstrip() == prompt and cursor.x == len(prompt) + 1

    def frame(self, at: float) -> Frame:
        """The screen as it is now."""
        cursor = self._screen.cursor
        rows = tuple(tuple(self._texts(line)) for line in range(LINES))
        return Frame(at, rows, tuple(dict.fromkeys(self._pictures())), (cursor.x, cursor.y))

    def images(self) -> list[bytes]:
        """The PNG files of all images that were shown."""
        return list(self._images.values())

    def _pictures(self) -> Iterator[Picture]:
        """Where the images stand, as their placeholders say."""
        for line in range(LINES):
            for column in range(COLUMNS):
                cell = self._screen.buffer[line][column]
                if cell.data.startswith(PLACEHOLDER) and len(cell.data) > 2:  # else its marks are still to come
                    row, left = (MARKS.index(mark) for mark in cell.data[1:3])
                    yield Picture(list(self._images).index(int(cell.fg, 16)), column - left, line - row)

    def _texts(self, line: int) -> Iterator[Text]:
        cells = [self._screen.buffer[line][column] for column in range(COLUMNS)]
        column = 0
        for (colour, bold), run in groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
            characters = [" " if cell.data.startswith(PLACEHOLDER) else cell.data for cell in run]
            if text := "".join(characters).rstrip():
                yield Text(column, text, colour, bold)
            column += len(characters)


class Recording:
    """A session in a terminal, kept as frames with times of our own."""

    def __init__(self, terminal: Terminal):
        self._terminal, self._clock = terminal, 0.0
        self.frames = [terminal.frame(0.0)]

    def wait_for(self, prompt: str) -> None:
        """Records what is written until a program asks for the next line, and leaves time to read it."""
        for word_ended in self._terminal.words(PATIENCE_SECONDS):
            waiting = self._terminal.waits_at(prompt)
            if word_ended or waiting:
                self._add(WORD_SECONDS)
            if waiting:
                self._clock += READING_SECONDS
                return
        raise TimeoutError(f"no {prompt!r} within {PATIENCE_SECONDS:.0f} seconds of silence")

    def enter(self, line: str) -> None:
        """Types a line and the Enter key."""
        for key in line:
            self._terminal.type(key)
            for _ in self._terminal.words(PATIENCE_SECONDS):
                if self._terminal.frame(0.0).cursor != self.frames[-1].cursor:
                    break
            self._add(KEY_SECONDS)
        self._clock += 5 * KEY_SECONDS
        self._terminal.type("\r")

    def _add(self, seconds: float) -> None:
        frame = self._terminal.frame(self._clock)
        if frame != replace(self.frames[-1], seconds=frame.seconds):
            self.frames.append(frame)
            self._clock += seconds


def record() -> str:
    """Runs the session; returns its SVG."""
    with tempfile.TemporaryDirectory() as home:
        # Neither the user's history nor the user's shell belongs in a recording.
        environment = {**os.environ, "HOME": home, "XDG_STATE_HOME": home, "TERM": "xterm-256color"}
        environment |= {"COLORTERM": "truecolor", "PS1": r"\[\e[32m\]$\[\e[0m\] ", "LC_ALL": "C.UTF-8"}
        terminal = Terminal(["bash", "--norc", "--noprofile", "-i"], MEDIA, environment)
        recording = Recording(terminal)
        recording.wait_for(SHELL_PROMPT)
        recording.enter(START)
        for message in MESSAGES:
            recording.wait_for(CHAT_PROMPT)
            recording.enter(message)
        recording.wait_for(CHAT_PROMPT)
        terminal.type("\x04")
    return animated_svg(recording.frames, terminal.images(), COLUMNS, LINES, LAST_SECONDS)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else DOCS / "chat.svg").write_text(record(), encoding="utf-8")
