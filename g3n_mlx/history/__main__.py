"""`g3n history`: lists, shows, searches and removes the conversations that `g3n chat` has kept."""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from g3n_mlx.commands import command_parser, positive, run_command, say, tell
from g3n_mlx.history.shown import Entry, local, table, words
from g3n_mlx.history.store import History

NAME = "g3n history"


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Does what was asked; returns the exit code."""
    parser = command_line(prog)
    arguments = parser.parse_args(argv)
    if arguments.do is _remove and bool(arguments.names) == arguments.all:
        parser.error("rm takes conversations, or --all")
    if isinstance(sys.stdout, io.TextIOWrapper):  # as in the chat: a model's words must not fail on its letters
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="replace")
    return run_command(prog, lambda: arguments.do(History(), arguments))


def command_line(prog: str = NAME) -> argparse.ArgumentParser:
    """The flags, of a command that was called as prog."""
    parser = command_parser(
        prog,
        "The conversations that g3n chat keeps. Go on with one: g3n chat --continue, or /resume in a chat.",
        epilog="G3N_HISTORY=off in the environment, or g3n chat --no-history, keeps nothing.",
    )
    actions = parser.add_subparsers(title="actions; default: list", metavar="ACTION")
    parser.set_defaults(do=_list, limit=None, json=False)
    listing = actions.add_parser("list", help="list conversations, the last one first")
    listing.add_argument("-n", "--limit", type=positive, metavar="N", help="that many at most; default: all")
    show = actions.add_parser("show", help="print a conversation")
    show.add_argument("name", metavar="NAME", help="id, or words of its name")
    search = actions.add_parser("search", help="list conversations in which all these words stand in one turn")
    search.add_argument("words", nargs="+", metavar="WORD")
    remove = actions.add_parser("rm", help="remove conversations for good")
    remove.add_argument("names", nargs="*", metavar="NAME", help="id, or words of its name")
    remove.add_argument("--all", action="store_true", help="all of them")
    path = actions.add_parser("path", help="print where the file is")
    for action, do in ((listing, _list), (show, _show), (search, _search), (remove, _remove), (path, _path)):
        action.set_defaults(do=do)
    for action in (listing, show, search):
        action.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _list(history: History, arguments: argparse.Namespace) -> int:
    entries = history.entries()[: arguments.limit]
    if not entries:
        say(f"no conversations are kept in {history.path}")
    return _print(entries, arguments.json)


def _search(history: History, arguments: argparse.Namespace) -> int:
    entries = history.search(" ".join(arguments.words))
    if not entries:
        say("no conversation has these words")
    return _print(entries, arguments.json) if entries else 1


def _print(entries: Sequence[Entry], as_json: bool) -> int:
    if as_json:
        tell(_json([asdict(entry) for entry in entries]))
    else:
        tell("".join(f"{line}\n" for line in table(entries)), end="")
    return 0


def _show(history: History, arguments: argparse.Namespace) -> int:
    conversation = history.find(arguments.name)
    if arguments.json:
        system = [{"role": "system", "content": conversation.system}] if conversation.system else []
        tell(_json({**asdict(conversation.entry), "messages": [*system, *conversation.messages]}))
        return 0
    tell(f"{conversation.id}  {conversation.entry.name}")
    if conversation.system:
        tell(f"system prompt: {conversation.system}")
    for turn in conversation.turns:
        question = words(turn.question).replace("\n", "\n  ")
        tell(f"\n{local(turn.answered_at)}, {turn.model}\n> {question}\n\n{words(turn.answer)}")
    return 0


def _remove(history: History, arguments: argparse.Namespace) -> int:
    if arguments.all:
        say(f"removed: {history.clear()}")
        return 0
    found = [history.find(name).entry for name in arguments.names]  # all of them, before any is removed
    history.remove([entry.id for entry in found])
    for entry in found:
        say(f"removed {entry.id}  {entry.name}")
    return 0


def _path(history: History, _: argparse.Namespace) -> int:
    tell(str(history.path))
    return 0


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
