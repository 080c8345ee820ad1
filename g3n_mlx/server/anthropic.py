"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over chat completions.

Blocks become parts of messages, the choice's message becomes blocks: its text, then a tool_use per call.
Source: the API reference of docs.anthropic.com (messages, streaming), for the fields and the order of the events.
"""

import json
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from g3n_mlx.server.chat import Translated, translated_choices, translated_prompt
from g3n_mlx.server.engine import PlaceOf
from g3n_mlx.server.errors import ANTHROPIC_PATH, ApiError
from g3n_mlx.server.exchange import EVENT_STREAM, Choices, event, respond
from g3n_mlx.server.schemas.anthropic import (
    AnthropicMessage,
    AnthropicTool,
    Block,
    CountTokensRequest,
    MessagesRequest,
)
from g3n_mlx.server.schemas.chat import ChatChoice
from g3n_mlx.server.tools.history import arguments_of

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# A chat's fields as this protocol has them, where they differ.
FIELDS = {
    "messages": "messages",  # without the places in it, which differ
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "json_schema": "",
    "function": "",
    "parameters": "input_schema",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

router = APIRouter()


@router.post(ANTHROPIC_PATH, response_class=Response)
async def create_message(body: MessagesRequest, request: Request, place: PlaceOf) -> Response:
    """The assistant's message that comes next; in a stream, as server-sent events."""
    schema = body.output_config and body.output_config.format
    fields = {
        **_fields(body),
        **{name: getattr(body, name) for name in ("max_tokens", "temperature", "top_p", "top_k")},
        "stop": body.stop_sequences,
        "response_format": schema and {"type": "json_schema", "json_schema": {"schema": schema.schema_}},
    }
    choices = await translated_choices(fields, FIELDS, request, place)
    return await respond(request, _Message(choices), stream=bool(body.stream))


@router.post(f"{ANTHROPIC_PATH}/count_tokens")
async def count_tokens(body: CountTokensRequest, request: Request, place: PlaceOf) -> dict[str, int]:
    """The tokens of the prompt that the same message would make."""
    request.app.state.models.find(body.model)
    prompt = await translated_prompt(_fields(body), FIELDS, place)
    return {"input_tokens": len(prompt.token_ids)}


def _fields(body: CountTokensRequest) -> dict[str, Any]:
    """The fields of a chat that make its prompt."""
    messages = [one for message in body.messages for one in _messages(message)]
    if body.system:
        content = body.system if isinstance(body.system, str) else _parts(body.system)
        messages.insert(0, {"role": "system", "content": content})
    choice = body.tool_choice
    chosen: Any = None
    if choice is not None:
        named = {"type": "function", "function": {"name": choice.name or ""}}
        chosen = named if choice.type == "tool" else CHOICES[choice.type]
    return {
        "model": body.model,
        "messages": messages,
        # The last turn may have come to nothing: other models' thoughts are left out.
        "continue_final_message": (body.messages[-1].role == messages[-1]["role"] == "assistant") or None,
        "tools": [_tool(tool) for tool in body.tools or ()] or None,
        "tool_choice": chosen,
        "parallel_tool_calls": None if choice is None else not choice.disable_parallel_tool_use,
    }


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    if tool.type != "custom":
        raise ApiError(400, f"the tool type {tool.type!r:.80} is not supported: only custom is", param="tools")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {**function, "strict": tool.strict}}


def _messages(message: AnthropicMessage) -> Iterator[dict[str, Any]]:
    """A turn as chat completions have it: results of tools are messages of their own, before the rest."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    calls: list[dict[str, Any]] = []
    rest: list[Block] = []
    for block in message.content:
        if block.type == "tool_use":
            function = {"name": block.name or "", "arguments": json.dumps(block.input or {}, ensure_ascii=False)}
            calls.append({"id": block.id or "", "function": function})
        elif block.type == "tool_result":
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)}
        elif block.type not in ("thinking", "redacted_thinking"):  # other models' thoughts: Gemma 3n has none
            rest.append(block)
    if rest or calls:
        yield {"role": message.role, "content": _parts(rest), **({"tool_calls": calls} if calls else {})}


def _result(block: Block) -> list[dict[str, Any]]:
    """What a tool's call came to, with a line in front where it failed."""
    failed = [{"type": "text", "text": "Error:"}] if block.is_error else []
    content = [Block(type="text", text=block.content)] if isinstance(block.content, str) else block.content
    return [*failed, *_parts(content or ())]


