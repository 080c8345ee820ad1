"""What the commands share: model flags, --version, Ctrl-C, SIGTERM and closed pipes, failures as one line."""

import argparse
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from g3n_mlx.failures import is_expected, one_line
from g3n_mlx.installation import DISTRIBUTION, version

if TYPE_CHECKING:
    from types import FrameType

    from g3n_mlx.model import Gemma3n

INTERRUPTED, PIPE_CLOSED, TERMINATED = 130, 141, 143  # exit codes of a shell: 128 + SIGINT, SIGPIPE, SIGTERM

# Every flag that says which model is loaded, how and where. Completion takes FILE and FOLDER by their word.
MODEL_FLAGS: dict[str, dict[str, Any]] = {
    "--model": {
        "metavar": "MODEL",
        "help": "folder or hub id; default: the newest Gemma 3n here, else the demo model",
    },
    "--revision": {"metavar": "NAME", "help": "branch, tag or commit of a hub id"},
    "--matformer": {"metavar": "SLICE", "help": "MatFormer slice to take at load, by name or short form"},
    "--matformer-config": {"type": Path, "metavar": "FILE", "help": "CSV table of slices of your own"},
    "--q-bits": {"type": int, "metavar": "N", "help": "quantize at first load, into the cache: 2 to 6, or 8"},
    "--backend": {"choices": ["auto", "mlx", "torch"], "default": "auto"},
    "--device": {"metavar": "NAME", "help": "cpu, cuda, cuda:1, ...; default: the backend's best"},
    "--dtype": {"choices": ["bfloat16", "float32"], "help": "of activations; default: the device's best"},
}


class _Version(argparse.Action):
    """Prints the version, which takes a while to find out, when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        sys.stdout.write(f"{DISTRIBUTION} {version()}\n")
        parser.exit()


def command_parser(prog: str, description: str, **options: Any) -> argparse.ArgumentParser:
    """The parser of a command, with --version. prog: how the command was called."""
    parser = argparse.ArgumentParser(prog=prog, description=description, **options)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    return parser


def add_model_flags(add: Callable[..., argparse.Action], **changes: dict[str, Any]) -> None:
    """Adds all of MODEL_FLAGS. add: `add_argument` of a parser or group; changes: by destination, as below."""
    for flag in MODEL_FLAGS:
        add_model_flag(add, flag, **changes.get(flag.removeprefix("--").replace("-", "_"), {}))


def add_model_flag(add: Callable[..., argparse.Action], flag: str, *aliases: str, **changes: Any) -> None:
    """Adds one of MODEL_FLAGS. changes: of its options to `add_argument`; one that becomes None is left out."""
    options = {name: value for name, value in (MODEL_FLAGS[flag] | changes).items() if value is not None}
    add(flag, *aliases, **options)


def model_of(arguments: argparse.Namespace, tell: "Callable[[str], None] | None" = None) -> str | Path:
    """The folder or hub id of --model; without one the default model, of which a line is told, on stderr by default."""
    from g3n_mlx.checkpoint.hub import default_model

    if arguments.model is not None:
        return arguments.model
    folder, line = default_model()
    (tell or say)(line)
    return folder


def load_from(arguments: argparse.Namespace, tell: "Callable[[str], None] | None" = None) -> "Gemma3n":
    """Loads the model that the flags of `add_model_flags` describe. tell: see `model_of`."""
    # Imports make some 300,000 objects that live as long as the process. The collector looks through them again and
    # again while they come, which takes 0.2 s, and once more at the end, which takes 0.5 s.
    gc.disable()
    try:
        from g3n_mlx.loading import import_backend, load

        import_backend(arguments.backend)
    finally:
        gc.freeze()
        gc.enable()
    return load(
        model_of(arguments, tell),
        backend=arguments.backend,
        matformer=arguments.matformer,
        matformer_config=arguments.matformer_config,
        q_bits=arguments.q_bits,
        dtype=arguments.dtype,
        device=arguments.device,
        revision=arguments.revision,
    )


def positive(text: str) -> int:
    """A flag's whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def count(text: str) -> int:
    """A flag's whole number from 0 on."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def positive_float(text: str) -> float:
    """A flag's finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


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
