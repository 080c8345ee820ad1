"""Messages to the pieces of a prompt, as the published Gemma 3n chat template renders them.

A prompt is a list of pieces: control tokens, text, media, and the borders where a cache snapshot is
worth taking. Control tokens come from here alone; what a message says is text, whatever it looks like.
Three deliberate differences from the published template: all text parts of a system message count,
not the first alone; unknown roles and part types are errors instead of being rendered or dropped;
control words inside a message stay text.
Source: chat_template.jinja of google/gemma-3n-E4B-it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from g3n_mlx.failures import BadValue
from g3n_mlx.media.audio import Audio
from g3n_mlx.media.image import Image
from g3n_mlx.media.part import Media
from g3n_mlx.media.video import Video

# Part types of Hugging Face's and OpenAI's messages, and the modality each one brings.
MEDIA_KINDS = {
    "image": "image",
    "image_url": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
    "video": "video",
    "video_url": "video",
}
ROLES = ("system", "user", "assistant", "model")


@dataclass(frozen=True, slots=True)
class Control:
    """A control token, by its name in the vocabulary."""

    word: str


@dataclass(frozen=True, slots=True)
class Border:
    """A place where later prompts are likely to part from this one; renders as nothing."""


Piece = Control | Media | Border | str


def render(
    messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, *, continued: bool = False
) -> list[Piece]:
    """The pieces of a conversation, beginning with `<bos>`; text pieces that touch belong together.

    messages: `{"role": ..., "content": text or a list of parts}`; a part is a string, `{"type": "text", "text": ...}`
    or a media part. continued: the last message, the assistant's, is left open instead of being followed by a new turn.
    A border follows the system text and every `<start_of_turn>model` header.
    Raises ValueError naming the message or part that can't be rendered.
    """
    check_messages(messages)
    system, turns, skipped = "", messages, 0
    if messages[0]["role"] == "system":
        system, turns, skipped = _system_text(messages[0]["content"]) + "\n\n", messages[1:], 1
        if not turns:
            raise BadValue("messages hold a system message alone; add a user message")
    pieces: list[Piece] = [Control("<bos>")]
    for index, message in enumerate(turns):
        where, role = f"messages[{index + skipped}]", message["role"]
        if (role == "user") != (index % 2 == 0):
            raise BadValue(
                "Conversation roles must alternate user/assistant/user/assistant/...; "
                f"{where} has the role {role!r}, expected {'user' if index % 2 == 0 else 'assistant'!r}"
            )
        pieces += _header("model" if role == "assistant" else role)
        if index == 0 and system:
            pieces += [system, Border()]
        pieces += _content(message["content"], where)
        pieces += [Control("<end_of_turn>"), "\n"]
    if continued:
        if turns[-1]["role"] not in ("assistant", "model"):
            raise BadValue("the last message is not the assistant's, so it can't be continued")
        return pieces[:-2]  # its end of turn
    if add_generation_prompt:
        pieces += _header("model")
    return pieces


def _header(role: str) -> list[Piece]:
    header: list[Piece] = [Control("<start_of_turn>"), f"{role}\n"]
    return [*header, Border()] if role == "model" else header


def _content(content: Any, where: str) -> list[Piece]:
    if isinstance(content, str):
        return [content.strip()]
    pieces: list[Piece] = []
    for index, part in enumerate(parts_of(content, where)):
        place = f"{where}.content[{index}]"
        if not isinstance(part, str) and part["type"] in MEDIA_KINDS:
            pieces.append(Media(MEDIA_KINDS[part["type"]], part, place))
        else:
            pieces.append(_text(part, place).strip())
    return pieces


def _system_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(
        _text(part, f"messages[0].content[{index}]") for index, part in enumerate(parts_of(content, "messages[0]"))
    )


def parts_of(content: Any, where: str) -> list[Any]:
    """The parts of a content list, each a string or a mapping with a type; bare media objects get theirs."""
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise BadValue(f"{where}.content is of type {type(content).__name__}, expected a string or a list of parts")
    parts: list[Any] = []
    for index, part in enumerate(content):
        match part:
            case Image():
                part = {"type": "image", "image": part}
            case Audio():
                part = {"type": "audio", "audio": part}
            case Video():
                part = {"type": "video", "video": part}
            case _:
                pass
        if not isinstance(part, str) and not (isinstance(part, Mapping) and isinstance(part.get("type"), str)):
            raise BadValue(
                f"{where}.content[{index}] is {part!r:.80}, expected a string or a dict with a 'type', "
                "or an Image, Audio or Video"
            )
        parts.append(part)
    return parts


def _text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if part["type"] in MEDIA_KINDS:
        raise BadValue(f"{where}: a system message can't hold {part['type']!r} parts, only text")
    if part["type"] != "text":
        known = ", ".join(["text", *MEDIA_KINDS])
        raise BadValue(f"{where}: the part type {part['type']!r} is unknown; known are {known}")
    if not isinstance(part.get("text"), str):
        raise BadValue(f"{where}: the text part's 'text' is {part.get('text')!r:.80}, expected a string")
    return part["text"]


def check_messages(messages: Any) -> None:
    """Raises ValueError unless it is a list of messages of known roles, with contents."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise BadValue(f"messages is a {type(messages).__name__}, expected a list of dicts")
    if not messages:
        raise BadValue("messages is empty; expected at least one user message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise BadValue(f"messages[{index}] is {message!r:.80}, expected a dict with 'role' and 'content'")
        if message["role"] not in ROLES:
            raise BadValue(f"messages[{index}] has the role {message['role']!r}, expected one of {', '.join(ROLES)}")
