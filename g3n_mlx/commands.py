"""What the commands share: model flags, --version, signals and closed streams, failures as one line.

Whatever they show of a file, a name or an error goes through `printable`: it may come from anywhere, and a terminal
obeys what is written to it.
"""

import argparse
import gc
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from g3n_mlx.failures import is_expected, one_line, size_in_words
from g3n_mlx.installation import DISTRIBUTION, version

if TYPE_CHECKING:
    from types import FrameType

    from g3n_mlx.model import Gemma3n

_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}

AUTO, OFF = "auto", "off"  # of --fits, beside a size

# Exit codes of a shell: 128 + SIGHUP, SIGINT, SIGPIPE, SIGTERM.
HUNG_UP, INTERRUPTED, PIPE_CLOSED, TERMINATED = 129, 130, 141, 143

# Every flag that says which model is loaded, how and where. Completion takes FILE and FOLDER by their word.
MODEL_FLAGS: dict[str, dict[str, Any]] = {
    "--model": {
        "metavar": "MODEL",
        "help": "folder, hub id or conversion's name; default: the newest Gemma 3n here, else the demo model",
    },
    "--revision": {"metavar": "NAME", "help": "branch, tag or commit of a hub id"},
    "--matformer": {"metavar": "SLICE", "help": "MatFormer slice to take at load, by name or short form"},
    "--matformer-config": {"type": Path, "metavar": "FILE", "help": "CSV table of slices of your own"},
    "--adapter": {
        "action": "append",
        "default": [],
        "metavar": "PATH[=X]",
        "help": "LoRA adapter, folder or hub id, with a weight other than 1; repeatable",
    },
    "--q-bits": {"type": int, "metavar": "N", "help": "quantize at first load, into the cache: 2 to 6, or 8"},
    "--backend": {"choices": ["auto", "mlx", "torch"], "default": "auto"},
    "--device": {"metavar": "NAME", "help": "cpu, cuda, cuda:1, ...; default: the backend's best"},
    "--chat-template": {"choices": ["gemma", "own"], "default": "gemma", "help": "whose makes the prompts"},
    "--dtype": {"choices": ["bfloat16", "float32"], "help": "of activations; default: the device's best"},
    "--activations": {
        "choices": ["exact", "int8"],
        "default": "exact",
        "help": "int8: a prompt is read faster on a CPU, by an approximation",
    },
}


class _Version(argparse.Action):
    """Prints the version, which takes a while to find out, when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        sys.stdout.write(f"{DISTRIBUTION} {version()}\n")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """A parser whose errors, which repeat what was typed, are printable."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(status, message and printable(message))


def command_parser(prog: str, description: str, **options: Any) -> argparse.ArgumentParser:
    """The parser of a command, with --version. prog: how the command was called."""
    parser = _Parser(prog=prog, description=description, **options)
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


def load_from(
    arguments: argparse.Namespace, tell: "Callable[[str], None] | None" = None, *, slices_later: bool = False
) -> "Gemma3n":
    """Loads the model that the flags of `add_model_flags` describe. tell: see `model_of`.

    slices_later: --matformer-config may be given for slices that are taken of the loaded model alone.
    """
    from g3n_mlx.checkpoint.ahead import read_ahead

    source, fits = model_of(arguments, tell), getattr(arguments, "fits", None)
    if _is_read_as_stored(Path(source), arguments, fits):
        read_ahead(Path(source))  # while the backend is imported
    # Imports make some 300,000 objects that live as long as the process. The collector looks through them again and
    # again while they come, which takes 0.2 s, and once more at the end, which takes 0.5 s.
    gc.disable()
    try:
        from g3n_mlx.loading import free_bytes, import_backend, load

        import_backend(arguments.backend)
    finally:
        gc.freeze()
        gc.enable()
    from g3n_mlx.matformer.adapted import parsed_adapters
    from g3n_mlx.sizing import SPEED_BITS, chosen_in_words, fast_enough, fitting, is_quantized, unasked

    matformer, q_bits, told = arguments.matformer, arguments.q_bits, tell or say
    speed = getattr(arguments, "speed", None)
    if isinstance(fits, int):
        best = fitting(source, fits, arguments.revision, arguments.matformer_config, q_bits)
        told(f"best slice that fits: {chosen_in_words(best, size_in_words)}")
        matformer, q_bits = None if best.is_whole else best.slice.name, best.q_bits
    elif speed is not None and q_bits is None and not is_quantized(source, arguments.revision):
        q_bits = SPEED_BITS
    elif speed is None and fits == AUTO:
        free = free_bytes(arguments.backend, arguments.device)
        chosen = unasked(source, free, arguments.revision, arguments.matformer_config, matformer, q_bits)
        matformer, q_bits = chosen.matformer, chosen.q_bits
        if chosen.told is not None:
            told(chosen.told)
    model = load(
        source,
        backend=arguments.backend,
        matformer=matformer,
        matformer_config=None if slices_later and matformer is None else arguments.matformer_config,
        q_bits=q_bits,
        dtype=arguments.dtype,
        device=arguments.device,
        revision=arguments.revision,
        chat_template=arguments.chat_template,
        activations=arguments.activations,
        adapter=parsed_adapters(arguments.adapter),
    )
    if speed is None:
        return model
    fast, measured = fast_enough(model, speed, arguments.matformer_config)
    told(f"best slice that is as fast: {fast.slice_name or fast.name}, {measured:.1f} tok/s measured")
    return fast


