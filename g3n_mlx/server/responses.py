"""POST /v1/responses: OpenAI's Responses API over chat completions, without a memory of earlier responses.

Input items become messages, the choice's message becomes output items: one message, then a function_call per call.
Source: OpenAI's API reference (responses, responses-streaming), for the fields and the order of the events.
"""

import json
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from g3n_mlx.server.chat import Translated, translated_choices
from g3n_mlx.server.engine import PlaceOf
from g3n_mlx.server.errors import ApiError
from g3n_mlx.server.exchange import EVENT_STREAM, Choices, event, respond
from g3n_mlx.server.schemas.base import now
from g3n_mlx.server.schemas.chat import ChatChoice, Logprobs
from g3n_mlx.server.schemas.responses import (
    FlatTool,
    FlatToolChoice,
    InputItem,
    InputPart,
    ResponsesRequest,
    TextFormat,
)

# A chat's fields as this protocol has them, where they differ.
FIELDS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "json_schema": "",
    "function": "",
}
WITH_LOGPROBS = "message.output_text.logprobs"

router = APIRouter()


@router.post("/v1/responses", response_class=Response)
async def create_response(body: ResponsesRequest, request: Request, place: PlaceOf) -> Response:
    """A response to the input; in a stream, as server-sent events."""
    choices = await translated_choices(_chat(body), FIELDS, request, place)
    return await respond(request, _Response(body, choices), stream=bool(body.stream))


def _chat(body: ResponsesRequest) -> dict[str, Any]:
    """The same question to chat completions, as its fields."""
    items = [InputItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    tools, choice = _tools(body)
    text = body.text.format if body.text is not None else None
    return {
        **{name: getattr(body, name) for name in ("model", "draft", *type(body).sampling_names())},
        "messages": [*system, *_messages(items)],
        "max_tokens": body.max_output_tokens,
        "logprobs": True if WITH_LOGPROBS in (body.include or ()) else None,
        "top_logprobs": body.top_logprobs if WITH_LOGPROBS in (body.include or ()) else None,
        "response_format": None if text is None else _response_format(text),
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
    }


def _messages(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        match item.type or "message":
            case "message":
                if item.role is None:
                    raise ApiError(400, f"input[{index}] has no role", param="input")
                messages.append({"role": item.role, "content": _content(item.content)})
            case "function_call":
                function = {"name": item.name or "", "arguments": item.arguments or "{}"}
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant"})
                messages[-1].setdefault("tool_calls", []).append({"id": item.call_id or "", "function": function})
            case "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
            case "reasoning":
                pass  # other models' thoughts: Gemma 3n has none
            case "item_reference":
                raise ApiError(
                    400, "item_reference is not supported: this server stores no items; send them", param="input"
                )
            case other:
                raise ApiError(
                    400,
                    f"the item type {other!r:.80} is unknown; known are message, function_call, function_call_output",
                    param="input",
                )
    return messages


def _content(content: str | list[InputPart] | None) -> str | list[dict[str, Any]]:
    return content or "" if not isinstance(content, list) else [_part(part) for part in content]


def _part(part: InputPart) -> dict[str, Any]:
    """The part as chat completions have it."""
    match part.type:
        case "input_text" | "output_text" | "text":
            return {"type": "text", "text": part.text}
        case "refusal":
            return {"type": "refusal", "refusal": part.refusal}
        case "input_image" if part.image_url is not None:
            return {"type": "image_url", "image_url": part.image_url}
        case "input_audio" if part.input_audio is not None:
            return {"type": "input_audio", "input_audio": part.input_audio.model_dump()}
        case "input_file":
            return {"type": "file", "file": {"file_data": part.file_data, "filename": part.filename}}
        case "input_image" | "input_audio":
            field = "image_url" if part.type == "input_image" else "input_audio"
            raise ApiError(400, f"a part of the type {part.type} has no {field}", param="input")
        case other:
            known = "input_text, input_image, input_audio, input_file, output_text, refusal"
            raise ApiError(400, f"the part type {other!r:.80} is unknown; known are {known}", param="input")


def _tools(body: ResponsesRequest) -> tuple[list[dict[str, Any]] | None, str | dict[str, Any] | None]:
    """The tools and the choice among them, as chat completions have them."""
    tools = [_tool(tool) for tool in body.tools or ()]
    if not isinstance(choice := body.tool_choice, FlatToolChoice):
        return tools or None, choice
    if choice.type == "function":
        return tools or None, {"type": "function", "function": {"name": choice.name or ""}}
    if choice.type != "allowed_tools":
        raise ApiError(400, f"tool_choice of the type {choice.type!r:.80} is not supported", param="tool_choice")
    allowed = [tool.get("name") for tool in choice.tools or ()]
    return [tool for tool in tools if tool["function"]["name"] in allowed] or None, choice.mode


def _tool(tool: FlatTool) -> dict[str, Any]:
    if tool.type != "function":
        raise ApiError(400, f"the tool type {tool.type!r:.80} is not supported: only functions are", param="tools")
    if tool.name is None:
        raise ApiError(400, "a function in tools has no name", param="tools")
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _response_format(text: TextFormat) -> dict[str, Any]:
    if text.type != "json_schema":
        return {"type": text.type}
    if text.schema_ is None:
        raise ApiError(400, "text.format is json_schema, but has no schema", param="text.format")
    return {"type": "json_schema", "json_schema": {"name": text.name, "schema": text.schema_, "strict": text.strict}}


class _Response(Translated):
    """The exchange of one response."""

    stream_type: ClassVar[str] = EVENT_STREAM

    def __init__(self, body: ResponsesRequest, choices: Choices[ChatChoice]) -> None:
        super().__init__(choices, FIELDS)
        self._body = body
        self._created = now()
        self._id = _new_id("resp")
        self._events = 0
        self._output = _Output()

    async def whole(self, pieces: AsyncIterator[ChatChoice]) -> Response:
        """The response, complete."""
        async for piece in pieces:
            for _ in self._output.events(piece):
                pass
        # As ASCII: what is sent back of the request may have lone surrogates.
        return Response(json.dumps(self._response()), media_type="application/json")

    async def events(self, pieces: AsyncIterator[ChatChoice]) -> AsyncIterator[str]:
        """Every item, part and delta as it begins, grows and ends."""
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, {"response": self._response()})
        async for piece in pieces:
            for name, fields in self._output.events(piece):
                yield self._event(name, fields)
        response = self._response()
        yield self._event(f"response.{response['status']}", {"response": response})

    def failed(self, error: ApiError) -> str:
        """The response as it failed, with its output so far."""
        found = error.body()["error"]
        self._output.cut()
        response = {
            **self._response(),
            "status": "failed",
            "error": {"code": "server_error", "message": found["message"]},
        }
        return self._event("response.failed", {"response": response})

    def _event(self, name: str, fields: Mapping[str, Any]) -> str:
        data = {"type": name, "sequence_number": self._events, **fields}
        self._events += 1
        return event(json.dumps(data), name)

    def _response(self) -> dict[str, Any]:
        body, text, output = self._body, self._body.text, self._output
        truncated = output.finish_reason == "length"
        done = output.finish_reason is not None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if not done else "incomplete" if truncated else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if truncated else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.place.served.model_id,
            "output": output.items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,  # whatever was asked for: see the module
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}} if text is None else text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": _dumped(body.tool_choice) or "auto",
            "tools": [{"strict": None, "parameters": None, **_dumped(tool)} for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if done else None,
            "metadata": body.metadata or {},
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._choices.usage
        cached = usage.prompt_tokens_details.cached_tokens
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }


