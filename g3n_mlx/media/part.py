"""A media part of a message, before it is opened."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Media:
    """An image, audio or video part, not yet opened."""

    kind: str  # "image", "audio" or "video"
    part: Mapping[str, Any]
    where: str  # "messages[0].content[1]", for errors
