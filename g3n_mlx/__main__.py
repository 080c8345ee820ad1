"""`g3n COMMAND`, or `python -m g3n_mlx COMMAND`: the commands and where they live; `g3n-chat` and its like start here.

A command is a package whose `__main__` has `command_line(prog)`, its parser, and `main(argv, prog)`, which returns the
exit code; prog is how it was called. A row in COMMANDS is all that a new one needs.
Nothing heavy is imported before a command is: Ctrl-C while that goes on ends it without a traceback.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from g3n_mlx import completion
from g3n_mlx.commands import INTERRUPTED, command_parser

COMMANDS = {
    "chat": ("g3n_mlx.chat", "talk to a model, or ask it once"),
    "history": ("g3n_mlx.history", "list, show, search and remove the conversations of chats"),
    "transcribe": ("g3n_mlx.transcribe", "write down what is said in audio files"),
    "convert": ("g3n_mlx.convert", "slice and quantize a checkpoint"),
    "bench": ("g3n_mlx.bench", "measure load time, speed and memory"),
    "eval": ("g3n_mlx.eval", "measure quality on examples or a text"),
    "slices": ("g3n_mlx.slices", "find the best slice on your own data"),
    "batch": ("g3n_mlx.batch", "answer a file of requests, or one question about many files"),
    "serve": ("g3n_mlx.server", "serve a model over OpenAI's API"),
    "mcp": ("g3n_mlx.mcp", "offer a model's eyes and ears to agents and editors"),
    "models": ("g3n_mlx.models", "list the models on this machine, remove conversions"),
    "doctor": ("g3n_mlx.doctor", "show what this machine can run and what is installed"),
    "completion": ("g3n_mlx.completion", "print the script for completion by Tab"),
}
ALIASES = {"server": "serve"}


def main(argv: Sequence[str] | None = None, prog: str = "g3n") -> int:
    """Hands the arguments after the command's name to that command; returns its exit code."""
    if completion.is_asked():
        completion.complete(completion.whole_command_line(COMMANDS, ALIASES))
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        command_line(prog).print_help()
        return 0
    command: str = command_line(prog).parse_args(arguments[:1]).command
    return _run(ALIASES.get(command, command), arguments[1:], f"{prog} {command}")


def command_line(prog: str) -> argparse.ArgumentParser:
    """The parser of the first argument."""
    parser = command_parser(
        prog,
        "Gemma 3n in MLX and PyTorch. Every command has its own --help.",
        usage="%(prog)s COMMAND [FLAGS]",
        epilog="\n".join(["commands:", *(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=[*COMMANDS, *ALIASES], metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def chat() -> int:
    """`g3n-chat`."""
    return _run("chat")


def convert() -> int:
    """`g3n-convert`."""
    return _run("convert")


def bench() -> int:
    """`g3n-bench`."""
    return _run("bench")


def evaluate() -> int:
    """`g3n-eval`."""
    return _run("eval")


def server() -> int:
    """`g3n-server`."""
    return _run("serve")


def _run(command: str, arguments: list[str] | None = None, *prog: str) -> int:
    """Without prog the command has the name of its script."""
    try:
        module = import_module(f"{COMMANDS[command][0]}.__main__")
        if completion.is_asked():
            completion.complete(module.command_line())
        return module.main(arguments, *prog)
    except KeyboardInterrupt:  # before the command could take it
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(prog="python -m g3n_mlx"))
