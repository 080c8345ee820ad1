"""What is drafted behind the last token of one answer: forced tokens, else a lookup's, else a slice's."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from g3n_mlx.engine.cache import Cache
from g3n_mlx.engine.drafts import MAX_ROWS, CallCosts, DraftConstraint, Drafter, Mode
from g3n_mlx.engine.nested import Nested, SliceDrafter
from g3n_mlx.rows import Step
from g3n_mlx.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class How:
    """How the tokens of an answer are drafted."""

    mode: Mode = "off"
    costs: CallCosts | None = None  # of the model's calls for answers that are drawn alike
    nested: Nested | None = None  # a slice that drafts where nothing else does


class Drafting:
    """The drafts of one answer."""

    def __init__(
        self,
        how: How,
        constraint: DraftConstraint | None,
        params: SamplingParams,
        stop_ids: frozenset[int],
        token_ids: Sequence[int],
    ) -> None:
        """token_ids: the prompt's."""
        self.costs = how.costs or CallCosts()
        self._constraint, self._params, self._stop_ids = constraint, params, stop_ids
        self._drafter = Drafter(how.mode, self.costs, token_ids)
        self._slice = None if how.nested is None else SliceDrafter(how.nested, self.costs, params, token_ids)
        self._by_slice = False  # whether the last draft is the slice's

    def push(self, token_id: int) -> None:
        """The answer goes on with a token."""
        self._drafter.push(token_id)
        if self._slice is not None:
            self._slice.push(token_id)

    def judge(self, drafted: int, accepted: int) -> None:
        """So many tokens of the last draft agree with the model's own draws."""
        if self._slice is not None and self._by_slice:
            self._slice.judge(drafted, accepted)

    def draft(self, cache: Cache, step: Step, position: int, limit: int, together: int) -> tuple[list[int], bool]:
        """Tokens that may follow a step in an answer's next call, and whether they are certain and need no draw.

        position: of the draw after the step; limit: how many tokens the answer may still have; together: the sequences
        that share the call.
        """
        self._by_slice = False
        limit = min(limit, MAX_ROWS) - 1  # the draw after the last row has to be within the limit too
        forced = [] if self._constraint is None else self._constraint.forced()
        if forced:
            bias = self._params.logit_bias  # -inf forbids a token whatever the constraint says
            forced = self._useful(takewhile(lambda token_id: bias.get(token_id) != -np.inf, forced[:limit]))
            scored = self._params.logprobs or self._params.top_logprobs > 0
            return (forced, not scored) if self._drafter.pays(len(forced), together) else ([], False)
        draft = self._drafter.draft(limit, together)
        # A slice reads its weights for one sequence, and in a batch the model's are shared.
        if not draft and self._slice is not None and together == 1 and (count := self._slice.length(limit)):
            self._by_slice = True
            draft = self._slice.draft(cache, step, position, count, self.masks)
        return self._useful(draft), False

    def masks(self, draft: Sequence[int]) -> Sequence[np.ndarray | None]:
        """What may be drawn after the last token and after each of a draft, up to one that may not come there."""
        return [None] * (len(draft) + 1) if self._constraint is None else self._constraint.masks(draft)

    def _useful(self, draft: Iterable[int]) -> list[int]:
        """A draft up to the first token that would end the answer: no row behind it would be used."""
        return list(takewhile(lambda token_id: token_id not in self._stop_ids, draft))
