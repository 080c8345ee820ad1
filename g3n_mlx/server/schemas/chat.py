"""Chat completions: messages, tools and formats in, choices out."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from g3n_mlx.server.schemas.base import Wire
from g3n_mlx.server.schemas.generation import MAX_TOP_LOGPROBS, GenerationRequest, Tokens
from g3n_mlx.server.schemas.messages import MAX_MESSAGES, MAX_TOOLS, Message


class FunctionDefinition(Wire):
    """A function that the model may call."""

    REFUSED: ClassVar[Mapping[str, str]] = dict.fromkeys(("input_schema", "schema", "arguments"), "use parameters")

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None


class Tool(Wire):
    """A tool; functions are the only kind."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(Wire):
    """The name in a tool choice."""

    name: str


class NamedTool(Wire):
    """A tool choice that names the function to call."""

    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Wire):
    """A schema with its name."""

    name: str | None = None
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Wire):
    """What the response must be: text, any JSON object, or JSON of a schema."""

    REFUSED: ClassVar[Mapping[str, str]] = dict.fromkeys(("regex", "pattern", "grammar", "value"), "use grammar")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None  # llama.cpp's place for it

    @property
    def wanted(self) -> dict[str, Any] | bool | None:
        """The schema of the response; None for any text."""
        if self.type == "text":
            return None
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.schema_ is None else self.schema_


class GrammarField(Wire):
    """A grammar for the response."""

    type: Literal["regex", "lark"]
    value: str


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **GenerationRequest.REFUSED,
        **dict.fromkeys(("echo", "suffix", "best_of"), "/v1/completions has it"),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    continue_final_message: bool | None = None  # goes on with a last message of the assistant
    response_format: ResponseFormat | None = None
    grammar: GrammarField | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def answer_tokens(self) -> int | None:
        """The most tokens of an answer; the newer name counts where both are given."""
        return self.max_completion_tokens or self.max_tokens


class TopLogprob(BaseModel):
    """A token that could have been drawn, or was."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A drawn token, with the most likely ones."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """Log probabilities of a choice's tokens."""

    content: list[TokenLogprob]


class ChatChoice(BaseModel):
    """One response: `message` when it comes whole, `delta` in a stream."""

    index: int
    message: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | None = None  # the stop string that ended it, as vLLM names it
