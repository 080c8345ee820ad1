"""POST /v1/completions: text or ids in, text out, with the log probabilities that evaluation tools ask for.

With `echo` and `logprobs` the prompt's own tokens are scored; `max_tokens` 0 then asks for nothing else. A text gets
`<bos>` in front, ids are taken as they are.
"""

from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from g3n_mlx.engine.results import Chunk
from g3n_mlx.engine.scores import TokenScore
from g3n_mlx.model import Gemma3n
from g3n_mlx.prompt.prompt import Prompt
from g3n_mlx.server.engine import TOO_LONG, Place, PlaceOf, unless_gone
from g3n_mlx.server.errors import ApiError
from g3n_mlx.server.exchange import Choices, at_least, respond, sampling_params, token_text
from g3n_mlx.server.scheduler import Task
from g3n_mlx.server.schemas.completions import MAX_PROMPTS, CompletionChoice, CompletionLogprobs, CompletionRequest
from g3n_mlx.server.schemas.generation import Completion

router = APIRouter()


@router.post("/v1/completions", response_model=Completion[CompletionChoice])
async def create_completion(body: CompletionRequest, request: Request, place: PlaceOf) -> Response:
    """What follows each prompt, `n` times; in a stream, as server-sent events."""
    place.served = request.app.state.models.find(body.model)
    if body.echo:  # its scores are to be the named model's, and the echo is sent before anything runs
        place.served.is_open = False
    _check(body)
    tasks = await unless_gone(request, _tasks(body, place))
    shape = _CompletionShape(place.engine.model, body, tasks)
    return await respond(request, Choices(body, place, tasks, shape), stream=bool(body.stream))


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise ApiError(400, "suffix is not supported: Gemma 3n does not fill in the middle", param="suffix")
    if body.best_of is not None and body.best_of != body.num_choices:
        raise ApiError(400, f"best_of is {body.best_of}, expected n, {body.num_choices}, or nothing", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0, which needs echo: there is nothing else to return", param="max_tokens")
    if len(body.prompts) * body.num_choices > MAX_PROMPTS:
        raise ApiError(400, f"more than {MAX_PROMPTS} choices in one request", param="prompt")


async def _tasks(body: CompletionRequest, place: Place) -> list[Task]:
    model, scored = place.engine.model, body.logprobs if body.echo else None
    tasks: list[Task] = []
    for text_or_ids in body.prompts:
        prompt = await _prompt(text_or_ids, place)
        for choice in range(body.num_choices):
            params = None
            if body.max_tokens != 0:
                params = sampling_params(
                    model,
                    **body.sampling(choice),
                    max_tokens=body.max_tokens,
                    logprobs=body.logprobs is not None,
                    top_logprobs=body.logprobs,
                    # Evaluation tools ask for one token behind the scores and cut off its entry (lm_eval's
                    # local-completions): it has to be there also when it is the end of the text.
                    ignore_eos=bool(body.ignore_eos) or (scored is not None and body.max_tokens == 1),
                )
            constraint = None if params is None else at_least(body, params, None, place)
            tasks.append(Task(prompt, params, constraint, scored=scored, draft=body.draft is not False))
    return tasks


async def _prompt(text_or_ids: str | list[int], place: Place) -> Prompt:
    model = place.engine.model
    if isinstance(text_or_ids, str):
        ids = [model.tokenizer.bos_id, *await place.encoded(text_or_ids)]
    else:
        ids = text_or_ids
    context_tokens = model.config.text.max_position_embeddings
    place.check_ids(ids, "prompt")
    if len(ids) > context_tokens:
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens, the context {context_tokens}: shorten it",
            param="prompt",
            code=TOO_LONG,
        )
    return Prompt(tuple(ids), (len(ids),))


class _CompletionShape:
    """The choices of completions: the echo of the prompt, its scores, then text."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, model: Gemma3n, body: CompletionRequest, tasks: Sequence[Task]) -> None:
        self._model, self._body, self._tasks = model, body, tasks

    async def pieces(
        self, steps: AsyncIterator[tuple[int, Chunk | list[TokenScore]]]
    ) -> AsyncIterator[CompletionChoice]:
        """The echo of all prompts first."""
        offsets = [0] * len(self._tasks)  # of the next token's text, in characters
        ended: set[int] = set()  # choices whose only token is an end
        for index, task in enumerate(self._tasks):
            if self._body.echo:
                yield _piece(index, self._model.tokenizer.decode(task.prompt.token_ids))
        async for index, step in steps:
            logprobs = None
            if self._body.logprobs is not None:
                scores = step if isinstance(step, list) else [step]
                logprobs, offsets[index] = self._logprobs(scores, offsets[index])
            if isinstance(step, list):
                yield _piece(index, "", logprobs)
                continue
            if step.token in self._model.eos_token_ids:
                ended.add(index)
            reason = "stop" if step.finish_reason is not None and index in ended else step.finish_reason
            if step.text or reason or (logprobs and logprobs.tokens):
                yield _piece(index, step.text, logprobs, reason)
        if self._body.max_tokens == 0:
            for index in range(len(self._tasks)):
                yield _piece(index, "", reason="length")

    def empty(self, index: int) -> CompletionChoice:
        """A whole choice before its first piece."""
        return _piece(index, "")

    def add(self, choice: CompletionChoice, piece: CompletionChoice) -> None:
        """Adds a piece to a whole choice."""
        choice.text += piece.text
        choice.finish_reason = piece.finish_reason or choice.finish_reason
        if piece.logprobs is None:
            return
        choice.logprobs = choice.logprobs or _no_logprobs()
        for name in CompletionLogprobs.model_fields:
            getattr(choice.logprobs, name).extend(getattr(piece.logprobs, name))

    def _logprobs(self, scores: Sequence[TokenScore | Chunk], offset: int) -> tuple[CompletionLogprobs, int]:
        """The log probabilities of some tokens whose text begins at an offset, and where it ends."""
        found = _no_logprobs()
        for score in scores:
            if score.token is None:
                continue
            token = token_text(self._model, score.token)
            found.tokens.append(token)
            found.token_logprobs.append(score.logprob)
            found.text_offset.append(offset)
            offset += len(self._model.tokenizer.decode([score.token]))
            most_likely: dict[str, float] = {}
            for token_id, logprob in score.top_logprobs or ():
                most_likely.setdefault(token_text(self._model, token_id), logprob)  # several ids may look alike
            if score.logprob is not None:
                most_likely.setdefault(token, score.logprob)
            found.top_logprobs.append(None if score.logprob is None else most_likely)
        return found, offset


def _piece(
    index: int, text: str, logprobs: CompletionLogprobs | None = None, reason: str | None = None
) -> CompletionChoice:
    return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)


def _no_logprobs() -> CompletionLogprobs:
    return CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
