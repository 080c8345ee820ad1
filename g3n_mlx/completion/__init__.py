"""Completion by Tab: what argcomplete needs to know of the commands' parsers.

The shell runs the command itself with _ARGCOMPLETE in its environment and reads the candidates from it, so that they
are those of the version that is installed. Nothing is loaded for that: no array framework, and of the commands only the
one that stands on the line.
"""

import argparse
import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from g3n_mlx.commands import command_parser

SHELLS = ("bash", "zsh", "fish")
SCRIPTS = ("g3n", "g3n-chat", "g3n-convert", "g3n-bench", "g3n-eval", "g3n-server")


def is_asked() -> bool:
    """Whether a shell has started the program to complete a line."""
    return "_ARGCOMPLETE" in os.environ


def whole_command_line(commands: Mapping[str, tuple[str, str]], aliases: Mapping[str, str]) -> argparse.ArgumentParser:
    """The parser of `g3n`, with the flags of those commands that the line has in it.

    commands: package and description by name; aliases: names of commands by other names.
    """
    words = os.environ.get("COMP_LINE", "").split()
    parser = command_parser("g3n", "")
    choices = parser.add_subparsers()
    for name in (*commands, *aliases):
        package, text = commands[aliases.get(name, name)]
        parents = [import_module(f"{package}.__main__").command_line(name)] if name in words else []
        choices.add_parser(name, help=text, parents=parents, add_help=False)
    return parser


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell and ends the process."""
    import argcomplete
    from argcomplete.completers import SuppressCompleter

    _name_values(parser)
    argcomplete.autocomplete(
        parser,
        always_complete_options="long",  # pyright: ignore[reportArgumentType] (a documented value)
        default_completer=SuppressCompleter(),  # pyright: ignore[reportArgumentType] (FilesCompleter's rival)
    )


def _name_values(parser: argparse.ArgumentParser) -> None:
    """Gives flags what their values can be, where argparse does not know it: by their metavar."""
    from argcomplete.completers import DirectoriesCompleter, FilesCompleter

    completers = {
        "FILE": FilesCompleter(),
        "FILE.png": FilesCompleter(),
        "FOLDER": DirectoriesCompleter(),
        "MODEL": _models,
        "CONVERSION": _conversions,
        "SLICE": _slices,
    }
    actions: list[Any] = parser._actions  # pyright: ignore[reportPrivateUsage] (argparse has no public list)
    for action in actions:
        if action.metavar in completers:
            action.completer = completers[action.metavar]
        if action.nargs == argparse.PARSER:
            for command in action.choices.values():
                _name_values(command)


def _models(prefix: str, **_: object) -> list[str]:
    from argcomplete.completers import DirectoriesCompleter

    from g3n_mlx.checkpoint.hub import DEMO, models_here

    return [DEMO, *(name for _, name in models_here()), *DirectoriesCompleter()(prefix)]


def _conversions(**_: object) -> list[str]:
    from g3n_mlx.checkpoint.registry import conversions

    return [folder.name for folder in conversions()]


def _slices(**_: object) -> list[str]:
    from g3n_mlx.matformer.table import read_slices

    return [entry.short_name for entry in read_slices()]
