"""Completions: text or ids in, text out."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from g3n_mlx.server.schemas.generation import MAX_TOP_LOGPROBS, GenerationRequest, TokenId, Tokens

MAX_PROMPTS = 256  # of one request

# The first wrong value ends the check: an error for each would make the response far larger than a large body.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: text in, text out, without the chat template."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **GenerationRequest.REFUSED,
        **dict.fromkeys(
            ("response_format", "grammar", "tools", "messages", "continue_final_message"), "/v1/chat/completions has it"
        ),
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
