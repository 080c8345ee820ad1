"""Gemma3n: what `load` returns and users hold. Messages in, text out, over the loop of generate.py."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self, Unpack

import numpy as np

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.engine.conversation import Conversation
from g3n_mlx.engine.generate import Constraint, Timings, check_length, chunks, generate_tokens, soft_tokens
from g3n_mlx.engine.grammar import Grammars
from g3n_mlx.engine.options import AnswerOptions, constraint_of, parsed, with_media
from g3n_mlx.engine.results import Chunk, Result, Usage
from g3n_mlx.engine.scores import TokenScore, token_scores
from g3n_mlx.engine.soft_tokens import EmbeddedMedia
from g3n_mlx.engine.stops import StopStrings
from g3n_mlx.failures import size_in_words
from g3n_mlx.interface import Model, Step
from g3n_mlx.media.audio import Audio
from g3n_mlx.media.image import Image
from g3n_mlx.media.opener import MediaOpener
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.memory import peak_process_bytes, return_freed_memory
from g3n_mlx.prompt.preparer import ANY_MEDIA, Preparer
from g3n_mlx.prompt.prompt import Prompt, of_token_ids
from g3n_mlx.prompt.tokenizer import Tokenizer
from g3n_mlx.sampling import SamplingOptions, SamplingParams, check_option_names

ACTIVATION_BYTES = {"bfloat16": 2, "float32": 4}
# Rows of logits at once in `score`: 64 MiB at the released vocabulary, in float32.
SCORED_ROWS = 64

PromptLike = str | Sequence[int] | Sequence[Mapping[str, Any]] | Prompt


class Gemma3n:
    """A model ready to answer. Made by `g3n_mlx.load`.

    It keeps the cache of its last conversation, so that the next turn only runs what is new. Not for several
    threads at once, but for its `preparer`; two streams that overlap in one thread do not disturb each other.
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
        dtype: str,
        generation_config: Mapping[str, Any],
    ) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.name = name
        self.backend = backend
        self.device = device
        self.dtype = dtype  # of the activations
        self.slice_name = slice_name
        self.sampling_defaults = SamplingParams.published_defaults(generation_config)
        eos = generation_config.get("eos_token_id")
        if eos is None:  # where neither file says it, what ends a turn of the chat template
            eos = self.config.eos_token_ids or [tokenizer.id_of("<eos>"), tokenizer.id_of("<end_of_turn>")]
        self.eos_token_ids = frozenset(eos if isinstance(eos, Sequence) else [eos])
        self._network: Model | None = model
        opener = MediaOpener(checkpoint.folder, checkpoint.config)
        self.preparer = Preparer(tokenizer, opener, self.config.text.max_position_embeddings)
        self._embedded = EmbeddedMedia(model)
        self._conversation: Conversation | None = None

    def __repr__(self) -> str:
        bits = sorted({stored.bits for stored in self.checkpoint.quantizations.values()})
        memory = self.checkpoint.nbytes_in_memory(ACTIVATION_BYTES[self.dtype])
        facts = [
            self.name,
            *([] if self.slice_name is None else [f"slice {self.slice_name}"]),
            f"{' and '.join(map(str, bits))} bits" if bits else "not quantized",
            f"{self.backend} on {self.device}",
            self.dtype,
            "closed" if self._network is None else f"{size_in_words(memory)} of weights in memory",
        ]
        return f"Gemma3n({', '.join(facts)})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the weights, the towers and all caches: nothing can be prepared or generated any more.

        Later calls raise ValueError, and so do streams that are under way. Closing twice does no harm.
        """
        if self._network is not None:
            self.reset()
            self._embedded.clear()
            self._network.close()
            self._network = None
            self.checkpoint.close()
            vars(self).pop("grammars", None)
            return_freed_memory()

    @property
    def _model(self) -> Model:
        """What runs; raises ValueError after `close`."""
        if self._network is None:
            raise ValueError(f"the model {self.name} has been closed: load it again")
        return self._network

    def _check_open(self) -> None:
        """Raises ValueError after `close`."""
        _ = self._model

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's config, after the slice."""
        return self.checkpoint.config

    def prepare(self, messages: str | Sequence[Mapping[str, Any]], policy: MediaPolicy = ANY_MEDIA) -> Prompt:
        """The prompt that asks for an answer to OpenAI-style messages; a string is one user message.

        Media are fetched as the policy allows, opened and brought to the model's sizes here; the model does not run.
        Raises ValueError naming the message or part that can't be used, PromptTooLong when no context holds the text.
        """
        self._check_open()
        return self.preparer.prepare(messages, policy)

    def encode_image(self, image: Any) -> np.ndarray:
        """The soft tokens of an `Image`, or of what makes one, as they enter the text model: float32 [n, D].

        Raises ValueError when it can't be opened or the checkpoint has no vision tower.
        """
        return self._encoded(image if isinstance(image, Image) else Image(image))

    def encode_audio(self, waveform: Any, rate: int | None = None) -> np.ndarray:
        """The soft tokens of a waveform [samples] or [samples, channels] of a rate in Hz, or of an `Audio`.

        float32 [n, D]: the config's count for every clip; a sound longer than a clip is several of them.
        Raises ValueError when it can't be used or the checkpoint has no audio tower.
        """
        return self._encoded(waveform if isinstance(waveform, Audio) else Audio(waveform, rate))

    def split_audio(self, audio: Audio, policy: MediaPolicy = ANY_MEDIA) -> list[tuple[float, float, Audio]]:
        """A sound as clips that the model hears at once, cut at quiet places: start and end in seconds, and the clip.

        Raises ValueError when it can't be opened or the checkpoint has no audio tower.
        """
        self._check_open()
        return self.preparer.opener.split_audio(audio, policy)

    def drop_towers(self) -> None:
        """Frees the vision and the audio tower and what they encoded; the next image or clip reads them again."""
        self._model.drop_towers()
        self._embedded.clear()
        return_freed_memory()

    def generate(
        self, prompt: PromptLike, params: SamplingParams | None = None, **options: Unpack[AnswerOptions]
    ) -> Result:
        """The answer to messages, to a string as one user message, or to token ids taken as they are.

        options: fields of SamplingParams, over `params` or else over those of generation_config.json; `schema` (a
        pydantic model class or a JSON schema), `regex` or `lark`, which the answer follows; `images`, `audio` and
        `videos`, one or a list of each, which go before a string prompt in that order (engine/options.py).
        With a pydantic model `Result.parsed` is the object, or None where the text does not validate, as after
        max_tokens truncated it (finish_reason "length").
        Raises ValueError on a bad prompt or option, PromptTooLong when the prompt exceeds the context.
        """
        prepared, sampling, constraint = self._request(prompt, params, options)
        result = Result.of(list(self._stream(prepared, sampling, constraint)), sampling)
        return replace(result, parsed=parsed(result.text, options.get("schema")))

    def stream(
        self, prompt: PromptLike, params: SamplingParams | None = None, **options: Unpack[AnswerOptions]
    ) -> Generator[Chunk, None, None]:
        """The answer as it comes: one chunk per token, then a last one with usage. Closing it stops the generation.

        Prompt, options and errors as in `generate`; they are checked in this call, not at the first chunk.
        """
        return self._stream(*self._request(prompt, params, options))

    def sampling_params(
        self, params: SamplingParams | None = None, **overrides: Unpack[SamplingOptions]
    ) -> SamplingParams:
        """The given options over `params`, or else over the checkpoint's own; None is not given.

        Raises ValueError on one that does not exist or is out of range.
        """
        check_option_names(overrides, SamplingOptions.__annotations__)
        if params is not None and not isinstance(params, SamplingParams):
            raise ValueError(f"params is {params!r:.80}, expected a SamplingParams; single options go by keyword")
        given = {name: value for name, value in overrides.items() if value is not None}
        base = SamplingParams(**self.sampling_defaults) if params is None else params
        merged = replace(base, **given)
        merged.check_vocabulary(self.config.text.vocab_size)
        return merged

    @cached_property
    def grammars(self) -> Grammars:
        """Makes constraints for this model's answers. The first use takes seconds at the released vocabulary.

        Raises ImportError when llguidance is not installed.
        """
        return Grammars(self.tokenizer, self.config.text.vocab_size, self.eos_token_ids)

    def count_tokens(self, prompt: PromptLike) -> int:
        """How many tokens a prompt has, the template's and those of media included; the model does not run.

        Raises as `generate`, but not when the prompt exceeds the context.
        """
        return len(self._prompt(prompt).token_ids)

    def logits(self, prompt: PromptLike) -> np.ndarray:
        """Logits after every token of a prompt, float32 [T, V], for scoring. Raises as `generate`."""
        return np.concatenate(list(self.logit_chunks(prompt)))

    def logit_chunks(
        self, prompt: PromptLike, start: int = 0, rows: int = SamplingParams().prefill_step_size
    ) -> Iterator[np.ndarray]:
        """Logits after the tokens from `start` on, float32 [n <= rows, V] at a time: E4B's take 1 MiB a row.

        Raises as `generate`, at the first chunk.
        """
        prepared = self._prompt(prompt)
        ids = np.asarray(prepared.token_ids, dtype=np.int64)
        check_length(prepared, 0, self.config.text.max_position_embeddings)
        cache = self._model.make_cache()
        for a, b in chunks(0, start, (), SamplingParams().prefill_step_size):
            self._model.prefill(ids[a:b], cache, None, soft_tokens(prepared.media, a, b, self._embedded))
        for a, b in chunks(start, len(ids), (start,), rows):
            yield self._model.logits(ids[a:b], cache, soft_tokens(prepared.media, a, b, self._embedded))

    def score(self, prompt: Prompt, top_logprobs: int = 0) -> Iterator[list[TokenScore]]:
        """Log probabilities of a prompt's own tokens, part by part. Raises PromptTooLong before anything runs."""
        ids = np.asarray(prompt.token_ids, dtype=np.int64)
        check_length(prompt, 0, self.config.text.max_position_embeddings)
        cache = self._model.make_cache()
        last: np.ndarray | None = None
        for a, b in chunks(0, len(ids), prompt.borders, SCORED_ROWS):
            logits = self._model.logits(ids[a:b], cache, soft_tokens(prompt.media, a, b, self._embedded))
            before = logits[:-1] if last is None else np.concatenate([last, logits[:-1]])
            last = logits[-1:]
            scores = token_scores(ids[b - len(before) : b], before, top_logprobs)
            yield scores if a else [TokenScore(int(ids[0]), None, None), *scores]

    def conversation(self) -> Conversation:
        """An empty cache, for `answer`."""
        return Conversation(self._model.make_cache())

    def answer(
        self,
        conversation: Conversation,
        prompt: Prompt,
        params: SamplingParams,
        constraint: Constraint | None = None,
    ) -> Generator[Chunk | None, None, None]:
        """The answer as it comes, over a cache of the caller's: None for every part of the prompt that was read.

        What a server takes in turns for several callers. Broken off between two of them the conversation stays good.
        Raises PromptTooLong before anything runs.
        """
        timings = Timings()
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        decoder, stops = self.tokenizer.stream(), StopStrings(params.stop)
        steps = generate_tokens(
            self._model,
            conversation,
            prompt,
            params,
            stop_ids,
            self.config.text.max_position_embeddings,
            timings,
            self._embedded,
            constraint,
        )
        for step in steps:
            if step is None:
                yield None
                continue
            yield Chunk(stops.push(decoder.push(int(step))), int(step), *_logprobs(step, params))
            if stops.found:
                break
        rest = "" if stops.found else stops.push(decoder.finish()) + stops.finish()
        reason = "length" if timings.at_limit and not stops.found else "stop"
        yield Chunk(rest, finish_reason=reason, usage=self._usage(timings))

    def reset(self) -> None:
        """Forgets the cached conversation and frees its memory."""
        self._conversation = None

    def _request(
        self, prompt: PromptLike, params: SamplingParams | None, options: AnswerOptions
    ) -> tuple[Prompt, SamplingParams, Constraint | None]:
        """What `answer` takes, made of what `generate` takes."""
        check_option_names(options, AnswerOptions.__annotations__)
        overrides: Any = {name: options[name] for name in options if name in SamplingOptions.__annotations__}
        sampling = self.sampling_params(params, **overrides)
        constraint = constraint_of(options, lambda: self.grammars)
        prepared = self._prompt(with_media(prompt, options))
        check_length(prepared, 1, self.config.text.max_position_embeddings)
        return prepared, sampling, constraint

    def _prompt(self, prompt: Any) -> Prompt:
        self._check_open()
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, str) or (isinstance(prompt, Sequence) and any(isinstance(e, Mapping) for e in prompt)):
            return self.prepare(prompt)
        return of_token_ids(prompt, self.config.text.vocab_size)

    def _encoded(self, source: Image | Audio) -> np.ndarray:
        self._check_open()
        features = [piece for piece in self.preparer.opener.open(source, ANY_MEDIA) if not isinstance(piece, str)]
        return np.concatenate([self._model.rows(self._embedded(piece)) for piece in features])

    def _stream(
        self, prompt: Prompt, params: SamplingParams, constraint: Constraint | None
    ) -> Generator[Chunk, None, None]:
        # Taken out while in use: what breaks off inside a model call leaves a cache nobody can trust.
        conversation, self._conversation = self._conversation or self.conversation(), None
        try:
            for chunk in self.answer(conversation, prompt, params, constraint):
                if chunk is not None:
                    yield chunk
                self._check_open()
        except GeneratorExit:
            self._conversation = conversation  # closed between two tokens
            raise
        self._conversation = conversation

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


def _logprobs(step: Step, params: SamplingParams) -> tuple[float | None, tuple[tuple[int, float], ...] | None]:
    top = tuple(step.top_logprobs(params.top_logprobs)) if params.top_logprobs else None
    return (step.logprob() if params.logprobs or params.top_logprobs else None), top
