"""POST /v1/completions: text or ids in, text out, with the log probabilities that evaluation tools ask for.

With `echo` and `logprobs` the prompt's own tokens are scored; `max_tokens` 0 then asks for nothing else. A text gets
`<bos>` in front, ids are taken as they are.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from g3n_mlx.engine.results import Chunk
from g3n_mlx.engine.scores import TokenScore
from g3n_mlx.prompt.prompt import Prompt
from g3n_mlx.server.engine import TOO_LONG, Place, PlaceOf, unless_gone
from g3n_mlx.server.errors import ApiError
from g3n_mlx.server.scheduler import Answer
from g3n_mlx.server.schemas import (
    MAX_PROMPTS,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    UsageAnswer,
    new_id,
    now,
)
from g3n_mlx.server.stream import (
    END_OF_STREAM,
    SSE,
    UsageCount,
    event,
    first_of,
    sampling_params,
    token_text,
    with_errors,
)

router = APIRouter()


@router.post("/v1/completions", response_model=Completion, response_model_exclude_unset=True)
async def create_completion(body: CompletionRequest, request: Request, place: PlaceOf) -> Completion | Response:
    """Answers to prompts, `n` for each; in a stream, as server-sent events."""
    body.report_unknown()
    served = request.app.state.models.find(body.model)
    _check(body)
    prompts = await unless_gone(request, _prompts(body, place))
    work = _Work(body, place, served, prompts)
    if not body.stream:
        return await unless_gone(request, work.whole())
    pieces = work.pieces()
    first = await unless_gone(request, first_of(pieces))
    return StreamingResponse(with_errors(work.events(first, pieces)), media_type=SSE)


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise ApiError(400, "suffix is not supported: Gemma 3n does not fill in the middle", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, f"best_of is {body.best_of}, expected n, {body.n or 1}, or nothing", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0, which needs echo: there is nothing else to answer", param="max_tokens")
    batch = body.prompt if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int) else [body.prompt]
    if len(batch) * (body.n or 1) > MAX_PROMPTS:
        raise ApiError(400, f"more than {MAX_PROMPTS} answers in one request", param="prompt")


async def _prompts(body: CompletionRequest, place: Place) -> list[Prompt]:
    given: Any = body.prompt
    batch = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    return [await _prompt(text_or_ids, place) for text_or_ids in batch]


async def _prompt(text_or_ids: str | list[int], place: Place) -> Prompt:
    model = place.engine.model
    if isinstance(text_or_ids, str):
        ids = [model.tokenizer.bos_id, *await place.encoded(text_or_ids)]
    else:
        ids = text_or_ids
    vocab_size, context_tokens = model.config.text.vocab_size, model.config.text.max_position_embeddings
    wrong = [token_id for token_id in ids if token_id >= vocab_size]
    if wrong:
        raise ApiError(400, f"{wrong[0]} is no token id, expected 0 to {vocab_size - 1}", param="prompt")
    if len(ids) > context_tokens:
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens, the context {context_tokens}: shorten it",
            param="prompt",
            code=TOO_LONG,
        )
    return Prompt(tuple(ids), (len(ids),))


class _Work:
    """What one request runs, and its answers piece by piece."""

    def __init__(self, body: CompletionRequest, place: Place, served: str, prompts: Sequence[Prompt]) -> None:
        self._body, self._place, self._served = body, place, served
        self._id, self._created = new_id("cmpl"), now()
        self._model = place.engine.model
        choices = body.n or 1
        # Evaluation tools ask for one token behind the scores and cut off its entry (lm_eval's local-completions): it
        # has to be there also when it is the end of the text.
        self._scores_alone = bool(body.echo) and body.logprobs is not None and body.max_tokens == 1
        self._usage = UsageCount(place, sum(len(prompt.token_ids) for prompt in prompts), choices)
        self._tasks = [self._task(prompt, choice) for prompt in prompts for choice in range(choices)]

    def _task(self, prompt: Prompt, choice: int) -> Answer:
        body, top = self._body, self._body.logprobs
        scored = top if body.echo else None
        if body.max_tokens == 0:
            return Answer(prompt, None, scored=scored)
        params = sampling_params(
            self._model,
            **body.sampling(choice),
            max_tokens=body.max_tokens,
            logprobs=top is not None,
            top_logprobs=top,
            ignore_eos=self._scores_alone,
        )
        return Answer(prompt, params, scored=scored)

    async def pieces(self) -> AsyncIterator[CompletionChoice]:
        """The answers as they come, the echo of the prompts first."""
        offsets = [0] * len(self._tasks)  # of the next token's text, in characters
        ended: set[int] = set()  # answers whose only token is an end
        for index, task in enumerate(self._tasks):
            if self._body.echo:
                text = self._model.tokenizer.decode(task.prompt.token_ids)
                yield CompletionChoice(index=index, text=text, logprobs=None, finish_reason=None)
        async for index, step in self._place.run(self._tasks):
            chunks: list[TokenScore | Chunk] = step if isinstance(step, list) else [step]
            logprobs = None
            if self._body.logprobs is not None:
                logprobs, offsets[index] = self._logprobs(chunks, offsets[index])
            if isinstance(step, Chunk):
                self._usage.take(index, step)
                text, reason = step.text, step.finish_reason
                if step.token in self._model.eos_token_ids:
                    ended.add(index)
                if reason is not None and index in ended:
                    reason = "stop"
            else:
                text, reason = "", None
            yield CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)
        if self._body.max_tokens == 0:
            for index in range(len(self._tasks)):
                yield CompletionChoice(index=index, text="", logprobs=None, finish_reason="length")

    def _logprobs(self, steps: Sequence[TokenScore | Chunk], offset: int) -> tuple[CompletionLogprobs, int]:
        """The log probabilities of some tokens whose text begins at an offset, and where it ends."""
        found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for step in steps:
            if step.token is None:
                continue
            token = token_text(self._model, step.token)
            found.tokens.append(token)
            found.token_logprobs.append(step.logprob)
            found.text_offset.append(offset)
            offset += len(self._model.tokenizer.decode([step.token]))
            likeliest: dict[str, float] = {}
            for token_id, logprob in step.top_logprobs or ():
                likeliest.setdefault(token_text(self._model, token_id), logprob)  # several ids may look alike
            if step.logprob is not None:
                likeliest.setdefault(token, step.logprob)
            found.top_logprobs.append(None if step.logprob is None else likeliest)
        return found, offset

    async def whole(self) -> Completion:
        """All answers, complete."""
        choices = [
            CompletionChoice(index=index, text="", logprobs=None, finish_reason=None)
            for index in range(len(self._tasks))
        ]
        async for piece in self.pieces():
            choice = choices[piece.index]
            choice.text += piece.text
            choice.finish_reason = piece.finish_reason or choice.finish_reason
            if piece.logprobs is not None:
                if choice.logprobs is None:
                    choice.logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
                extend(choice.logprobs, piece.logprobs)
        return self._completion(choices, self._usage.answer())

    async def events(self, first: CompletionChoice, rest: AsyncIterator[CompletionChoice]) -> AsyncIterator[str]:
        """The pieces as server-sent events."""
        yield event(self._completion([first]))
        async for piece in rest:
            if piece.text or piece.finish_reason or (piece.logprobs and piece.logprobs.tokens):
                yield event(self._completion([piece]))
        if self._body.wants_usage:
            yield event(self._completion([], self._usage.answer()))
        yield END_OF_STREAM

    def _completion(self, choices: list[CompletionChoice], usage: UsageAnswer | None = None) -> Completion:
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._served,
            choices=choices,
            usage=usage,
        )


def extend(logprobs: CompletionLogprobs, more: CompletionLogprobs) -> None:
    """Puts the lists of the second behind those of the first."""
    logprobs.tokens += more.tokens
    logprobs.token_logprobs += more.token_logprobs
    logprobs.top_logprobs += more.top_logprobs
    logprobs.text_offset += more.text_offset
