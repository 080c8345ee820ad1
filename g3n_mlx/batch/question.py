"""One question about many files: `g3n batch --files`."""

import base64
import glob
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from g3n_mlx.batch.requests import CHAT, Entry, Request
from g3n_mlx.failures import BadValue

# What mimetypes does not know everywhere, or takes for something else.
_KINDS = {
    **dict.fromkeys((".avif", ".heic", ".heif", ".webp", ".jpe", ".jfif"), "image"),
    **dict.fromkeys((".flac", ".m4a", ".ogg", ".oga", ".opus", ".weba"), "audio"),
    **dict.fromkeys((".mkv", ".mts", ".m2ts", ".ts", ".ogv", ".webm", ".m4v"), "video"),
}


def kind_of(path: str) -> str | None:
    """Whether a file's name is an image's, an audio's or a video's; None for another."""
    suffix = PurePosixPath(path.replace("\\", "/")).suffix.lower()
    kind = _KINDS.get(suffix) or (mimetypes.guess_type(f"x{suffix}")[0] or "").partition("/")[0]
    return kind if kind in ("image", "audio", "video") else None


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about every file, and how it is answered."""

    prompt: str
    system_prompt: str | None = None
    schema: dict[str, Any] | None = None  # a JSON schema that every answer follows
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None  # the same for every file, so that no answer depends on the order

    def about(self, path: str, content: bytes | None = None) -> Request:
        """The request about a file. content: what is in it, where it is not to be opened."""
        kind = kind_of(path)
        if kind is None:
            return Request(path, problem=f"{path} has no name of an image, audio or video file")
        name = f"{kind}_url"
        url = path if content is None else f"data:;base64,{base64.b64encode(content).decode()}"
        parts = [{"type": name, name: {"url": url}}, {"type": "text", "text": self.prompt}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        body: dict[str, Any] = {"messages": messages}
        options = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}
        body |= {name: value for name, value in options.items() if value is not None}
        if self.schema is not None:
            wanted = {"name": "answer", "schema": self.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        return Request(path, CHAT, body)


class FilesOfQuestion:
    """A question about all files that patterns match; their paths are the custom_ids."""

    def __init__(self, question: Question, patterns: Sequence[str]) -> None:
        """patterns: paths, or globs in which ** stands for any folders. Raises ValueError when one matches nothing."""
        self._question = question
        found: dict[str, None] = {}
        for pattern in patterns:
            paths = sorted(glob.glob(pattern, recursive=True))
            if not paths and not glob.has_magic(pattern):
                paths = [pattern]  # a missing file is its own error, never the end of the job
            if not paths:
                raise BadValue(f"--files {pattern!r} matches no file")
            found |= dict.fromkeys(paths)
        self.paths = [path for path in found if kind_of(path)]
        self.skipped = len(found) - len(self.paths)  # of another kind
        if not self.paths:
            raise BadValue(f"none of the {len(found)} files is an image, audio or video by its name")

    def entries(self) -> list[Entry]:
        return [Entry(path, "", index) for index, path in enumerate(self.paths)]

    def request(self, entry: Entry) -> Request:
        return self._question.about(entry.custom_id)
