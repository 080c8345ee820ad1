"""What requests for text have in common, how its tokens are drawn, and the usage that is reported for it."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, FiniteFloat, computed_field

from g3n_mlx.server.schemas.base import OUR_TEMPLATE, SENT_ELSEWHERE, RequestBody, Wire

MAX_CHOICES = 8
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


def divisible(temperature: float) -> float:
    """The temperature, or 0 for one so small that logits divided by it leave float32."""
    return 0.0 if temperature < 1e-3 else temperature


_GIVE_SCHEMA = "give response_format with a json_schema, or grammar"
_NOT_DRAWN_SO = "leave it out, or give temperature, top_p, top_k, min_p or a penalty"


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

    @classmethod
    def sampling_names(cls) -> list[str]:
        return list(SamplingFields.model_fields)

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
        **dict.fromkeys(("images", "videos", "audios", "image_data", "multi_modal_data"), SENT_ELSEWHERE),
        **dict.fromkeys(("functions", "function_call"), "use tools and tool_choice"),
        **dict.fromkeys(("modalities", "audio"), "answers are text"),
        **dict.fromkeys(
            (
                *("typical_p", "tfs_z", "top_a", "top_n_sigma", "mirostat", "mirostat_mode", "dynatemp_range"),
                *("dry_multiplier", "xtc_probability", "use_beam_search", "length_penalty", "allowed_token_ids"),
                *("bad_words", "logits_processors", "smoothing_factor", "epsilon_cutoff", "eta_cutoff"),
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
        **dict.fromkeys(
            ("chat_template", "template", "raw", "context", "prompt_embeds", "mm_processor_kwargs"), OUR_TEMPLATE
        ),
        **dict.fromkeys(("truncate_prompt_tokens", "prompt_truncate_len"), "shorten the prompt"),
        **dict.fromkeys(("lora", "adapters", "lora_request", "adapter_id"), "there are no adapters"),
        "web_search_options": "there is no search",
    }
    NEUTRAL: ClassVar[Mapping[str, Any]] = {
        **dict.fromkeys(("typical_p", "tfs_z", "length_penalty", "repeat_penalty", "encoder_repetition_penalty"), 1),
        **dict.fromkeys(("top_n_sigma", "truncate_prompt_tokens", "n_predict", "num_predict"), -1),
        **{"modalities": ["text"], "function_call": "none", "guidance_scale": 1},
    }

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    ignore_eos: bool | None = None  # goes on to the limit, whatever the model says
    min_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None  # before it may end by itself
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


class Completion(BaseModel, Generic[C]):
    """All choices, or a chunk of one."""

    id: str
    object: str  # "chat.completion", "chat.completion.chunk" or "text_completion"
    created: int
    model: str
    choices: list[C]
    usage: RequestUsage | None = None
