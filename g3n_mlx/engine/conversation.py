"""One conversation's cache: which ids it holds, and how far back it can be taken to begin another prompt.

A full-attention cache can be cut at any token, a sliding one only within its spare rows: it has overwritten what came
before its window. So snapshots of the sliding windows (18 MB at E4B's shape) are taken where later prompts are likely
to part from this one, and a new prompt goes on from the last state that begins it: the end of the cache or a snapshot,
each of them less as many ids as it has spare rows for. Several prompts that begin alike go on from forks: caches of
their own that share the snapshots.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from g3n_mlx.engine.cache import Cache, Snapshot
from g3n_mlx.interface import MAX_TRIM_TOKENS

# Snapshots kept: the first one, which mostly is the system text's, and the latest.
MAX_SNAPSHOTS = 6


@dataclass(frozen=True, slots=True)
class _Mark:
    length: int  # ids before the snapshot
    snapshot: Snapshot


class Conversation:
    """A cache with the ids it has seen and the snapshots to return to."""

    def __init__(self, cache: Cache) -> None:
        self.begin(cache)

    def begin(self, cache: Cache) -> None:
        """Starts anew with an empty cache."""
        self.cache = cache
        self.token_ids: list[int] = []
        self._marks: list[_Mark] = []  # ascending by length

    def resume(self, token_ids: Sequence[int]) -> int:
        """Takes the cache back to the longest state that begins these ids; returns how many of them it holds.

        Always less than all of them: the last one has to run to give logits. When it is none, the cache is unchanged,
        and the caller begins with an empty one.
        """
        shared = _shared_prefix(self.token_ids, token_ids[:-1])
        excess = len(self.token_ids) - shared
        if excess > self.cache.spare:
            mark = self._nearest(shared)
            if mark is None:
                return 0
            self.cache.restore(mark.snapshot)
            excess = max(0, mark.length - shared)
        self.cache.trim(excess)
        self._marks = [known for known in self._marks if known.length <= shared]
        del self.token_ids[self.cache.offset :]
        return len(self.token_ids)

    def reusable(self, token_ids: Sequence[int]) -> int:
        """How many of these ids `resume`, or `fork` where that is fewer than all it holds, would find in the cache."""
        shared = _shared_prefix(self.token_ids, token_ids[:-1])
        if shared == len(self.token_ids):
            return shared
        mark = self._nearest(shared)
        return 0 if mark is None else min(mark.length, shared)

    def fork(self, token_ids: Sequence[int]) -> "Conversation | None":
        """A conversation of its own at the longest snapshot that begins these ids; None when none does."""
        shared = _shared_prefix(self.token_ids, token_ids[:-1])
        mark = self._nearest(shared)
        if mark is None:
            return None
        other = Conversation(self.cache.fork(mark.snapshot))
        other.cache.trim(max(0, mark.length - shared))
        other.token_ids = self.token_ids[: other.cache.offset]
        other._marks = [known for known in self._marks if known.length <= shared]
        return other

    def _nearest(self, shared: int) -> _Mark | None:
        """The last mark that leads to no more than so many ids."""
        found = (mark for mark in reversed(self._marks) if 0 < mark.length <= shared + mark.snapshot.spare)
        return next((mark for mark in found if min(mark.length, shared)), None)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and of its snapshots."""
        return self.cache.nbytes + sum(mark.snapshot.nbytes for mark in self._marks)

    def nbytes_at(self, tokens: int, window: int) -> int:
        """The most bytes it takes once it holds so many ids; some must have been taken in, and marked.

        window: of the sliding layers; with the spare rows, the most rows of a snapshot.
        """
        mark, rows = self._marks[0], window - 1 + MAX_TRIM_TOKENS
        row_bytes = mark.snapshot.nbytes / max(1, min(mark.length, rows))
        return self.cache.nbytes_at(tokens) + math.ceil(MAX_SNAPSHOTS * row_bytes * min(tokens, rows))

    def append(self, token_ids: Sequence[int]) -> None:
        """Notes that the cache has taken these ids in."""
        self.token_ids.extend(token_ids)
        assert self.cache.offset == len(self.token_ids), (self.cache.offset, len(self.token_ids))

    def mark(self) -> None:
        """Takes a snapshot of the present state, unless there is one; drops the oldest but the first."""
        length = len(self.token_ids)
        if self._marks and self._marks[-1].length == length:
            return
        self._marks.append(_Mark(length, self.cache.snapshot()))
        if len(self._marks) > MAX_SNAPSHOTS:
            del self._marks[1]


def _shared_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return index
    return min(len(ours), len(theirs))
