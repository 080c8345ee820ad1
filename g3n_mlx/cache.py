"""One conversation's cache: which ids it holds, and how far back it can be taken to begin another prompt.

A full-attention cache can be cut at any token, a sliding one cannot: it has overwritten what came before its window.
So snapshots of the sliding windows (16 MB at E4B's shape) are taken where later prompts are likely to part from this
one, and a new prompt goes on from the longest snapshot, or from the very end, whose ids it begins with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from g3n_mlx.interface import Cache

# Snapshots kept: the first one, which mostly is the system text's, and the latest.
MAX_SNAPSHOTS = 6


@dataclass(frozen=True, slots=True)
class _Mark:
    length: int  # ids before the snapshot
    snapshot: object


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

        Always less than all of them: the last one has to run to give logits.
        """
        shared = _shared_prefix(self.token_ids, token_ids[:-1])
        if shared < len(self.token_ids):
            self._marks = [mark for mark in self._marks if mark.length <= shared]
            if not self._marks:
                return 0
            self.cache.restore(self._marks[-1].snapshot)
            del self.token_ids[self._marks[-1].length :]
        return len(self.token_ids)

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
