"""How conversations are shown: what a message says in words, and conversations in a line each."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

NAME_LETTERS = 60

Content = str | list[Any]  # of a message


@dataclass(frozen=True, slots=True)
class Entry:
    """What a list says of a conversation."""

    id: int
    name: str  # the beginning of its first question
    questions: int
    model: str  # that answered last
    started: str  # ISO 8601, UTC, as all times
    updated: str


def words(content: Content) -> str:
    """What a message says in words; files and other media are named in brackets."""
    parts = [content] if isinstance(content, str) else content
    return "\n".join(part if isinstance(part, str) else _words_of(part) for part in parts)


def _words_of(part: dict[str, Any]) -> str:
    kind = part.get("type")
    if kind == "text":
        return str(part.get("text", ""))
    source = part.get(str(kind))
    return f"[{kind}: {source}]" if isinstance(source, str) and not source.startswith("data:") else f"[{kind}]"


def short(text: str, letters: int = NAME_LETTERS) -> str:
    """A text in one line, cut where it is longer."""
    line = " ".join(text[: 10 * letters].split())
    return line if len(line) <= letters else f"{line[: letters - 1].rstrip()}…"


def table(entries: Iterable[Entry]) -> list[str]:
    """A line each: id, when it was spoken in last, how many questions, name."""
    found = list(entries)
    width = max((len(str(entry.id)) for entry in found), default=0)
    return [f"{entry.id:>{width}}  {local(entry.updated)}  {entry.questions:>3}  {entry.name}" for entry in found]


def local(time: str) -> str:
    """A time in the zone of whoever reads it, to the minute."""
    return datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M")
