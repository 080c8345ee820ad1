"""What is heard of a file so far, beside its transcript until that is written: a run that was stopped goes on there."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from g3n_mlx.engine.transcript import Segment
from g3n_mlx.failures import FileInTheWay


class Progress:
    """A file of JSON lines: first what was asked of which audio, then its segments."""

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        """asked: what must be the same for a run to go on."""
        self._path, self._asked = path, json.dumps(asked, sort_keys=True)

    def begin(self) -> list[Segment]:
        """The segments of an earlier run with the same question; none where there was no such run."""
        found = self._read() if self._path.exists() else []
        # Written anew beside it and put into its place, so that a run that is killed here loses nothing.
        new = self._path.with_name(f"{self._path.name}.new")
        new.write_text("".join(f"{line}\n" for line in [self._asked, *map(_line, found)]), "utf-8")
        os.replace(new, self._path)
        return found

    def _read(self) -> list[Segment]:
        """What the file has, as far as it is whole; raises FileInTheWay when it is another program's."""
        lines = self._path.read_bytes().decode("utf-8", "replace").split("\n")
        if lines[0] and not lines[0].startswith('{"'):
            raise FileInTheWay(f"{self._path} is not a transcription's progress: move it away")
        found: list[Segment] = []
        if lines[0] == self._asked:
            for line in lines[1:-1]:  # a last one without an end was cut off
                try:
                    found.append(Segment(**json.loads(line)))
                except (ValueError, TypeError):  # damaged: go on from what is before it
                    break
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
