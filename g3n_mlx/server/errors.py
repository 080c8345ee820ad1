"""Errors with the status that clients expect, in the shape of the protocol that the path belongs to.

OpenAI's is `{"error": {message, type, param, code}}`; Ollama's and Anthropic's say less.
"""

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# Anthropic's names, where they differ.
ANTHROPIC_TYPES = {413: "request_too_large", 503: "overloaded_error"}
OLLAMA_PATH, ANTHROPIC_PATH = "/api/", "/v1/messages"
# Not in the standard: nginx's "client closed request". Only the log sees it.
CLIENT_GONE = 499
# Advice to install an extra ends a message. It is for whoever runs the server, and may name a folder of this machine.
_INSTALL_ADVICE = re.compile(r"\b(?:uv )?pip install \S.*", re.DOTALL)


class ApiError(Exception):
    """What a route raises to refuse a request."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self, path: str = "") -> dict[str, Any]:
        """The JSON that clients of this path read."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message, param = _sendable(self.message), None if self.param is None else _sendable(self.param)
        if path.startswith(OLLAMA_PATH):
            return {"error": message}
        if path.startswith(ANTHROPIC_PATH):
            kind = ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else kind)
            return {"type": "error", "error": {"type": kind, "message": message}}
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def renamed(self, names: Mapping[str, str]) -> "ApiError":
        """The same for a caller who sent other fields than those that it is about; see `told_by`."""
        name = names.get(self.param or "")
        if name is None:
            return self
        # A message's place among the chat's is not its place among the caller's.
        said = re.sub(rf"\b{self.param}\b(\[\d+\](\.content\[\d+\])?)?", name, self.message)
        return ApiError(self.status, said, param=name, code=self.code, headers=self.headers)

    def response(self, path: str) -> JSONResponse:
        return JSONResponse(self.body(path), self.status, headers=self.headers)


@contextmanager
def told_by(names: Mapping[str, str]) -> Generator[None]:
    """Has an ApiError about a chat's field name the caller's instead. names: from the chat's fields to the caller's."""
    try:
        yield
    except ApiError as error:
        raise error.renamed(names) from None


def _sendable(text: str) -> str:
    """Escapes lone surrogates, which JSON can carry but UTF-8 cannot; without advice to install something here."""
    text = _INSTALL_ADVICE.sub("this server does not have it", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
