"""A media part of a message, and how it may be written.

Hugging Face's parts (`{"type": "image", "image": ...}`, also with "url", "path" or "base64"), OpenAI's (`image_url`,
`audio_url`, `video_url`, `input_audio`), and Image, Audio and Video objects. Unknown keys are ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from g3n_mlx.failures import BadValue
from g3n_mlx.media.audio import Audio
from g3n_mlx.media.image import Image
from g3n_mlx.media.video import Video

Source = Image | Audio | Video


@dataclass(frozen=True, slots=True)
class Media:
    """An image, audio or video part, not yet opened."""

    kind: str  # "image", "audio" or "video"
    part: Mapping[str, Any]
    where: str  # "messages[0].content[1]", for errors

    @property
    def named(self) -> str:
        """What errors call it: the keyword argument that brought it, or its place in the messages."""
        argument = self.part.get("argument")
        return argument if isinstance(argument, str) else self.where

    def source(self) -> Source:
        """The object that the part holds or describes; raises ValueError when it is malformed."""
        value: Any = _value_of(self.part, self.kind)
        match self.kind:
            case "image":
                return value if isinstance(value, Image) else Image(value)
            case "audio":
                return _audio(value, self.part.get("sampling_rate"))
            case _:
                given = {key: self.part[key] for key in ("fps", "max_frames") if self.part.get(key) is not None}
                return value if isinstance(value, Video) else Video(value, **given)


def _audio(value: Any, rate: Any) -> Audio:
    if isinstance(value, Mapping):  # as Hugging Face's data sets hold audio
        value, rate = value.get("array"), value.get("sampling_rate")
    return value if isinstance(value, Audio) else Audio(value, rate if isinstance(value, np.ndarray) else None)


def _value_of(part: Mapping[str, Any], kind: str) -> Any:
    """What an Image, Audio or Video is made of, wherever the part has it."""
    if part["type"] == "input_audio":
        return _input_audio(part.get("input_audio"))
    if part["type"] == f"{kind}_url":
        value = part.get(f"{kind}_url")
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str) or not url:
            raise BadValue(f"the part's '{kind}_url' is {value!r:.80}, expected {{'url': ...}} or a URL")
        return url
    for key in (kind, "url", "path", "base64"):
        value: Any = part.get(key)
        if value is None:
            continue
        if key == kind:
            return value
        if key == "path" and isinstance(value, str | Path):
            return Path(value)
        if not isinstance(value, str):
            raise BadValue(f"the part's {key!r} is {value!r:.80}, expected a string")
        return value if key == "url" else _data_uri(value)
    raise BadValue(f"the {kind} part has none of the keys {kind!r}, 'url', 'path' and 'base64'")


def _input_audio(value: Any) -> str:
    data = value.get("data") if isinstance(value, Mapping) else None
    if not isinstance(data, str):
        raise BadValue(f"the part's 'input_audio' is {value!r:.80}, expected {{'data': BASE64, 'format': ...}}")
    return data if data.startswith("data:") else _data_uri(data)


def _data_uri(text: str) -> str:
    return f"data:;base64,{text}"
