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

from g3n_mlx.server import chat, completions, models, page, responses, transcriptions
from g3n_mlx.server.engine import Engine
from g3n_mlx.server.errors import ApiError
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
    for routes in (page, models, chat, responses, completions, transcriptions):
        app.include_router(routes.router)
    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(Exception, failed)
    return Bounded(Gate(app, policy), engine)


async def refused(_: Request, error: Any) -> Response:
    """An ApiError as it stands."""
    return error.response()


async def invalid(request: Request, error: Any) -> Response:
    """A body that does not fit its schema: 400 with the field at fault, as OpenAI has it."""
    first = error.errors()[0]
    if first["type"] == "unsupported_field":
        return ApiError(400, first["msg"], param=first["ctx"]["path"][:200]).response()
    if first["type"] == "json_invalid":
        at, reason = first["loc"][-1], first["ctx"]["error"]
        return ApiError(400, f"the body is not JSON: {reason} at character {at}").response()
    if tuple(first["loc"]) == ("body",) and "json" not in request.headers.get("content-type", ""):
        return ApiError(400, "expected a JSON object, sent with the header Content-Type: application/json").response()
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
    return ApiError(400, f"{field or 'the body'}: {found['msg']}", param=field or None).response()


async def no_route(_: Request, error: Any) -> Response:
    """What Starlette raises itself: unknown paths, methods, unreadable bodies."""
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def failed(_: Request, error: Any) -> Response:
    """A bug of ours; Starlette logs it."""
    return ApiError(500, f"the server failed on this request: {type(error).__name__}; its log has more").response()


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
        if scope["method"] == "HEAD":  # a GET whose body uvicorn leaves out
            scope = {**scope, "method": "GET"}
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
                await ApiError(408, "the request did not arrive in time").response()(scope, receive, counted)
