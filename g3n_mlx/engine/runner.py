"""Carries out what sequences want, one or many of them in a call: the only caller of the model's forward pass.

All calls of a model are made in one thread of their own, in the order in which they were asked for. So a model may be
used from any thread: overlapping answers go on call by call. The thread lives as long as the process: MLX keeps its
streams and compiled functions per thread, PyTorch a pool of threads for each.
"""

import asyncio
import atexit
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from g3n_mlx.engine.drafts import CallCosts
from g3n_mlx.failures import BadValue, Error
from g3n_mlx.interface import Model
from g3n_mlx.rows import Batch, Rows, Step
from g3n_mlx.sampling import NOT_FINITE

T = TypeVar("T")

# How long the end of the process waits for the call that is under way.
EXIT_TIMEOUT_S = 5.0
_NOT_FINITE = "the model's logits are not finite"


class ModelThread:
    """The thread in which the models of a backend run."""

    def __init__(self, name: str, at_exit: Callable[[], None]) -> None:
        """at_exit: done in the thread when the process ends."""
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._live, name=f"{name} models", daemon=True)
        self._thread.start()
        atexit.register(self._end, at_exit)

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Queues a call; it is not made if its future is cancelled before."""
        future: Future[T] = Future()
        self._work.put((future, work))
        return future

    def call(self, work: Callable[[], T]) -> T:
        """Makes a call and waits for it; at once where the thread itself asks."""
        return work() if threading.current_thread() is self._thread else self.submit(work).result()

    def _end(self, at_exit: Callable[[], None]) -> None:
        with suppress(TimeoutError):  # a call is under way, of a prompt that was interrupted say
            self.submit(at_exit).result(EXIT_TIMEOUT_S)

    def _live(self) -> None:
        while True:
            self._do(*self._work.get())

    @staticmethod
    def _do(future: "Future[Any]", work: Callable[[], Any]) -> None:
        # A method of its own, so that nothing of a call outlives it here: a future holds the arrays of its result.
        if future.set_running_or_notify_cancel():
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
                future.set_exception(error)
            else:
                future.set_result(result)


@cache
def model_thread(name: str, at_exit: Callable[[], None]) -> ModelThread:
    """The process's thread for a backend."""
    return ModelThread(name, at_exit)


