"""Smaller slices under load: a request that named no slice gets one of them instead of waiting longer.

The next smaller one is taken when a request has waited too long for its turn, or when others beside it have kept it
from its first token for too long; the next larger one after every calm while. What a request gets is decided when it
starts, and holds for all of its choices.
"""

import time
from collections.abc import Callable, Sequence

# A slice serves for so many times the wait that is allowed before a larger one is tried again.
CALM_WAITS = 10
# To its first token a request may take so many times the wait that is allowed.
FIRST_TOKEN_WAITS = 2


class Shedding:
    """Which slice the next request gets. For one thread."""

    def __init__(self, slices: Sequence[str], after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """slices: short names, in the order in which they are taken. after_s: how long a request may wait."""
        self._slices, self._after_s, self._clock = slices, after_s, clock
        self.level = 0  # 0: the model as it was loaded; n: the n-th slice
        self._changed = self._busy = float("-inf")  # when the level was raised or lowered, when there was too much

    @property
    def current(self) -> str | None:
        """The slice in use; None: the model as it was loaded."""
        return self._slices[self.level - 1] if self.level else None

    def chosen(self, waited_s: float) -> str | None:
        """The slice of a request that starts now, having waited so long; None: the model as it was loaded."""
        if waited_s > self._after_s:
            self._lower()
        else:
            self._raise()
        return self.current

    def first_token(self, of: str | None, after_s: float) -> None:
        """Takes note of how long a request took to its first token, others beside it. of: the slice that it got."""
        if after_s > FIRST_TOKEN_WAITS * self._after_s and of == self.current:
            self._lower()

    def _lower(self) -> None:
        """Takes the next slice, unless the one in use is too new to tell whether it is enough."""
        self._busy = now = self._clock()
        if self.level < len(self._slices) and (self.level == 0 or now - self._changed >= self._after_s):
            self.level += 1
            self._changed = now

    def _raise(self) -> None:
        """Goes back by a slice for every while in which nobody waited too long."""
        calm_s, since = CALM_WAITS * self._after_s, max(self._changed, self._busy)
        while self.level and self._clock() - since >= calm_s:
            self.level -= 1
            self._changed = since = since + calm_s
