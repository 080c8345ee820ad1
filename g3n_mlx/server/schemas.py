"""The wire types: OpenAI's requests and responses as this server reads and writes them, and vLLM's tokenize.

Names and ranges are OpenAI's, with the sampling fields that other local servers add (top_k, min_p,
repetition_penalty, grammar). Other fields that would change an answer are refused (`Wire.REFUSED`), at every depth of
the body; whatever else is not listed is ignored, with a line in the log.
Source: OpenAI's API reference (chat, completions, audio, models); mistral.rs for `grammar` and the speeds in usage.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    computed_field,
    model_validator,
)
from pydantic_core import PydanticCustomError

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
# -1 is no limit to LM Studio and llama.cpp.
Tokens = Annotated[int, Field(ge=1, le=2**31)] | Annotated[Literal[-1], AfterValidator(lambda _: None)]
TokenId = Annotated[int, Field(ge=0, le=2**31)]
Bias = Annotated[FiniteFloat, Field(ge=-100, le=100)]
StopString = Annotated[str, Field(max_length=256)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]

C = TypeVar("C")

log = logging.getLogger(__name__)


def divisible(temperature: float) -> float:
    """The temperature, or 0 for one so small that logits divided by it leave float32."""
    return 0.0 if temperature < 1e-3 else temperature


_GIVE_SCHEMA = "give response_format with a json_schema, or grammar"
_SENT_ELSEWHERE = "send it as a part of the message's content: image_url, input_audio, audio_url or video_url"
_NOT_DRAWN_SO = "leave it out, or give temperature, top_p, top_k, min_p or a penalty"
_OUR_TEMPLATE = "prompts follow the checkpoint's own template"


class Wire(BaseModel):
    """A request's object. Fields that are not listed are ignored, unless they would change the answer."""

    model_config = ConfigDict(extra="allow")
    # What other servers know and this one does not: what to do instead.
    REFUSED: ClassVar[Mapping[str, str]] = {}
    # Their values that ask for nothing, besides null, false, 0 and whatever is empty.
    NEUTRAL: ClassVar[Mapping[str, Any]] = {}

    def unknown(self, path: str = "") -> Iterator[str]:
        """The paths of the ignored fields, here and further in; raises PydanticCustomError at a refused one."""
        for name, value in (self.model_extra or {}).items():
            place = f"{path}{ascii(name)[1:-1]:.60}"
            if name in self.REFUSED and value and value != self.NEUTRAL.get(name):
                context = {"path": place, "advice": self.REFUSED[name]}
                raise PydanticCustomError("unsupported_field", "{path} is not supported: {advice}", context)
            yield place
        for name, field in type(self).model_fields.items():
            value, place = getattr(self, name), f"{path}{field.alias or name}"
            if isinstance(value, Wire):
                yield from value.unknown(f"{place}.")
            elif isinstance(value, list) and value and not isinstance(value[0], int):
                for index, inner in enumerate(value):
                    if isinstance(inner, Wire):
                        yield from inner.unknown(f"{place}[{index}].")


class RequestBody(Wire):
    """A request's body; one line of the log names the fields that this server ignores."""

    model: Annotated[str, BeforeValidator(lambda name: "default" if name is None else name)] = "default"

    @model_validator(mode="after")
    def _report_unknown(self) -> Self:
        if unknown := list(self.unknown()):
            log.info("ignored fields: %s", ", ".join(map(repr, unknown[:20])))
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
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None

    def sampling(self, choice: int) -> dict[str, Any]:
        """Keywords of `Gemma3n.sampling_params` for one choice: each choice of a request has its own seed."""
        options = {name: getattr(self, name) for name in SamplingFields.model_fields}
        if self.seed is not None:
            options["seed"] = (self.seed + choice) % 2**64
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        options["stop"] = [text for text in given if text] or None  # an empty one asks for nothing
        return options