class Wisher(Protocol):
    """Something that appends rows to a cache, wish by wish (engine/answer.py)."""

    @property
    def decoding(self) -> bool:
        """Whether the next wish is one token, and perhaps a draft."""
        ...

    def wish(self, together: int, /) -> Rows:
        """The rows to append next. together: how many tasks share the call."""
        ...

    def told(self, steps: Sequence[Step]) -> Any:
        """Takes note of what they drew; returns what is to be handed out."""
        ...


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong with one task of several."""

    error: BaseException


def run(model: Model, rows: Sequence[Rows], *, goes_on: bool = True) -> list[list[Step]]:
    """Appends the rows of several sequences to their caches, in one call; the steps that each of them drew.

    goes_on: whether the next call is likely to append these steps.
    """
    batch = Batch(rows)
    logits = model(batch)
    drawn: list[list[Step]] = []
    row = 0
    for entry in rows:
        steps: list[Step] = []
        for index, mask in enumerate(entry.draw.masks if entry.draw is not None else ()):
            assert entry.draw is not None
            steps.append(entry.draw.sampler.draw(logits[row], entry.draw.position + index, mask))
            row += 1
        drawn.append(steps)
    if goes_on and all(len(steps) == 1 for steps in drawn):
        model.begin_next([step for (step,) in drawn], batch.caches)
    return drawn


def all_logits(model: Model, rows: Rows) -> np.ndarray:
    """Appends the ids of one sequence to its cache; the logits of all of them, float32 [T, V]."""
    return model.numpy(model(Batch([rows], keep_all=True)))


class Runner:
    """Carries out the wishes of tasks. Every method may be called from any thread."""

    def __init__(
        self, model: Model, thread: ModelThread, name: str, defect: Callable[[], Error] = lambda: BadValue(_NOT_FINITE)
    ) -> None:
        """name: of the model, for errors. defect: what is wrong with it when its logits are not finite."""
        self._model: Model | None = model
        self._name = name
        self.thread = thread
        self.costs: defaultdict[Hashable, CallCosts] = defaultdict(CallCosts)  # of calls, by how tokens are drawn
        self._defect = defect

    @property
    def model(self) -> Model:
        """What runs; raises ValueError after `close`."""
        if self._model is None:
            raise BadValue(f"the model {self._name} has been closed: load it again")
        return self._model

    def of_slice(self, model: Model) -> "Runner":
        """What runs a slice of the model, in the same thread."""
        return Runner(model, self.thread, self._name, self._defect)

    @property
    def closed(self) -> bool:
        """Whether nothing runs any more."""
        return self._model is None

    def close(self) -> None:
        """Frees the weights, after the call that is under way."""
        model, self._model = self.model, None
        self.thread.call(model.close)

    def call(self, work: Callable[[], T]) -> T:
        """Waits for something that is done in the model's thread."""
        return self.thread.call(work)

    def checked(self, array: np.ndarray) -> np.ndarray:
        """Logits or soft tokens as they are; raises ValueError, naming what is wrong, when they are not finite."""
        if not np.isfinite(array.sum()):
            raise self._defect()
        return array

    def advance(self, tasks: Sequence[Wisher]) -> list[Any]:
        """One wish of each task, all in one call of the model; what `told` returned for each, or its Failure.

        A failure of one task's wish, or of what it makes of its step, harms no other. What fails in the call itself
        has left all their caches half written, so it is the failure of them all.
        """
        return self.thread.call(lambda: self._advance(tasks))

    async def advance_async(self, tasks: Sequence[Wisher]) -> list[Any]:
        """The same for an event loop. Cancelled, it leaves the tasks where they are, or half way in a call."""
        return await asyncio.wrap_future(self.thread.submit(lambda: self._advance(tasks)))

    def _advance(self, tasks: Sequence[Wisher]) -> list[Any]:
        wishes = [_attempt(partial(task.wish, len(tasks))) for task in tasks]
        rows = [wish for wish in wishes if not isinstance(wish, Failure)]
        ran = _attempt(lambda: run(self.model, rows)) if rows else []
        drawn = iter([ran] * len(rows) if isinstance(ran, Failure) else ran)
        outcomes: list[Any] = []
        for task, wish in zip(tasks, wishes, strict=True):
            steps = wish if isinstance(wish, Failure) else next(drawn)
            outcomes.append(steps if isinstance(steps, Failure) else _attempt(partial(self._tell, task, steps)))
        return outcomes

    def _tell(self, task: Wisher, steps: Sequence[Step]) -> Any:
        if any(int(step) == NOT_FINITE for step in steps):
            raise self._defect()
        return task.told(steps)


class Rounds(Generic[T]):
    """Tasks that take turns: in every round each of those that decode gets a token, and one other a part of its prompt.

    So at most one part of a prompt comes between two tokens of an answer, and long prompts are read in turn. Those that
    decode with the same model do so in one call.
    """

    def __init__(self, decoding: Callable[[T], bool], model: Callable[[T], Hashable] = lambda task: None) -> None:
        """decoding: whether a task's next wish is one token. model: what runs it."""
        self.tasks: list[T] = []
        self._decoding, self._model = decoding, model

    def calls(self) -> list[list[T]]:
        """The tasks of the calls of one round."""
        tokens: dict[Hashable, list[T]] = {}
        for task in self.tasks:
            if self._decoding(task):
                tokens.setdefault(self._model(task), []).append(task)
        reading = [task for task in self.tasks if not self._decoding(task)][:1]
        for task in reading:
            self.tasks.remove(task)
            self.tasks.append(task)
        return [call for call in (*tokens.values(), reading) if call]


def _attempt(work: Callable[[], T]) -> "T | Failure":
    try:
        return work()
    except BaseException as error:  # noqa: BLE001 - whatever befalls one task, a panic in Rust say, others go on
        return Failure(error)
