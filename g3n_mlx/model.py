"""Gemma3n: what `load` returns and users hold. Messages in, text out, over the engine."""

import asyncio
import copy
import secrets
import threading
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np

from g3n_mlx.checkpoint.adapter import changes_of
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.hub import resolve_adapter
from g3n_mlx.config.model import ModelConfig, token_ids
from g3n_mlx.engine.answer import Answer, Progress, chunks_of
from g3n_mlx.engine.cache import Cache
from g3n_mlx.engine.conversation import Conversation
from g3n_mlx.engine.drafting import How
from g3n_mlx.engine.drafts import MODES
from g3n_mlx.engine.grammar import Grammars
from g3n_mlx.engine.many import answers
from g3n_mlx.engine.nested import Nested
from g3n_mlx.engine.options import AnswerOptions, constraint_of, parsed, with_media
from g3n_mlx.engine.results import Chunk, Result
from g3n_mlx.engine.runner import Runner
from g3n_mlx.engine.scores import PromptReader, TokenScore
from g3n_mlx.engine.sequence import Constraint, TokenSequence, check_length, prefill_spans
from g3n_mlx.engine.soft_tokens import EmbeddedMedia
from g3n_mlx.engine.transcript import CLIP_TOKENS, Segment, Transcript, question, segments
from g3n_mlx.failures import BadValue, size_in_words
from g3n_mlx.interface import Model
from g3n_mlx.matformer.adapted import AdapterLike, named_adapters
from g3n_mlx.matformer.plan import SlicePlan, check_plan, find_slice, plan_slice
from g3n_mlx.matformer.table import Slice, slices_for
from g3n_mlx.matformer.view import can_slice, sliced
from g3n_mlx.media.audio import Audio
from g3n_mlx.media.image import Image
from g3n_mlx.media.opener import MediaOpener
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.memory import peak_process_bytes, return_freed_memory
from g3n_mlx.prompt.own_template import OwnTemplate
from g3n_mlx.prompt.preparer import ANY_MEDIA, Preparer
from g3n_mlx.prompt.prompt import Prompt, of_token_ids
from g3n_mlx.prompt.tokenizer import Tokenizer
from g3n_mlx.sampling import SamplingOptions, SamplingParams, check_option_names

ACTIVATION_BYTES = {"bfloat16": 2, "float32": 4}
# Answers in progress at once, of many prompts.
PARALLEL = 4
# Of the prompt that warms up: more than one row, as prompts have.
WARM_UP_TOKENS = 16

# Prompt, sampling and constraint of an answer, how it is drafted, and who is told how far the prompt is read.
Request = tuple[Prompt, SamplingParams, Constraint | None, str, Progress | None]
PromptLike = str | Sequence[int] | Sequence[Mapping[str, Any]] | Prompt


