"""How far candidates are from the whole model: KL divergence of the next token's distribution, on the user's data.

A batch of pieces is read by the whole model once, and its distributions are kept while every candidate reads the same
pieces. Candidates are views of the loaded model; only other bits need weights of their own.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from g3n_mlx.eval.quality import LOGITS_BYTES
from g3n_mlx.slices.journal import Journal
from g3n_mlx.slices.pieces import Piece
from g3n_mlx.slices.space import Candidate
from g3n_mlx.slices.variants import Variants

if TYPE_CHECKING:
    from tqdm import tqdm

    from g3n_mlx.model import Gemma3n

# Of the whole model's log probabilities at a time: candidates with bits of their own are read once for all of these.
_KEPT_BYTES = 1 << 30


class Divergences:
    """Measures candidates, and knows what was measured before."""

    def __init__(self, variants: Variants, journal: Journal, bar: "tqdm[NoReturn]") -> None:
        """bar: shows how many passes of candidates over pieces are done, how many are due, and the time left."""
        self._variants, self._journal, self._bar = variants, journal, bar

    def of(self, candidates: Sequence[Candidate], pieces: Sequence[Piece]) -> dict[Candidate, float]:
        """The mean divergence of each from the whole model over all tokens that count, in nats."""
        due = sum(not self._is_known(candidate, piece) for candidate in set(candidates) for piece in pieces)
        self._bar.total += due
        self._bar.refresh()
        for batch in self._batches(pieces):
            self._measure(list(dict.fromkeys(candidates)), batch)
        tokens = sum(piece.tokens for piece in pieces)
        return {candidate: sum(self._known(candidate, piece) for piece in pieces) / tokens for candidate in candidates}

    def is_clearly_less(self, one: Candidate, other: Candidate, pieces: Sequence[Piece]) -> bool:
        """Whether the first diverges less by more than two standard errors, the pieces taken as independent.

        Both were measured on all of them. With a single piece any difference is clear.
        """
        gains = np.array([self._known(other, piece) - self._known(one, piece) for piece in pieces])
        return float(gains.sum()) > 2 * float(gains.std(ddof=1 if len(gains) > 1 else 0)) * len(gains) ** 0.5

    def _measure(self, candidates: Sequence[Candidate], pieces: Sequence[Piece]) -> None:
        due = [candidate for candidate in candidates if not all(self._is_known(candidate, piece) for piece in pieces)]
        if not due:
            return
        whole = {piece.key: list(_log_probabilities(self._variants.whole, piece)) for piece in pieces}
        for candidate in due:
            with self._variants.opened(candidate) as model:
                for piece in pieces:
                    if not self._is_known(candidate, piece):
                        divergence = _divergence(whole[piece.key], _log_probabilities(model, piece))
                        self._journal.put(piece.key, repr(candidate), divergence)
                        self._bar.update()

    def _batches(self, pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
        row_bytes = 4 * self._variants.whole.config.text.vocab_size
        batch: list[Piece] = []
        for piece in pieces:
            if batch and sum(other.tokens for other in [*batch, piece]) * row_bytes > _KEPT_BYTES:
                yield batch
                batch = []
            batch.append(piece)
        yield batch

    def _is_known(self, candidate: Candidate, piece: Piece) -> bool:
        return self._journal.get(piece.key, repr(candidate)) is not None

    def _known(self, candidate: Candidate, piece: Piece) -> float:
        found = self._journal.get(piece.key, repr(candidate))
        assert found is not None
        return found


def _log_probabilities(model: "Gemma3n", piece: Piece) -> Iterator[np.ndarray]:
    """Of what follows each token that counts, float32 [n, V] at a time."""
    rows = max(1, LOGITS_BYTES // (8 * model.config.text.vocab_size))
    for logits in model.logit_chunks(piece.prompt, piece.start, rows):
        wide = logits.astype(np.float64)
        wide -= wide.max(axis=-1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
        yield wide.astype(np.float32)


def _divergence(whole: Iterable[np.ndarray], other: Iterable[np.ndarray]) -> float:
    """Sum over all rows."""
    total = 0.0
    for p, q in zip(whole, other, strict=True):
        wide = p.astype(np.float64)
        total += float((np.exp(wide) * (wide - q)).sum())
    return total
