"""POST /v1/chat/completions: messages in, a response out, whole or as server-sent events, free or under a grammar."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError

from g3n_mlx.engine.results import Chunk
from g3n_mlx.engine.schemas import closed
from g3n_mlx.engine.sequence import Constraint
from g3n_mlx.model import Gemma3n
from g3n_mlx.prompt.prompt import Prompt
from g3n_mlx.server.documents import opened_turns
from g3n_mlx.server.engine import Place, PlaceOf, unless_gone
from g3n_mlx.server.errors import ApiError, told_by
from g3n_mlx.server.exchange import Choices, at_least, respond, sampling_params, token_text
from g3n_mlx.server.scheduler import Task
from g3n_mlx.server.schemas.chat import ChatChoice, ChatRequest, Logprobs, TokenLogprob, TopLogprob
from g3n_mlx.server.schemas.generation import Completion
from g3n_mlx.server.tools.offer import Tools
from g3n_mlx.server.tools.parser import CallParser

router = APIRouter()


@router.post("/v1/chat/completions", response_model=Completion[ChatChoice])
async def create_chat_completion(body: ChatRequest, request: Request, place: PlaceOf) -> Response:
    """A response to messages, `n` of them; in a stream, as server-sent events."""
    return await respond(request, await chat_choices(body, request, place), stream=bool(body.stream))


def chat_request(fields: Mapping[str, Any], names: Mapping[str, str]) -> ChatRequest:
    """What a request of another protocol asks for, None for what it leaves open.

    names: the caller's fields by the chat's, "" for a step of the path that the caller's fields don't have. Raises
    RequestValidationError, as for a request that came so, about the caller's fields.
    """
    try:
        return ChatRequest.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": _told(one["loc"], names)} for one in error.errors()]) from None


def _told(path: Sequence[int | str], names: Mapping[str, str]) -> tuple[int | str, ...]:
    """Where a chat's field is in the caller's body."""
    found: list[int | str] = ["body"]
    for step in path:
        found += [step] if isinstance(step, int) else [part for part in names.get(step, step).split(".") if part]
        if step == "messages":  # the places of the caller's differ
            break
    return tuple(found)


async def translated_choices(
    fields: Mapping[str, Any], names: Mapping[str, str], request: Request, place: Place
) -> Choices[ChatChoice]:
    """The choices of the chat that a request of another protocol asks for; for names see `chat_request`."""
    with told_by(names):
        return await chat_choices(chat_request(fields, names), request, place)


async def chat_choices(body: ChatRequest, request: Request, place: Place) -> Choices[ChatChoice]:
    """The choices of a chat. Raises ApiError."""
    place.served = request.app.state.models.find(body.model)
    _check_formats(body)
    offered = Tools.from_request(body)
    tasks = await unless_gone(request, _tasks(body, offered, place))
    is_json = _schema(body) is not None
    parsers = [offered and offered.parser(content_is_json=is_json) for _ in tasks]
    shape = _ChatShape(place.engine.model, parsers, logprobs=bool(body.logprobs))
    return Choices(body, place, tasks, shape)


async def translated_prompt(fields: Mapping[str, Any], names: Mapping[str, str], place: Place) -> Prompt:
    """The prompt of such a chat, which need not leave room for an answer. Raises ApiError."""
    with told_by(names):
        body = chat_request(fields, names)
        return await _prompt(body, Tools.from_request(body), place, answered=False)


async def _prompt(body: ChatRequest, offered: Tools | None, place: Place, *, answered: bool = True) -> Prompt:
    turns = await opened_turns(body.messages, offered and offered.system_text(), place)
    return await place.prepared(turns, answered=answered, continued=bool(body.continue_final_message))


async def _tasks(body: ChatRequest, offered: Tools | None, place: Place) -> list[Task]:
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs is given without logprobs: true", param="top_logprobs")
    params = [
        sampling_params(
            place.engine.model,
            **body.sampling(choice),
            max_tokens=body.max_completion_tokens or body.max_tokens,
            ignore_eos=bool(body.ignore_eos),
            logprobs=body.logprobs,
            top_logprobs=body.top_logprobs,
        )
        for choice in range(body.num_choices)
    ]
    prompt = await _prompt(body, offered, place)
    may_draft = body.draft is not False
    return [
        Task(prompt, each, at_least(body, each, await _constraint(body, offered, place), place), draft=may_draft)
        for each in params
    ]


def _check_formats(body: ChatRequest) -> None:
    """Refuses what can't be enforced at the same time."""
    wanted = body.response_format
    if wanted is not None and wanted.type == "json_schema" and wanted.json_schema is None and wanted.schema_ is None:
        raise ApiError(400, "response_format is json_schema, but has no json_schema", param="response_format")
    others = {
        "response_format": wanted is not None and wanted.type != "text",
        "tools": bool(body.tools) and body.tool_choice != "none",
    }
    for name, is_given in others.items():
        if is_given and body.grammar is not None:
            raise ApiError(400, f"{name} and grammar can't be combined: leave one out", param=name)


