"""Who may call: the Host header, the calling page's origin, the key, and how large a body may be.

A browser sends whatever a web page asks it to, also to 127.0.0.1. So the Host must be an address or a name that we
know (against DNS rebinding: an attacker's name may point here), and a page of another origin is refused unless
`--cors-origin` names it. CORS alone would not do: it keeps a page from reading responses, not from sending forms.
"""

import ipaddress
import secrets
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from g3n_mlx.server.errors import ApiError

OPEN_PATHS = ("/", "/docs", "/health")  # what needs no key: the page, which asks for it, the manual, and the probe


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """Whom the gate lets through."""

    api_key: str | None
    hosts: frozenset[str]  # names besides localhost and addresses, in lower case
    cors_origins: frozenset[str]  # in lower case, as browsers send them; "*" is any
    max_body_bytes: int


class Gate:
    """What stands before the app: Host and Origin, then CORS, then the key and the body's length."""

    def __init__(self, app: ASGIApp, policy: GatePolicy) -> None:
        self._app = app
        self._policy = policy
        # Within CORS, so that a page that may call can also read why it was refused.
        self._keyed: ASGIApp = self._enter
        if policy.cors_origins:
            self._keyed = CORSMiddleware(
                self._enter,
                allow_origins=policy.cors_origins,
                allow_methods=["GET", "HEAD", "POST"],
                allow_headers=["*"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with the reason why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_origin(Headers(scope=scope))
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
        else:
            await self._keyed(scope, receive, send)

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, max_bytes = Headers(scope=scope), self._policy.max_body_bytes
        try:
            if scope["path"] not in OPEN_PATHS:
                self._check_key(headers)
            length = headers.get("content-length", "0")
            if length.isdecimal() and int(length) > max_bytes:
                raise too_large(max_bytes)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
        else:
            await self._app(scope, limited(receive, max_bytes), send)

    def _check_origin(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._host_is_ours(host):
            raise ApiError(
                403,
                f"the Host header is {host!r}, expected an address, localhost or a name given with --allow-host",
                code="host_not_allowed",
            )
        if origin is not None and not self._allowed_origin(origin) and origin_host(origin) != host.lower():
            raise ApiError(
                403,
                f"web pages of {origin} may not call this server; --cors-origin lets one in",
                code="origin_not_allowed",
            )

    def _check_key(self, headers: Headers) -> None:
        if self._policy.api_key is None:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")  # Anthropic's header
        # Compared as bytes: compare_digest takes no str beyond ASCII.
        if not secrets.compare_digest(given.encode("utf-8"), self._policy.api_key.encode("utf-8")):
            raise ApiError(
                401,
                "the Authorization header has no valid key, expected 'Bearer' and the server's --api-key",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _host_is_ours(self, host: str) -> bool:
        name = host_name(host)
        if name in self._policy.hosts or name == "localhost":
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True  # an address can't be rebound

    def _allowed_origin(self, origin: str) -> bool:
        return "*" in self._policy.cors_origins or origin in self._policy.cors_origins


def limited(receive: Receive, max_bytes: int) -> Receive:
    """A `receive` that raises once a body is longer than its limit, whatever Content-Length says."""
    read = 0

    async def counted() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > max_bytes:
            # Starlette's own, since FastAPI turns every other error in a body into a 400.
            raise HTTPException(413, too_large(max_bytes).message)
        return message

    return counted


def too_large(max_bytes: int) -> ApiError:
    """The error of a body above the limit."""
    return ApiError(413, f"the request's body is longer than {max_bytes >> 20} MiB, this server's limit")


def host_name(host: str) -> str:
    """The name or address in a Host header, without port and brackets."""
    host = host.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def origin_host(origin: str) -> str | None:
    """The `host:port` of an origin; None where there is none, as in "null"."""
    try:
        return urlsplit(origin.lower()).netloc or None
    except ValueError:  # half a bracket
        return None