class GenerationRequest(RequestBody, SamplingFields):
    """What chat and completions have in common."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            (
                *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "format"),
                *("json_schema", "response_schema", "schema", "regex", "ebnf", "structural_tag", "choices"),
            ),
            _GIVE_SCHEMA,
        ),
        **dict.fromkeys(("images", "videos", "audios", "image_data", "multi_modal_data"), _SENT_ELSEWHERE),
        **dict.fromkeys(("functions", "function_call"), "use tools and tool_choice"),
        **dict.fromkeys(("modalities", "audio"), "answers are text"),
        **dict.fromkeys(
            (
                *("typical_p", "tfs_z", "top_a", "top_n_sigma", "mirostat", "mirostat_mode", "dynatemp_range"),
                *("dry_multiplier", "xtc_probability", "use_beam_search", "length_penalty", "allowed_token_ids"),
                *("bad_words", "min_tokens", "logits_processors", "smoothing_factor", "epsilon_cutoff", "eta_cutoff"),
                *("no_repeat_ngram_size", "encoder_repetition_penalty", "penalty_alpha", "guidance_scale"),
            ),
            _NOT_DRAWN_SO,
        ),
        **dict.fromkeys(("repeat_penalty", "repeat_last_n"), "use repetition_penalty, of the whole text"),
        **dict.fromkeys(("n_predict", "num_predict", "max_new_tokens", "max_length"), "use max_tokens"),
        **dict.fromkeys(("stop_sequences", "stop_strings"), "use stop"),
        "options": "give temperature, top_p, seed and so on beside messages",
        "system": "send a message of the role system",
        "instructions": "send a message of the role system",
        "documents": "put their texts into a message",
        "continue_final_message": "an answer is always a new turn",
        **dict.fromkeys(
            ("chat_template", "template", "raw", "context", "prompt_embeds", "mm_processor_kwargs"), _OUR_TEMPLATE
        ),
        **dict.fromkeys(("truncate_prompt_tokens", "prompt_truncate_len"), "shorten the prompt"),
        **dict.fromkeys(("lora", "adapters", "lora_request", "adapter_id"), "there are no adapters"),
        "web_search_options": "there is no search",
        "ignore_eos": "an answer ends where the model ends it",
    }
    NEUTRAL: ClassVar[Mapping[str, Any]] = {
        **dict.fromkeys(("typical_p", "tfs_z", "length_penalty", "repeat_penalty", "encoder_repetition_penalty"), 1),
        **dict.fromkeys(("top_n_sigma", "truncate_prompt_tokens", "n_predict", "num_predict"), -1),
        **{"modalities": ["text"], "function_call": "none", "guidance_scale": 1},
    }

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    draft: bool | None = None  # False: no tokens are drafted; the text is the same
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


# What Qwen's and other servers' parts take.
_PARTS_OF_MEDIA: Mapping[str, str] = dict.fromkeys(
    (
        *("fps", "nframes", "num_frames", "max_frames", "min_pixels", "max_pixels", "resized_height", "resized_width"),
        *("video_start", "video_end", "start_time", "end_time", "start_offset", "end_offset"),
    ),
    "a video is shown as a frame per second, an image at the model's size",
)


class MediaUrl(Wire):
    """Where an image, audio or a video is: a data: URI, http(s), or a path below --media-root."""

    REFUSED: ClassVar[Mapping[str, str]] = _PARTS_OF_MEDIA

    url: str


class InputAudio(Wire):
    """Audio in the request itself."""

    data: str  # base64
    format: str | None = None


class Part(Wire):
    """A part of a message's content."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **_PARTS_OF_MEDIA,
        **dict.fromkeys(("image", "images", "audio", "video", "file", "source", "input_image"), _SENT_ELSEWHERE),
    }

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | MediaUrl | None = None
    audio_url: str | MediaUrl | None = None
    video_url: str | MediaUrl | None = None
    input_audio: InputAudio | None = None


class FunctionCall(Wire):
    """The call that an assistant's message made."""

    name: str
    # Ollama's and some clients' are the object itself.
    arguments: Annotated[
        str, BeforeValidator(lambda given: json.dumps(given) if isinstance(given, dict) else given)
    ] = "{}"


class ToolCall(Wire):
    """One of an assistant's calls."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Wire):
    """One message of a conversation."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("images", "videos", "audios", "audio", "image", "video", "files"), _SENT_ELSEWHERE),
        **dict.fromkeys(("prefix", "partial"), "an answer is always a new turn"),
        "function_call": "send tool_calls",
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[str | Part], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None  # an assistant's, in place of content


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

    REFUSED: ClassVar[Mapping[str, str]] = {
        **GenerationRequest.REFUSED,
        **dict.fromkeys(("response_format", "grammar", "tools", "messages"), "/v1/chat/completions has it"),
    }

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: Tokens | Literal[0] | None = 16  # OpenAI's default; 0 only scores, with echo
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

    REFUSED: ClassVar[Mapping[str, str]] = {
        "continue_final_message": "an answer is always a new turn",
        **dict.fromkeys(("chat_template", "tools", "documents"), _OUR_TEMPLATE),
    }

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


class CompletionTokensDetails(BaseModel):
    """What became of drafted tokens, in OpenAI's words; the rejected ones are in no other count."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class RequestUsage(BaseModel):
    """Counts of all choices together, and the speeds of the first one; times begin when the request came."""

    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
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
