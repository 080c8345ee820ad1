"""The one thread that owns the model: answers in progress take their steps in turn, the others wait in a queue.

A step is a part of a prompt or one token, so a short question does not wait behind a long answer, and what a request
is given depends on its own prompt alone. Every answer reserves at its start what its cache can grow to, so that the
caches stay below their limit; idle ones in the prefix cache give way.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Final

from g3n_mlx.engine.conversation import Conversation
from g3n_mlx.engine.generate import Constraint
from g3n_mlx.engine.prefix_cache import PrefixCache
from g3n_mlx.engine.results import Chunk
from g3n_mlx.engine.scores import TokenScore
from g3n_mlx.model import Gemma3n
from g3n_mlx.prompt.prompt import Prompt
from g3n_mlx.sampling import SamplingParams
from g3n_mlx.server.metrics import Metrics

Step = Chunk | list[TokenScore] | None
DONE: Final = object()


class Expired(Exception):
    """The request's time was over before its answer was complete."""


class Ended(Exception):
    """The scheduler has ended."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request asks of the model: to score its prompt's tokens, to answer it, or first one, then the other."""

    prompt: Prompt
    params: SamplingParams | None  # None: no answer
    constraint: Constraint | None = None
    scored: int | None = None  # how many of the likeliest tokens come with every score; None: no scores

    def tokens(self, context_tokens: int) -> int:
        """The most tokens that its cache will hold."""
        answer_tokens = 0 if self.params is None else self.params.max_tokens or context_tokens
        return min(len(self.prompt.token_ids) + answer_tokens, context_tokens)


@dataclass(slots=True, eq=False)
class Job:
    """A task on its way through the scheduler. `stopped` may be set by any thread, the rest is the scheduler's."""

    task: Answer
    deliver: Callable[[Any], None]  # given every step, and at the end DONE or an exception; raises nothing
    arrived: float  # time.monotonic()
    deadline: float
    request: Any = None  # what it belongs to; several jobs may belong to one
    stopped: bool = False


@dataclass(slots=True, eq=False)
class Running:
    """A job in progress."""

    job: Job
    reserved_bytes: int
    steps: Generator[Any, None, None] = field(init=False)
    conversation: Conversation | None = None  # from its first step on
    last_token: float | None = None  # time.monotonic() of its last token


