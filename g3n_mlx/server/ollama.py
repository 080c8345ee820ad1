"""Ollama's API over chat completions: /api/chat, /api/generate, and what its clients ask about models.

Streams are JSON objects, one a line. Nothing is pulled, made or deleted here, and the model stays loaded.
Source: docs/api.md of ollama/ollama.
"""

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from g3n_mlx.config.manifest import effective_parameters
from g3n_mlx.server.chat import Translated, translated_choices
from g3n_mlx.server.engine import Engine, Place, PlaceOf
from g3n_mlx.server.errors import ApiError
from g3n_mlx.server.exchange import Choices, respond
from g3n_mlx.server.models import ModelTable
from g3n_mlx.server.schemas.chat import ChatChoice
from g3n_mlx.server.schemas.ollama import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaMessage,
    OllamaOptions,
    OllamaRequest,
    OllamaShowRequest,
)
from g3n_mlx.server.tools.history import arguments_of

FAMILY = "gemma3n"
# Programs refuse an Ollama that is older than what they were written for: VS Code's Copilot one before 0.6.4.
API_VERSION = "0.12.0"
# A chat's fields as this protocol has them, where they differ.
FIELDS = {
    **{name: f"options.{name}" for name in OllamaOptions.model_fields},
    "repetition_penalty": "options.repeat_penalty",
    "max_tokens": "options.num_predict",
    "response_format": "format",
    "json_schema": "",
    "schema": "",
}

router = APIRouter()


@router.post("/api/chat", response_class=Response)
async def chat(body: OllamaChatRequest, request: Request, place: PlaceOf) -> Response:
    """A message that answers the others."""
    if not body.messages:
        return _loaded(body, request, {"message": {"role": "assistant", "content": ""}})
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    return await _respond(body, request, place, {"messages": _messages(body.messages), "tools": tools}, _chat_fields)


@router.post("/api/generate", response_class=Response)
async def generate(body: OllamaGenerateRequest, request: Request, place: PlaceOf) -> Response:
    """The answer to one prompt."""
    if not body.prompt and not body.images:
        return _loaded(body, request, {"response": ""})
    system = [{"role": "system", "content": body.system}] if body.system else []
    messages = [*system, {"role": "user", "content": _content(body.prompt, body.images)}]
    return await _respond(body, request, place, {"messages": messages}, _generate_fields)


def _generate_fields(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"response": message["content"]}


def _chat_fields(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"message": {"role": "assistant", **message}}


@router.get("/api/version")
async def show_version() -> dict[str, str]:
    """The Ollama release whose API this is."""
    return {"version": API_VERSION}


@router.get("/api/tags")
async def tags(request: Request) -> dict[str, Any]:
    """The ids that requests may name."""
    table: ModelTable = request.app.state.models
    return {"models": [_described(request, name) for name in table.ids]}


@router.get("/api/ps")
async def loaded_models(request: Request) -> dict[str, Any]:
    """The model that is loaded, which it stays."""
    table: ModelTable = request.app.state.models
    engine: Engine = request.app.state.engine
    described = _described(request, table.ids[0])
    del described["modified_at"]
    expires_at = (datetime.now(UTC) + timedelta(days=365)).isoformat()
    context_length = engine.model.config.text.max_position_embeddings
    return {"models": [{**described, "expires_at": expires_at, "size_vram": 0, "context_length": context_length}]}


@router.post("/api/show")
async def show(body: OllamaShowRequest, request: Request) -> dict[str, Any]:
    """What the model is and can do."""
    name = request.app.state.models.find(body.name or body.model).model_id
    engine: Engine = request.app.state.engine
    config, described = engine.model.config, _described(request, name)
    towers = {"vision": config.vision, "audio": config.audio}
    defaults = engine.model.sampling_defaults
    return {
        "modelfile": "",
        "parameters": "\n".join(f"{key} {value}" for key, value in defaults.items()),
        "template": "",
        "modified_at": described["modified_at"],
        "details": described["details"],
        "model_info": {
            "general.architecture": FAMILY,
            "general.basename": name,
            "general.parameter_count": effective_parameters(config.text),
            f"{FAMILY}.context_length": config.text.max_position_embeddings,
            f"{FAMILY}.block_count": config.text.num_hidden_layers,
            f"{FAMILY}.embedding_length": config.text.hidden_size,
        },
        "capabilities": ["completion", "tools", *(name for name, tower in towers.items() if tower is not None)],
    }


def _described(request: Request, name: str) -> dict[str, Any]:
    engine: Engine = request.app.state.engine
    table: ModelTable = request.app.state.models
    checkpoint = engine.model.checkpoint
    bits = sorted({stored.bits for stored in checkpoint.quantizations.values()})
    return {
        "name": name,
        "model": name,
        "modified_at": datetime.fromtimestamp(table.created, UTC).isoformat(),
        "size": checkpoint.nbytes,
        "digest": "",
        "details": {
            "parent_model": "",
            "format": "safetensors",
            "family": FAMILY,
            "families": [FAMILY],
            "parameter_size": f"{effective_parameters(checkpoint.config.text) / 1e9:.2f}B",
            "quantization_level": "+".join(f"Q{each}" for each in bits) or "BF16",
        },
    }


def _loaded(body: OllamaRequest, request: Request, empty: Mapping[str, Any]) -> Response:
    """The answer to nothing, by which clients load or unload a model."""
    name = request.app.state.models.find(body.model).model_id
    reason = "unload" if body.keep_alive in (0, "0", "0s", "0m", "0h") else "load"
    return JSONResponse({"model": name, "created_at": _now(), **empty, "done": True, "done_reason": reason})


