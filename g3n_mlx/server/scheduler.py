"""Which answers are in progress: each takes a step in every round, the others wait in a queue.

In a round everyone who decodes gets a token, or several of a draft, all in one call of the model, and one other a part
of its prompt; so a short question does not wait for a long answer to end, and what a request is given depends on its
own prompt alone.
Every answer reserves at its start what its cache can grow to, so that the caches stay below their limit; idle ones in
the prefix cache give way. Slices of the model are made when the first request for them starts, and take part in the
same rounds, with a call for each of them.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from g3n_mlx.engine.answer import Answer
from g3n_mlx.engine.conversation import Conversation
from g3n_mlx.engine.drafts import MODES
from g3n_mlx.engine.prefix_cache import PrefixCache
from g3n_mlx.engine.results import Chunk
from g3n_mlx.engine.runner import Failure, Rounds
from g3n_mlx.engine.scores import TokenScore
from g3n_mlx.engine.sequence import Constraint
from g3n_mlx.matformer.plan import SlicePlan
from g3n_mlx.model import Gemma3n
from g3n_mlx.prompt.prompt import Prompt
from g3n_mlx.sampling import SamplingParams
from g3n_mlx.server.metrics import Metrics
from g3n_mlx.server.shedding import Shedding

DONE: Final = object()


class Expired(Exception):
    """The request's time was over before its answer was complete."""


class Ended(Exception):
    """The scheduler has ended."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a request asks of the model: to score its prompt's tokens, to answer it, or first one, then the other."""

    prompt: Prompt
    params: SamplingParams | None  # None: no answer
    constraint: Constraint | None = None
    scored: int | None = None  # how many of the most likely tokens come with every score; None: no scores
    draft: bool = True  # whether tokens may be drafted, as the server does it

    def tokens(self, context_tokens: int) -> int:
        """The most tokens that its cache will hold."""
        answer_tokens = 0 if self.params is None else self.params.max_tokens or context_tokens
        return min(len(self.prompt.token_ids) + answer_tokens, context_tokens)


@dataclass(slots=True, eq=False)
class Served:
    """Which model answers a request: the one that it named, or what the scheduler chooses when it starts."""

    model_id: str = ""  # as the response names it
    slice: str | None = None  # by short name, or an adapter by name; None: the model as it was loaded
    is_open: bool = False  # whether the scheduler may still choose a smaller slice


@dataclass(slots=True, eq=False)
class Job:
    """A task on its way through the scheduler. `stopped` may be set by any thread, the rest is the scheduler's."""

    task: Task
    deliver: Callable[[Any], None]  # given every step, and at the end DONE or an exception; raises nothing
    arrived: float  # time.monotonic()
    deadline: float
    request: Any = None  # what it belongs to; several jobs may belong to one
    served: Served = field(default_factory=Served)  # the same object for all jobs of a request
    stopped: bool = False
    queued: float = 0.0  # time.monotonic()


@dataclass(slots=True, eq=False)
class Running:
    """A job in progress."""

    job: Job
    model: Gemma3n
    reserved_bytes: int
    scores: Iterator[list[TokenScore]] | None = None  # None: none were asked for, or all are delivered
    answer: Answer | None = None
    last_token: float | None = None  # time.monotonic() of its last token

    @property
    def decoding(self) -> bool:
        """Whether its next step is a token; else it is a part of a prompt."""
        return self.scores is None and self.answer is not None and self.answer.decoding

    @property
    def conversation(self) -> Conversation | None:
        """The cache of its answer."""
        return None if self.answer is None else self.answer.sequence.conversation


