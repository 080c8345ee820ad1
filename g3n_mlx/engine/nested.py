"""Drafts by a MatFormer slice of the model, over the same cache.

The slice reads the keys and values that the whole model has left for the tokens so far, and appends its own for the few
that it drafts. These are forgotten before the whole model checks the draft, which writes its own in their place. So a
slice needs no prefill and no cache; whether the whole model's keys and values suit it, its acceptance tells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from g3n_mlx.engine.cache import Cache
from g3n_mlx.engine.drafts import LEAST_GAIN, LENGTHS, MEMORY, PRIOR_TOKENS, CallCosts
from g3n_mlx.engine.runner import Runner, run
from g3n_mlx.rows import Draw, Rows, Step
from g3n_mlx.sampling import SamplingParams

# Before anything is known: the share of a slice's tokens that the model agrees with, and what a step of the slice takes
# in steps of the model (E2B reads 0.54 of the weights that E4B reads).
PRIOR_AGREEMENT, PRIOR_STEP = 0.7, 0.54
# A slice's first drafts are made to see what they bring. When they no longer pay, one is tried again after so many
# calls, with so many tokens: it takes 2 % at most.
FIRST_DRAFTS, CALLS_BETWEEN_TRIALS, TRIAL_TOKENS = 8, 64, 2


@dataclass(slots=True)
class Agreement:
    """How often a model's draws agree with its slice's."""

    right: float = PRIOR_AGREEMENT * PRIOR_TOKENS  # of the latest tokens
    all: float = PRIOR_TOKENS
    drafts: int = 0
    calls_without: int = 0  # since the last draft

    def push(self, drafted: int, accepted: int) -> None:
        """So many of the drafted tokens were accepted; what came behind the first wrong one tells nothing."""
        self.drafts += 1
        for right in [1] * accepted + [0] * (drafted > accepted):
            self.right, self.all = self.right * MEMORY + right, self.all * MEMORY + 1


@dataclass(frozen=True, slots=True)
class Nested:
    """A slice inside a model, and what is known of its drafts, over all answers that are drawn alike."""

    runner: Runner  # of the slice
    owners: tuple[int, ...]  # the model's layers that the slice's first ones are: those that own keys and values
    costs: CallCosts  # of the slice's calls
    agreement: Agreement = field(default_factory=Agreement)


class Borrowed:
    """A model's cache as a slice of it counts the layers."""

    def __init__(self, cache: Cache, owners: Sequence[int]) -> None:
        self.layers: dict[int, Any] = {index: cache.layers[layer] for index, layer in enumerate(owners)}

    @property
    def offset(self) -> int:
        """Tokens seen."""
        return self.layers[0].offset

    def trim(self, n: int) -> None:
        """Forgets the last n tokens, in the layers that the slice has."""
        for layer in self.layers.values():
            layer.trim(n)


class SliceDrafter:
    """Drafts one answer's tokens with a slice, as long as that pays."""

    def __init__(self, nested: Nested, costs: CallCosts, params: SamplingParams, token_ids: Sequence[int]) -> None:
        """costs: of the model's calls; params: with the answer's seed, so that both draw by the same numbers."""
        self._nested, self._costs = nested, costs
        self._sampler = nested.runner.model.make_sampler(replace(params, logprobs=False, top_logprobs=0), token_ids)

    def push(self, token_id: int) -> None:
        """The answer goes on with a token."""
        self._sampler.count([token_id])

    def judge(self, drafted: int, accepted: int) -> None:
        """So many of the drafted tokens were accepted."""
        self._nested.agreement.push(drafted, accepted)

    def length(self, limit: int) -> int:
        """How many tokens to draft, at most `limit`; 0 where it does not pay."""
        known, best, most = self._nested.agreement, 0, LEAST_GAIN
        if known.drafts < FIRST_DRAFTS:
            return min(TRIAL_TOKENS, limit)
        for count in [n for n in LENGTHS if n <= limit]:
            if (gain := self._gain(count)) > most:
                best, most = count, gain
        if not best and known.calls_without >= CALLS_BETWEEN_TRIALS:
            best = min(TRIAL_TOKENS, limit)
        known.calls_without = 0 if best else known.calls_without + 1
        return best

    def _gain(self, count: int) -> float:
        """Tokens a second with drafts of so many, in those without."""
        share = self._nested.agreement.right / self._nested.agreement.all
        step, whole = self._nested.costs.seconds(1), self._costs.seconds(1)
        relative = PRIOR_STEP if step is None or whole is None else step / whole
        accepted = sum(share**n for n in range(count + 1))
        return accepted / (self._costs.ratio(1 + count) + count * relative)

    def draft(
        self,
        cache: Cache,
        step: Step,
        position: int,
        count: int,
        masks: Callable[[Sequence[int]], Sequence[np.ndarray | None]],
    ) -> list[int]:
        """The slice's own `count` tokens behind a step, from a position of the answer on; the cache stays as it is.

        masks: see DraftConstraint; what breaks the rule ends the draft.
        """
        borrowed, draft = Borrowed(cache, self._nested.owners), list[int]()
        while len(draft) < count:
            allowed = masks(draft)
            if len(allowed) <= len(draft):
                break
            with self._nested.costs.timed(1):
                draw = Draw(self._sampler, position + len(draft), allowed[-1:])
                more = len(draft) + 1 < count
                ((step,),) = run(self._nested.runner.model, [Rows(borrowed, step, draw=draw)], goes_on=more)
                draft.append(int(step))
        borrowed.trim(len(draft))
        self._sampler.forget(len(draft))
        return draft
