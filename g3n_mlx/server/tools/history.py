"""Earlier calls and their results, as text that the model reads."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from g3n_mlx.prompt.fences import fence_around


def calls_text(calls: Sequence[tuple[str, str]]) -> str:
    """Calls of an earlier response, (name, arguments as JSON), as the model wrote them."""
    return "\n".join(_call_text(name, arguments) for name, arguments in calls)


def _call_text(name: str, arguments: str) -> str:
    try:
        return json.dumps({"name": name, "parameters": json.loads(arguments)}, ensure_ascii=False)
    except (ValueError, RecursionError):  # not JSON, or nested too deeply: kept as text
        return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)


def result_parts(name: str, content: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A function's result, parts of a message, as parts of the user's turn; an unknown name is ''.

    Text is put into a fence longer than any in it, media after it.
    """
    text = "\n".join(part.get("text") or "" for part in content if part["type"] == "text")
    fence = fence_around(text)
    fenced = f"Result of {name or 'the function'}:\n{fence}tool_output\n{text}\n{fence}"
    return [{"type": "text", "text": fenced}, *(dict(part) for part in content if part["type"] != "text")]


def arguments_of(text: str) -> dict[str, Any]:
    """A call's arguments as an object, which is empty where max_tokens truncated their JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return {}
