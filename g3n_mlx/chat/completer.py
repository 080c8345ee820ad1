"""What Tab completes: the names of commands and settings, and of files, with the spaces in them escaped."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from g3n_mlx.chat import attachments
from g3n_mlx.chat.commands import COMMANDS
from g3n_mlx.chat.settings import SETTINGS
from g3n_mlx.commands import is_control

_LAST_WORD = re.compile(r"\S*\Z" if os.name == "nt" else r"(?:\\.|[^\s\\])*\Z")
_FULL_PATH = re.compile(r"/|[A-Za-z]:[\\/]")  # as a file is dropped


class ChatCompleter(Completer):
    """Completes the word before the cursor by where it stands."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """All that the word may become."""
        before = document.text_before_cursor
        name, space, argument = before.partition(" ")
        command = COMMANDS.get(name[1:]) if name[:1] == "/" else None
        found = _LAST_WORD.search(before)
        word = found[0] if found else ""
        if not space and (names := [known for known in COMMANDS if f"/{known}".startswith(before) and before]):
            for known in names:
                entry = COMMANDS[known]
                yield Completion(f"/{known}{' ' if entry.takes else ''}", -len(before), display_meta=entry.text)
        elif space and name == "/set":
            if " " not in argument:
                yield from (Completion(f"{known} ", -len(argument)) for known in SETTINGS if known.startswith(argument))
        elif command is not None and "FILE" in command.takes:
            kind = name[1:]
            yield from _files(word, lambda path: kind not in attachments.SUFFIXES or attachments.kind_of(path) == kind)
        elif _FULL_PATH.match(word):
            yield from _files(word, lambda path: attachments.kind_of(path) is not None)


def _files(word: str, wanted: Callable[[Path], bool]) -> Iterator[Completion]:
    """The folders, and the files that are wanted, whose names begin as the word does."""
    typed = attachments.unquoted(word)
    folder, start = os.path.split(typed)
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name.casefold())
    except OSError:
        return
    for entry in entries:
        name = entry.name
        hidden = name.startswith(".") and not start.startswith(".")
        if hidden or not name.startswith(start) or any(letter == "\n" or is_control(letter) for letter in name):
            continue
        end = "/" if entry.is_dir() else ""
        if end or wanted(Path(name)):
            yield Completion(_escaped(name[len(start) :]) + end, display=name + end)


def _escaped(name: str) -> str:
    """A name as a shell is given it."""
    return name if os.name == "nt" else re.sub(r"([\s'\"\\])", r"\\\1", name)
