"""`python -m g3n_mlx COMMAND`: the commands and where they live."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "chat": ("g3n_mlx.chat", "talk to a model, or ask it once"),
    "convert": ("g3n_mlx.convert.__main__", "slice and quantize a checkpoint"),
    "bench": ("g3n_mlx.bench", "measure load time, speed and memory"),
    "eval": ("g3n_mlx.eval", "measure quality on examples or a text"),
    "server": ("g3n_mlx.server.__main__", "serve a model over OpenAI's API"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the arguments behind the command's name to that command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m g3n_mlx",
        usage="%(prog)s COMMAND [FLAGS]",
        description="Gemma 3n in MLX and PyTorch. Every command has its own --help.",
        epilog="\n".join(["commands:", *(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    command = parser.parse_args(arguments[:1]).command
    return import_module(COMMANDS[command][0]).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
