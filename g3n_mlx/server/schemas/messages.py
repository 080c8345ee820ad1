"""A conversation's messages: roles, the parts of their content, calls."""

import json
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from g3n_mlx.server.schemas.base import SENT_ELSEWHERE, Wire

MAX_MESSAGES = 4096
MAX_PARTS = 256  # of one message
# The most that a request's media may cost, counted in images. So many images fill the published context and take 220 MB
# once opened; audio and video cost the same whatever their length, which has a limit of its own. A file may be a PDF,
# which takes a process for up to 30 s.
MAX_MEDIA_COST = 128
MEDIA_COSTS = {"image_url": 1, "audio_url": 16, "input_audio": 16, "video_url": 16, "file": 4}
MAX_TOOLS = 128

# What Qwen's and other servers' parts take.
_PARTS_OF_MEDIA: Mapping[str, str] = dict.fromkeys(
    (
        *("fps", "nframes", "num_frames", "max_frames", "min_pixels", "max_pixels", "resized_height", "resized_width"),
        *("video_start", "video_end", "start_time", "end_time", "start_offset", "end_offset"),
    ),
    "a video is shown as a frame per second, an image at the model's size",
)


class MediaUrl(Wire):
    """Where an image, audio or a video is: a data: URI, http(s), or a path below --media-root."""

    REFUSED: ClassVar[Mapping[str, str]] = _PARTS_OF_MEDIA

    url: str


class InputAudio(Wire):
    """Audio in the request itself."""

    data: str  # base64
    format: str | None = None


class FileData(Wire):
    """A text or a PDF; its text goes into the prompt."""

    REFUSED: ClassVar[Mapping[str, str]] = {"file_id": "this server stores no files: send file_data"}

    file_data: str | None = None  # base64, alone or as a data: URI
    filename: str | None = None


class Part(Wire):
    """A part of a message's content."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **_PARTS_OF_MEDIA,
        **dict.fromkeys(("image", "images", "audio", "video", "source", "input_image"), SENT_ELSEWHERE),
    }

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | MediaUrl | None = None
    audio_url: str | MediaUrl | None = None
    video_url: str | MediaUrl | None = None
    input_audio: InputAudio | None = None
    file: FileData | None = None


class FunctionCall(Wire):
    """The call that an assistant's message made."""

    name: str
    # Ollama's and some clients' are the object itself.
    arguments: Annotated[
        str, BeforeValidator(lambda given: json.dumps(given) if isinstance(given, dict) else given)
    ] = "{}"


class ToolCall(Wire):
    """One of an assistant's calls."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Wire):
    """One message of a conversation."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("images", "videos", "audios", "audio", "image", "video", "files"), SENT_ELSEWHERE),
        **dict.fromkeys(("prefix", "partial"), "set continue_final_message beside messages"),
        "function_call": "send tool_calls",
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[str | Part], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None  # an assistant's, in place of content
