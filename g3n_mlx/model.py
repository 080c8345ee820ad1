"""Gemma3n: what `load` returns and users hold. Text in, text out, over the loop of generate.py."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from g3n_mlx.cache import Conversation
from g3n_mlx.checkpoint import Checkpoint
from g3n_mlx.config import ModelConfig
from g3n_mlx.generate import Timings, check_length, chunks, generate_tokens
from g3n_mlx.interface import Model, Step
from g3n_mlx.memory import peak_process_bytes
from g3n_mlx.prompt import Prompt, prepare
from g3n_mlx.sampling import SamplingParams
from g3n_mlx.tokenizer import Tokenizer

PromptLike = str | Sequence[int] | Sequence[Mapping[str, Any]] | Prompt


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts and times of one answer; tokens a second are averages."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt's, found in the cache of the conversation before
    completion_tokens: int
    time_to_first_token_s: float
    avg_prompt_tok_per_sec: float  # of the tokens that were not cached
    avg_compl_tok_per_sec: float  # 0 for an answer of one token
    peak_memory_bytes: int  # of the process or of the device, whichever is more


@dataclass(frozen=True, slots=True)
class Chunk:
    """One token of an answer, or its end: token None, with the reason and the usage."""

    text: str  # may be empty: half a character, or what may become a stop string
    token: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    finish_reason: str | None = None  # "stop" or "length", in the last chunk only
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer. A stop id that ended it is not among the tokens."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None


class Gemma3n:
    """A model ready to answer. Made by `g3n_mlx.load`.

    It keeps the cache of its last conversation, so that the next turn only runs what is new. Not for several
    threads at once; two streams that overlap in one thread do not disturb each other.
    """

    def __init__(
        self,
        model: Model,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        *,
        name: str,
        slice_name: str | None,
        backend: str,
        device: str,
        generation_config: Mapping[str, Any],
    ) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.name = name
        self.backend = backend
        self.device = device
        self.slice_name = slice_name
        self.sampling_defaults = SamplingParams.published_defaults(generation_config)
        eos = generation_config.get("eos_token_id")
        eos = self.config.eos_token_ids if eos is None else eos
        self.eos_token_ids = frozenset(eos if isinstance(eos, Sequence) else [eos])
        self._model = model
        self._conversation: Conversation | None = None

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's config, after the slice."""
        return self.checkpoint.config

    def prepare(self, messages: str | Sequence[Mapping[str, Any]]) -> Prompt:
        """The prompt that asks for an answer to OpenAI-style messages; a string is one user message.

        Raises ValueError naming the message or part that can't be used.
        """
        return prepare(messages, self.tokenizer)

    def generate(self, prompt: PromptLike, **sampling: Any) -> Result:
        """The answer to messages, to a string as one user message, or to token ids taken as they are.

        sampling: fields of SamplingParams; what is not given comes from generation_config.json.
        Raises ValueError on a bad prompt or option, PromptTooLong when the prompt exceeds the context.
        """
        answer = list(self.stream(prompt, **sampling))
        tokens, end = answer[:-1], answer[-1]
        assert end.finish_reason is not None
        assert end.usage is not None
        wanted = bool(sampling.get("logprobs")) or bool(sampling.get("top_logprobs"))
        return Result(
            text="".join(chunk.text for chunk in answer),
            token_ids=tuple(chunk.token for chunk in tokens if chunk.token is not None),
            finish_reason=end.finish_reason,
            usage=end.usage,
            logprobs=tuple(chunk.logprob for chunk in tokens if chunk.logprob is not None) if wanted else None,
            top_logprobs=tuple(chunk.top_logprobs for chunk in tokens if chunk.top_logprobs is not None)
            if sampling.get("top_logprobs")
            else None,
        )

    def stream(self, prompt: PromptLike, **sampling: Any) -> Generator[Chunk, None, None]:
        """The answer as it comes: one chunk a token, then a last one with usage. Closing it stops the generation.

        Prompt, options and errors as in `generate`; they are checked in this call, not at the first chunk.
        """
        given = {name: value for name, value in sampling.items() if value is not None}
        params = SamplingParams(**{**self.sampling_defaults, **given})
        params.check_vocabulary(self.config.text.vocab_size)
        prepared = self._prompt(prompt)
        check_length(len(prepared.token_ids), 1, self.config.text.max_position_embeddings)
        return self._stream(prepared, params)

    def logits(self, prompt: PromptLike) -> np.ndarray:
        """Logits after every token of a prompt, float32 [T, V], for scoring. Raises as `generate`."""
        ids = np.asarray(self._prompt(prompt).token_ids, dtype=np.int64)
        check_length(len(ids), 0, self.config.text.max_position_embeddings)
        cache = self._model.make_cache()
        spans = chunks(0, len(ids), (), SamplingParams().prefill_step_size)
        return np.concatenate([self._model.logits(ids[a:b], cache) for a, b in spans])

    def reset(self) -> None:
        """Forgets the cached conversation and frees its memory."""
        self._conversation = None

    def _prompt(self, prompt: PromptLike) -> Prompt:
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, str) or any(isinstance(entry, Mapping) for entry in prompt):
            return self.prepare(prompt)  # pyright: ignore[reportArgumentType]
        ids = tuple(int(token_id) for token_id in prompt)  # pyright: ignore[reportArgumentType]
        vocab_size = self.config.text.vocab_size
        wrong = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
        if not ids or wrong:
            found = f"the ids {wrong[:5]}" if wrong else "no ids"
            raise ValueError(f"a prompt of token ids has {found}, expected ids from 0 to {vocab_size - 1}")
        return Prompt(ids, (len(ids),))

    def _stream(self, prompt: Prompt, params: SamplingParams) -> Generator[Chunk, None, None]:
        # Taken out while in use: what breaks off inside a model call leaves a cache nobody can trust.
        conversation, self._conversation = self._conversation or Conversation(self._model.make_cache()), None
        try:
            yield from self._answer(conversation, prompt, params)
        except GeneratorExit:
            self._conversation = conversation  # closed between two tokens
            raise
        self._conversation = conversation

    def _answer(
        self, conversation: Conversation, prompt: Prompt, params: SamplingParams
    ) -> Generator[Chunk, None, None]:
        timings = Timings()
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        decoder, stops = self.tokenizer.stream(), StopStrings(params.stop)
        steps = generate_tokens(
            self._model,
            conversation,
            prompt.token_ids,
            prompt.borders,
            params,
            stop_ids,
            self.config.text.max_position_embeddings,
            timings,
        )
        for step in steps:
            yield Chunk(stops.push(decoder.push(int(step))), int(step), *_logprobs(step, params))
            if stops.found:
                break
        rest = "" if stops.found else stops.push(decoder.finish()) + stops.finish()
        reason = "length" if timings.at_limit and not stops.found else "stop"
        yield Chunk(rest, finish_reason=reason, usage=self._usage(timings))

    def _usage(self, timings: Timings) -> Usage:
        computed = timings.prompt_tokens - timings.cached_tokens
        decoded = timings.completion_tokens - 1
        return Usage(
            prompt_tokens=timings.prompt_tokens,
            cached_tokens=timings.cached_tokens,
            completion_tokens=timings.completion_tokens,
            time_to_first_token_s=timings.prefill_s,
            avg_prompt_tok_per_sec=computed / timings.prefill_s,
            avg_compl_tok_per_sec=decoded / timings.decode_s if decoded > 0 and timings.decode_s else 0.0,
            peak_memory_bytes=max(peak_process_bytes(), self._model.peak_memory_bytes()),
        )


class StopStrings:
    """Passes text on, up to the first stop string; holds back what may yet become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is safe to show after this piece."""
        self._held += text
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            shown, self._held = self._held[: min(starts)], ""
            return shown
        longest = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        safe = len(self._held) - longest
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def finish(self) -> str:
        """What was held back, once nothing more comes."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _logprobs(step: Step, params: SamplingParams) -> tuple[float | None, tuple[tuple[int, float], ...] | None]:
    top = tuple(step.top_logprobs(params.top_logprobs)) if params.top_logprobs else None
    return (step.logprob() if params.logprobs or params.top_logprobs else None), top
