"""How a response is sent: all at once, or piece by piece as a stream.

`respond` is for every route. Chat and completions share `Choices`, which runs their tasks, counts the usage and sends
OpenAI's envelope; what stands in a choice is the route's own, its `Shape`.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from g3n_mlx.engine.at_least import AtLeast
from g3n_mlx.engine.results import Chunk
from g3n_mlx.engine.sequence import Constraint
from g3n_mlx.model import Gemma3n
from g3n_mlx.sampling import SamplingParams
from g3n_mlx.server.engine import Place, unless_gone
from g3n_mlx.server.errors import ApiError
from g3n_mlx.server.scheduler import Task
from g3n_mlx.server.schemas.base import now
from g3n_mlx.server.schemas.chat import ChatChoice
from g3n_mlx.server.schemas.completions import CompletionChoice
from g3n_mlx.server.schemas.generation import (
    Completion,
    CompletionTokensDetails,
    GenerationRequest,
    PromptTokensDetails,
    RequestUsage,
)

EVENT_STREAM = "text/event-stream"
DONE = "data: [DONE]\n\n"  # ends OpenAI's older streams

P = TypeVar("P")
C = TypeVar("C", ChatChoice, CompletionChoice)


class Exchange(Protocol[P]):
    """One request and what is sent for it."""

    @property
    def place(self) -> Place:
        """Where it runs."""
        ...

    stream_type: ClassVar[str]  # the media type of a stream

    def pieces(self) -> AsyncIterator[P]:
        """The response as it comes, at least one piece; the first decides the status."""
        ...

    async def whole(self, pieces: AsyncIterator[P]) -> Response:
        """What the pieces add up to."""
        ...

    def events(self, pieces: AsyncIterator[P]) -> AsyncIterator[str]:
        """The pieces as they stand in the stream."""
        ...

    def failed(self, error: ApiError) -> str:
        """What ends a stream that can't go on."""
        ...


async def respond(request: Request, exchange: Exchange[P], *, stream: bool) -> Response:
    """The response, whole or as a stream; an ApiError after a stream's first piece becomes its last event."""
    pieces = exchange.pieces()
    if not stream:
        response = await unless_gone(request, exchange.whole(pieces))
    else:
        first = await unless_gone(request, anext(pieces))
        response = StreamingResponse(_sent(exchange, _chained(first, pieces)), media_type=exchange.stream_type)
    # Known by now: the first piece has been computed.
    response.headers.update(request.app.state.models.headers(exchange.place.served))
    return response


async def _sent(exchange: Exchange[P], pieces: AsyncIterator[P]) -> AsyncIterator[str]:
    try:
        async for event in exchange.events(pieces):
            yield event
    except ApiError as error:  # the status is sent already
        yield exchange.failed(error)


def event(data: str, name: str | None = None) -> str:
    """A server-sent event."""
    return f"data: {data}\n\n" if name is None else f"event: {name}\ndata: {data}\n\n"


async def _chained(first: P, rest: AsyncIterator[P]) -> AsyncIterator[P]:
    yield first
    async for piece in rest:
        yield piece


class Shape(Protocol[C]):
    """How a route's choices look."""

    kind: str  # of a whole completion, as its `object` names it
    chunk_kind: str
    id_prefix: str

    def pieces(self, steps: AsyncIterator[tuple[int, Any]]) -> AsyncIterator[C]:
        """What the model's steps, each with its choice's index, add to the choices."""
        ...

    def empty(self, index: int) -> C:
        """A whole choice before its first piece."""
        ...

    def add(self, choice: C, piece: C) -> None:
        """Adds a piece to a whole choice."""
        ...


