"""What the commands share: failures as one line, Ctrl-C, SIGTERM and closed pipes, text made safe to show; and the
terminal's side of a chat: messages typed or piped in.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyPressEvent

INTERRUPTED, PIPE_CLOSED, TERMINATED = 130, 141, 143  # exit codes of a shell: 128 + SIGINT, SIGPIPE, SIGTERM
# What PyTorch and MLX say in a RuntimeError, on CPUs, CUDA and Metal.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|unable to allocate|attempting to allocate"
    r"|insufficient memory|bad_alloc",
    re.IGNORECASE,
)


class Terminated(SystemExit):
    """SIGTERM as an exception, so that what is half written is removed as after Ctrl-C."""


def run_command(name: str, work: Callable[[], int], stopped: str = "") -> int:
    """Does a command's work; returns its exit code. What a user can cause is one line on stderr, `name: ...`.

    stopped: what is said after Ctrl-C or SIGTERM.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _on_sigterm) if in_main_thread else None
    try:
        code = work()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has gone. What is still buffered has nowhere to go, and Python would complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        if not is_expected(error):
            raise
        say(f"{name}: {one_line(error)}")
        return 1
    except (KeyboardInterrupt, Terminated) as error:
        if stopped:
            say(stopped)
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def _on_sigterm(_number: int, _frame: "FrameType | None") -> None:
    raise Terminated(TERMINATED)


def is_expected(error: BaseException) -> bool:
    """Whether a user, a file, a network or too little memory caused it; all else is a bug whose traceback is wanted."""
    return isinstance(error, OSError | ValueError | ImportError) or is_out_of_memory(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy, PyTorch or MLX could not have the memory it asked for."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


class Interruption:
    """Ctrl-C while an answer comes: a context that notes the first one and leaves the chunk whole.

    Before the first chunk (a long prompt may take its time) and at the second Ctrl-C it raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.noted = False
        self.answering = False  # the caller sets it once a chunk has come

    def __enter__(self) -> "Interruption":
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, _number: int, _frame: "FrameType | None") -> None:
        if self.noted or not self.answering:
            raise KeyboardInterrupt
        self.noted = True


def message_lines() -> Iterator[str]:
    """Messages from a pipe: one a line; a backslash at a line's end continues it."""
    message = ""
    for line in sys.stdin:
        message += line.rstrip("\n")
        if message.endswith("\\"):
            message = message[:-1] + "\n"
            continue
        yield message
        message = ""
    if message:
        yield message


def typed_messages() -> Iterator[str]:
    """Messages typed into the terminal, until Ctrl-D."""
    session = _prompt_session()
    while True:
        try:
            yield session.prompt("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            say("Ctrl-D or /exit ends")


def _prompt_session() -> "PromptSession[str]":
    """Line editing, history over sessions, and messages of several lines; pasted newlines are kept as they are."""
    import platformdirs
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _enter(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _alt_enter(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    path = platformdirs.user_state_path("g3n_mlx", appauthor=False) / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # what one asks a model is private
        history = FileHistory(str(path))
    except OSError as error:
        say(f"no history is kept: {one_line(error)}")
        history = InMemoryHistory()
    return PromptSession(history=history, key_bindings=keys, multiline=True, prompt_continuation="  ")


def printable(text: str) -> str:
    """Text as stdout may show it: a model's words must not move a terminal's cursor or send it commands."""
    if not sys.stdout.isatty():
        return text
    return "".join(f"\\x{ord(letter):02x}" if is_control(letter) else letter for letter in text)


def is_control(letter: str) -> bool:
    """Whether a terminal acts on the letter: the C0 and C1 controls but line feed and tab."""
    return letter not in "\n\t" and (letter < " " or "\x7f" <= letter <= "\x9f")


def one_line(error: BaseException) -> str:
    """An error's message, folded to one line; its type's name when it has none."""
    if is_out_of_memory(error):
        words = " ".join(str(error).partition("\n")[0].split())
        return (
            f"out of memory{f' ({words:.160})' if words else ''}: a smaller slice (matformer), fewer bits (q_bits) or "
            "a shorter prompt needs less"
        )
    if isinstance(error, OSError) and error.strerror and str(error).startswith(("[Errno ", "[WinError ")):
        words = error.strerror[:1].lower() + error.strerror[1:]
        return words if error.filename is None else f"{error.filename}: {words}"
    return " ".join(str(error).split()) or type(error).__name__


def check_folder_of(path: Path) -> None:
    """Raises FileNotFoundError when a file to write has no folder to be written into."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path} can't be written: there is no folder {path.absolute().parent}")


def size_in_words(num_bytes: float) -> str:
    """A size as users read it: in GB, below a tenth of one in MB, below a tenth of that in KB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size / 10:
            return f"{num_bytes / size:.{2 if num_bytes < 10 * size else 1}f} {unit}"
    return f"{num_bytes / 1e3:.1f} KB"


def say(line: str) -> None:
    """Writes a line to stderr, where everything goes that is not an answer."""
    sys.stderr.write(line + "\n")
