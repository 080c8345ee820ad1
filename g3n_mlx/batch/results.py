"""Results of a batch: the lines of OpenAI's batch output, and the tables that are made of them.

A line has `id`, `custom_id`, `response` and `error`. A request that failed has an `error` with code and message; its
response, where the server's rules refused it, is the one that a client of the server would get.
"""

import csv
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g3n_mlx.failures import MissingPackage
from g3n_mlx.installation import install_command

TABLES = (".csv", ".parquet")
COLUMNS = ("custom_id", "text", "finish_reason", "prompt_tokens", "completion_tokens", "error")
_ROWS_AT_ONCE = 10_000  # of a Parquet file's row groups

OK = 200


@dataclass(frozen=True, slots=True)
class Response:
    """What a request was answered: a status of HTTP, and the body's JSON, or its text where it is none."""

    status: int
    body: Any


def refused(message: str) -> Response:
    """The response to a request that can't be sent, in the server's shape."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return Response(400, {"error": error})


def result_line(custom_id: str, response: Response) -> dict[str, Any]:
    """The line of a response."""
    body, error = response.body, None
    if response.status != OK:
        details: Any = body.get("error") if isinstance(body, dict) else None
        details = details if isinstance(details, dict) else {"message": str(body)}
        code = details.get("code") or details.get("type") or str(response.status)
        error = {"code": code, "message": details.get("message", "")}
    number = uuid.uuid4().hex
    answer = {"status_code": response.status, "request_id": f"req_{number}", "body": body}
    return {"id": f"batch_req_{number}", "custom_id": custom_id, "response": answer, "error": error}


def text_of(line: Mapping[str, Any]) -> str | None:
    """The answer's text, of its first choice; None where it failed."""
    if line["error"] is not None:
        return None
    body: Any = line["response"]["body"]
    if isinstance(body, str) or "choices" not in body:
        return body if isinstance(body, str) else body.get("text")
    choice = body["choices"][0]
    return choice["text"] if "text" in choice else (choice["message"].get("content"))


def tokens_of(line: Mapping[str, Any]) -> int:
    """How many tokens were generated; a transcription does not say."""
    return _usage(line).get("completion_tokens") or 0


def _usage(line: Mapping[str, Any]) -> dict[str, Any]:
    body: Any = (line["response"] or {}).get("body")
    usage = body.get("usage") if isinstance(body, dict) else None
    return usage if isinstance(usage, dict) else {}


def row_of(line: Mapping[str, Any], properties: Sequence[str] = ()) -> dict[str, Any]:
    """A line as a table's row. properties: of the schema; each is a column, JSON where it is no scalar."""
    body: Any = (line["response"] or {}).get("body")
    choices = body.get("choices") if isinstance(body, dict) else None
    error, text, usage = line["error"], text_of(line), _usage(line)
    row: dict[str, Any] = {
        "custom_id": line["custom_id"],
        "text": text,
        "finish_reason": choices[0]["finish_reason"] if choices else None,
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "error": None if error is None else error["message"],
    }
    found = _object(text) if properties else {}
    return row | {column_of(name): _cell(found.get(name)) for name in properties}


def column_of(name: str) -> str:
    """The column of a property, which may be called like one of ours."""
    return f"answer.{name}" if name in COLUMNS else name


def _object(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "")
    except ValueError:  # max_tokens truncated it
        return {}
    return found if isinstance(found, dict) else {}


def _cell(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def write_table(lines: Iterable[Mapping[str, Any]], path: Path, schema: Mapping[str, Any] | None = None) -> None:
    """Writes results as CSV or Parquet, by the suffix; whole or not at all.

    schema: of the answers; its properties are columns too. Raises ImportError when pyarrow is missing.
    """
    properties = list((schema or {}).get("properties", {}))
    rows = (row_of(line, properties) for line in lines)
    names = [*COLUMNS, *map(column_of, properties)]
    unfinished = path.with_name(f".{path.name}.unfinished")
    if path.suffix == ".csv":
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    else:
        _write_parquet(rows, names, unfinished)
    os.replace(unfinished, path)


def check_table(path: Path) -> None:
    """Raises ImportError when what a table needs is missing: before hours of work."""
    if path.suffix == ".parquet":
        _pyarrow()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingPackage(f"Parquet needs pyarrow: {install_command('parquet')}") from None
    return pyarrow, pyarrow.parquet


def _write_parquet(rows: Iterator[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    arrow, parquet = _pyarrow()
    counts = ("prompt_tokens", "completion_tokens")
    schema = arrow.schema([(name, arrow.int64() if name in counts else arrow.string()) for name in names])
    with parquet.ParquetWriter(path, schema) as writer:
        some: list[dict[str, Any]] = []
        for row in rows:
            some.append(row)
            if len(some) == _ROWS_AT_ONCE:
                writer.write_table(arrow.Table.from_pylist(some, schema))
                some = []
        writer.write_table(arrow.Table.from_pylist(some, schema))
