"""Requests of a batch: OpenAI's batch file format, a JSON object per line.

A line has `custom_id`, `method` (POST), `url` and `body`. Audio for transcriptions comes as `file_url` in the body,
since a line can't carry a form. Sources: "The request input object" of OpenAI's Batch API; `vllm run-batch`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from g3n_mlx.failures import BadValue

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
AUDIO = ("/v1/audio/transcriptions", "/v1/audio/translations")
URLS = (CHAT, COMPLETIONS, *AUDIO)

_KEY_LENGTH = 200  # characters of a prompt by which requests are sorted
_LONG_URL = 200  # characters; a longer one is data


@dataclass(frozen=True, slots=True)
class Request:
    """One request, or why a line is none."""

    custom_id: str
    url: str = ""
    body: dict[str, Any] = field(default_factory=dict[str, Any])
    problem: str | None = None
    is_object: bool = True  # of JSON

    @staticmethod
    def of(fields: Any, fallback_id: str) -> "Request":
        """The request that a line's JSON describes; fallback_id: its id when it names none."""
        if not isinstance(fields, dict):
            return Request(fallback_id, problem="the line is not a JSON object", is_object=False)
        custom_id = fields.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            return Request(fallback_id, problem=f"custom_id is {custom_id!r:.80}, expected a string that is not empty")
        url, body = fields.get("url"), fields.get("body")
        problem = None
        if fields.get("method", "POST") != "POST":
            problem = f"method is {fields['method']!r:.80}, expected 'POST'"
        elif url not in URLS:
            problem = f"url is {url!r:.80}, expected one of {', '.join(URLS)}"
        elif not isinstance(body, dict):
            problem = f"body is {body!r:.80}, expected a JSON object"
        elif body.get("stream"):
            problem = "stream is set in the body: a batch's responses come whole"
        return Request(custom_id, problem=problem) if problem else Request(custom_id, str(url), dict(body or {}))

    @staticmethod
    def of_line(line: bytes, number: int) -> "Request":
        """The request of a line, by its number from 1."""
        fallback_id = f"line-{number}"
        try:
            return Request.of(json.loads(line), fallback_id)
        except (ValueError, RecursionError) as error:
            return Request(fallback_id, problem=f"the line is not JSON: {error}", is_object=False)

    def fields(self) -> dict[str, Any]:
        """As a line has it."""
        return {"custom_id": self.custom_id, "method": "POST", "url": self.url, "body": self.body}

    @property
    def beginning(self) -> str:
        """How its prompt begins: requests sorted by it find their shared beginning in the prefix cache."""
        begun, length = [f"{self.url} "], 0
        for text in _texts(self.body.get("messages", self.body.get("prompt"))):
            begun.append(text)
            length += len(text)
            if length >= _KEY_LENGTH:
                break
        return "".join(begun)[:_KEY_LENGTH]


def _texts(value: Any) -> Iterator[str]:
    """All strings of a value, in order, however deep it is nested; long URLs by their digest."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield hashlib.sha1(value.encode("utf-8", "replace")).hexdigest() if _is_data(value) else value
        elif isinstance(value, dict):
            # The keys are in any order; a part's type would hide what two of them share.
            waiting += [inner for key, inner in value.items() if key not in ("type", "role")][::-1]
        elif isinstance(value, list):
            waiting += value[::-1]
        elif value is not None:
            yield str(value)


def _is_data(text: str) -> bool:
    return len(text) > _LONG_URL and text.startswith(("data:", "http:", "https:"))


@dataclass(frozen=True, slots=True)
class Entry:
    """A request that is yet to be read."""

    custom_id: str
    beginning: str
    at: int  # where its source finds it


class Source(Protocol):
    """Where requests come from."""

    def entries(self) -> list[Entry]:
        """All of them, in their order; raises ValueError when two have one custom_id."""
        ...

    def request(self, entry: Entry) -> Request:
        """One of them."""
        ...


class RequestFile:
    """A file of requests, which is read line by line: it may be larger than memory."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when it can't be opened."""
        self._file = path.open("rb")
        self._path = path
        self._numbers: dict[int, int] = {}  # of lines, by offset

    def entries(self) -> list[Entry]:
        found: list[Entry] = []
        lines: dict[str, int] = {}
        has_objects = False
        offset = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if line.strip():
                request = Request.of_line(line, number)
                if request.custom_id in lines:
                    raise BadValue(
                        f"{self._path}: lines {lines[request.custom_id]} and {number} have the custom_id "
                        f"{request.custom_id!r}: each request needs its own"
                    )
                lines[request.custom_id] = number
                has_objects |= request.is_object
                self._numbers[offset] = number
                found.append(Entry(request.custom_id, request.beginning, offset))
            offset += len(line)
        if not has_objects:
            raise BadValue(f"{self._path} has no requests, expected a JSON object per line")
        return found

    def request(self, entry: Entry) -> Request:
        self._file.seek(entry.at)
        return Request.of_line(self._file.readline(), self._numbers[entry.at])