async def _constraint(body: ChatRequest, offered: Tools | None, place: Place) -> Constraint | None:
    """What one response must look like, None for anything; raises ApiError 400 when that can't be enforced."""
    grammar = body.grammar
    place.constrained_by = "tools" if offered is not None else "grammar" if grammar is not None else "response_format"
    schema = _schema(body)
    if schema is not None:  # beside tools too, so that the error names the right field
        alone = await place.constraint(lambda grammars: grammars.json_schema(schema), "response_format")
        if offered is None:
            return alone
    if offered is not None:
        return await place.constraint(lambda grammars: offered.constraint(grammars, schema), "tools")
    if grammar is not None and grammar.type == "regex":
        return await place.constraint(lambda grammars: grammars.regex(grammar.value), "grammar")
    if grammar is not None:
        return await place.constraint(lambda grammars: grammars.lark(grammar.value), "grammar")
    return None


def _schema(body: ChatRequest) -> dict[str, Any] | bool | None:
    """The schema of a response without calls; None for any text."""
    return None if body.response_format is None else closed(body.response_format.wanted)


class Translated:
    """The exchange of a chat in another protocol: it runs as the chat, a subclass says how it is sent."""

    def __init__(self, choices: Choices[ChatChoice], names: Mapping[str, str]) -> None:
        """choices: of one answer. names: as in `chat_request`."""
        self._choices, self._names = choices, names

    @property
    def place(self) -> Place:
        """Where the chat runs."""
        return self._choices.place

    async def pieces(self) -> AsyncIterator[ChatChoice]:
        """The chat's only choice as it comes."""
        with told_by(self._names):
            async for piece in self._choices.pieces():
                yield piece


class _ChatShape:
    """A chat's choices: the role, then text and calls, at last the reason why they end."""

    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: Gemma3n, parsers: Sequence[CallParser | None], *, logprobs: bool) -> None:
        """parsers: one per choice, None where no tools are offered."""
        self._model, self._parsers, self._wants_logprobs = model, parsers, logprobs

    async def pieces(self, steps: AsyncIterator[tuple[int, Chunk]]) -> AsyncIterator[ChatChoice]:
        """Deltas; log probabilities stand beside the first one of their token."""
        begun: set[int] = set()
        async for index, chunk in steps:
            if index not in begun:
                begun.add(index)
                yield _piece(index, {"role": "assistant", "content": ""})
            logprobs = self._logprobs(chunk) if self._wants_logprobs and chunk.token is not None else None
            deltas = self._deltas(index, chunk)
            if not deltas and logprobs is not None:
                deltas = [{"content": ""}]
            for delta in deltas:
                yield _piece(index, delta, logprobs)
                logprobs = None
            if chunk.finish_reason is not None:
                parser = self._parsers[index]
                called = parser is not None and parser.num_calls > 0 and chunk.finish_reason == "stop"
                end = _piece(index, {}, reason="tool_calls" if called else chunk.finish_reason)
                if chunk.stop is not None:
                    end.stop_reason = chunk.stop
                yield end

    def empty(self, index: int) -> ChatChoice:
        """A whole choice before its first piece."""
        return ChatChoice(index=index, message={}, logprobs=None, finish_reason=None)

    def add(self, choice: ChatChoice, piece: ChatChoice) -> None:
        """Adds a piece to a whole choice: texts grow, calls are found by their index."""
        assert choice.message is not None
        assert piece.delta is not None
        _extend(choice.message, piece.delta)
        choice.finish_reason = piece.finish_reason
        if piece.stop_reason is not None:
            choice.stop_reason = piece.stop_reason
        if piece.logprobs is not None:
            choice.logprobs = choice.logprobs or Logprobs(content=[])
            choice.logprobs.content += piece.logprobs.content

    def _deltas(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        """What a chunk adds to the message."""
        parser = self._parsers[index]
        if parser is None:
            return [{"content": chunk.text}] if chunk.text else []
        found = parser.push(chunk.text)
        if chunk.finish_reason is not None:
            found += parser.finish()
        return found

    def _logprobs(self, chunk: Chunk) -> Logprobs:
        assert chunk.token is not None
        assert chunk.logprob is not None
        most_likely = [self._token(token_id, logprob) for token_id, logprob in chunk.top_logprobs or ()]
        drawn = self._token(chunk.token, chunk.logprob)
        return Logprobs(content=[TokenLogprob(**drawn.model_dump(), top_logprobs=most_likely)])

    def _token(self, token_id: int, logprob: float) -> TopLogprob:
        text, content = token_text(self._model, token_id), self._model.tokenizer.bytes_of(token_id)
        return TopLogprob(token=text, logprob=logprob, bytes=list(text.encode() if content is None else content))


def _piece(
    index: int, delta: dict[str, Any], logprobs: Logprobs | None = None, reason: str | None = None
) -> ChatChoice:
    return ChatChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)


def _extend(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        if name == "content":
            message["content"] = (message.get("content") or "") + value
        elif name == "tool_calls":
            message["content"] = message.get("content") or None
            calls = message.setdefault("tool_calls", [])
            for call in value:
                if call["index"] == len(calls):
                    calls.append({"id": call["id"], "type": "function", "function": {"name": "", "arguments": ""}})
                function = calls[call["index"]]["function"]
                for key, text in call["function"].items():
                    function[key] += text
        else:
            message[name] = value