class Gemma3n:
    """A model ready to answer. Made by `g3n_mlx.load`.

    It keeps the cache of its last conversation, so that the next turn only runs what is new. It may be used from any
    thread, and from several at once: their calls of the model queue up, so overlapping streams go on step by step.
    """

    def __init__(
        self,
        runner: Runner,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        *,
        name: str,
        slice_name: str | None,
        backend: str,
        device: str,
        dtype: str,
        generation_config: Mapping[str, Any],
        own_template: OwnTemplate | None = None,
        adapters: Sequence[str] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.name = name
        self.backend = backend
        self.device = device
        self.dtype = dtype  # of the activations
        self.slice_name = slice_name
        self.adapters = tuple(adapters)  # as they were named
        self.sampling_defaults, eos = _published(generation_config, checkpoint)
        # Where neither file says it, what ends a turn of the chat template.
        named = eos or self.config.eos_token_ids or [tokenizer.id_of("<eos>"), tokenizer.id_of("<end_of_turn>")]
        self.eos_token_ids = frozenset(named)
        self.plan: SlicePlan | None = None  # of the slice, where `slice` took it from another model
        self.runner = runner  # of the network, in the thread that it lives in
        opener = MediaOpener(checkpoint.folder, checkpoint.config)
        self.preparer = Preparer(tokenizer, opener, self.config.text.max_position_embeddings, own_template)
        self._embedded = EmbeddedMedia(runner)
        self._drafting_slices: dict[str, Gemma3n] = {}  # by name
        self._nested: dict[tuple[str, tuple[bool, ...]], Nested] = {}  # they, by what a draw takes
        self._conversation: Conversation | None = None
        self._conversation_lock = threading.Lock()

    def __repr__(self) -> str:
        bits = sorted({stored.bits for stored in self.checkpoint.quantizations.values()})
        memory = self.checkpoint.nbytes_in_memory(ACTIVATION_BYTES[self.dtype])
        facts = [
            self.name,
            *([] if self.slice_name is None else [f"slice {self.slice_name}"]),
            *([f"with {' and '.join(self.adapters)}"] if self.adapters else []),
            f"{' and '.join(map(str, bits))} bits" if bits else "not quantized",
            f"{self.backend} on {self.device}",
            self.dtype,
            "closed" if self.runner.closed else f"{size_in_words(memory)} of weights in memory",
        ]
        return f"Gemma3n({', '.join(facts)})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the weights, the towers and all caches: nothing can be prepared or generated any more.

        Later calls raise ValueError, and so do streams that are under way. Closing twice does no harm. Slices taken
        from it (`slice`) go on, each until it is closed itself: what they share is freed with the last of them.
        """
        if not self.runner.closed:
            self.reset()
            for small in self._drafting_slices.values():
                small.close()
            self.runner.close()
            self.runner.thread.call(self._embedded.leave)  # where it is filled, after the call that may be under way
            self.checkpoint.close()
            vars(self).pop("grammars", None)
            return_freed_memory()

    def _check_open(self) -> None:
        """Raises ValueError after `close`."""
        _ = self.runner.model

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's config, after the slice."""
        return self.checkpoint.config

    def slices(self, matformer_config: str | Path | None = None) -> list[Slice]:
        """What `slice` can be asked for by name: of the checkpoint's own matformer.csv, and the published slices.

        matformer_config: a CSV table whose slices are listed instead. Raises FileNotFoundError or ValueError.
        """
        table = slices_for(self.checkpoint.folder, None if matformer_config is None else Path(matformer_config))
        return [entry for entry in table if can_slice(self.config.text, self.checkpoint.quantizations, entry)]

    def slice(self, chosen: str | SlicePlan, *, matformer_config: str | Path | None = None) -> "Gemma3n":
        """A smaller model inside this one, over the same weights: it takes milliseconds, and memory for little more
        than its conversations.

        chosen: a slice's name or short name, as `slices` lists them, of matformer_config, a CSV table, where one is
        given; or a plan for this model's layers and widths. Both models answer independently, with caches of their own,
        and are closed each by itself (see `close`); calls of theirs queue up in the same thread.
        Raises ValueError for a slice that does not exist or can't be taken from this model.
        """
        if isinstance(chosen, SlicePlan):
            plan = chosen
            check_plan(self.config.text, plan)
        else:
            table = slices_for(self.checkpoint.folder, None if matformer_config is None else Path(matformer_config))
            plan = plan_slice(self.config.text, find_slice(chosen, table, self.config.text))
        runner, checkpoint = self.runner, sliced(self.checkpoint, plan)
        other = self._beside(runner.call(lambda: runner.model.slice(checkpoint, plan)), checkpoint)
        other.plan, other.slice_name = plan, plan.slice_name
        other._embedded = self._embedded.shared_with(other.runner)
        return other

    def adapted(self, adapter: AdapterLike) -> "Gemma3n":
        """The same model with an adapter, over the same weights: it takes memory for the adapter and conversations.

        adapter: as in `load`. Both models answer independently, and each is closed by itself, as slices are. An adapter
        of a tower has this model read it once more. Raises ValueError and the hub's errors.
        """
        other = self
        for name, weight in named_adapters(adapter).items():
            before, changes = other, changes_of(resolve_adapter(name), other.checkpoint, weight)
            checkpoint = before.checkpoint.changed(changes, beside=True)
            model = before.runner.call(lambda b=before, c=checkpoint, d=changes: b.runner.model.adapted(c, d))
            other = before._beside(model, checkpoint)
            other.adapters = (*before.adapters, name)
            shared = before._embedded.shared_with(other.runner)
            other._embedded = EmbeddedMedia(other.runner) if changes.reaches_towers else shared
            if before is not self:
                before.close()
        if other is self:
            raise BadValue("no adapter was given")
        return other

    def _beside(self, model: Model, checkpoint: Checkpoint) -> "Gemma3n":
        """Another model over weights of this one: tokenizer, template and media rules are the same."""
        other = copy.copy(self)
        other.checkpoint, other.runner = checkpoint, self.runner.of_slice(model)
        other._conversation, other._conversation_lock = None, threading.Lock()
        other._drafting_slices, other._nested = {}, {}
        return other

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

        float32 [n, D]: the config's count for every clip; longer audio is several clips.
        Raises ValueError when it can't be used or the checkpoint has no audio tower.
        """
        return self._encoded(waveform if isinstance(waveform, Audio) else Audio(waveform, rate))

    def split_audio(self, audio: Audio, policy: MediaPolicy = ANY_MEDIA) -> list[tuple[float, float, Audio]]:
        """Audio as clips that the model hears at once, cut at quiet places: start and end in seconds, and the clip.

        Raises ValueError when it can't be opened or the checkpoint has no audio tower.
        """
        self._check_open()
        return self.preparer.opener.split_audio(audio, policy)

    def transcribe(
        self, audio: Any, language: str | None = None, prompt: str | None = None, translate: bool = False
    ) -> Transcript:
        """The words of audio of any length: of an `Audio`, or of what makes one.

        language: what is spoken, as "German" or "de"; prompt: a hint at the words; translate: answer in English.
        Raises ValueError when it can't be opened or the checkpoint has no audio tower.
        """
        return Transcript(tuple(self.transcribe_stream(audio, language, prompt, translate)))

    def transcribe_stream(
        self,
        audio: Any,
        language: str | None = None,
        prompt: str | None = None,
        translate: bool = False,
        *,
        skip: int = 0,
        policy: MediaPolicy = ANY_MEDIA,
    ) -> Iterator[Segment]:
        """The words of audio clip by clip, in order; several clips are heard at once. See `transcribe`.

        skip: how many of the first clips are left out. policy: where the audio may come from, and how much of it.
        Errors come with the first segment.
        """
        clips = self.split_audio(audio if isinstance(audio, Audio) else Audio(audio), policy)[skip:]
        asked = question(language, prompt, translate=translate)
        yield from segments(
            clips, asked, lambda prompts: self.stream_many(prompts, temperature=0.0, max_tokens=CLIP_TOKENS)
        )

    def drop_towers(self) -> None:
        """Frees the vision and the audio tower and what they encoded; the next image or clip reads them again."""
        self.runner.call(self.runner.model.drop_towers)
        self.runner.call(self._embedded.clear)
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
        request = self._request(prompt, params, options)
        result = Result.of(list(self._stream(*request)), request[1])
        return replace(result, parsed=parsed(result.text, options.get("schema")))

    def stream(
        self, prompt: PromptLike, params: SamplingParams | None = None, **options: Unpack[AnswerOptions]
    ) -> Generator[Chunk, None, None]:
        """The answer as it comes: one chunk per token, then a last one with usage. Closing it stops the generation.

        Prompt, options and errors as in `generate`; they are checked in this call, not at the first chunk.
        """
        return self._stream(*self._request(prompt, params, options))

    async def agenerate(
        self, prompt: PromptLike, params: SamplingParams | None = None, **options: Unpack[AnswerOptions]
    ) -> Result:
        """`generate` for an event loop. Cancelling it stops the generation within one token."""
        request = await asyncio.to_thread(self._request, prompt, params, options)
        result = Result.of([chunk async for chunk in self._astream(*request)], request[1])
        return replace(result, parsed=parsed(result.text, options.get("schema")))

    async def astream(
        self, prompt: PromptLike, params: SamplingParams | None = None, **options: Unpack[AnswerOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """`stream` for an event loop; errors come with the first chunk. Cancelling it stops it within one token."""
        request = await asyncio.to_thread(self._request, prompt, params, options)
        async with aclosing(self._astream(*request)) as chunks:
            async for chunk in chunks:
                yield chunk

    def stream_many(
        self,
        prompts: Iterable[PromptLike],
        params: SamplingParams | None = None,
        *,
        parallel: int = PARALLEL,
        **options: Unpack[AnswerOptions],
    ) -> Iterator[tuple[int, Result | Exception]]:
        """The answers to many prompts as they are complete, each with the number of its prompt; errors in their place.

        Each is the answer that it would get alone, prompt i with the seed + i. `parallel` of them are in progress at a
        time, their next tokens drawn in one call of the model; a prompt is taken when there is room for it.
        """
        if not isinstance(parallel, int) or parallel < 1:
            raise BadValue(f"parallel is {parallel!r}, expected an integer of at least 1")
        if options.get("constraint") is not None:
            raise BadValue("a constraint is good for one answer: give many prompts a schema, regex or lark")
        base = self.sampling_params(params, **_sampling(options))
        samplings: dict[int, SamplingParams] = {}

        def begun() -> Iterator[tuple[int, Answer | Exception]]:
            for number, prompt in enumerate(prompts):
                samplings[number] = base if base.seed is None else replace(base, seed=base.seed + number)
                try:
                    request = self._request(prompt, samplings[number], _format(options))
                    yield number, self.answer(self.conversation(), *request)
                except (ValueError, OSError) as error:
                    yield number, error

        for number, outcome in answers(self.runner, begun(), parallel):
            if isinstance(outcome, Exception):
                yield number, outcome
                continue
            result = Result.of(outcome, samplings.pop(number))
            yield number, replace(result, parsed=parsed(result.text, options.get("schema")))

    def generate_many(
        self,
        prompts: Iterable[PromptLike],
        params: SamplingParams | None = None,
        *,
        parallel: int = PARALLEL,
        **options: Unpack[AnswerOptions],
    ) -> list[Result]:
        """The answers to many prompts, in their order; the first error of a prompt ends it. See `stream_many`."""
        found: dict[int, Result] = {}
        for number, result in self.stream_many(prompts, params, parallel=parallel, **options):
            if isinstance(result, Exception):
                raise result
            found[number] = result
        return [found[number] for number in sorted(found)]

    def sampling_params(
        self, params: SamplingParams | None = None, **overrides: Unpack[SamplingOptions]
    ) -> SamplingParams:
        """The given options over `params`, or else over the checkpoint's own; None is not given.

        Raises ValueError on one that does not exist or is out of range.
        """
        check_option_names(overrides, SamplingOptions.__annotations__)
        if params is not None and not isinstance(params, SamplingParams):
            raise BadValue(f"params is {params!r:.80}, expected a SamplingParams; single options go by keyword")
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
        reader = self.reader(prepared)
        for a, b in prefill_spans(0, start, (), SamplingParams().prefill_step_size):
            reader.skip(a, b)
        for a, b in prefill_spans(start, len(prepared.token_ids), (start,), rows):
            yield reader.logits(a, b)

    def score(self, prompt: Prompt, top_logprobs: int = 0) -> Iterator[list[TokenScore]]:
        """Log probabilities of a prompt's own tokens, part by part. Raises PromptTooLong before anything runs."""
        yield from self.reader(prompt).scores(top_logprobs)

    def reader(self, prompt: Prompt) -> PromptReader:
        """What reads a prompt part by part. Raises PromptTooLong."""
        check_length(prompt, 0, self.config.text.max_position_embeddings)
        return PromptReader(self.runner, self.config.text, prompt, self._embedded)

    def conversation(self) -> Conversation:
        """An empty cache, for `answer`."""
        return Conversation(Cache(self.config.text, self.runner.model.kv_arrays))

    def answer(
        self,
        conversation: Conversation,
        prompt: Prompt,
        params: SamplingParams,
        constraint: Constraint | None = None,
        draft: str = "off",
        progress: Progress | None = None,
    ) -> Answer:
        """An answer that is yet to run, over a cache of the caller's: a task for the runner, alone or among others.

        draft: see `checked_draft`. Broken off between two of its wishes, the conversation
        stays good. Raises PromptTooLong.
        """
        model, text = self.runner.model, self.config.text
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        if params.seed is None and draft not in MODES:  # the slice has to draw by the same numbers
            params = replace(params, seed=secrets.randbits(64))
        how = self._how(draft, (params.greedy, params.top_k > 0, params.penalizes, constraint is not None))
        return Answer(
            TokenSequence(model, text, conversation, prompt, params, stop_ids, self._embedded, constraint, how),
            self.tokenizer.stream(),
            params,
            lambda: max(peak_process_bytes(), model.peak_memory_bytes()),
            progress,
        )

    def warm_up(self) -> None:
        """Starts on a short answer that nobody reads, and returns at once.

        What the first answer would wait for, GPU kernels that are compiled at their first use say, is done meanwhile.
        """

        def answered() -> None:
            params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
            answer = self.answer(
                self.conversation(), of_token_ids([0] * WARM_UP_TOKENS, self.config.text.vocab_size), params
            )
            while not answer.finished:
                self.runner.advance([answer])

        # Its failure is the first answer's as well, which reports it.
        self.runner.thread.submit(answered)

    def checked_draft(self, draft: object) -> str:
        """How tokens are drafted: "off", "auto", "lookup", or the name of a slice, which drafts where "auto" does not.

        It changes no text. Raises ValueError when it is none of them.
        """
        if draft in MODES or draft in self._drafting_slices:
            return str(draft)
        try:
            if not isinstance(draft, str):
                raise BadValue("it is no string")
            self._drafting_slices[draft] = self.slice(draft)
        except ValueError as error:
            modes = ", ".join(map(repr, MODES))
            raise BadValue(f"draft is {draft!r}, expected {modes} or the name of a slice: {error}") from None
        return draft

    def _how(self, draft: str, drawn: tuple[bool, ...]) -> How:
        """drawn: what a draw, and so a call, takes."""
        costs = self.runner.costs[drawn]
        for mode in MODES:
            if draft == mode:
                return How(mode, costs)
        small = self._drafting_slices[self.checked_draft(draft)]
        assert small.plan is not None
        if (draft, drawn) not in self._nested:
            owners = small.plan.kept_layers[: small.config.text.first_kv_shared_layer]
            self._nested[draft, drawn] = Nested(small.runner, owners, small.runner.costs[drawn])
        return How("auto", costs, self._nested[draft, drawn])

    def reset(self) -> None:
        """Forgets the cached conversation and frees its memory."""
        self._conversation = None

    def _request(self, prompt: PromptLike, params: SamplingParams | None, options: AnswerOptions) -> Request:
        """What `answer` takes, made of what `generate` takes."""
        check_option_names(options, AnswerOptions.__annotations__)
        draft = self.checked_draft(options.get("draft") or "off")
        sampling = self.sampling_params(params, **_sampling(options))
        constraint = constraint_of(options, lambda: self.grammars)
        prepared = self._prompt(with_media(prompt, options))
        check_length(prepared, 1, self.config.text.max_position_embeddings)
        return prepared, sampling, constraint, draft, options.get("progress")

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
        numpy = self.runner.model.numpy
        encoded = [self.runner.call(lambda piece=piece: numpy(self._embedded(piece))) for piece in features]
        return self.runner.checked(np.concatenate(encoded))

    def _stream(self, *request: *Request) -> Generator[Chunk, None, None]:
        with self._own_conversation() as conversation:
            answer = self.answer(conversation, *request)
            while not answer.finished:
                yield from chunks_of(*self.runner.advance([answer]))

    async def _astream(self, *request: *Request) -> AsyncGenerator[Chunk, None]:
        with self._own_conversation() as conversation:
            answer = self.answer(conversation, *request)
            while not answer.finished:
                for chunk in chunks_of(*await self.runner.advance_async([answer])):
                    yield chunk

    @contextmanager
    def _own_conversation(self) -> Generator[Conversation, None, None]:
        """The cached conversation, taken out while in use, or an empty one where another answer has it.

        It is kept when the answer is complete or was closed between two tokens. What breaks off inside a call of the
        model leaves a cache that nobody can trust.
        """
        with self._conversation_lock:
            taken, self._conversation = self._conversation, None
        conversation = taken or self.conversation()
        try:
            yield conversation
        except GeneratorExit:
            self._conversation = conversation
            raise
        self._conversation = conversation


def _published(generation_config: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[dict[str, Any], tuple[int, ...]]:
    """What generation_config.json says: options of sampling, and the ids that end an answer.

    Raises ValueError naming the key whose value can't be used.
    """
    where = str(checkpoint.folder / "generation_config.json")
    eos = generation_config.get("eos_token_id")
    ids = () if eos is None else token_ids(eos, "eos_token_id", checkpoint.config.text.vocab_size, where)
    defaults = SamplingParams.published_defaults(generation_config)
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise BadValue(f"{where}: {error}") from None
    return defaults, ids


def _sampling(options: AnswerOptions) -> Any:
    """The options that say how an answer is sampled."""
    return {name: options[name] for name in options if name in SamplingOptions.__annotations__}


def _format(options: AnswerOptions) -> Any:
    """The others: what it looks like, and media."""
    return {name: options[name] for name in options if name not in SamplingOptions.__annotations__}
