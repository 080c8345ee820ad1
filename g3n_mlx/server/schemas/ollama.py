"""Ollama's requests, as its own client sends them.

Source: docs/api.md of ollama/ollama.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from g3n_mlx.server.schemas.base import OUR_TEMPLATE, RequestBody, Wire
from g3n_mlx.server.schemas.chat import Tool
from g3n_mlx.server.schemas.generation import MAX_TOP_LOGPROBS, SamplingFields
from g3n_mlx.server.schemas.messages import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS

Images = Annotated[list[str], Field(max_length=MAX_PARTS, fail_fast=True)]  # base64


class OllamaOptions(Wire):
    """How tokens are drawn. What places a model in memory (num_ctx, num_gpu, ...) is ignored."""

    REFUSED: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("mirostat", "tfs_z", "typical_p"), "leave it out, or give temperature, top_p, top_k or min_p"
    )
    NEUTRAL: ClassVar[Mapping[str, Any]] = {"tfs_z": 1, "typical_p": 1}

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None  # below 0: another one each time
    stop: str | list[str] | None = None
    num_predict: int | None = None  # below 1: no limit
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def chat_fields(self) -> dict[str, Any]:
        """The same as fields of a chat."""
        names = SamplingFields.model_fields.keys() & type(self).model_fields.keys()
        limit = self.num_predict if self.num_predict is not None and self.num_predict > 0 else None
        same = {name: getattr(self, name) for name in names}
        seed = self.seed if self.seed is not None and self.seed >= 0 else None
        return {**same, "seed": seed, "max_tokens": limit, "repetition_penalty": self.repeat_penalty}


class OllamaRequest(RequestBody):
    """What chat and generate have in common."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "think": "Gemma 3n does not think before it answers",
        **dict.fromkeys(("temperature", "top_p", "top_k", "seed", "stop", "num_predict"), "put it into options"),
    }

    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    keep_alive: float | str | None = None  # accepted: the model stays loaded
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class OllamaFunctionCall(Wire):
    """A call with its arguments as an object."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict[str, Any])


class OllamaCall(Wire):
    """One of an assistant's calls; without ids, results follow in the order of the calls."""

    function: OllamaFunctionCall


class OllamaMessage(Wire):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: Images | None = None
    tool_calls: Annotated[list[OllamaCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_name: str | None = None


class OllamaChatRequest(OllamaRequest):
    """POST /api/chat."""

    messages: Annotated[list[OllamaMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)] = Field(
        default_factory=list[OllamaMessage]
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None


class OllamaGenerateRequest(OllamaRequest):
    """POST /api/generate."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **OllamaRequest.REFUSED,
        "suffix": "Gemma 3n does not fill in the middle",
        **dict.fromkeys(("template", "raw"), OUR_TEMPLATE),
        "context": "use /api/chat with the messages",
    }

    prompt: str = ""
    system: str | None = None
    images: Images | None = None


class OllamaShowRequest(RequestBody):
    """POST /api/show."""

    name: str | None = None  # of older clients
    verbose: bool | None = None