async def _respond(
    body: OllamaRequest, request: Request, place: Place, fields: Mapping[str, Any], shown: Any
) -> Response:
    given: dict[str, Any] = {
        "model": body.model,
        "logprobs": body.logprobs,
        "top_logprobs": body.top_logprobs if body.logprobs else None,
        **({} if body.options is None else body.options.chat_fields()),
        **fields,
    }
    if body.format == "json":
        given["response_format"] = {"type": "json_object"}
    elif body.format:
        given["response_format"] = {"type": "json_schema", "json_schema": {"schema": body.format}}
    names = {**FIELDS, "messages": "messages" if isinstance(body, OllamaChatRequest) else "prompt"}
    choices = await translated_choices(given, names, request, place)
    return await respond(request, _Answer(choices, names, shown), stream=body.stream)


def _messages(messages: Sequence[OllamaMessage]) -> list[dict[str, Any]]:
    """As chat completions have them: calls get ids, and a result belongs to the first call that has none yet."""
    found: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []  # id and name
    for index, message in enumerate(messages):
        fields: dict[str, Any] = {"role": message.role, "content": _content(message.content or "", message.images)}
        if message.tool_calls:
            named = [(f"call_{index}_{number}", call.function) for number, call in enumerate(message.tool_calls)]
            fields["tool_calls"] = [{"id": call_id, "function": function.model_dump()} for call_id, function in named]
            open_calls = [(call_id, function.name) for call_id, function in named]
        elif message.role == "tool":
            call = next((call for call in open_calls if message.tool_name in (None, call[1])), None)
            if call is not None:
                open_calls.remove(call)
                fields["tool_call_id"] = call[0]
        found.append(fields)
    return found


def _content(text: str, images: Sequence[str] | None) -> str | list[dict[str, Any]]:
    """Images come before the text, as Ollama puts them."""
    if not images:
        return text
    parts = [{"type": "image_url", "image_url": f"data:;base64,{image}"} for image in images]
    return [*parts, {"type": "text", "text": text}]


class _Answer(Translated):
    """The exchange of one answer."""

    stream_type: ClassVar[str] = "application/x-ndjson"

    def __init__(self, choices: Choices[ChatChoice], names: Mapping[str, str], shown: Any) -> None:
        """shown: the fields that a message becomes, of which it has content, and tool_calls where there are some."""
        super().__init__(choices, names)
        self._shown = shown

    async def whole(self, pieces: AsyncIterator[ChatChoice]) -> Response:
        """The answer in one object."""
        (choice,) = await self._choices.complete(pieces)
        assert choice.message is not None
        message: dict[str, Any] = {"content": choice.message.get("content") or ""}
        if calls := choice.message.get("tool_calls"):
            message["tool_calls"] = [_call(call["function"]) for call in calls]
        return JSONResponse({**self._line(message, choice), **self._end(choice)})

    async def events(self, pieces: AsyncIterator[ChatChoice]) -> AsyncIterator[str]:
        """A line for each piece of text and each call, and one with the counts."""
        calls: list[dict[str, str]] = []  # the one that is being written
        async for piece in pieces:
            delta = piece.delta or {}
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    for whole in calls:
                        yield self._json({"content": "", "tool_calls": [_call(whole)]})
                    calls = [{"name": call["function"]["name"], "arguments": ""}]
                calls[-1]["arguments"] += call["function"].get("arguments", "")
            if delta.get("content") or piece.logprobs is not None:
                yield self._json({"content": delta.get("content") or ""}, piece)
            if piece.finish_reason is not None:
                for whole in calls:
                    yield self._json({"content": "", "tool_calls": [_call(whole)]})
                yield json.dumps({**self._line({"content": ""}), **self._end(piece)}) + "\n"

    def failed(self, error: ApiError) -> str:
        """Ollama's error, as a line."""
        return json.dumps(error.body("/api/")) + "\n"

    def _json(self, message: Mapping[str, Any], choice: ChatChoice | None = None) -> str:
        return json.dumps(self._line(message, choice)) + "\n"

    def _line(self, message: Mapping[str, Any], choice: ChatChoice | None = None) -> dict[str, Any]:
        scores = None if choice is None else choice.logprobs
        scored = {} if scores is None else {"logprobs": scores.model_dump()["content"]}
        name = self.place.served.model_id
        return {"model": name, "created_at": _now(), **self._shown(message), "done": False, **scored}

    def _end(self, choice: ChatChoice) -> dict[str, Any]:
        """Counts, and times in nanoseconds."""
        usage = self._choices.usage
        read = usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens
        return {
            "done": True,
            "done_reason": "length" if choice.finish_reason == "length" else "stop",
            "total_duration": round((time.monotonic() - self.place.arrived) * 1e9),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _duration(read, usage.avg_prompt_tok_per_sec),
            "eval_count": usage.completion_tokens,
            "eval_duration": _duration(usage.completion_tokens - 1, usage.avg_compl_tok_per_sec),
        }


def _duration(tokens: int, per_second: float) -> int:
    return round(tokens / per_second * 1e9) if per_second else 0


def _call(function: Mapping[str, str]) -> dict[str, Any]:
    return {"function": {"name": function["name"], "arguments": arguments_of(function["arguments"])}}


def _now() -> str:
    return datetime.now(UTC).isoformat()
