"""The server without a network: a batch's requests go through the same routes as a client's, and get the same answers.

So what a request may ask for, how it is refused, and which sequences share a call of the model is written once. While
the model runs, the media of the requests that come next are fetched and decoded.
"""

import asyncio
import json
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import httpx

from g3n_mlx.batch.requests import AUDIO, Request
from g3n_mlx.batch.results import OK, Response, refused
from g3n_mlx.failures import Error, WorkerFailed
from g3n_mlx.media.fetch import fetch
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.model import Gemma3n
from g3n_mlx.server.app import create_app
from g3n_mlx.server.capacity import default_parallel
from g3n_mlx.server.engine import MEDIA_THREADS, Engine, ServerLimits
from g3n_mlx.server.gate import GatePolicy
from g3n_mlx.server.metrics import Metrics
from g3n_mlx.server.models import ModelTable
from g3n_mlx.server.offer import ALL, offered
from g3n_mlx.server.scheduler import Scheduler

MAX_BODY_BYTES = 1 << 30
TIMEOUT_S = 24 * 3600.0  # of one request, from its media to the end of its answer

log = logging.getLogger(__name__)


class Service:
    """A model that answers requests, several at a time. For one event loop's thread."""

    def __init__(self, model: Gemma3n, *, parallel: int | None, cache_bytes: int) -> None:
        """parallel: answers in progress, None for as many as fit; cache_bytes: of their caches and those kept for
        shared beginnings.
        """
        parallel = parallel or default_parallel(model, cache_bytes)
        self.in_flight = 2 * parallel + MEDIA_THREADS  # requests to hand over: those behind the first are prepared
        metrics, slices = Metrics(), offered(model, [ALL], [])
        scheduler = Scheduler(model, parallel=parallel, cache_bytes=cache_bytes, metrics=metrics, slices=slices)
        self._policy = MediaPolicy()  # the batch is the user's own program
        limits = ServerLimits(parallel, self.in_flight, TIMEOUT_S, self._policy)
        self._engine = Engine(model, scheduler, limits, metrics)
        self._table = ModelTable(model.name, model.slice_name, list(slices))
        policy = GatePolicy(None, frozenset(), frozenset(), MAX_BODY_BYTES)
        transport = httpx.ASGITransport(create_app(self._engine, self._table, policy), raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None)
        self._others: set[str] = set()  # names of models that are not this one

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends its threads; the model stays loaded."""
        await self._client.aclose()
        await asyncio.to_thread(self._engine.close)

    async def answer(self, request: Request) -> Response:
        """What the server answers. Raises WorkerFailed when the model runs no more."""
        if request.problem is not None:
            return refused(request.problem)
        body = {**request.body, "model": self._served(request.body.get("model"))}
        if request.url in AUDIO:
            response = await self._transcript(request.url, body)
        else:
            try:
                content = json.dumps(body, allow_nan=False).encode()
            except (ValueError, RecursionError) as error:  # JSON has neither NaN nor nesting without end
                return refused(f"the body is not JSON: {error}")
            headers = {"Content-Type": "application/json"}
            response = _response(await self._client.post(request.url, content=content, headers=headers))
        if response.status != OK and not self._engine.scheduler.alive:
            raise WorkerFailed("the model's thread has ended")
        return response

    def _served(self, name: Any) -> str:
        """The id that answers for a request's model: the one that is loaded, whatever a file calls it."""
        if not isinstance(name, str) or name in self._table.ids:
            return name if isinstance(name, str) else self._table.ids[0]
        if name not in self._others:
            self._others.add(name)
            log.warning("requests name the model %.200r: %s answers them", name, self._table.ids[0])
        return self._table.ids[0]

    async def _transcript(self, url: str, body: Mapping[str, Any]) -> Response:
        source = body.get("file_url")
        if not isinstance(source, str):
            return refused(f"file_url is {source!r:.80}, expected a path, a URL or a data: URI")
        try:
            data = await asyncio.to_thread(fetch, source, self._policy)
        except (Error, OSError) as error:
            return refused(str(error))
        fields = {
            f"{name}[]" if isinstance(value, list) else name: _form_value(value)
            for name, value in body.items()
            if name != "file_url" and value is not None
        }
        return _response(await self._client.post(url, data=fields, files={"file": ("audio", data)}))


def _form_value(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return [str(one) for one in value] if isinstance(value, list) else str(value)


def _response(response: httpx.Response) -> Response:
    is_json = "json" in response.headers.get("content-type", "")
    return Response(response.status_code, response.json() if is_json else response.text)
