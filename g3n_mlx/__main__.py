"""`python -m g3n_mlx COMMAND`: the commands and where they live; `g3n-chat` and its like start here too.

Nothing heavy is imported before a command is: Ctrl-C while that goes on ends it without a traceback.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from g3n_mlx.commands import INTERRUPTED

COMMANDS = {
    "chat": ("g3n_mlx.chat.__main__", "talk to a model, or ask it once"),
    "convert": ("g3n_mlx.convert.__main__", "slice and quantize a checkpoint"),
    "bench": ("g3n_mlx.bench.__main__", "measure load time, speed and memory"),
    "eval": ("g3n_mlx.eval.__main__", "measure quality on examples or a text"),
    "server": ("g3n_mlx.server.__main__", "serve a model over OpenAI's API"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the arguments behind the command's name to that command; returns its exit code."""
    import argparse

    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m g3n_mlx",
        usage="%(prog)s COMMAND [FLAGS]",
        description="Gemma 3n in MLX and PyTorch. Every command has its own --help.",
        epilog="\n".join(["commands:", *(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return _run(parser.parse_args(arguments[:1]).command, arguments[1:])


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
    return _run("server")


def _run(command: str, arguments: list[str] | None = None) -> int:
    try:
        return import_module(COMMANDS[command][0]).main(arguments)
    except KeyboardInterrupt:  # before the command could take it
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
