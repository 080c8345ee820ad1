"""The class that Ray Data maps over batches of rows: one model, answering the rows of several batches at once."""

import asyncio
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from g3n_mlx.batch.question import Question
from g3n_mlx.batch.requests import Request
from g3n_mlx.batch.results import result_line, text_of
from g3n_mlx.failures import BadValue

Columns = Mapping[str, np.ndarray]


class Worker:
    """A callable on batches of rows, for `ray.data.Dataset.map_batches`; any other pipeline may call it too.

    Rows are requests (columns custom_id, url and body, or `request` with a whole line of a batch file), or files about
    which `prompt` asks (column path; where there is also a column bytes, the file's content, as
    `ray.data.read_binary_files` has it). Several threads may call it at once: their rows share calls of the model.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        prompt: str | None = None,
        system_prompt: str | None = None,
        schema: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        parallel: int | None = None,
        cache_bytes: int = 4 * 10**9,
        load_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Loads the model. load_options: keywords of `g3n_mlx.load`. Raises as that does, and ImportError without the
        packages of the extra `server`.

        parallel: answers in progress; by default as many as fit in cache_bytes.
        """
        from g3n_mlx.batch.service import Service
        from g3n_mlx.loading import load

        self._question = None
        if prompt is not None:
            wanted = None if schema is None else dict(schema)
            self._question = Question(prompt, system_prompt, wanted, max_tokens, temperature, seed)
        self._model = load(model, **(load_options or {}))
        self._service = Service(self._model, parallel=parallel, cache_bytes=cache_bytes)
        self._room = asyncio.Semaphore(self._service.in_flight)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="batch", daemon=True)
        self._thread.start()

    def __call__(self, batch: Columns) -> dict[str, np.ndarray]:
        """The results of the rows, in their order: custom_id, text and error (empty where there is none), and
        `result`, the line of a batch's results as JSON.

        Raises ValueError when a column is missing; what is wrong with one row is its error.
        """
        requests = [self._request(row) for row in _rows(batch)]
        lines = asyncio.run_coroutine_threadsafe(self._answers(requests), self._loop).result()
        columns = {
            "custom_id": [line["custom_id"] for line in lines],
            "text": [text_of(line) or "" for line in lines],
            "error": ["" if line["error"] is None else line["error"]["message"] for line in lines],
            "result": [json.dumps(line) for line in lines],
        }
        return {name: np.array(values, dtype=object) for name, values in columns.items()}

    def close(self) -> None:
        """Frees the model; nothing may be called any more."""
        asyncio.run_coroutine_threadsafe(self._service.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._model.close()

    async def _answers(self, requests: list[Request]) -> list[dict[str, Any]]:
        async def answered(request: Request) -> dict[str, Any]:
            async with self._room:
                return result_line(request.custom_id, await self._service.answer(request))

        return await asyncio.gather(*map(answered, requests))

    def _request(self, row: Mapping[str, Any]) -> Request:
        try:
            if "request" in row:
                return Request.of(json.loads(row["request"]), "")
            if {"custom_id", "url", "body"} <= row.keys():
                body = row["body"]
                return Request.of({**row, "body": json.loads(body) if isinstance(body, str) else body}, "")
        except (ValueError, RecursionError) as error:
            return Request(str(row.get("custom_id", "")), problem=f"the row's request is not JSON: {error}")
        if "path" not in row:
            raise BadValue(f"the columns are {', '.join(row)}, expected path, request, or custom_id, url and body")
        if self._question is None:
            raise BadValue("the rows are files, but there is no prompt to ask about them: Worker(prompt=...)")
        return self._question.about(str(row["path"]), content=row.get("bytes"))


def _rows(batch: Columns) -> list[dict[str, Any]]:
    count = len(next(iter(batch.values()), ()))
    return [{name: column[index] for name, column in batch.items()} for index in range(count)]
