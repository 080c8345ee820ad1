"""One answer as a state machine over token ids: prefill, decode, stop.

A sequence says which rows it wants to append next, and is told the steps that came of them; who carries that out, for
one sequence or for many in one call, is runner.py's business. It knows no text, and of the model only the seam.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from g3n_mlx.batch import Draw, Rows, Soft, SoftTokens, Step
from g3n_mlx.config.text import TextConfig
from g3n_mlx.engine.cache import Cache
from g3n_mlx.engine.conversation import Conversation
from g3n_mlx.interface import Model
from g3n_mlx.prompt.prompt import Features, MediaSpan, Prompt, PromptTooLong
from g3n_mlx.sampling import SamplingParams

Embed = Callable[[Features], SoftTokens]


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
    for span in media:
        first, last = max(start, span.start), min(stop, span.start + span.length)
        if first < last:
            rows = embed(span.features)
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
    ) -> None:
        """embed: media to soft tokens; called only for what the cache does not hold.

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
        self._identity = prompt.identity
        self._parts: Iterator[tuple[int, int]] | None = None  # of the prompt; None before the first wish
        self._part = (0, 0)
        self._step: Step | None = None  # drawn last
        self._drawn_at = 0.0

    @property
    def decoding(self) -> bool:
        """Whether the next wish is one token; else it is a part of the prompt."""
        return self._step is not None

    def wish(self) -> Rows:
        """The rows to append next."""
        cache = self.conversation.cache
        if self._step is not None:
            return Rows(cache, self._step, draw=self._draw())
        if self._parts is None:
            self._begin()
            cache = self.conversation.cache
        assert self._parts is not None
        a, b = self._part = next(self._parts)
        ids = np.asarray(self._prompt.token_ids[a:b], dtype=np.int64)
        soft = soft_tokens(self._prompt.media, a, b, self._embed)
        return Rows(cache, ids, soft, self._draw() if b == self.timings.prompt_tokens else None)

    def told(self, steps: Sequence[Step]) -> Step | None:
        """Takes note of what a wish drew; returns the step if its token belongs to the answer.

        Not one: after a part of the prompt, and when the token is a stop id, which ends the sequence.
        """
        if self._step is None:
            a, b = self._part
            self.conversation.append(self._identity[a:b])
            if b in self._prompt.borders or b == self.timings.prompt_tokens:
                self.conversation.mark()
            if not steps:
                return None
        else:
            self.conversation.append([int(self._step)])
        (self._step,) = steps
        return self._drawn(self._step)

    def _begin(self) -> None:
        self._started_at = time.perf_counter()
        self._sampler = self._model.make_sampler(self._params, self._prompt.token_ids)
        start = self.conversation.resume(self._identity)
        self.timings.cached_tokens = start
        if start == 0:
            self.conversation.begin(Cache(self._config, self._model.kv_arrays))
        prompt = self._prompt
        self._parts = prefill_spans(start, len(prompt.token_ids), prompt.borders, self._params.prefill_step_size)

    def _draw(self) -> Draw:
        mask = None if self._constraint is None else self._constraint.mask()
        return Draw(self._sampler, self.timings.completion_tokens, [mask])

    def _drawn(self, step: Step) -> Step | None:
        token_id, timings = int(step), self.timings
        now = time.perf_counter()
        if timings.completion_tokens:
            timings.decode_s = now - self._drawn_at
        else:
            timings.prefill_s, self._drawn_at = now - self._started_at, now
        if self._constraint is not None:
            self._constraint.push(token_id)
        if token_id in self._stop_ids:
            self.finished = True
            return None
        timings.completion_tokens += 1
        if timings.completion_tokens == self.limit:
            self.finished = timings.at_limit = True
        return step
