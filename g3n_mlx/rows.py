"""The rows of one call of the model, flat behind each other: no padding, no batch axis; attention alone sees borders.

Steps, samplers, soft tokens and caches, as they cross the seam in a call, are described here too. T counts all rows of
a call, R those whose logits are wanted. Nothing here names an array framework.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np

from g3n_mlx.config.model import ModelConfig

Array = Any  # of the backend


class Step(Protocol):
    """One drawn token, perhaps still being computed on the device."""

    def __int__(self) -> int:
        """The token id, or sampling.NOT_FINITE where the logits are not finite; waits for it."""
        ...

    def logprob(self) -> float:
        """Natural log of the token's probability before penalties and filters."""
        ...

    def top_logprobs(self, count: int) -> list[tuple[int, float]]:
        """The `count` most likely (token id, log probability), best first, ties by id."""
        ...


class SoftTokens(Protocol):
    """Rows [n, D] on the device that stand for an image or an audio clip in the text model."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> "SoftTokens": ...

    @property
    def nbytes(self) -> int:
        """Bytes they take."""
        ...


Soft = Sequence[tuple[int, SoftTokens]]  # (index of the first id they replace, soft tokens) pairs


class Cache(Protocol):
    """Keys and values of one sequence (engine/cache.py), as a backend sees it."""

    @property
    def offset(self) -> int:
        """Tokens seen: the position of the next one."""
        ...

    @property
    def layers(self) -> dict[int, Any]:
        """Per layer that owns keys and values: `update(keys, values)` appends, and returns all that may be seen."""
        ...


class Sampler(Protocol):
    """Draws the tokens of one answer; keeps its penalties' counts."""

    def draw(self, logits: Any, position: int, mask: np.ndarray | None = None, /) -> Step:
        """The token at a position of the answer, from 0, out of a row [V] of logits.

        mask: bool [V], the tokens that may be drawn.
        """
        ...

    def count(self, token_ids: Sequence[int]) -> None:
        """Counts tokens that come into the answer without a draw, for the penalties: a grammar forces them."""
        ...

    def forget(self, n: int) -> None:
        """Takes the last n tokens out of the penalties' counts: a draft that was not accepted."""
        ...


@dataclass(frozen=True, slots=True)
class Draw:
    """That tokens be drawn after the last rows of a sequence in a call: 1 to decode, k + 1 to verify a draft of k."""

    sampler: Sampler
    position: int  # of the first drawn token in the answer, from 0: it decides the uniform number
    masks: Sequence[np.ndarray | None] = (None,)  # for each, bool [V]: the tokens that may be drawn


@dataclass(frozen=True, slots=True)
class Rows:
    """What one sequence appends to its cache in a call: ids, or the token of a step that may not be known yet."""

    cache: Cache
    token_ids: np.ndarray | Step  # int64 [T]
    soft: Soft = ()
    draw: Draw | None = None  # None: keys and values alone, so the layers that share others' are skipped


class Batch:
    """What several sequences append in one call."""

    def __init__(self, rows: Sequence[Rows], *, keep_all: bool = False) -> None:
        """keep_all: the logits of all rows are wanted, not only of those after which a token is drawn."""
        self.rows = rows
        self.caches: list[Cache] = [entry.cache for entry in rows]
        self.counts = [len(e.token_ids) if isinstance(e.token_ids, np.ndarray) else 1 for e in rows]
        drawn = [0 if entry.draw is None else len(entry.draw.masks) for entry in rows]
        self.kept = self.counts if keep_all else drawn  # the last rows of each sequence
        # int32 [T]: the rows of every sequence go on from its cache, which has moved on once layer 0 has run.
        spans = [
            np.arange(c.offset, c.offset + n, dtype=np.int32) for c, n in zip(self.caches, self.counts, strict=True)
        ]
        self.positions = np.concatenate(spans) if len(spans) > 1 else spans[0]

    @property
    def steps(self) -> list[Step]:
        """The steps whose tokens are appended, when the rows are nothing else; else none."""
        steps = [entry.token_ids for entry in self.rows if not isinstance(entry.token_ids, np.ndarray)]
        return steps if len(steps) == len(self.rows) else []

    def token_ids(self) -> np.ndarray:
        """int64 [T]; waits for the tokens of steps."""
        ids = [e.token_ids if isinstance(e.token_ids, np.ndarray) else [int(e.token_ids)] for e in self.rows]
        return np.concatenate(ids) if len(ids) > 1 else np.asarray(ids[0])

    def kept_rows(self) -> np.ndarray | None:
        """int32 [R]: the rows whose logits are wanted, the last ones of every sequence; None when all are."""
        if self.kept == self.counts:
            return None
        ends = accumulate(self.counts)
        return np.concatenate([np.arange(b - n, b, dtype=np.int32) for b, n in zip(ends, self.kept, strict=True)])

    def soft(self) -> list[tuple[int, SoftTokens]]:
        """All soft tokens, each with the row where it begins."""
        starts = accumulate(self.counts, initial=0)
        return [(start + index, soft) for start, e in zip(starts, self.rows, strict=False) for index, soft in e.soft]


class Context:
    """What the attention of one call looks at: the keys and values of every sequence, layer by layer."""

    def __init__(self, caches: Sequence[Cache], counts: Sequence[int]) -> None:
        """counts: rows of each sequence."""
        self.caches = caches
        self.spans = list(pairwise(accumulate(counts, initial=0)))  # first row and end of each sequence
        self._visible: dict[int, list[tuple[Array, Array]]] = {}

    def holds(self, layer_idx: int) -> bool:
        """Whether a layer's new keys and values are stored."""
        return layer_idx in self._visible

    def store(self, layer_idx: int, keys: Sequence[Array], values: Sequence[Array]) -> None:
        """Appends a layer's new keys and values, [1, K, n, H] for each sequence, to its cache."""
        new = zip(self.caches, keys, values, strict=True)
        self._visible[layer_idx] = [cache.layers[layer_idx].update(k, v) for cache, k, v in new]

    def sequences(self, owner_idx: int) -> Iterator[tuple[int, int, Array, Array]]:
        """For each sequence its first row and end, and the keys and values [1, K, S, H] that these rows may see."""
        return ((a, b, k, v) for (a, b), (k, v) in zip(self.spans, self._visible[owner_idx], strict=True))

    def narrowed(self, kept: Sequence[int]) -> "Context":
        """The same for the last `kept` rows of each sequence alone, once all new keys and values are stored."""
        at = [index for index, n in enumerate(kept) if n]
        other = Context([self.caches[index] for index in at], [kept[index] for index in at])
        other._visible = {idx: [pairs[index] for index in at] for idx, pairs in self._visible.items()}
        return other


def embedder_rows(
    config: ModelConfig, token_ids: np.ndarray, soft: Sequence[tuple[int, SoftTokens]]
) -> dict[str, np.ndarray]:
    """The rows [n] of a call that an embedder of images or audio embeds, by its name: ids of its range.

    Those that soft tokens cover are none of them.
    """
    ids = token_ids.tolist()
    for start, rows in soft:
        ids[start : start + len(rows)] = [0] * len(rows)
    found: dict[str, list[int]] = {}
    for row, token_id in enumerate(ids):
        if (name := config.embedder_of(token_id)) is not None:
            found.setdefault(name, []).append(row)
    return {name: np.array(rows) for name, rows in found.items()}
