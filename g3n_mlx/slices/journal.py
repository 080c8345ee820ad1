"""What a search has measured so far, in a file that a later run goes on from.

A line of JSON each: first what the search is of, then [piece, candidate, sum of divergences]. A line that was cut off
when the process was killed is dropped.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from g3n_mlx.failures import BadValue


class Journal:
    """Measurements by piece and candidate, appended to a file as they come."""

    def __init__(self, path: Path, subject: dict[str, str]) -> None:
        """subject: what must be the same for a measurement to be of use: model, backend, dtype.

        Raises ValueError when the file is of another subject, or none of these.
        """
        self._known: dict[tuple[str, str], float] = {}
        header = json.dumps(subject, sort_keys=True)
        whole = b""
        if path.is_file():
            whole = b"".join(line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n"))
            self._read(path, whole.decode("utf-8", "replace"), header)
        self._file = path.open("r+b" if path.is_file() else "w+b")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not whole:
            self._append(header)

    def _read(self, path: Path, text: str, header: str) -> None:
        first, *lines = text.splitlines() or [header]
        if first != header:
            raise BadValue(f"{path} is of another search, or no journal: delete it, or write somewhere else")
        try:
            self._known = {(piece, candidate): float(value) for piece, candidate, value in map(json.loads, lines)}
        except (ValueError, TypeError) as error:
            raise BadValue(f"{path} is damaged: {error}; delete it to begin again") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, piece: str, candidate: str) -> float | None:
        return self._known.get((piece, candidate))

    def put(self, piece: str, candidate: str, value: float) -> None:
        self._known[piece, candidate] = value
        self._append(json.dumps([piece, candidate, value]))

    def _append(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()
