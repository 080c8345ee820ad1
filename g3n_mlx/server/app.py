"""The app: routes, the gate before them, and every error in OpenAI's shape."""

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from g3n_mlx.server import anthropic, chat, completions, models, ollama, page, reference, responses, transcriptions
from g3n_mlx.server.engine import Engine
from g3n_mlx.server.errors import OLLAMA_PATH, ApiError
from g3n_mlx.server.gate import Gate, GatePolicy
from g3n_mlx.server.models import ModelTable

# What a request may take beyond its time limit, which the model's part of it observes by itself.
SLACK_S = 30.0
# A step of the path to an error that is a field of ours, not pydantic's name of a type.
_FIELD = re.compile(r"(?!(?:str|int|float|bool|dict)$)[a-z_]+(\[\])?")


def create_app(engine: Engine, table: ModelTable, policy: GatePolicy) -> ASGIApp:
    """The whole server as an ASGI app; the engine is closed when the app ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="g3n_mlx", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.state.models = table
    for routes in (page, reference, models, chat, responses, completions, transcriptions, ollama, anthropic):
        app.include_router(routes.router)
    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(Exception, failed)
    return Bounded(Gate(app, policy), engine)


async def refused(request: Request, error: Any) -> Response:
    """An ApiError as it stands."""
    return error.response(request.url.path)


async def invalid(request: Request, error: Any) -> Response:
    """A body that does not fit its schema: 400 with the field at fault, as OpenAI has it."""
    return _misfit(request, error).response(request.url.path)


def _misfit(request: Request, error: Any) -> ApiError:
    first = error.errors()[0]
    if first["type"] == "unsupported_field":
        return ApiError(400, first["msg"], param=first["ctx"]["path"][:200])
    if first["type"] == "json_invalid":
        at, reason = first["loc"][-1], first["ctx"]["error"]
        return ApiError(400, f"the body is not JSON: {reason} at character {at}")
    if tuple(first["loc"]) == ("body",) and "json" not in request.headers.get("content-type", ""):
        return ApiError(400, "expected a JSON object, sent with the header Content-Type: application/json")
    # Where a value may have several types there is an error for each: the deepest one is about the type that was meant,
    # and so is one that says more than that the type is wrong.
    found = max(error.errors(), key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    field = ""
    for step in found["loc"][1:]:
        if isinstance(step, int):
            field += f"[{step}]"
        elif _FIELD.fullmatch(step):
            field += f".{step}"
    field = field.lstrip(".")[:200]
    return ApiError(400, f"{field or 'the body'}: {found['msg']}", param=field or None)


async def no_route(request: Request, error: Any) -> Response:
    """What Starlette raises itself: unknown paths, methods, unreadable bodies."""
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response(request.url.path)


async def failed(request: Request, error: Any) -> Response:
    """A bug of ours; Starlette logs it."""
    message = f"the server failed on this request: {type(error).__name__}; its log has more"
    return ApiError(500, message).response(request.url.path)


def as_ours(scope: Scope) -> Scope:
    """A request as the routes expect it, whatever its program leaves out: /v1 before the path, or what the body is."""
    changed: dict[str, Any] = {}
    if scope["method"] == "HEAD":  # a GET whose body uvicorn leaves out
        changed["method"] = "GET"
    if re.match("/(chat|completions|responses|messages|audio|models|tokenize|detokenize)(/|$)", scope["path"]):
        changed["path"] = f"/v1{scope['path']}"
    if scope["path"].startswith(OLLAMA_PATH):  # the samples of its manual send JSON as a form
        others = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
        changed["headers"] = [*others, (b"content-type", b"application/json")]
    return {**scope, **changed}


class Bounded:
    """Counts responses by path and status, and ends those that take too long for a reason outside the model.

    The model's own part ends in time by itself; this is for clients that neither send nor read.
    """

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self._app = app
        self._metrics = engine.metrics
        self._timeout_s = engine.limits.request_timeout_s + SLACK_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = as_ours(scope)
        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                # By route, not by path: a client must not be able to make up new labels.
                route = scope.get("route")
                path = "other" if route is None else route.path
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                await self._app(scope, receive, counted)
        except TimeoutError:
            if not limit.expired():
                raise
            if not begun:
                await ApiError(408, "the request did not arrive in time").response(scope["path"])(
                    scope, receive, counted
                )
