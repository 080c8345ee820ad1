"""A conversation in a JSON file."""

import json
from pathlib import Path
from typing import Any

from g3n_mlx.config.fields import parse_json
from g3n_mlx.failures import FileProblem


def saved_messages(path: Path) -> list[dict[str, Any]] | None:
    """The messages of a saved conversation; None when the file is something else."""
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    messages = document.get("messages") if isinstance(document, dict) else None
    return messages if isinstance(messages, list) else None


def write_messages(path: Path, model: str, messages: list[dict[str, Any]]) -> None:
    """Writes a conversation with a model of this name; raises FileProblem, and then leaves the file as it was."""
    document = {"model": model, "messages": messages}
    # Written beside it first: a full disk must not cost the conversation saved before.
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:  # hides the temporary file's name
        raise FileProblem(f"{path} can't be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
