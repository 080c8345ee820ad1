"""`g3n completion SHELL`: the script that makes a shell complete the commands by Tab."""

import argparse
import sys
from collections.abc import Sequence

from g3n_mlx.commands import command_parser, run_command
from g3n_mlx.completion import SCRIPTS, SHELLS

NAME = "g3n completion"


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Prints the script; returns the exit code."""
    arguments = command_line(prog).parse_args(argv)
    return run_command(prog, lambda: _print_script(arguments.shell))


def command_line(prog: str = NAME) -> argparse.ArgumentParser:
    """The flags, of a command that was called as prog."""
    parser = command_parser(
        prog,
        "Prints a script that completes g3n's commands, flags and values by Tab.",
        epilog='bash and zsh, in .bashrc or .zshrc (after compinit): eval "$(g3n completion bash)"\n'
        "fish, in config.fish: g3n completion fish | source",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def _print_script(shell: str) -> int:
    from argcomplete.shell_integration import shellcode

    sys.stdout.write(shellcode(list(SCRIPTS), shell=shell).strip() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
