"""The wire types: OpenAI's requests and responses as this server reads and writes them, and vLLM's tokenize.

Names and ranges are OpenAI's, with the sampling fields that other local servers add (top_k, min_p,
repetition_penalty, grammar). Fields that are not listed are ignored.
Source: OpenAI's API reference (chat, completions, audio, models); mistral.rs for `grammar` and the speeds in usage.
"""

import logging
import time
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, computed_field, model_validator

MAX_CHOICES = 8
MAX_MESSAGES = 4096
MAX_PARTS = 256  # of one message
# The most that a request's media may cost, counted in images. So many images fill the published context and take 220 MB
# once opened; audio and video cost the same whatever their length, which has a limit of its own.
MAX_MEDIA_COST = 128
MEDIA_COSTS = {"image_url": 1, "audio_url": 16, "input_audio": 16, "video_url": 16}
MAX_TOOLS = 128
MAX_PROMPTS = 256  # of one completions request
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 4096
MAX_STOPS = 16

Penalty = Annotated[FiniteFloat, Field(ge=-2, le=2)]
Tokens = Annotated[int, Field(ge=1, le=2**31)]
TokenId = Annotated[int, Field(ge=0, le=2**31)]
Bias = Annotated[FiniteFloat, Field(ge=-100, le=100)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]

C = TypeVar("C")

log = logging.getLogger(__name__)


def divisible(temperature: float) -> float:
    """The temperature, or 0 for one so small that logits divided by it leave float32."""
    return 0.0 if temperature < 1e-3 else temperature


class Wire(BaseModel):
    """A request's object: fields that are not listed are ignored."""

    model_config = ConfigDict(extra="allow")


class RequestBody(Wire):
    """A request's body; one line of the log names the fields that this server ignores."""

    model: str = "default"

    @model_validator(mode="after")
    def _report_unknown(self) -> Self:
        if self.model_extra:
            log.info("ignored fields: %s", ", ".join(f"{name!a:.60}" for name in list(self.model_extra)[:20]))
        return self


class StreamOptions(Wire):
    """What a stream contains besides the text."""

    include_usage: bool = False


class SamplingFields(BaseModel):
    """How tokens are drawn; what is None comes from the checkpoint."""

    temperature: Annotated[FiniteFloat, Field(ge=0, le=100), AfterValidator(divisible)] | None = None
    # OpenAI allows 0, which leaves the most likely token: what the smallest top_p does.
    top_p: Annotated[FiniteFloat, Field(ge=0, le=1), AfterValidator(lambda value: max(value, 1e-9))] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[FiniteFloat, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_BIASES)] | None = None
    seed: Seed | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None

    def sampling(self, choice: int) -> dict[str, Any]:
        """Keywords of `Gemma3n.sampling_params` for one choice: each choice of a request has its own seed."""
        options = {name: getattr(self, name) for name in SamplingFields.model_fields}
        if self.seed is not None:
            options["seed"] = (self.seed + choice) % 2**64
        if isinstance(self.stop, str):
            options["stop"] = [self.stop]
        return options


class GenerationRequest(RequestBody, SamplingFields):
    """What chat and completions have in common."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def num_choices(self) -> int:
        """Choices for each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class MediaUrl(Wire):
    """Where an image, audio or a video is: a data: URI, http(s), or a path below --media-root."""

    url: str


class InputAudio(Wire):
    """Audio in the request itself."""

    data: str  # base64
    format: str | None = None


class Part(Wire):
    """A part of a message's content."""

    type: str
    text: str | None = None
    image_url: str | MediaUrl | None = None
    audio_url: str | MediaUrl | None = None
    video_url: str | MediaUrl | None = None
    input_audio: InputAudio | None = None


class FunctionCall(Wire):
    """The call that an assistant's message made."""

    name: str
    arguments: str = "{}"


class ToolCall(Wire):
    """One of an assistant's calls."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Wire):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[str | Part], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None


class FunctionDefinition(Wire):
    """A function that the model may call."""

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

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GrammarField(Wire):
    """A grammar for the response."""

    type: Literal["regex", "lark"]
    value: str


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    grammar: GrammarField | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def answer_tokens(self) -> int | None:
        """The most tokens of an answer; the newer name counts where both are given."""
        return self.max_completion_tokens or self.max_tokens


# The first wrong value ends the check: an error for each would make the response far larger than a large body.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: text in, text out, without the chat template."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = 16  # OpenAI's default; 0 only scores, with echo
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or ids; a single one is a list of one."""
        given: Any = self.prompt
        return given if isinstance(given, list) and not isinstance(given[0], int) else [given]


class TokenizeRequest(RequestBody):
    """POST /v1/tokenize: a text, or messages as the model would read them."""

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    add_special_tokens: bool = True  # <bos> before a text


class TokenizeResponse(BaseModel):
    """The ids, and the length of the context."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(RequestBody):
    """POST /v1/detokenize."""

    tokens: Annotated[list[TokenId], Field(max_length=2**20)]


class DetokenizeResponse(BaseModel):
    """The text of some ids, control tokens by name."""

    prompt: str


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens, those that were found in the prefix cache."""

    cached_tokens: int


class RequestUsage(BaseModel):
    """Counts of all choices together, and the speeds of the first one; times begin when the request came."""

    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails
    avg_prompt_tok_per_sec: float
    avg_compl_tok_per_sec: float
    time_to_first_token_s: float | None

    @computed_field
    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


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


class CompletionLogprobs(BaseModel):
    """Log probabilities in the older shape: lists with one entry per token, None for a prompt's first."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One response to one prompt, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(BaseModel, Generic[C]):
    """All choices, or a chunk of one."""

    id: str
    object: str  # "chat.completion", "chat.completion.chunk" or "text_completion"
    created: int
    model: str
    choices: list[C]
    usage: RequestUsage | None = None


class ServedModel(BaseModel):
    """An id that requests may name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "g3n-mlx"
    max_model_len: int


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


def now() -> int:
    """Seconds since 1970, as OpenAI's `created` has them."""
    return int(time.time())
