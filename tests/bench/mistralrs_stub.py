"""Stands in for the package mistralrs: what of it the benchmark uses, with the answers that version 0.9.5 gives.

The last chunk has the text of tokens that were no whole letters, so there may be fewer chunks than tokens.
"""

import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class MultimodalArchitecture(Enum):
    Gemma3n = "Gemma3n"


class Which:
    @dataclass
    class MultimodalPlain:
        model_id: str
        arch: MultimodalArchitecture | None = None


@dataclass
class ChatCompletionRequest:
    messages: list[dict[str, str]]
    model: str
    max_tokens: int
    temperature: float
    stream: bool
    ignore_eos: bool


@dataclass
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Chunk:
    choices: list[Any]
    usage: Usage | None = None


class Runner:
    def __init__(self, which: Any, *, in_situ_quant: str | None, prefix_cache_n: int, jinja_explicit: str) -> None:
        os.write(1, b"INFO mistralrs_core: loading\n")  # as its logs go, past Python
        assert Path(which.model_id).is_dir()
        assert (in_situ_quant, prefix_cache_n) == (None, 0)
        assert "messages" in Path(jinja_explicit).read_text()

    def send_chat_completion_request(self, asked: ChatCompletionRequest) -> Any:
        assert asked.stream
        assert asked.ignore_eos
        prompt_tokens = 1 + len(asked.messages[0]["content"].split())
        chunks = max(asked.max_tokens - 1, 1)
        for index in range(chunks):
            yield Chunk([], Usage(prompt_tokens, asked.max_tokens) if index == chunks - 1 else None)
