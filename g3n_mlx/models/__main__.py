"""`g3n models`: lists the models on this machine, and removes conversions."""

import argparse
import logging
import sys
from collections.abc import Sequence

from g3n_mlx.commands import command_parser, log_to_stderr, run_command, say, tell

NAME = "g3n models"


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Lists or removes; returns the exit code."""
    parser = command_line(prog)
    arguments = parser.parse_args(argv)
    if arguments.action is not None and not arguments.names:
        parser.error("rm needs the name or the folder of a conversion")
    log_to_stderr(logging.WARNING)
    return run_command(prog, lambda: _list() if arguments.action is None else _remove(arguments.names))


def command_line(prog: str = NAME) -> argparse.ArgumentParser:
    """The flags, of a command that was called as prog."""
    parser = command_parser(
        prog,
        "Lists the conversions on this machine and every Gemma 3n of the hub's cache, the last used first. rm deletes "
        "conversions in g3n's cache and forgets those that are elsewhere, whose files stay.",
        usage="%(prog)s [rm CONVERSION ...]",
    )
    parser.add_argument("action", nargs="?", choices=["rm"], help="without it they are listed")
    parser.add_argument("names", nargs="*", metavar="CONVERSION", help="the name of its folder, or the folder")
    return parser


def _list() -> int:
    from g3n_mlx.models import models, table

    if found := models():
        tell("\n".join(table(found)))
    else:
        say("no conversions here, and no Gemma 3n in the hub's cache: g3n convert makes one, g3n chat downloads one")
    return 0


def _remove(names: Sequence[str]) -> int:
    from g3n_mlx.models import remove

    for name in names:
        tell(remove(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
