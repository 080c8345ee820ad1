"""An answer that must have some tokens before it may end by itself."""

from collections.abc import Collection

import numpy as np

from g3n_mlx.engine.sequence import Constraint


class AtLeast:
    """A constraint, or none, without the ends until enough tokens are drawn. Good for one answer."""

    def __init__(
        self, min_tokens: int, end_ids: Collection[int], vocab_size: int, constraint: Constraint | None
    ) -> None:
        """end_ids: what would end the answer; vocab_size: V."""
        self._left, self._ends, self._constraint = min_tokens, sorted(end_ids), constraint
        self._no_end = np.ones(vocab_size, dtype=bool)
        self._no_end[self._ends] = False

    def mask(self) -> np.ndarray | None:
        """The constraint's mask without the ends; with them where nothing else may come."""
        mask = None if self._constraint is None else self._constraint.mask()
        if self._left <= 0:
            return mask
        if mask is None:
            return self._no_end
        allowed = mask & self._no_end
        return allowed if allowed.any() else mask

    def push(self, token_id: int) -> None:
        """Takes note of a drawn token."""
        self._left -= 1
        if self._constraint is not None:
            self._constraint.push(token_id)
