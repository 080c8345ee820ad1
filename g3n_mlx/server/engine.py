"""The requests' side of the model: places, the queue's limit, and steps that come as asynchronous iterators.

A request takes a Place before it costs anything, media included. Leaving the place stops what it runs, whether the
answer was sent, the client went away or something failed.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from g3n_mlx.engine.grammar import GrammarError, GrammarMatcher, Grammars
from g3n_mlx.engine.sequence import check_length
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.model import Gemma3n
from g3n_mlx.prompt.prompt import Prompt, PromptTooLong
from g3n_mlx.server.errors import CLIENT_GONE, ApiError
from g3n_mlx.server.metrics import Metrics
from g3n_mlx.server.scheduler import DONE, Ended, Expired, Job, Scheduler, Served, Task

T = TypeVar("T")

log = logging.getLogger(__name__)

# Few threads open media: decoding one image of the largest size takes a gigabyte. Text has threads of its own, so that
# it does not wait for a slow host, and so have grammars, of which one may be compiled for seconds.
MEDIA_THREADS, TEXT_THREADS, GRAMMAR_THREADS = 4, 2, 2
TOO_LONG = "context_length_exceeded"
RETRY_AFTER_S = 2  # the openai client waits that long and tries again, twice


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What the server takes on."""

    parallel: int  # responses in progress
    max_queue: int  # requests behind them
    request_timeout_s: float  # from a request's arrival to the end of its response
    policy: MediaPolicy  # where media may come from


