"""What an answer is handed out as: chunks while it is generated, one result when it is whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from g3n_mlx.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts and times of one answer; tokens per second are averages."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt's, found in the cache of the conversation before
    completion_tokens: int
    time_to_first_token_s: float
    avg_prompt_tok_per_sec: float  # of the tokens that were not cached
    avg_compl_tok_per_sec: float  # 0 for an answer of one token
    peak_memory_bytes: int  # of the process or of the device, whichever is more
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of the drafted ones
    tokens_per_call: float = 0.0  # behind the first one: 1 without drafts; 0 for an answer of one token


@dataclass(frozen=True, slots=True)
class Chunk:
    """One token of an answer, or its end: token None, with the reason and the usage."""

    text: str  # may be empty: half a character, or what may become a stop string
    token: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    finish_reason: str | None = None  # "stop" or "length", in the last chunk only
    stop: str | None = None  # the stop string that ended it, there too
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer. A stop id that ended it is not among the tokens."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop", or "length" where max_tokens or the end of the context truncated it
    usage: Usage
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    parsed: Any = None  # the object of `schema=Model`, a pydantic model; None where the text does not validate

    def _repr_markdown_(self) -> str:
        """What a notebook shows: the answer, most of which are Markdown, and how it came about."""
        usage = self.usage
        facts = [f"{usage.completion_tokens} tokens"]
        if usage.avg_compl_tok_per_sec:
            facts.append(f"{usage.avg_compl_tok_per_sec:.1f} tokens/s")
        if self.finish_reason == "length":
            facts.append("truncated")
        return f"{self.text}\n\n---\n*{', '.join(facts)}*"

    @staticmethod
    def of(chunks: Sequence[Chunk], params: SamplingParams) -> "Result":
        """All chunks of an answer as one result."""
        tokens, end = chunks[:-1], chunks[-1]
        assert end.finish_reason is not None
        assert end.usage is not None
        logprobs = tuple(chunk.logprob for chunk in tokens if chunk.logprob is not None)
        top_logprobs = tuple(chunk.top_logprobs for chunk in tokens if chunk.top_logprobs is not None)
        return Result(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(chunk.token for chunk in tokens if chunk.token is not None),
            finish_reason=end.finish_reason,
            usage=end.usage,
            logprobs=logprobs if params.logprobs or params.top_logprobs else None,
            top_logprobs=top_logprobs if params.top_logprobs else None,
        )
