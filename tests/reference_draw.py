"""The draw in numpy, plain and slow: what both backends' draws on the device are compared with."""

from collections.abc import Sequence

import numpy as np

from g3n_mlx.sampling import SamplingParams


def penalize(
    logits: np.ndarray, params: SamplingParams, prompt_ids: Sequence[int], answer_ids: Sequence[int]
) -> np.ndarray:
    """Logits [V] after repetition, frequency and presence penalties and the bias, in float32, in that order."""
    scores = logits.astype(np.float32).copy()
    counts = np.bincount(np.asarray(answer_ids, dtype=np.int64), minlength=len(scores)).astype(np.float32)
    seen = counts > 0
    seen[np.asarray(prompt_ids, dtype=np.int64)] = True
    repetition = np.float32(params.repetition_penalty)
    scores = np.where(seen, np.where(scores > 0, scores / repetition, scores * repetition), scores)
    scores -= counts * np.float32(params.frequency_penalty) + (counts > 0) * np.float32(params.presence_penalty)
    for token_id, bias in params.logit_bias.items():
        scores[token_id] += np.float32(bias)
    return scores


def masked(scores: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Scores [V] with minus infinity where the mask, bool [V], lets no token through."""
    return scores if mask is None else np.where(mask, scores, np.float32(-np.inf))


def candidates(scores: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Token ids that may be drawn, best first, and their probabilities (float64, they sum to 1)."""
    order = np.lexsort((np.arange(len(scores)), -scores))
    order = order[: params.top_k] if params.top_k else order
    if params.greedy:
        return order[:1], np.ones(1)
    scaled = scores[order].astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled[0])
    probabilities = weights / weights.sum()
    before = np.cumsum(probabilities) - probabilities  # mass of the better candidates
    kept = (before < params.top_p) & (probabilities >= params.min_p * probabilities[0])
    kept[0] = True
    return order[kept], probabilities[kept] / probabilities[kept].sum()


def draw(scores: np.ndarray, params: SamplingParams, uniform: float) -> tuple[int, float]:
    """The token that `uniform` picks, and its distance from the nearest border of the CDF."""
    ids, probabilities = candidates(scores, params)
    borders = np.cumsum(probabilities)
    chosen = min(int(np.searchsorted(borders, uniform, side="right")), len(ids) - 1)
    return int(ids[chosen]), float(np.abs(borders - uniform).min())