class Engine:
    """The model, its scheduler and the places before it. For the event loop's thread."""

    def __init__(self, model: Gemma3n, scheduler: Scheduler, limits: ServerLimits, metrics: Metrics) -> None:
        self.model = model
        self.scheduler = scheduler
        self.limits = limits
        self.metrics = metrics
        self.places_taken = 0
        # A transcription keeps its audio, up to a gigabyte, until it is done: no more of them than run in parallel.
        self.long_audio = asyncio.Semaphore(limits.parallel)
        self.media_threads = ThreadPoolExecutor(MEDIA_THREADS, thread_name_prefix="media")
        self.text_threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self.grammar_threads = ThreadPoolExecutor(GRAMMAR_THREADS, thread_name_prefix="grammar")

    @property
    def grammars(self) -> Grammars:
        """The grammars of the model's vocabulary. The first use takes seconds: not in the event loop's thread."""
        return self.model.grammars

    @contextmanager
    def place(self) -> Generator["Place"]:
        """A place for a request; what it runs is stopped when it is left. Raises ApiError 429 when all are taken."""
        places = self.limits.parallel + self.limits.max_queue
        if self.places_taken >= places:
            raise ApiError(
                429,
                f"{places} requests are in progress or waiting, as many as this server takes; try again later",
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        self.places_taken += 1
        place = Place(self)
        try:
            yield place
        finally:
            self.places_taken -= 1
            place.stop()

    def close(self) -> None:
        """Waits for the remaining jobs, and ends all threads."""
        self.media_threads.shutdown(cancel_futures=True)
        self.text_threads.shutdown(cancel_futures=True)
        self.grammar_threads.shutdown(cancel_futures=True)
        self.scheduler.close()


class Place:
    """A request's place among those in progress and those that wait."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.arrived = time.monotonic()
        self.deadline = self.arrived + engine.limits.request_timeout_s
        self.served = Served()  # set by the route, which knows what was asked for
        self.constrained_by = "response_format"  # the field to blame when a grammar fails during generation
        self.jobs: list[Job] = []  # in progress or waiting
        self._holds_audio = False
        self._working: Future[Any] | None = None  # the last work in another thread

    @property
    def policy(self) -> MediaPolicy:
        """Where media may come from, and until when they must be open."""
        return replace(self.engine.limits.policy, deadline=self.deadline)

    async def hold_audio(self) -> None:
        """Waits for one of the few places for hours of audio; kept until the place is left."""
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                await self.engine.long_audio.acquire()
        except TimeoutError:
            raise self.too_late() from None
        self._holds_audio = True

    async def opened(self, work: Callable[[], T], param: str, threads: ThreadPoolExecutor) -> T:
        """The result of work that must block neither the event loop nor the model: it runs in one of the threads.

        Its ValueError becomes an ApiError 400 about a parameter.
        """
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                self._working = threads.submit(work)
                return await asyncio.wrap_future(self._working)
        except TimeoutError:
            raise self.too_late() from None
        except PromptTooLong as error:
            raise ApiError(400, str(error), param=param, code=TOO_LONG) from None
        except ValueError as error:
            raise ApiError(400, str(error), param=param) from None

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError 400 about a parameter when one of its ids is no token's."""
        vocab_size = self.engine.model.config.text.vocab_size
        wrong = next((token_id for token_id in ids if token_id >= vocab_size), None)
        if wrong is not None:
            raise ApiError(400, f"{wrong} is not a token id, expected 0 to {vocab_size - 1}", param=param)

    async def encoded(self, text: str) -> list[int]:
        """The ids of a plain text; raises ApiError 400 when there are none, or more than the context holds."""
        return await self.opened(lambda: self.engine.model.preparer.encode(text), "prompt", self.engine.text_threads)

    async def constraint(self, make: Callable[[Grammars], GrammarMatcher], param: str) -> GrammarMatcher:
        """What an answer must look like; raises ApiError 400 about a parameter when that can't be enforced."""
        return await self.opened(lambda: make(self.engine.grammars), param, self.engine.grammar_threads)

    async def prepared(
        self,
        messages: Sequence[dict[str, Any]],
        param: str = "messages",
        *,
        answered: bool = True,
        continued: bool = False,
    ) -> Prompt:
        """The prompt of some messages, their media fetched and opened; raises ApiError 400 when that can't be done.

        answered: it must leave room for a response. continued: the response goes on with the last message.
        """
        media = any(part["type"] != "text" for message in messages for part in message["content"])
        model = self.engine.model

        def work() -> Prompt:
            prompt = model.preparer.prepare(messages, self.policy, continued=continued)
            if answered:  # a prompt that leaves no room is refused before it waits
                check_length(prompt, 1, model.config.text.max_position_embeddings)
            return prompt

        return await self.opened(work, param, self.engine.media_threads if media else self.engine.text_threads)

    async def run(self, tasks: Sequence[Task]) -> AsyncIterator[tuple[int, Any]]:
        """The steps of several tasks as they come, each with its task's index. Raises ApiError."""
        loop, steps = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Any]]()

        def deliver(index: int, step: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended, so nobody waits
                loop.call_soon_threadsafe(steps.put_nowait, (index, step))

        jobs = [
            Job(task, partial(deliver, index), self.arrived, self.deadline, self, self.served)
            for index, task in enumerate(tasks)
        ]
        self.jobs += jobs
        for job in jobs:
            self.engine.scheduler.submit(job)
        left = len(tasks)
        while left:
            index, step = await steps.get()
            if step is DONE:
                left -= 1
                self.jobs.remove(jobs[index])
            elif isinstance(step, BaseException):
                raise self._refused(step)
            else:
                yield index, step

    def stop(self) -> None:
        """Stops every job before its next step, and releases the place for hours of audio."""
        for job in self.jobs:
            job.stopped = True
        if self._holds_audio:
            self._holds_audio = False
            if self._working is None or self._working.done():
                self.engine.long_audio.release()
                return
            loop = asyncio.get_running_loop()

            def release(_: object) -> None:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self.engine.long_audio.release)

            self._working.add_done_callback(release)  # a thread decodes to its end, whoever waits

    def too_late(self) -> ApiError:
        """The error of a request whose time is over."""
        limit = self.engine.limits.request_timeout_s
        return ApiError(
            503,
            f"the response was not complete after {limit:g} s, this server's limit",
            code="timeout",
            headers={"x-should-retry": "false"},  # or the openai client would repeat the request twice
        )

    def _refused(self, error: BaseException) -> ApiError:
        if isinstance(error, PromptTooLong):
            return ApiError(400, str(error), param="messages", code=TOO_LONG)
        if isinstance(error, GrammarError):
            return ApiError(400, str(error), param=self.constrained_by)
        if isinstance(error, Expired):
            return self.too_late()
        if isinstance(error, Ended):
            return ApiError(503, "the server is shutting down", code="shutting_down")
        log.error("a request failed", exc_info=error)
        return ApiError(500, f"the model failed on this request: {type(error).__name__}; the server's log has more")


async def _place(request: Request) -> AsyncIterator[Place]:
    engine: Engine = request.app.state.engine
    with engine.place() as place:
        yield place


# FastAPI leaves the place once the response is sent or given up, also that of a stream.
PlaceOf = Annotated[Place, Depends(_place)]


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result; if the client disconnects first, cancels the work and raises ApiError 499."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(CLIENT_GONE, "the client disconnected")
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
