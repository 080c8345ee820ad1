"""One answer as a state machine over token ids: prefill, decode, stop.

A sequence says which rows it wants to append next, and is told the steps that came of them; who carries that out, for
one sequence or for many in one call, is runner.py's business. It knows no text, and of the model only the seam.
With drafts (drafts.py) the rows are those of several tokens, of which the model's own draws decide how many stay.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from g3n_mlx.config.text import TextConfig
from g3n_mlx.engine.cache import Cache
from g3n_mlx.engine.conversation import Conversation
from g3n_mlx.engine.drafting import Drafting, How
from g3n_mlx.engine.drafts import DraftConstraint
from g3n_mlx.interface import Model
from g3n_mlx.prompt.prompt import Features, MediaSpan, Prompt, PromptTooLong
from g3n_mlx.rows import Draw, Rows, Soft, SoftTokens, Step
from g3n_mlx.sampling import SamplingParams


class Embed(Protocol):
    """Media to soft tokens."""

    def __call__(self, features: Features, later: Sequence[Features] = ()) -> SoftTokens:
        """The soft tokens of an image or a clip. later: those of the prompt behind it."""
        ...


class Constraint(Protocol):
    """What an answer must look like, a grammar say: asked before every draw, told after it."""

    def mask(self) -> np.ndarray | None:
        """The tokens that may come next, bool [V]; None for all."""
        ...

    def push(self, token_id: int) -> None:
        """Takes note of a drawn token."""
        ...


@dataclass(slots=True)
class Timings:
    """What one answer took; filled while it is generated."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the cache
    completion_tokens: int = 0
    prefill_s: float = 0.0  # until the first token is known
    decode_s: float = 0.0  # from the first token to the last
    decode_calls: int = 0  # of the model, after the prompt's
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of them
    at_limit: bool = False  # ended by max_tokens or the end of the context


def check_length(prompt: Prompt, answer_tokens: int, context_tokens: int) -> None:
    """Raises PromptTooLong when the context has no room for a prompt and the least answer wanted."""
    prompt_tokens = len(prompt.token_ids)
    excess = prompt_tokens + answer_tokens - context_tokens
    if excess <= 0:
        return
    answer = " and an answer" if answer_tokens else ""
    kinds = [span.features.kind for span in prompt.media]
    counts = {"image": kinds.count("image"), "audio clip": kinds.count("audio")}
    media = " and ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items() if count)
    advice = "shorten it"
    if media:
        advice += (
            f", or send less or shorter media: {sum(span.length for span in prompt.media)} tokens stand for {media}"
        )
    raise PromptTooLong(
        f"the prompt has {prompt_tokens} tokens, {excess} too many for the context of {context_tokens} "
        f"tokens{answer}: {advice}"
    )


