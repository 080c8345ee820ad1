"""The Responses API's request, without what needs a memory of earlier requests, which this server does not keep.

Source: OpenAI's API reference (responses).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from g3n_mlx.server.schemas.base import RequestBody, Wire
from g3n_mlx.server.schemas.generation import MAX_TOP_LOGPROBS, SamplingFields, Tokens
from g3n_mlx.server.schemas.messages import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, FileData, InputAudio

_NOTHING_STORED = "this server stores no responses: send the whole conversation as input"


class InputPart(FileData):
    """A part of an input item's content; a file's fields stand in the part itself."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **FileData.REFUSED,
        "file_url": "send the file itself as file_data",
    }

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    input_audio: InputAudio | None = None


Parts = Annotated[list[InputPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class InputItem(Wire):
    """A message, a call that the model made, or what came of it; without a type it is a message."""

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Parts | None = None
    call_id: str | None = None
    name: str | None = None  # of the function
    arguments: str | None = None  # JSON
    output: str | Parts | None = None  # of the function


class FlatTool(Wire):
    """A function, whose fields stand beside its type here."""

    type: str = "function"
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatToolChoice(Wire):
    """The function to call, or those that may be called."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] = "auto"  # of allowed_tools
    tools: list[dict[str, Any]] | None = None


class TextFormat(Wire):
    """What the text must be; a schema's fields stand beside its type here."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(Wire):
    """How the text is formed."""

    format: TextFormat | None = None


class ResponsesRequest(RequestBody, SamplingFields):
    """POST /v1/responses."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("previous_response_id", "conversation"), _NOTHING_STORED),
        "background": "there is nowhere to fetch the response later: leave it out",
        "prompt": "this server stores no prompts: send instructions and input",
        "context_management": "shorten the input yourself",
        "max_tool_calls": "functions are called by the client, which can count them",
        "messages": "use input, or /v1/chat/completions",
        "response_format": "use text.format",
        **dict.fromkeys(("max_tokens", "max_completion_tokens"), "use max_output_tokens"),
    }

    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    text: TextConfig | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    draft: bool | None = None  # as in chat completions
