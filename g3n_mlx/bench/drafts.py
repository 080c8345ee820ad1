"""What drafts bring here: answers with them and without, and how long calls of several rows take.

A copy of the prompt is the best case of a lookup. A constraint forces it, so that weights of any kind, random ones too,
write it; the masks are those of a grammar, and nothing tells the drafter what comes. The keys of an object are what a
grammar forces. Free text is what the model itself goes on with, end of sequence or not.
"""

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from g3n_mlx.engine.cache import Cache
from g3n_mlx.engine.runner import run
from g3n_mlx.engine.sequence import Constraint
from g3n_mlx.model import Gemma3n
from g3n_mlx.rows import Draw, Rows
from g3n_mlx.sampling import SamplingParams

COPY, OBJECT, FREE = "a copy of the prompt", "an object with long keys", "free text"
KEYS = (
    "customer_identification_number",
    "number_of_registered_vehicles",
    "years_since_the_last_inspection",
    "outstanding_balance_in_euros",
)
SCHEMA = {
    "type": "object",
    "properties": {key: {"type": "integer", "minimum": 0, "maximum": 9} for key in KEYS},
    "required": list(KEYS),
    "additionalProperties": False,
}
ROWS, ROW_TRIALS = (1, 2, 4, 8, 16), 3


@dataclass(frozen=True, slots=True)
class Drafted:
    """One task with drafts and without, one after the other."""

    task: str
    plain_tps: float  # tokens a second after the first one, without drafts
    tps: float
    drafted_tokens: int
    accepted_tokens: int
    tokens_per_call: float


class Copy:
    """A constraint that lets through one text alone, again and again."""

    def __init__(self, token_ids: Sequence[int], width: int) -> None:
        self._ids, self._width, self._written = token_ids, width, 0

    def mask(self) -> np.ndarray:
        return self._at(0)

    def push(self, token_id: int) -> None:
        self._written += 1

    def masks(self, draft: Sequence[int]) -> list[np.ndarray]:
        right = 0
        while right < len(draft) and draft[right] == self._ids[(self._written + right) % len(self._ids)]:
            right += 1
        return [self._at(index) for index in range(right + 1)]

    def forced(self) -> list[int]:
        """None: a lookup has to find them."""
        return []

    def _at(self, index: int) -> np.ndarray:
        mask = np.zeros(self._width, dtype=np.bool_)
        mask[self._ids[(self._written + index) % len(self._ids)]] = True
        return mask


def drafted(model: Gemma3n, draft: Any, prompt: list[int], count: int) -> list[Drafted]:
    """Every task after the prompt, at most `count` tokens long."""
    width = model.config.text.vocab_size
    tasks: dict[str, Callable[[], Constraint | None]] = {COPY: lambda: Copy(prompt, width), FREE: lambda: None}
    if importlib.util.find_spec("llguidance") is not None:
        tasks[OBJECT] = lambda: model.grammars.json_schema(SCHEMA)
    return [_drafted(model, task, make, draft, prompt, count) for task, make in tasks.items()]


def _drafted(
    model: Gemma3n, task: str, make: Callable[[], Constraint | None], draft: Any, prompt: list[int], count: int
) -> Drafted:
    usages = []
    for mode in ("off", draft):
        # An object has an end of its own, and nothing may come behind it.
        options: dict[str, Any] = {"temperature": 0.0, "ignore_eos": task != OBJECT, "max_tokens": count}
        model.reset()
        usages.append(model.generate(prompt, **options, constraint=make(), draft=mode).usage)
    plain, found = usages
    return Drafted(
        task=task,
        plain_tps=plain.avg_compl_tok_per_sec,
        tps=found.avg_compl_tok_per_sec,
        drafted_tokens=found.drafted_tokens,
        accepted_tokens=found.accepted_tokens,
        tokens_per_call=found.tokens_per_call,
    )


def row_seconds(model: Gemma3n, prompt: list[int]) -> list[tuple[int, float]]:
    """Of calls for one sequence that draw after each of so many rows: rows and the best time, in seconds."""
    return model.runner.call(lambda: _row_seconds(model, prompt))


def _row_seconds(model: Gemma3n, prompt: list[int]) -> list[tuple[int, float]]:
    network = model.runner.model
    cache = Cache(model.config.text, network.kv_arrays)
    sampler = network.make_sampler(SamplingParams(temperature=0.0), prompt)
    run(network, [Rows(cache, np.array(prompt))])
    found: list[tuple[int, float]] = []
    for rows in ROWS:
        ids, times = np.array([prompt[i % len(prompt)] for i in range(rows)]), list[float]()
        for _ in range(ROW_TRIALS):
            started = time.perf_counter()
            (steps,) = run(network, [Rows(cache, ids, draw=Draw(sampler, 0, [None] * rows))])
            for step in steps:
                int(step)
            times.append(time.perf_counter() - started)
            cache.trim(rows)
        found.append((rows, min(times)))
    return found