class Scheduler:
    """Owns the model and the thread that it lives in."""

    def __init__(self, open_model: Callable[[], Gemma3n], *, parallel: int, cache_bytes: int, metrics: Metrics) -> None:
        """open_model is called in the thread, since arrays of some frameworks belong to the thread that made them."""
        self._open_model = open_model
        self._parallel = parallel
        self._cache_bytes = cache_bytes
        self._metrics = metrics
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._closing = self._ended = False
        self._started: dict[int, float] = {}  # when a request whose jobs wait had one started, by its id
        self._running: list[Running] = []
        self._model: Gemma3n | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._live, name="model", daemon=True)

    def start(self) -> Gemma3n:
        """Starts the thread and waits until the model has answered once; raises what went wrong with that."""
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._model is not None or self._failure is not None)
        if self._failure is not None:
            raise self._failure
        assert self._model is not None
        return self._model

    @property
    def alive(self) -> bool:
        """Whether jobs will be answered."""
        return self._model is not None and self._thread.is_alive() and not self._closing

    def submit(self, job: Job) -> None:
        """Puts a job into the queue."""
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
            model = self._open_model()
            self._size = first_words(model)
        except Exception as error:  # noqa: BLE001 - it belongs to the thread that waits in `start`
            with self._changed:
                self._failure = error
                self._changed.notify()
            return
        self._prefixes = PrefixCache(model.conversation)
        with self._changed:
            self._model = model
            self._changed.notify()
        try:
            while self._work_or_end():
                self._admit(model)
                self._round()
        finally:
            self._end()

    def _work_or_end(self) -> bool:
        """Waits for something to do; False when there is nothing more to come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._closing)
            return bool(self._waiting or self._running)

    def _end(self) -> None:
        """Nobody waits for a thread that is no more; there is nobody left unless it failed."""
        with self._changed:
            self._ended = True
            jobs = [running.job for running in self._running] + list(self._waiting)
            self._waiting.clear()
        for job in jobs:
            job.deliver(Ended())

    def _admit(self, model: Gemma3n) -> None:
        """Starts waiting jobs, as many as the limits allow; one always.

        In their order, but a request of many prompts goes to the end of the queue with each that is started.
        """
        context_tokens, window = model.config.text.max_position_embeddings, model.config.text.sliding_window
        with self._changed:
            self._drop_late_ones()
            admitted: list[tuple[Job, int]] = []
            reserved = sum(running.reserved_bytes for running in self._running)
            known = {id(job.request) for job in self._waiting}
            self._started = {request: when for request, when in self._started.items() if request in known}
            while self._waiting and len(self._running) + len(admitted) < self._parallel:
                job = min(self._waiting, key=lambda job: self._started.get(id(job.request), job.arrived))
                task = job.task
                wanted = self._size.nbytes_at(task.tokens(context_tokens), window)
                if task.scored is not None and task.params is not None:  # scores have a cache of their own
                    wanted += self._size.nbytes_at(len(task.prompt.token_ids), window)
                if (self._running or admitted) and reserved + wanted > self._cache_bytes:
                    break
                reserved += wanted
                self._started[id(job.request)] = time.monotonic()
                self._waiting.remove(job)
                admitted.append((job, wanted))
            self._metrics.waiting.set(len(self._waiting))
        for job, wanted in admitted:
            running = Running(job, wanted)
            running.steps = self._steps(running, model)
            self._running.append(running)

    def _drop_late_ones(self) -> None:
        now = time.monotonic()
        for job in [job for job in self._waiting if job.stopped or now > job.deadline]:
            self._waiting.remove(job)
            job.deliver(Expired())

    def _round(self) -> None:
        """One step of every running job. Decoding several of them in one call of the model would be done here."""
        for running in list(self._running):
            self._step(running)

    def _steps(self, running: Running, model: Gemma3n) -> Generator[Any, None, None]:
        """Scores part by part, then chunks; None where there is nothing to tell."""
        task = running.job.task
        if task.params is not None:
            others = [other.conversation for other in self._running if other.conversation is not None]
            running.conversation = self._prefixes.take(task.prompt.identity, others)
        self._account()
        if task.scored is not None:
            yield from model.score(task.prompt, task.scored)
        if task.params is not None and running.conversation is not None:
            yield from model.answer(running.conversation, task.prompt, task.params, task.constraint)

    def _step(self, running: Running) -> None:
        job = running.job
        try:
            step = self._next(running)
        except BaseException as error:  # noqa: BLE001 - whatever befalls one request, a panic in Rust say, others go on
            # Its cache may be half written, so nobody gets it.
            step = error
        if step is DONE or isinstance(step, BaseException):
            self._running.remove(running)
            self._account()
        else:
            self._measure(running, step)
        if step is not None:
            job.deliver(step)

    def _next(self, running: Running) -> Any:
        """The job's next step; DONE or Expired at its end, when its cache is kept."""
        late = time.monotonic() > running.job.deadline
        step = DONE if late or running.job.stopped else next(running.steps, DONE)
        if step is DONE:
            running.steps.close()
            if running.conversation is not None:
                self._prefixes.put(running.conversation)
        return Expired() if late else step

    def _account(self) -> None:
        """Lets idle caches give way to what the running ones may need."""
        reserved = sum(running.reserved_bytes for running in self._running)
        self._prefixes.shrink(max(0, self._cache_bytes - reserved))
        self._metrics.cache_bytes.set(self._prefixes.nbytes)
        self._metrics.running.set(len(self._running))

    def _measure(self, running: Running, step: Any) -> None:
        now, metrics = time.monotonic(), self._metrics
        if not isinstance(step, Chunk):
            metrics.prompt_tokens.inc(len(step or ()) if running.job.task.params is None else 0)
            return
        if step.token is not None:
            if running.last_token is None:
                metrics.first_token.observe(now - running.job.arrived)
            else:
                metrics.next_token.observe(now - running.last_token)
            running.last_token = now
            metrics.completion_tokens.inc()
        if step.usage is not None:
            metrics.prompt_tokens.inc(step.usage.prompt_tokens)
            metrics.cached_tokens.inc(step.usage.cached_tokens)
            (metrics.cache_hits if step.usage.cached_tokens else metrics.cache_misses).inc()


def first_words(model: Gemma3n) -> Conversation:
    """A conversation in which the model has answered: proof that it can, and the measure of what others will take."""
    conversation = model.conversation()
    for _ in model.answer(conversation, model.prepare("Hi"), model.sampling_params(max_tokens=1, temperature=0.0)):
        pass
    return conversation
