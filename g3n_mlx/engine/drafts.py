"""Drafts: tokens that an answer may go on with, of which one call of the model checks several.

They are lossless by construction: at every position the model's own draw, with that position's own uniform number and
penalties, is what is handed out. A draft only decides how many of them are computed in one call.
How long a draft is follows from two things that are measured: what a call of so many rows costs on this machine, and
how often what a lookup found was right, which is seen at every token, drafted or not.
"""

import math
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from g3n_mlx.engine.lookup import Lookup

Mode = Literal["off", "auto", "lookup"]
MODES: tuple[Mode, ...] = ("off", "auto", "lookup")

# Rows of a call: as many as the kernels in C take (kernels/library.py); every cache can forget as many.
MAX_ROWS = 16
# Lengths that are considered: few, so that the cost of each is soon known.
LENGTHS = (1, 2, 3, 4, 5, 7, 11, 15)
# What a further row costs as a share of a single-row call where nothing is known yet. MLX on an M4 Pro takes about
# 0.15, on an M1 0.85; our kernels in C 0.15 up to 4 rows.
PRIOR_ROW_COST = 0.25
# The least gain that a draft is made for: below, its cost is as likely to be noise.
LEAST_GAIN = 1.05
# Times that are kept of each count of rows, how many make a figure, and after how many calls one is forgotten, so that
# what once seemed too slow is tried again.
TIMES, LEAST_TIMES, REMEMBERED_CALLS = 9, 2, 1000
# How often a lookup's next token is right before anything is known, by the bits of the length of its match
# (2-3, 4-7, ... tokens), how many tokens that is worth, and the share of the past that every new one leaves.
PRIOR_ACCEPTANCE, PRIOR_TOKENS, MEMORY = (0.3, 0.5, 0.7, 0.8, 0.9), 4.0, 0.95


@runtime_checkable
class DraftConstraint(Protocol):
    """A constraint that looks ahead, so that several tokens of a draft can be checked at once; it stays as it is."""

    def mask(self) -> np.ndarray | None: ...

    def push(self, token_id: int) -> None: ...

    def masks(self, draft: Sequence[int]) -> list[np.ndarray | None]:
        """The tokens that may come next, bool [V] each: now, and after each token of the draft that may come there.

        One more than the draft has tokens, or fewer where it breaks the rule.
        """
        ...

    def forced(self) -> list[int]:
        """The tokens that must come next, each of them the only one that its mask would let through."""
        ...


class CallCosts:
    """How long calls for one sequence take on this machine, by their rows."""

    def __init__(self) -> None:
        self._calls = 0
        self._times: dict[int, deque[float]] = {}  # seconds, by rows
        self._noted: dict[int, int] = {}  # the number of the last call of so many rows
        self._known: list[tuple[int, float]] = []  # rows and seconds, ascending

    def note(self, rows: int, seconds: float) -> None:
        """A call of so many rows took so long."""
        self._calls += 1
        self._noted[rows] = self._calls
        self._times.setdefault(rows, deque(maxlen=TIMES)).append(seconds)
        for old in [n for n, call in self._noted.items() if self._calls - call > REMEMBERED_CALLS]:
            del self._noted[old], self._times[old]
        # The lower median: the first call of a kind also compiles or allocates.
        self._known = sorted(
            (n, sorted(times)[(len(times) - 1) // 2]) for n, times in self._times.items() if len(times) >= LEAST_TIMES
        )

    @contextmanager
    def timed(self, rows: int) -> Generator[None]:
        """Notes how long what is done inside takes."""
        started = time.perf_counter()
        yield
        self.note(rows, time.perf_counter() - started)

    def seconds(self, rows: int) -> float | None:
        """The time of a call of so many rows; None where it is not known."""
        return dict(self._known).get(rows)

    def ratio(self, rows: int) -> float:
        """The time of a call of so many rows, in calls of one row; between and beyond what is known, on lines."""
        known = self._known if self._known and self._known[0][0] == 1 else []
        single = known[0][1] if known else 1.0
        below, low = max(((n, s / single) for n, s in known if n <= rows), default=(1, 1.0))
        above, high = min(((n, s / single) for n, s in known if n > rows), default=(0, 0.0))
        if above:
            return low + (high - low) * (rows - below) / (above - below)
        slope = max(PRIOR_ROW_COST, (low - 1) / (below - 1) if below > 1 else 0.0)
        return low + slope * (rows - below)


class Acceptance:
    """How often the token that a lookup found was the next one, by the length of its match."""

    def __init__(self) -> None:
        self._right = [share * PRIOR_TOKENS for share in PRIOR_ACCEPTANCE]
        self._all = [PRIOR_TOKENS] * len(PRIOR_ACCEPTANCE)

    def push(self, match: int, right: bool) -> None:
        """A lookup whose match had so many tokens was right, or wrong."""
        kind = _kind(match)
        self._right[kind] = self._right[kind] * MEMORY + right
        self._all[kind] = self._all[kind] * MEMORY + 1

    def expected(self, match: int, count: int) -> float:
        """How many of a draft's first `count` tokens will be accepted; each lengthens the match that the next has."""
        share, accepted = 1.0, 0.0
        for index in range(count):
            kind = _kind(match + index)
            share *= self._right[kind] / self._all[kind]
            accepted += share
        return accepted


def _kind(match: int) -> int:
    return min(match.bit_length() - 2, len(PRIOR_ACCEPTANCE) - 1)


class Drafter:
    """Makes the drafts of one answer."""

    def __init__(self, mode: Mode, costs: CallCosts, token_ids: Sequence[int]) -> None:
        """mode: "auto" drafts where it pays, "lookup" wherever a lookup finds something; token_ids: the prompt's."""
        self._costs = costs if mode == "auto" else CallCosts()
        self._least_gain = LEAST_GAIN if mode == "auto" else -math.inf
        self._lookup, self._acceptance = Lookup(token_ids), Acceptance()
        self._match = self._lookup.match()

    def push(self, token_id: int) -> None:
        """The answer goes on with a token."""
        index, length = self._match
        if length:
            self._acceptance.push(length, self._lookup.token_ids[index] == token_id)
        self._lookup.push(token_id)
        self._match = self._lookup.match()

    def draft(self, limit: int, together: int) -> list[int]:
        """At most `limit` tokens to check in the next call, which is made for so many sequences; often none."""
        index, length = self._match
        if not length:
            return []
        best, most = 0, self._least_gain
        for count in [n for n in LENGTHS if n <= limit]:
            gain = self._gain(self._acceptance.expected(length, count), count, together)
            if gain > most:
                best, most = count, gain
        return self._lookup.following(index, best)

    def pays(self, count: int, together: int) -> bool:
        """Whether tokens that are certain to be accepted are worth so many rows more.

        For one sequence always: their rows need neither a draw nor the layers behind the last keys and values, so they
        are cheaper than calls of their own on any machine. What is measured, calls that draw after every row, is not
        asked, nor its noise.
        """
        return together == 1 or self._gain(count, count, together) > 1

    def _gain(self, accepted: float, count: int, together: int) -> float:
        """Tokens a second with a draft, in those without one; the other sequences are taken to draft as much."""
        rows = together * (1 + count)
        if rows > MAX_ROWS:
            return 0.0
        return (1 + accepted) * self._costs.ratio(together) / self._costs.ratio(rows)
