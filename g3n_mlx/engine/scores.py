"""How likely a model finds the tokens of a prompt."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token of a prompt, and how likely the ones before it made it."""

    token: int
    logprob: float | None  # None of the first one
    top_logprobs: tuple[tuple[int, float], ...] | None  # the likeliest ones in its place, best first


def token_scores(token_ids: np.ndarray, logits: np.ndarray, top: int) -> list[TokenScore]:
    """The scores of ids [T] under the logits [T, V] before each, with the `top` likeliest ones, ties by id."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    found: list[TokenScore] = []
    for token_id, row in zip(token_ids, logprobs, strict=True):
        likeliest = np.argpartition(-row, top - 1)[:top] if top else np.zeros(0, dtype=np.int64)
        best = sorted(((int(i), float(row[i])) for i in likeliest), key=lambda entry: (-entry[1], entry[0]))
        found.append(TokenScore(int(token_id), float(row[token_id]), tuple(best)))
    return found
