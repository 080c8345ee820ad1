"""Runs the requests of a batch that are not done yet, and keeps the model busy meanwhile."""

import asyncio
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, Self

from tqdm import tqdm

from g3n_mlx.batch.journal import Journal
from g3n_mlx.batch.requests import Entry, Request, Source
from g3n_mlx.batch.results import Response, result_line, tokens_of


class Answering(Protocol):
    """What answers requests (service.py)."""

    in_flight: int  # how many to hand over at a time

    async def answer(self, request: Request, /) -> Response: ...


def pending(source: Source, journal: Journal) -> list[Entry]:
    """The requests to run, those whose prompts begin alike next to each other: the prefix cache holds a few."""
    return sorted(
        (entry for entry in source.entries() if entry.custom_id not in journal.done), key=lambda entry: entry.beginning
    )


async def run(service: Answering, source: Source, entries: Iterable[Entry], journal: Journal, bar: "Progress") -> None:
    """Answers requests, and appends each result when it is there, whatever became of it."""

    async def answered(entry: Entry) -> None:
        line = result_line(entry.custom_id, await service.answer(source.request(entry)))
        journal.append(line)
        bar.add(tokens_of(line), failed=line["error"] is not None)

    left = iter(entries)
    tasks: set[asyncio.Task[None]] = set()
    try:
        while True:
            while len(tasks) < service.in_flight and (entry := next(left, None)) is not None:
                tasks.add(asyncio.create_task(answered(entry)))
            if not tasks:
                return
            finished, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Progress:
    """A bar on a terminal: done, failed, tokens per second, time left; and the counts for a last line."""

    def __init__(self, total: int | None, *, shown: bool = True) -> None:
        """total: None where nobody knows it before the end."""
        self.done = self.failed = self.tokens = 0
        self._total = total
        self._began = time.monotonic()
        self._bar = tqdm(total=total, unit="req", disable=None if shown else True, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.close()

    def add(self, tokens: int, *, failed: bool) -> None:
        """Counts a result."""
        self.done += 1
        self.failed += failed
        self.tokens += tokens
        self._bar.set_postfix_str(f"{self.failed} failed, {self._rate():.1f} tok/s", refresh=False)
        self._bar.update()

    def _rate(self) -> float:
        return self.tokens / max(time.monotonic() - self._began, 1e-9)

    def summary(self) -> str:
        """The counts in a line."""
        seconds = time.monotonic() - self._began
        of = "" if self._total is None else f" of {self._total}"
        return (
            f"{self.done}{of} requests done in {seconds:.1f} s, {self.failed} failed; "
            f"{self.tokens} tokens, {self._rate():.1f} per second"
        )
