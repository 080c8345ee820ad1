"""The results of a batch as they come, in a file that a later run goes on from.

A line is written by one call of the system, so a process that is killed loses only requests that were in flight. Should
the system have written a part of a line, the next run cuts it off.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from g3n_mlx.failures import BadValue, FileProblem

_FIRST_BYTES = b'{"id": "batch_req_'  # of every line, which one that is torn has, too


class Journal:
    """Result lines, appended to a file; one process at a time."""

    def __init__(self, path: Path, *, retry_errors: bool = False) -> None:
        """retry_errors: lines of requests that failed are taken out first.

        Raises ValueError when the file holds something else, OSError when another run writes to it.
        """
        self.path = path
        self.done: set[str] = set()  # custom_ids
        self.failed = 0  # of them
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise FileProblem(f"{path} is being written by another run: wait for it, or choose another -o") from None
        try:
            self._cut_and_read(retry_errors)
        except BaseException:
            self._lock.release()
            raise

    def _cut_and_read(self, retry_errors: bool) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            whole = _whole_bytes(self.path)
            for line in self.lines(whole):  # before anything is cut: it may be a file of another kind
                self.done.add(line["custom_id"])
                self.failed += line["error"] is not None
            with self.path.open("rb") as file:
                file.seek(whole)
                torn = file.read(len(_FIRST_BYTES))
            if not _FIRST_BYTES.startswith(torn):
                raise BadValue(f"{self.path} does not end in a result of a batch; choose another -o")
        except BaseException:
            os.close(self._file)
            raise
        os.ftruncate(self._file, whole)
        if retry_errors and self.failed:
            self._drop_errors()
        os.lseek(self._file, 0, os.SEEK_END)

    def _drop_errors(self) -> None:
        unfinished = self.path.with_name(f".{self.path.name}.unfinished")
        kept: set[str] = set()
        with unfinished.open("wb") as file:
            for line in self.lines():
                if line["error"] is None:
                    file.write(_encoded(line))
                    kept.add(line["custom_id"])
            file.flush()
            os.fsync(file.fileno())
        os.close(self._file)
        os.replace(unfinished, self.path)
        self._file = os.open(self.path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        self.done, self.failed = kept, 0

    def lines(self, num_bytes: int | None = None) -> Iterator[dict[str, Any]]:
        """All lines, or those of so many bytes; raises ValueError at one that is not a result."""
        left = self.path.stat().st_size if num_bytes is None else num_bytes
        with self.path.open("rb") as file:
            for number, text in enumerate(file, 1):
                left -= len(text)
                if left < 0:
                    return
                line = _result(text)
                if line is None:
                    raise BadValue(f"{self.path}, line {number}: this is not a result of a batch; choose another -o")
                yield line

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a result."""
        text = _encoded(line)
        written = os.write(self._file, text)
        while written < len(text):  # the disk is full, which raises now, or a signal came between
            written += os.write(self._file, text[written:])
        self.done.add(line["custom_id"])
        self.failed += line["error"] is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        # The lock's file stays: were it unlinked, a run that waits for it and one that comes new could both write.
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)
            self._lock.release()


def _whole_bytes(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    size = path.stat().st_size
    with path.open("rb") as file:
        end = size
        while end > 0:
            start = max(0, end - (1 << 20))
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _result(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    is_result = isinstance(line, dict) and {"custom_id", "response", "error"} <= line.keys()
    return line if is_result and isinstance(line["custom_id"], str) else None


def _encoded(line: Mapping[str, Any]) -> bytes:
    # A lone surrogate, which a broken file name can bring, stays an escape; all else is written as it is.
    try:
        return (json.dumps(line, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(line) + "\n").encode()
