"""What is heard of a file so far, beside its transcript until that is written: a run that was stopped goes on there."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from g3n_mlx.engine.transcript import Segment


class Progress:
    """A file of JSON lines: first what was asked of which audio, then its segments."""

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        """asked: what must be the same for a run to go on."""
        self._path, self._asked = path, json.dumps(asked, sort_keys=True)

    def begin(self) -> list[Segment]:
        """The segments of an earlier run with the same question; none where there was no such run."""
        found: list[Segment] = []
        if self._path.exists():
            first, *rest = self._path.read_text("utf-8").split("\n")
            if first == self._asked:
                found = [Segment(**json.loads(line)) for line in rest[:-1]]  # a last one without an end was cut off
        self._path.write_text("".join(f"{line}\n" for line in [self._asked, *map(_line, found)]), "utf-8")
        return found

    def add(self, segment: Segment) -> None:
        """Keeps a segment."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{_line(segment)}\n")

    def end(self) -> None:
        """Forgets all of it: the transcript is written."""
        self._path.unlink()


def _line(segment: Segment) -> str:
    return json.dumps(asdict(segment), ensure_ascii=False)
