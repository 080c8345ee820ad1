"""A request's messages to those of the published template: system first, then user and assistant by turns.

`developer` is `system`. Gemma has one system text, before the first user turn; a later system message becomes part of
the user's turn where it stands. Turns of one role that follow each other become one, tool calls and results become the
text that tools.py documents.
"""

from collections.abc import Sequence
from typing import Any

from g3n_mlx.server import tools
from g3n_mlx.server.schemas import Message

Turns = list[dict[str, Any]]
SEPARATOR = "\n\n"


def conversation(messages: Sequence[Message], tools_text: str | None) -> Turns:
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
            role, content = "user", wrapped(content, *tools.result_texts(name))
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = joined(turns[-1]["content"], content)
        else:
            turns.append({"role": role, "content": content})
    return turns


def parts(message: Message) -> list[dict[str, Any]]:
    """A message's content as parts, with its tool calls as text behind it."""
    if isinstance(message.content, str):
        content = [text_part(message.content)]
    else:
        content = [
            text_part(part) if isinstance(part, str) else part.model_dump(exclude_unset=True)
            for part in message.content or []
        ]
    if message.tool_calls:
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls]
        content = joined(content, [text_part(tools.calls_text(calls))])
    return content


def joined(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two contents as one. Texts that meet get an empty line between them, since the template strips them."""
    if not first or not second or not (first[-1]["type"] == second[0]["type"] == "text"):
        return [*first, *second]
    texts = [part.get("text") or "" for part in (first[-1], second[0])]
    return [*first[:-1], text_part(SEPARATOR.join(text for text in texts if text)), *second[1:]]


def wrapped(content: list[dict[str, Any]], before: str, after: str) -> list[dict[str, Any]]:
    """A content between two texts."""
    return joined(joined([text_part(before)], content), [text_part(after)])


def text_part(text: str) -> dict[str, Any]:
    """A text as a part."""
    return {"type": "text", "text": text}
