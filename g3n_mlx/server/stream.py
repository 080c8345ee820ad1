"""What the chat and the completions routes share: server-sent events, usage, sampling options, tokens as text."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from pydantic import BaseModel

from g3n_mlx.engine.results import Chunk
from g3n_mlx.model import Gemma3n
from g3n_mlx.sampling import SamplingParams
from g3n_mlx.server.engine import Place
from g3n_mlx.server.errors import ApiError
from g3n_mlx.server.schemas import PromptTokensDetails, UsageAnswer

T = TypeVar("T")
SSE = "text/event-stream"
END_OF_STREAM = "data: [DONE]\n\n"


def event(data: BaseModel) -> str:
    """A server-sent event."""
    return f"data: {data.model_dump_json(exclude_unset=True)}\n\n"


async def first_of(pieces: AsyncIterator[T]) -> T:
    """The first piece of an answer, which decides on the status: there always is one."""
    return await anext(pieces)


async def with_errors(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events; an error after the first of them, when the status is sent already, becomes the last one."""
    try:
        async for one in events:
            yield one
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"


def sampling_params(model: Gemma3n, **options: Any) -> SamplingParams:
    """The options over the checkpoint's own; raises ApiError 400 naming the one that is out of range."""
    try:
        return model.sampling_params(**options)
    except ValueError as error:
        raise ApiError(400, str(error), param=str(error).partition(" ")[0]) from None


def token_text(model: Gemma3n, token_id: int) -> str:
    """One token as text, control tokens by name; a byte that is no character is a replacement character."""
    return model.tokenizer.decode([token_id], skip_special=False)


class UsageCount:
    """Counts the tokens of all choices of a request."""

    def __init__(self, place: Place, prompt_tokens: int, choices_per_prompt: int) -> None:
        self._place = place
        self._prompt_tokens = prompt_tokens
        self._choices_per_prompt = choices_per_prompt
        self._completion_tokens = self._cached_tokens = 0
        self._speeds = (0.0, 0.0)
        self._first_token_s: float | None = None

    def take(self, index: int, chunk: Chunk) -> None:
        """Counts a chunk of the choice of an index. A prompt counts once, however many choices it has."""
        if chunk.token is not None and self._first_token_s is None:
            self._first_token_s = time.monotonic() - self._place.arrived
        usage = chunk.usage
        if usage is None:
            return
        self._completion_tokens += usage.completion_tokens
        if index % self._choices_per_prompt == 0:
            self._cached_tokens += usage.cached_tokens
        if index == 0:
            self._speeds = (usage.avg_prompt_tok_per_sec, usage.avg_compl_tok_per_sec)

    def answer(self) -> UsageAnswer:
        """The usage on the wire."""
        return UsageAnswer(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=self._prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached_tokens),
            avg_prompt_tok_per_sec=self._speeds[0],
            avg_compl_tok_per_sec=self._speeds[1],
            time_to_first_token_s=self._first_token_s,
        )