class _Output:
    """The output items, as a choice's pieces make them grow; each change is an event's name and fields."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.finish_reason: str | None = None

    def events(self, piece: ChatChoice) -> Iterator[tuple[str, dict[str, Any]]]:
        """What one piece adds."""
        delta = piece.delta or {}
        if delta.get("content") or piece.logprobs is not None:
            yield from self._text(delta.get("content") or "", piece.logprobs)
        for call in delta.get("tool_calls", ()):
            yield from self._call(call)
        if piece.finish_reason is not None:
            if not self.items:  # an empty answer is a message all the same
                yield from self._text("", None)
            yield from self._end("incomplete" if piece.finish_reason == "length" else "completed")
            self.finish_reason = piece.finish_reason

    def cut(self) -> None:
        """Marks what is being written as incomplete; no events, since an error has their place."""
        for item in self.items:
            if item["status"] == "in_progress":
                item["status"] = "incomplete"

    def _text(self, text: str, logprobs: Logprobs | None) -> Iterator[tuple[str, dict[str, Any]]]:
        if not self._open("message"):
            yield from self._end()
            yield self._begin({"type": "message", "id": _new_id("msg"), "role": "assistant", "content": []})
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self.items[-1]["content"].append(part)
            yield "response.content_part.added", {**self._where(), "part": {**part}}
        scores = [] if logprobs is None else logprobs.model_dump()["content"]
        (part,) = self.items[-1]["content"]
        part["text"] += text
        part["logprobs"] += scores
        yield "response.output_text.delta", {**self._where(), "delta": text, "logprobs": scores}

    def _call(self, call: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        function = call["function"]
        if "id" in call:
            yield from self._end()
            item = {"type": "function_call", "id": _new_id("fc"), "call_id": call["id"], "name": function["name"]}
            yield self._begin({**item, "arguments": ""})
        if function.get("arguments"):
            self.items[-1]["arguments"] += function["arguments"]
            where = self._where(in_part=False)
            yield "response.function_call_arguments.delta", {**where, "delta": function["arguments"]}

    def _open(self, kind: str) -> bool:
        return bool(self.items) and self.items[-1]["type"] == kind and self.items[-1]["status"] == "in_progress"

    def _begin(self, item: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        item["status"] = "in_progress"
        self.items.append(item)
        content = {"content": []} if item["type"] == "message" else {}
        return "response.output_item.added", {"output_index": len(self.items) - 1, "item": {**item, **content}}

    def _end(self, status: str = "completed") -> Iterator[tuple[str, dict[str, Any]]]:
        """Ends the item that is open, if one is."""
        if self._open("message"):
            (part,) = self.items[-1]["content"]
            said = {"text": part["text"], "logprobs": part["logprobs"]}
            yield "response.output_text.done", {**self._where(), **said}
            yield "response.content_part.done", {**self._where(), "part": part}
        elif self._open("function_call"):
            item = self.items[-1]
            called = {"arguments": item["arguments"], "name": item["name"]}
            yield "response.function_call_arguments.done", {**self._where(in_part=False), **called}
        else:
            return
        self.items[-1]["status"] = status
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": self.items[-1]}

    def _where(self, *, in_part: bool = True) -> dict[str, Any]:
        part = {"content_index": 0} if in_part else {}
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **part}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _dumped(field: Any) -> Any:
    return field.model_dump(exclude_none=True) if isinstance(field, FlatTool | FlatToolChoice) else field