def prefill_spans(start: int, length: int, borders: Sequence[int], step_size: int) -> Iterator[tuple[int, int]]:
    """Spans [a, b) that cover start..length: cut at every border, and every `step_size` ids after one.

    They depend on the prompt and where the cache ends alone: from an empty one, the same calls every time.
    """
    anchor = max((b for b in borders if b <= start), default=0)
    position = start
    for border in sorted({*(b for b in borders if start < b < length), length}):
        while position < border:
            end = min(anchor + (position - anchor) // step_size * step_size + step_size, border)
            yield position, end
            position = end
        anchor = border


def soft_tokens(media: Sequence[MediaSpan], start: int, stop: int, embed: Embed) -> Soft:
    """The soft tokens among the prompt's ids [start, stop), placed from `start` on."""
    soft: list[tuple[int, SoftTokens]] = []
    for index, span in enumerate(media):
        first, last = max(start, span.start), min(stop, span.start + span.length)
        if first < last:
            rows = embed(span.features, [other.features for other in media[index + 1 :]])
            assert len(rows) == span.length, (len(rows), span.length)
            soft.append((first - start, rows[first - span.start : last - span.start]))
    return soft


class TokenSequence:
    """The ids of one answer on their way: what it wants next (`wish`), and what came of it (`told`).

    All of its methods belong to the thread that runs the model; broken off between two of them, the conversation stays
    good.
    """

    def __init__(
        self,
        model: Model,
        config: TextConfig,
        conversation: Conversation,
        prompt: Prompt,
        params: SamplingParams,
        stop_ids: frozenset[int],
        embed: Embed,
        constraint: Constraint | None = None,
        how: How | None = None,
    ) -> None:
        """embed: media to soft tokens; called only for what the cache does not hold. how: its tokens are drafted.

        Raises PromptTooLong. The conversation's cache goes on from what it shares with the prompt.
        """
        length = len(prompt.token_ids)
        check_length(prompt, 1, config.max_position_embeddings)
        room = config.max_position_embeddings - length
        self.limit = room if params.max_tokens is None else min(room, params.max_tokens)
        self.timings = Timings(prompt_tokens=length)
        self.finished = False
        self.conversation = conversation
        self._model, self._config, self._prompt, self._params = model, config, prompt, params
        self._stop_ids, self._embed, self._constraint = stop_ids, embed, constraint
        # A rule that does not look ahead has to be asked between any two draws.
        looks_ahead = constraint is None or isinstance(constraint, DraftConstraint)
        self._how = how if how is not None and how.mode != "off" and looks_ahead else None
        self._drafting: Drafting | None = None
        self._identity = prompt.identity
        self._parts: Iterator[tuple[int, int]] | None = None  # of the prompt; None before the first wish
        self._part = (0, 0)
        self._step: Step | None = None  # drawn last
        self._drafted: list[int] = []  # tokens behind it in the call that is under way
        self._called_at: float | None = None  # when that call was asked for, if it is one of this sequence alone
        self._drawn_at = 0.0

    @property
    def decoding(self) -> bool:
        """Whether the next wish is one token, and perhaps a draft; else it is a part of the prompt."""
        return self._step is not None

    def wish(self, together: int = 1) -> Rows:
        """The rows to append next. together: how many sequences share the call."""
        cache = self.conversation.cache
        if self._step is not None:
            return self._decode_rows(self._step, together)
        if self._parts is None:
            self._begin()
            cache = self.conversation.cache
        assert self._parts is not None
        a, b = self._part = next(self._parts)
        ids = np.asarray(self._prompt.token_ids[a:b], dtype=np.int64)
        soft = soft_tokens(self._prompt.media, a, b, self._embed)
        last = b == self.timings.prompt_tokens
        return Rows(cache, ids, soft, Draw(self._sampler, 0, [self._mask()]) if last else None)

    def told(self, steps: Sequence[Step], each: Callable[[Step | int], bool] = lambda _: True) -> None:
        """Takes note of what a wish drew.

        each: is given every token that belongs to the answer, as a step or as the id that was forced, and says whether
        the answer goes on. A stop id is none of them; it ends the sequence.
        """
        if self._step is None:
            a, b = self._part
            self.conversation.append(self._identity[a:b])
            if b in self._prompt.borders or b == self.timings.prompt_tokens:
                self.conversation.mark()
            if steps:
                (self._step,) = steps
                self._take(steps, each)
            return
        now = time.perf_counter()
        rows = 1 + len(self._drafted)
        tokens = self._verified(steps)
        if self._drafting is not None:
            self._drafting.judge(rows - 1, len(tokens) - 1)
            if self._called_at is not None and len(steps) == rows:
                self._drafting.costs.note(rows, now - self._called_at)
        before = int(self._step)
        used = self._take(tokens, each)
        self._step = steps[min(used, len(steps)) - 1]
        # As if the tokens had been drawn one by one: the last one is in no cache yet, what was refused in none.
        self.conversation.cache.trim(rows - used)
        self._sampler.forget(rows - used)
        self.conversation.append([before, *map(int, tokens[: used - 1])])
        self.timings.decode_calls += 1
        self.timings.drafted_tokens += rows - 1
        self.timings.accepted_tokens += used - 1

    def _begin(self) -> None:
        self._started_at = time.perf_counter()
        self._sampler = self._model.make_sampler(self._params, self._prompt.token_ids)
        start = self.conversation.resume(self._identity)
        self.timings.cached_tokens = start
        if start == 0:
            self.conversation.begin(Cache(self._config, self._model.kv_arrays))
        prompt = self._prompt
        self._parts = prefill_spans(start, len(prompt.token_ids), prompt.borders, self._params.prefill_step_size)

    def _decode_rows(self, step: Step, together: int) -> Rows:
        """The last token, and what is drafted behind it."""
        cache, position = self.conversation.cache, self.timings.completion_tokens
        draft, certain = list[int](), False
        if self._how is not None:
            if self._drafting is None:
                constraint = self._constraint if isinstance(self._constraint, DraftConstraint) else None
                ids = self._prompt.token_ids
                self._drafting = Drafting(self._how, constraint, self._params, self._stop_ids, ids)
                self._drafting.push(int(step))
            draft, certain = self._drafting.draft(cache, step, position, self.limit - position, together)
        self._called_at = time.perf_counter() if together == 1 else None
        masks = self._drafting.masks(draft) if draft and self._drafting else [self._mask()]
        self._drafted = draft = draft[: len(masks) - 1]
        if not draft:
            return Rows(cache, step, draw=Draw(self._sampler, position, masks))
        ids = np.array([int(step), *draft], dtype=np.int64)
        if not certain:
            return Rows(cache, ids, draw=Draw(self._sampler, position, masks))
        self._sampler.count(draft)
        return Rows(cache, ids, draw=Draw(self._sampler, position + len(draft), masks[-1:]))

    def _mask(self) -> np.ndarray | None:
        """What may be drawn next."""
        return None if self._constraint is None else self._constraint.mask()

    def _verified(self, steps: Sequence[Step]) -> list[Step | int]:
        """The tokens that a call has brought: the draft as far as the model's own draws agree, and one draw more."""
        draft = self._drafted
        if len(steps) == 1:
            return [*draft, *steps]
        accepted = next((i for i, token_id in enumerate(draft) if int(steps[i]) != token_id), len(draft))
        return list(steps[: accepted + 1])

    def _take(self, tokens: Sequence[Step | int], each: Callable[[Step | int], bool]) -> int:
        """Adds tokens to the answer, up to its end; returns how many."""
        for used, token in enumerate(tokens, 1):
            belongs = self._drawn(int(token))
            if belongs and not each(token):
                self.finished = True
            if self.finished:
                return used
        return len(tokens)

    def _drawn(self, token_id: int) -> bool:
        """Takes note of a token; False for a stop id, which is not part of the answer."""
        timings, now = self.timings, time.perf_counter()
        if timings.completion_tokens:
            timings.decode_s = now - self._drawn_at
        else:
            timings.prefill_s, self._drawn_at = now - self._started_at, now
        if self._constraint is not None:
            self._constraint.push(token_id)
        if self._drafting is not None:
            self._drafting.push(token_id)
        if token_id in self._stop_ids:
            self.finished = True
            return False
        timings.completion_tokens += 1
        if timings.completion_tokens == self.limit:
            self.finished = timings.at_limit = True
        return True
