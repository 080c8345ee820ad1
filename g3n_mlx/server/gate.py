"""Who may call: the Host header, the page that calls, the key, and how much is read of what they send.

A browser sends whatever a web page asks it to, also to 127.0.0.1. So the Host must be an address or a name that we
know (a name that an attacker points here, DNS rebinding, is none), and a page of another origin is refused unless
`--cors-origin` names it: without that check it could still send forms, though it could not read the answers.
"""

import ipaddress
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from g3n_mlx.server.errors import ApiError

OPEN_PATHS = ("/", "/health")  # what needs no key: the page, which asks for it, and the probe


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """What the gate lets through."""

    api_key: str | None
    hosts: frozenset[str]  # names besides localhost and addresses, in lower case
    cors_origins: frozenset[str]  # "*" is any
    max_body_bytes: int


class Gate:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, policy: GatePolicy) -> None:
        self.app = app
        self.policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with the reason why not."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        cors = self._cors_headers(headers)

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(cors)
            await send(message)

        preflight = scope["method"] == "OPTIONS" and bool(cors) and "access-control-request-method" in headers
        try:
            self._check(scope["path"], headers, preflight)
        except ApiError as error:
            await error.response()(scope, receive, send_with_cors)
            return
        if preflight:
            wanted = headers.get("access-control-request-headers", "*")
            allowed = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": wanted}
            await Response(status_code=204, headers=allowed)(scope, receive, send_with_cors)
            return
        await self.app(scope, limited(receive, self.policy.max_body_bytes), send_with_cors)

    def _check(self, path: str, headers: Headers, preflight: bool) -> None:
        host = headers.get("host", "")
        if not self._host_is_ours(host):
            raise ApiError(
                403,
                f"the Host header is {host!r}, expected an address, localhost or a name given with --allow-host",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and not self._allowed_origin(origin) and urlsplit_host(origin) != host.lower():
            raise ApiError(
                403,
                f"web pages of {origin} may not call this server; --cors-origin lets one in",
                code="origin_not_allowed",
            )
        if not preflight and path not in OPEN_PATHS:
            self._check_key(headers.get("authorization", ""))
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.policy.max_body_bytes:
            raise too_large(self.policy.max_body_bytes)

    def _check_key(self, authorization: str) -> None:
        if self.policy.api_key is None:
            return
        scheme, _, key = authorization.partition(" ")
        # Compared as bytes: compare_digest takes no str beyond ASCII.
        if scheme.lower() != "bearer" or not secrets.compare_digest(
            key.strip().encode("utf-8"), self.policy.api_key.encode("utf-8")
        ):
            raise ApiError(
                401,
                "the Authorization header has no valid key, expected 'Bearer' and the server's --api-key",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _host_is_ours(self, host: str) -> bool:
        name = host_name(host)
        if name in self.policy.hosts or name == "localhost":
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True  # no one can rebind an address

    def _allowed_origin(self, origin: str) -> bool:
        return "*" in self.policy.cors_origins or origin.lower() in self.policy.cors_origins

    def _cors_headers(self, headers: Headers) -> Mapping[str, str]:
        origin = headers.get("origin")
        if origin is None or not self._allowed_origin(origin):
            return {}
        return {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}


def limited(receive: Receive, max_bytes: int) -> Receive:
    """A `receive` that raises once a body is longer than its limit, whatever its length was said to be."""
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


def urlsplit_host(origin: str) -> str | None:
    """The `host:port` of an origin; None where there is none, as in "null"."""
    try:
        return urlsplit(origin.lower()).netloc or None
    except ValueError:  # half a bracket
        return None