class Scheduler:
    """Runs the jobs of a model, in a thread of its own."""

    def __init__(
        self,
        model: Gemma3n,
        *,
        parallel: int,
        cache_bytes: int,
        metrics: Metrics,
        draft: str = "auto",
        slices: Mapping[str, SlicePlan] | None = None,
        shedding: Shedding | None = None,
        adapted: Mapping[str, Gemma3n] | None = None,
    ) -> None:
        """The model answers once here: proof that it can, and the measure of what caches will take.

        draft: see Gemma3n.checked_draft. slices: what may be asked for, by short name. shedding: chooses one of them
        for requests that leave it open. adapted: the model with adapters, by name; they are closed with it.
        """
        self._model = model
        self._slices, self._shedding = slices or {}, shedding
        self._models: dict[str | None, Gemma3n] = {None: model}  # and the slices in use, and those with adapters
        self._models.update(adapted or {})
        self._parallel = parallel
        self._cache_bytes = cache_bytes
        self._metrics = metrics
        self._draft = model.checked_draft(draft)
        self._size = measured_cache(model)
        self._prefixes = PrefixCache(lambda name: self._models[name].conversation())
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._closing = self._ended = False
        self._started: dict[int, float] = {}  # when a request whose jobs wait had one started, by its id
        self._rounds: Rounds[Running] = Rounds(lambda running: running.decoding, lambda running: running.model)
        self._thread = threading.Thread(target=self._live, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs will be answered."""
        return self._thread.is_alive() and not self._closing

    @property
    def running(self) -> int:
        """How many jobs are in progress."""
        return len(self._rounds.tasks)

    def submit(self, job: Job) -> None:
        """Puts a job into the queue."""
        job.queued = time.monotonic()
        with self._changed:
            if not self._ended:
                self._waiting.append(job)
                self._changed.notify()
                return
        job.deliver(Ended())

    def close(self) -> None:
        """Finishes every job that was not stopped, and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _live(self) -> None:
        try:
            while self._work_or_end():
                self._admit()
                self._round()
        finally:
            self._end()

    def _work_or_end(self) -> bool:
        """Waits for something to do; False when there is nothing more to come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._rounds.tasks or self._closing)
            return bool(self._waiting or self._rounds.tasks)

    def _end(self) -> None:
        """Releases every waiter; there are none unless the thread failed."""
        with self._changed:
            self._ended = True
            jobs = [running.job for running in self._rounds.tasks] + list(self._waiting)
            self._waiting.clear()
        for job in jobs:
            job.deliver(Ended())
        for name, model in self._models.items():
            if name is not None:
                model.close()

    def _admit(self) -> None:
        """Starts waiting jobs, as many as the limits allow; one always.

        In their order, but a request of many prompts goes to the end of the queue with each that is started.
        """
        text = self._model.config.text
        context_tokens, window = text.max_position_embeddings, text.sliding_window
        with self._changed:
            self._drop_late_ones()
            admitted: list[Running] = []
            reserved = sum(running.reserved_bytes for running in self._rounds.tasks)
            known = {id(job.request) for job in self._waiting}
            self._started = {request: when for request, when in self._started.items() if request in known}
            while self._waiting and len(self._rounds.tasks) + len(admitted) < self._parallel:
                job = min(self._waiting, key=lambda job: self._started.get(id(job.request), job.arrived))
                task = job.task
                wanted = self._size.nbytes_at(task.tokens(context_tokens), window)
                if task.scored is not None and task.params is not None:  # scores have a cache of their own
                    wanted += self._size.nbytes_at(len(task.prompt.token_ids), window)
                if (self._rounds.tasks or admitted) and reserved + wanted > self._cache_bytes:
                    break
                reserved += wanted
                self._started[id(job.request)] = time.monotonic()
                self._waiting.remove(job)
                self._choose(job)
                admitted.append(Running(job, self._model, wanted))
            self._metrics.waiting.set(len(self._waiting))
        for running in admitted:
            self._rounds.tasks.append(running)
            self._begin(running)

    def _choose(self, job: Job) -> None:
        """Gives a request that left it open a slice, by what others had to wait."""
        served = job.served
        if self._shedding is None or not served.is_open:
            return
        chosen = self._shedding.chosen(time.monotonic() - job.queued)
        self._metrics.shed_level.set(self._shedding.level)
        served.is_open = False
        if chosen is not None:
            served.slice, served.model_id = chosen, f"{served.model_id}:{chosen}"
            self._metrics.shed.labels(chosen).inc()

    def _model_of(self, slice_name: str | None) -> Gemma3n:
        """The model, or a slice of it, which is made at its first use."""
        if slice_name not in self._models:
            assert slice_name is not None
            self._models[slice_name] = self._model.slice(self._slices[slice_name])
        return self._models[slice_name]

    def _draft_of(self, task: Task, slice_name: str | None) -> str:
        """How a task's tokens are drafted; a slice that drafts does so for the whole model alone."""
        if not task.draft:
            return "off"
        return self._draft if slice_name is None or self._draft in MODES else "auto"

    def _drop_late_ones(self) -> None:
        now = time.monotonic()
        for job in [job for job in self._waiting if job.stopped or now > job.deadline]:
            self._waiting.remove(job)
            job.deliver(Expired())

    def _begin(self, running: Running) -> None:
        task, of = running.job.task, running.job.served.slice
        try:
            model = running.model = self._model_of(of)
            if task.scored is not None:
                running.scores = model.score(task.prompt, task.scored)
            if task.params is not None:
                others = [one for one in self._rounds.tasks if one.model is model]
                running_ones = [one.conversation for one in others if one.conversation is not None]
                conversation = model.runner.call(lambda: self._prefixes.take(task.prompt.identity, running_ones, of))
                running.answer = model.answer(
                    conversation, task.prompt, task.params, task.constraint, self._draft_of(task, of)
                )
        except BaseException as error:  # noqa: BLE001 - whatever befalls one request, a panic in Rust say, others go on
            self._remove(running, error)
            return
        self._account()
        if running.scores is None and running.answer is None:  # nothing was asked for
            self._finish(running)

    def _round(self) -> None:
        """One step of every running job that decodes, and a part of the prompt of one that does not."""
        for running in list(self._rounds.tasks):
            if running.job.stopped or time.monotonic() > running.job.deadline:
                self._finish(running)
        for tasks in self._rounds.calls():
            (first, *_) = tasks
            if first.scores is not None:
                self._score(first)
                continue
            answers = [running.answer for running in tasks if running.answer is not None]
            for running, outcome in zip(tasks, first.model.runner.advance(answers), strict=True):
                self._hand_out(running, outcome)

    def _score(self, running: Running) -> None:
        assert running.scores is not None
        try:
            part = next(running.scores, None)
        except BaseException as error:  # noqa: BLE001 - whatever befalls one request, a panic in Rust say, others go on
            self._remove(running, error)
            return
        if part is not None:
            self._metrics.prompt_tokens.inc(len(part) if running.job.task.params is None else 0)
            running.job.deliver(part)
            return
        running.scores = None
        if running.answer is None:
            self._finish(running)

    def _hand_out(self, running: Running, outcome: "list[Chunk] | Failure") -> None:
        if isinstance(outcome, Failure):
            self._remove(running, outcome.error)  # its cache may be half written, so nobody gets it
            return
        for chunk in outcome:
            self._measure(running, chunk)
            running.job.deliver(chunk)
        if running.answer is not None and running.answer.finished:
            self._finish(running)

    def _finish(self, running: Running) -> None:
        """Ends a job that is complete, stopped or late; its cache is kept."""
        conversation, job = running.conversation, running.job
        if conversation is not None:
            self._model.runner.call(lambda: self._prefixes.put(conversation, job.served.slice))
        done = running.scores is None and (running.answer is None or running.answer.finished)
        self._remove(running, DONE if done or job.stopped else Expired())

    def _remove(self, running: Running, end: object) -> None:
        self._rounds.tasks.remove(running)
        self._account()
        running.job.deliver(end)

    def _account(self) -> None:
        """Lets idle caches give way to what the running ones may need."""
        reserved = sum(running.reserved_bytes for running in self._rounds.tasks)
        self._prefixes.shrink(max(0, self._cache_bytes - reserved))
        self._metrics.cache_bytes.set(self._prefixes.nbytes)
        self._metrics.running.set(len(self._rounds.tasks))

    def _measure(self, running: Running, chunk: Chunk) -> None:
        now, metrics = time.monotonic(), self._metrics
        if chunk.token is not None:
            if running.last_token is None:
                metrics.first_token.observe(now - running.job.arrived)
                if self._shedding is not None and len(self._rounds.tasks) > 1:
                    self._shedding.first_token(running.job.served.slice, now - running.job.queued)
                    metrics.shed_level.set(self._shedding.level)
            else:
                metrics.next_token.observe(now - running.last_token)
            running.last_token = now
            metrics.completion_tokens.inc()
        if chunk.usage is not None:
            metrics.prompt_tokens.inc(chunk.usage.prompt_tokens)
            metrics.cached_tokens.inc(chunk.usage.cached_tokens)
            metrics.drafted_tokens.inc(chunk.usage.drafted_tokens)
            metrics.accepted_tokens.inc(chunk.usage.accepted_tokens)
            (metrics.cache_hits if chunk.usage.cached_tokens else metrics.cache_misses).inc()


def measured_cache(model: Gemma3n) -> Conversation:
    """A conversation in which the model has answered, from which the sizes of others follow."""
    conversation = model.conversation()
    params = model.sampling_params(max_tokens=1, temperature=0.0)
    first = model.answer(conversation, model.prepare("Hi"), params)
    while not first.finished:
        (outcome,) = model.runner.advance([first])
        if isinstance(outcome, Failure):
            raise outcome.error
    return conversation
