"""The models and their tokens: OpenAI's list, and vLLM's tokenize and detokenize."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, Field

from g3n_mlx.server.schemas.base import OUR_TEMPLATE, RequestBody
from g3n_mlx.server.schemas.generation import TokenId
from g3n_mlx.server.schemas.messages import MAX_MESSAGES, Message


class TokenizeRequest(RequestBody):
    """POST /v1/tokenize: a text, or messages as the model would read them."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("chat_template", "tools", "documents"), OUR_TEMPLATE),
    }

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    continue_final_message: bool = False  # as in chat completions
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
