"""Anthropic's Messages API.

Source: the API reference of docs.anthropic.com (messages, count tokens).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, FiniteFloat

from g3n_mlx.server.schemas.base import RequestBody, Wire
from g3n_mlx.server.schemas.generation import MAX_STOPS, StopString
from g3n_mlx.server.schemas.messages import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS


class Source(Wire):
    """Where an image or a document is."""

    REFUSED: ClassVar[Mapping[str, str]] = {"file_id": "this server stores no files: send base64 or a url"}

    type: str
    media_type: str | None = None
    data: str | None = None  # base64; a document's text with the type text
    url: str | None = None


class Block(Wire):
    """A part of a message's content."""

    type: str
    text: str | None = None
    source: Source | None = None
    title: str | None = None  # of a document
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | Blocks | None" = None  # of a tool_result
    is_error: bool | None = None  # of a tool_result


Blocks = Annotated[list[Block], Field(max_length=MAX_PARTS, fail_fast=True)]


class AnthropicMessage(Wire):
    """One turn; a last one of the assistant is continued."""

    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class AnthropicTool(Wire):
    """A function of the client."""

    type: str = "custom"
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class AnthropicToolChoice(Wire):
    """Whether a function is called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Wire):
    """A schema for the text."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Wire):
    """What the text must be."""

    format: OutputFormat | None = None


class CountTokensRequest(RequestBody):
    """POST /v1/messages/count_tokens."""

    REFUSED: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("mcp_servers", "container"), "functions are called by the client: send tools"
    )

    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: str | Blocks | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicToolChoice | None = None


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=2**31)]
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    top_p: FiniteFloat | None = None
    top_k: int | None = None
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    output_config: OutputConfig | None = None
