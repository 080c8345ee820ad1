"""Prefill, decode, stop: the loop over token ids. It knows no text, and of the model only the seam.

A token is read, handed out, and only then is the next step asked for; a backend whose device works beside the host
has enqueued that step's beginning by then (interface.py).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from g3n_mlx.engine.conversation import Conversation
from g3n_mlx.interface import Model, Soft, SoftTokens, Step
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
    counts = {"picture": kinds.count("image"), "sound clip": kinds.count("audio")}
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


def chunks(start: int, length: int, borders: Sequence[int], step_size: int) -> Iterator[tuple[int, int]]:
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


def generate_tokens(
    model: Model,
    conversation: Conversation,
    prompt: Prompt,
    params: SamplingParams,
    stop_ids: frozenset[int],
    context_tokens: int,
    timings: Timings,
    embed: Embed,
    constraint: Constraint | None = None,
) -> Iterator[Step | None]:
    """Yields the drawn steps up to a stop id (not yielded), `max_tokens` or the end of the context.

    Before them, None for every part of the prompt that was read without a draw: a place to break off or to let others
    run. embed: media to soft tokens; called only for what the cache does not hold.
    Raises PromptTooLong before anything runs. The conversation's cache goes on from what it shares with the prompt.
    """
    length = len(prompt.token_ids)
    check_length(prompt, 1, context_tokens)
    room = context_tokens - length
    limit = room if params.max_tokens is None else min(room, params.max_tokens)
    started = time.perf_counter()
    sampler = model.make_sampler(params, prompt.token_ids)
    identity = prompt.identity
    start = conversation.resume(identity)
    timings.prompt_tokens, timings.cached_tokens = length, start
    if start == 0:
        conversation.begin(model.make_cache())
    step = None
    for a, b in chunks(start, length, prompt.borders, params.prefill_step_size):
        ids = np.asarray(prompt.token_ids[a:b], dtype=np.int64)
        soft = soft_tokens(prompt.media, a, b, embed)
        if b < length:
            model.prefill(ids, conversation.cache, None, soft)
        else:
            step = model.prefill(ids, conversation.cache, sampler, soft, _mask(constraint))
        conversation.append(identity[a:b])
        if b in prompt.borders or b == length:
            conversation.mark()
        if b < length:
            yield None
    assert step is not None
    token_id = int(step)
    first = time.perf_counter()
    timings.prefill_s = first - started
    for count in range(1, limit + 1):
        if constraint is not None:
            constraint.push(token_id)
        if token_id in stop_ids:
            return
        timings.completion_tokens = count
        yield step
        if count == limit:
            timings.at_limit = True
            return
        step = model.decode(step, conversation.cache, sampler, _mask(constraint))
        conversation.append([token_id])
        token_id = int(step)
        timings.decode_s = time.perf_counter() - first


def _mask(constraint: Constraint | None) -> np.ndarray | None:
    return None if constraint is None else constraint.mask()
