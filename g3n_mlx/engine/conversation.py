"""One conversation's cache: which ids it holds, and how far back it can be taken to begin another prompt.

A full-attention cache can be cut at any token, a sliding one cannot: it has overwritten what came before its window.
So snapshots of the sliding windows (16 MB at E4B's shape) are taken where later prompts are likely to part from this
one, and a new prompt goes on from the longest snapshot, or from the very end, whose ids it begins with. A snapshot also
leads to the id before it: the same prompt once more has but its last id to run. Several
prompts that begin alike go on from forks: caches of their own that share the snapshots.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from g3n_mlx.interface import Cache, Snapshot

# Snapshots kept: the first one, which mostly is the system text's, and the latest.
MAX_SNAPSHOTS = 6


@dataclass(frozen=True, slots=True)
class _Mark:
    length: int  # ids before the snapshot
    snapshot: Snapshot
    back: int  # ids before it that it leads to: 1, or 0 when the cache itself had just been taken back by one


class Conversation:
    """A cache with the ids it has seen and the snapshots to return to."""

    def __init__(self, cache: Cache) -> None:
        self.begin(cache)

    def begin(self, cache: Cache) -> None:
        """Starts anew with an empty cache."""
        self.cache = cache
        self.token_ids: list[int] = []
        self._marks: list[_Mark] = []  # ascending by length
        self._back = 1  # of a mark taken now

    def resume(self, token_ids: Sequence[int]) -> int:
        """Takes the cache back to the longest state that begins these ids; returns how many of them it holds.

        Always less than all of them: the last one has to run to give logits.
        """
        shared = _shared_prefix(self.token_ids, token_ids[:-1])
        if shared < len(self.token_ids):
            mark, back = self._nearest(shared)
            self._marks = [known for known in self._marks if known.length <= shared]
            if mark is None:
                return 0
            self.cache.restore(mark.snapshot, back)
            self._back = mark.back - back
            del self.token_ids[mark.length - back :]
        return len(self.token_ids)

    def reusable(self, token_ids: Sequence[int]) -> int:
        """How many of these ids `resume`, or `fork` where that is fewer than all it holds, would find in the cache."""
        shared = _shared_prefix(self.token_ids, token_ids[:-1])
        if shared == len(self.token_ids):
            return shared
        mark, back = self._nearest(shared)
        return 0 if mark is None else mark.length - back

    def fork(self, token_ids: Sequence[int]) -> "Conversation | None":
        """A conversation of its own at the longest snapshot that begins these ids; None when none does."""
        shared = _shared_prefix(self.token_ids, token_ids[:-1])
        mark, back = self._nearest(shared)
        if mark is None:
            return None
        other = Conversation(self.cache.fork(mark.snapshot, back))
        other.token_ids = self.token_ids[: mark.length - back]
        other._back = mark.back - back
        other._marks = [known for known in self._marks if known.length <= shared]
        return other

    def _nearest(self, shared: int) -> tuple[_Mark | None, int]:
        """The last mark that leads to no more than so many ids, and how many ids back from it, 0 or 1."""
        for mark in reversed(self._marks):
            back = max(0, mark.length - shared)
            if mark.length and back <= mark.back:
                return mark, back
        return None, 0

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and of its snapshots."""
        return self.cache.nbytes + sum(mark.snapshot.nbytes for mark in self._marks)

    def nbytes_at(self, tokens: int, window: int) -> int:
        """The most bytes it takes once it holds so many ids; some must have been taken in, and marked.

        window: of the sliding layers, the most rows of a snapshot.
        """
        mark = self._marks[0]
        row_bytes = mark.snapshot.nbytes / max(1, min(mark.length, window))
        return self.cache.nbytes_at(tokens) + math.ceil(MAX_SNAPSHOTS * row_bytes * min(tokens, window))

    def append(self, token_ids: Sequence[int]) -> None:
        """Notes that the cache has taken these ids in."""
        self.token_ids.extend(token_ids)
        if token_ids:
            self._back = 1
        assert self.cache.offset == len(self.token_ids), (self.cache.offset, len(self.token_ids))

    def mark(self) -> None:
        """Takes a snapshot of the present state, unless there is one; drops the oldest but the first."""
        length = len(self.token_ids)
        if self._marks and self._marks[-1].length == length:
            return
        self._marks.append(_Mark(length, self.cache.snapshot(), self._back))
        if len(self._marks) > MAX_SNAPSHOTS:
            del self._marks[1]


def _shared_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return index
    return min(len(ours), len(theirs))