def _is_read_as_stored(folder: Path, arguments: argparse.Namespace, fits: int | str | None) -> bool:
    """Whether a model's own files are what will be read, and not a conversion of them that memory may ask for."""
    from g3n_mlx.config.fields import read_json

    if arguments.q_bits is not None or not folder.is_dir():
        return False
    try:
        return fits in (None, OFF) or "quantization" in read_json(folder / "config.json")
    except (OSError, ValueError):  # said where it is loaded
        return False


def add_choice_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --fits and --speed, of which one may be given, and instead of --matformer."""
    group = parser.add_mutually_exclusive_group()
    add_fits_flag(group.add_argument)
    group.add_argument(
        "--speed", type=positive_float, metavar="N", help="take the best slice that decodes N tokens per second here"
    )


def add_fits_flag(add: Callable[..., argparse.Action]) -> None:
    """Adds --fits. add: `add_argument` of a parser or group."""
    add(
        "--fits",
        type=_fits,
        default=AUTO,
        metavar="SIZE",
        help="the best slice whose memory fits, as 4GB; auto: bits and slice by what is free; off; default: auto",
    )


def check_choice(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the command where the slice is named and to be chosen as well."""
    ways = ["--matformer", "--fits", "--speed"] if "speed" in arguments else ["--matformer", "--fits"]
    if arguments.matformer is not None and (isinstance(arguments.fits, int) or getattr(arguments, "speed", None)):
        parser.error(f"give {', '.join(ways[:-1])} or {ways[-1]}, one of them")


def add_draft_flag(add: Callable[..., argparse.Action], default: str) -> None:
    """Adds --draft. add: `add_argument` of a parser or group."""
    add(
        "--draft",
        metavar="HOW",
        default=default,
        help="compute several tokens at once, which changes no text: off, auto (where it pays), lookup (wherever it "
        f"can), or the name of a slice, which drafts beside auto; default: {default}",
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


def _fits(text: str) -> int | str:
    """--fits: a size, or who decides."""
    return text if text in (AUTO, OFF) else num_bytes(text)


def num_bytes(text: str) -> int:
    """A flag's size, such as 4GB, 3.5GiB or 900MB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or not match[2] or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4GB, 3.5GiB or 900MB")
    return int(float(match[1]) * _UNITS[match[2]])


class Terminated(SystemExit):
    """SIGTERM or SIGHUP as an exception, so that what is half written is removed as after Ctrl-C."""


def run_command(name: str, work: Callable[[], int], stopped: str = "") -> int:
    """Does a command's work; returns its exit code. What a user can cause is one line on stderr, `name: ...`.

    stopped: what is said after Ctrl-C, SIGTERM or SIGHUP.
    """
    _open_closed_streams()
    if sys.stdout is None:
        say(f"{name}: stdout is closed, so there is nowhere to write to")
        return 1
    with _signals_as_exceptions():
        try:
            code = work()
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            _drop_output()
            return PIPE_CLOSED
        except Exception as error:
            if not is_expected(error):
                raise
            say(f"{name}: {one_line(error)}")
            _drop_output()
            return 1
        except (KeyboardInterrupt, Terminated) as error:
            if stopped:
                say(stopped)
            return int(str(error)) if isinstance(error, Terminated) else INTERRUPTED


def _open_closed_streams() -> None:
    """Gives stdin and stderr, where the caller has closed them, an end: a file opened later could get their number."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 (as long as the process lives)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _drop_output() -> None:
    """Forgets what is buffered for stdout when it can't be written: Python would complain about it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _signals_as_exceptions() -> Generator[None]:
    """SIGTERM and SIGHUP raise Terminated; a SIGHUP that is ignored, as under nohup, stays ignored."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(number: int, _frame: "FrameType | None") -> None:
    raise Terminated(128 + number)


def printable(text: str) -> str:
    """Text as a terminal may be shown it: no file's name and no model's words move its cursor or send it commands."""
    return "".join(f"\\x{ord(letter):02x}" if is_control(letter) else letter for letter in text)


def is_control(letter: str) -> bool:
    """Whether a terminal acts on the letter: the C0 and C1 controls but line feed and tab."""
    return letter not in "\n\t" and (letter < " " or "\x7f" <= letter <= "\x9f")


def say(line: str) -> None:
    """Writes a line to stderr, where everything goes that is not an answer."""
    with suppress(OSError):  # the terminal has gone, or the disk is full: nobody reads it
        sys.stderr.write(printable(line) + "\n")


def tell(text: str, end: str = "\n") -> None:
    """Writes to stdout: an answer, a table. Into a file or a pipe it goes as it is."""
    sys.stdout.write((printable(text) if sys.stdout.isatty() else text) + end)


def log_to_stderr(level: int | str, form: str = "%(message)s") -> None:
    """Shows what the package logs, from a level on."""
    handler = _ToStderr()
    handler.setFormatter(_Printable(form))
    logging.basicConfig(level=level, handlers=[handler])


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to what is stderr now, as `say` does."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
