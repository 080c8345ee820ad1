"""Turns a request's messages into those of the published template: system first, then user and assistant in turn.

`developer` is `system`. Gemma has one system text, before the first user turn; a later system message becomes part of
the user's turn where it stands. Turns of one role that follow each other become one, tool calls and results become the
text that tools/ describes. A conversation that begins with the assistant, as chat programs greet, gets an empty turn of
the user before it.
"""

from collections.abc import Sequence
from typing import Any

from g3n_mlx.server.errors import ApiError
from g3n_mlx.server.schemas.messages import MAX_MEDIA_COST, MEDIA_COSTS, MediaUrl, Message, Part
from g3n_mlx.server.tools.history import calls_text, result_parts

Turns = list[dict[str, Any]]
SEPARATOR = "\n\n"


def template_messages(messages: Sequence[Message], tools_text: str | None) -> Turns:
    """The messages that `Gemma3n.prepare` takes. tools_text: what the system text says about tools."""
    turns: Turns = []
    if tools_text:
        turns.append({"role": "system", "content": [text_part(tools_text)]})
    names = {call.id: call.function.name for message in messages for call in message.tool_calls or []}
    for message in messages:
        role, content = message.role, parts(message)
        if role in ("system", "developer"):
            role = "system" if all(turn["role"] == "system" for turn in turns) else "user"
        elif role == "tool":
            name = names.get(message.tool_call_id or "", "")
            role, content = "user", result_parts(name, content)
        if role == "assistant" and all(turn["role"] == "system" for turn in turns):
            turns.append({"role": "user", "content": []})
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = joined(turns[-1]["content"], content)
        else:
            turns.append({"role": role, "content": content})
    if all(turn["role"] != "user" or not turn["content"] for turn in turns):
        raise ApiError(400, "there is no message of a user to answer", param="messages")
    return turns


def parts(message: Message) -> list[dict[str, Any]]:
    """A message's content as parts, followed by its tool calls as text."""
    if isinstance(message.content, str):
        content = [text_part(message.content)]
    else:
        content = [text_part(part) if isinstance(part, str) else part_fields(part) for part in message.content or []]
    if not content and message.refusal:
        content = [text_part(message.refusal)]
    if message.tool_calls:
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls]
        content = joined(content, [text_part(calls_text(calls))])
    return content


def part_fields(part: Part) -> dict[str, Any]:
    """A part as `Gemma3n.prepare` takes it: only known fields of untrusted input are passed on."""
    fields: dict[str, Any] = {"type": part.type}
    others = {name for name in ("text", *MEDIA_COSTS, "refusal") if getattr(part, name)} - {part.type}
    if others:
        found = ", ".join(sorted(others))
        raise ApiError(
            400, f"a part of the type {part.type!r:.80} also has {found}: send a part each", param="messages"
        )
    if part.type in ("text", "refusal"):
        return text_part(getattr(part, part.type) or "")
    if part.type == "input_audio":
        fields["input_audio"] = None if part.input_audio is None else {"data": part.input_audio.data}
    elif part.type in MEDIA_COSTS:
        value = getattr(part, part.type)
        fields[part.type] = value.url if isinstance(value, MediaUrl) else value
    else:
        known = ", ".join(["text", *MEDIA_COSTS])
        raise ApiError(400, f"the part type {part.type!r:.80} is unknown; known are {known}", param="messages")
    return fields


def check_media(messages: Sequence[Message]) -> None:
    """Raises ApiError 400 when a request brings too many media and files."""
    parts = (part for message in messages if isinstance(message.content, list) for part in message.content)
    cost = sum(MEDIA_COSTS.get(part.type, 0) for part in parts if isinstance(part, Part))
    if cost > MAX_MEDIA_COST:
        costs = ", ".join(f"{name} {one}" for name, one in MEDIA_COSTS.items())
        raise ApiError(
            400, f"the media cost {cost}, expected at most {MAX_MEDIA_COST} ({costs}): send fewer", param="messages"
        )


def joined(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two contents as one. Adjacent texts get an empty line between them, since the template strips them."""
    if not first or not second or not (first[-1]["type"] == second[0]["type"] == "text"):
        return [*first, *second]
    texts = [part.get("text") or "" for part in (first[-1], second[0])]
    return [*first[:-1], text_part(SEPARATOR.join(text for text in texts if text)), *second[1:]]


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