class Choices(Generic[C]):
    """The exchange of chat and completions: tasks, their choices, their usage."""

    stream_type: ClassVar[str] = EVENT_STREAM

    def __init__(self, body: GenerationRequest, place: Place, tasks: Sequence[Task], shape: Shape[C]) -> None:
        """tasks: `n` for each prompt."""
        self.place = place
        self._body, self._tasks, self._shape = body, tasks, shape
        self._id, self._created = f"{shape.id_prefix}-{uuid.uuid4().hex}", now()
        self.usage = RequestUsage(
            prompt_tokens=sum(len(task.prompt.token_ids) for task in tasks[:: body.num_choices]),
            completion_tokens=0,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=0),
            completion_tokens_details=CompletionTokensDetails(
                accepted_prediction_tokens=0, rejected_prediction_tokens=0
            ),
            avg_prompt_tok_per_sec=0.0,
            avg_compl_tok_per_sec=0.0,
            time_to_first_token_s=None,
        )

    def pieces(self) -> AsyncIterator[C]:
        """The choices as they come."""
        return self._shape.pieces(self._steps())

    async def whole(self, pieces: AsyncIterator[C]) -> Response:
        """All choices, complete."""
        completion = self._completion(self._shape.kind, await self.complete(pieces), self.usage)
        return Response(completion, media_type="application/json")

    async def complete(self, pieces: AsyncIterator[C]) -> list[C]:
        """The choices that the pieces add up to."""
        choices = [self._shape.empty(index) for index in range(len(self._tasks))]
        async for piece in pieces:
            self._shape.add(choices[piece.index], piece)
        return choices

    async def events(self, pieces: AsyncIterator[C]) -> AsyncIterator[str]:
        """A chunk for each piece, and one with the usage where it is asked for."""
        async for piece in pieces:
            yield event(self._completion(self._shape.chunk_kind, [piece]))
        if self._body.wants_usage:
            yield event(self._completion(self._shape.chunk_kind, [], self.usage))
        yield DONE

    def failed(self, error: ApiError) -> str:
        """OpenAI's error as an event."""
        return event(json.dumps(error.body()))

    def _completion(self, kind: str, choices: list[C], usage: RequestUsage | None = None) -> str:
        completion = Completion[Any](
            id=self._id,
            object=kind,
            created=self._created,
            model=self.place.served.model_id,
            choices=choices,
            usage=usage,
        )
        return completion.model_dump_json(exclude_unset=True)

    async def _steps(self) -> AsyncIterator[tuple[int, Any]]:
        async for index, step in self.place.run(self._tasks):
            if isinstance(step, Chunk):
                self._count(index, step)
            yield index, step

    def _count(self, index: int, chunk: Chunk) -> None:
        usage = self.usage
        if chunk.token is not None and usage.time_to_first_token_s is None:
            usage.time_to_first_token_s = time.monotonic() - self.place.arrived
        if chunk.usage is None:
            return
        usage.completion_tokens += chunk.usage.completion_tokens
        details, accepted = usage.completion_tokens_details, chunk.usage.accepted_tokens
        details.accepted_prediction_tokens += accepted
        details.rejected_prediction_tokens += chunk.usage.drafted_tokens - accepted
        if index % self._body.num_choices == 0:  # a prompt counts once, however many choices it has
            usage.prompt_tokens_details.cached_tokens += chunk.usage.cached_tokens
        if index == 0:
            usage.avg_prompt_tok_per_sec = chunk.usage.avg_prompt_tok_per_sec
            usage.avg_compl_tok_per_sec = chunk.usage.avg_compl_tok_per_sec


def sampling_params(model: Gemma3n, **options: Any) -> SamplingParams:
    """The options over the checkpoint's own; raises ApiError 400 naming the one that is out of range."""
    try:
        return model.sampling_params(**options)
    except ValueError as error:
        raise ApiError(400, str(error), param=str(error).partition(" ")[0]) from None


def at_least(
    body: GenerationRequest, params: SamplingParams, constraint: Constraint | None, place: Place
) -> Constraint | None:
    """The constraint of an answer that has its `min_tokens` before it may end by itself."""
    if not body.min_tokens:
        return constraint
    model = place.engine.model
    ends = {*model.eos_token_ids, *params.stop_token_ids}
    return AtLeast(body.min_tokens, ends, model.config.text.vocab_size, constraint)


def token_text(model: Gemma3n, token_id: int) -> str:
    """One token as text, control tokens by name; a byte that is not a character becomes U+FFFD."""
    return model.tokenizer.decode([token_id], skip_special=False)
