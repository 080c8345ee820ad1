"""What the commands share: Ctrl-C, SIGTERM and closed pipes, failures as one line, text made safe to show."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from g3n_mlx.failures import is_expected, one_line

if TYPE_CHECKING:
    from types import FrameType

INTERRUPTED, PIPE_CLOSED, TERMINATED = 130, 141, 143  # exit codes of a shell: 128 + SIGINT, SIGPIPE, SIGTERM


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


def printable(text: str) -> str:
    """Text as stdout may show it: a model's words must not move a terminal's cursor or send it commands."""
    if not sys.stdout.isatty():
        return text
    return "".join(f"\\x{ord(letter):02x}" if is_control(letter) else letter for letter in text)


def is_control(letter: str) -> bool:
    """Whether a terminal acts on the letter: the C0 and C1 controls but line feed and tab."""
    return letter not in "\n\t" and (letter < " " or "\x7f" <= letter <= "\x9f")


def say(line: str) -> None:
    """Writes a line to stderr, where everything goes that is not an answer."""
    sys.stderr.write(line + "\n")