def _parts(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    return [_part(block) for block in blocks]


def _part(block: Block) -> dict[str, Any]:
    """The block as a part of chat completions' content."""
    source = block.source
    match block.type, source and source.type:
        case "text", _:
            return {"type": "text", "text": block.text}
        case "image", "base64":
            kind = source.media_type if source is not None else None
            return {"type": "image_url", "image_url": f"data:{kind or ''};base64,{_data(block)}"}
        case "image", "url":
            return {"type": "image_url", "image_url": _data(block, "url")}
        case "document", "base64":
            return {"type": "file", "file": {"file_data": _data(block), "filename": block.title}}
        case "document", "text":
            return {"type": "text", "text": "\n".join([*([block.title] if block.title else []), _data(block)])}
        case "image" | "document", kind:
            found = "no source" if kind is None else f"a source of the type {kind!r:.80}"
            raise ApiError(400, f"a block of the type {block.type} has {found}, expected base64", param="messages")
        case other, _:
            known = "text, image, document, tool_use, tool_result"
            raise ApiError(400, f"the block type {other!r:.80} is unknown; known are {known}", param="messages")


def _data(block: Block, field: Literal["data", "url"] = "data") -> str:
    """What the block's source holds."""
    assert block.source is not None
    found = getattr(block.source, field)
    if not found:
        kind = block.source.type
        raise ApiError(400, f"a block of the type {block.type} has no {field} in its {kind} source", param="messages")
    return found


class _Message(Translated):
    """The exchange of one message."""

    stream_type: ClassVar[str] = EVENT_STREAM

    def __init__(self, choices: Choices[ChatChoice]) -> None:
        super().__init__(choices, FIELDS)
        self._id = f"msg_{uuid.uuid4().hex}"
        self._open: str | None = None  # the type of the block that is being written
        self._index = -1  # its number

    async def whole(self, pieces: AsyncIterator[ChatChoice]) -> Response:
        """The message, complete."""
        (choice,) = await self._choices.complete(pieces)
        assert choice.message is not None
        text, calls = choice.message.get("content"), choice.message.get("tool_calls", ())
        content = [{"type": "text", "text": text or ""}] if text or not calls else []
        content += [_tool_use(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in calls]
        return JSONResponse({**self._envelope(content), **_stopped(choice), "usage": self._usage()})

    async def events(self, pieces: AsyncIterator[ChatChoice]) -> AsyncIterator[str]:
        """The message, its blocks and deltas as they begin, grow and end."""
        start = {**self._envelope([]), "stop_reason": None, "stop_sequence": None, "usage": self._usage()}
        yield _event("message_start", {"message": start})
        async for piece in pieces:
            delta = piece.delta or {}
            if delta.get("content"):
                if self._open != "text":
                    for data in self._begin({"type": "text", "text": ""}):
                        yield data
                yield self._delta({"type": "text_delta", "text": delta["content"]})
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    for data in self._begin(_tool_use(call["id"], call["function"]["name"], "{}")):
                        yield data
                if call["function"].get("arguments"):
                    yield self._delta({"type": "input_json_delta", "partial_json": call["function"]["arguments"]})
            if piece.finish_reason is not None:
                if self._open is None:  # an empty answer has a block all the same
                    for data in self._begin({"type": "text", "text": ""}):
                        yield data
                yield self._end()
                yield _event("message_delta", {"delta": _stopped(piece), "usage": self._usage()})
        yield _event("message_stop", {})

    def failed(self, error: ApiError) -> str:
        """Anthropic's error as an event."""
        return event(json.dumps(error.body(ANTHROPIC_PATH)), "error")

    def _begin(self, block: Mapping[str, Any]) -> Iterator[str]:
        """Ends the block that is open, if one is, and begins the next."""
        if self._open is not None:
            yield self._end()
        self._open = block["type"]
        self._index += 1
        yield _event("content_block_start", {"index": self._index, "content_block": block})

    def _delta(self, delta: Mapping[str, Any]) -> str:
        return _event("content_block_delta", {"index": self._index, "delta": delta})

    def _end(self) -> str:
        return _event("content_block_stop", {"index": self._index})

    def _envelope(self, content: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        model = self.place.served.model_id
        return {"id": self._id, "type": "message", "role": "assistant", "model": model, "content": content}

    def _usage(self) -> dict[str, Any]:
        """Anthropic's input_tokens leave out those that were read from the cache."""
        usage = self._choices.usage
        cached = usage.prompt_tokens_details.cached_tokens
        return {
            "input_tokens": usage.prompt_tokens - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.completion_tokens,
        }


def _event(name: str, fields: Mapping[str, Any]) -> str:
    return event(json.dumps({"type": name, **fields}), name)


def _tool_use(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments_of(arguments)}


def _stopped(choice: ChatChoice) -> dict[str, Any]:
    if choice.stop_reason is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
    return {"stop_reason": STOP_REASONS[choice.finish_reason or "stop"], "stop_sequence": None}
