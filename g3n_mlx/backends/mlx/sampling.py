"""The draw on the device; its reference is g3n_mlx/sampling.py, which it must match token for token."""

import math
from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import numpy as np

from g3n_mlx.sampling import NOT_FINITE, SamplingParams, Uniforms

# Columns of the table whose row maxima decide which rows can hold one of the k best.
COLUMNS = 64


class Step:
    """One drawn token on the device."""

    def __init__(self, token: mx.array, logits: mx.array) -> None:
        self.token = token  # [1] int64, that the next step may begin with
        self.logits = logits  # [V] float32, before penalties
        # What the host is told, in the copy that it waits for anyway. One sum shows any number that is not finite.
        self.told = mx.where(mx.isfinite(logits.sum()), token, NOT_FINITE)
        self._token_id: int | None = None

    def __int__(self) -> int:
        if self._token_id is None:  # waited for and copied once, however often it is asked
            self._token_id = cast(int, self.told.item())
        return self._token_id

    def logprob(self) -> float:
        """Log probability of the token before penalties and filters."""
        return cast(float, log_softmax(self.logits)[self.token].item())

    def top_logprobs(self, count: int) -> list[tuple[int, float]]:
        """The most likely (token id, log probability), best first, ties by id."""
        ids = ordered(self.logits, count)
        values = log_softmax(self.logits)[ids]
        return list(zip(cast(list[int], ids.tolist()), cast(list[float], values.tolist()), strict=True))


class Sampler:
    """Draws the tokens of one answer."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int, device: mx.Device) -> None:
        self.params = params
        self.uniforms = Uniforms(params.seed)
        self.tokens: list[mx.array] = []  # [1] each: the answer so far, where penalties count it
        self.counts: mx.array | None = None  # [V] float32: how often each token is in the answer
        self.prompted: mx.array | None = None  # [V] bool: whether it is in the prompt
        if params.penalizes:
            self.counts = mx.zeros(vocab_size)
            self.prompted = mx.zeros(vocab_size, dtype=mx.bool_)
            self.prompted[mx.array(list(prompt_ids), dtype=mx.int64)] = True
        self.bias: mx.array | None = None  # [V] float32
        if params.logit_bias:
            self.bias = mx.zeros(vocab_size)
            for token_id, bias in params.logit_bias.items():
                self.bias[token_id] = bias

    def draw(self, logits: mx.array, position: int, mask: np.ndarray | None = None) -> Step:
        """The token at a position of the answer from [V] float32 logits, of those that the mask [V] lets through."""
        scores = self.penalized(logits)
        if mask is not None:
            scores = mx.where(mx.array(mask), scores, -math.inf)
        if self.params.greedy:
            token = mx.argmax(scores, axis=-1, keepdims=True).astype(mx.int64)
        else:
            token = drawn(scores, self.params, self.uniforms.at(position))
        self.add(token)
        return Step(token, logits)

    def count(self, token_ids: Sequence[int]) -> None:
        """Counts tokens that need no draw, as if they had been drawn."""
        for token_id in token_ids:
            self.add(mx.array([token_id]))

    def add(self, token: mx.array) -> None:
        """Adds a token [1] of the answer to the penalties' counts."""
        if self.counts is not None:
            self.counts = self.counts.at[token].add(1)
            self.tokens.append(token)

    def forget(self, n: int) -> None:
        """Takes the last n tokens back out of the penalties' counts."""
        for token in [self.tokens.pop() for _ in range(n if self.counts is not None else 0)]:
            assert self.counts is not None
            self.counts = self.counts.at[token].add(-1)

    def penalized(self, logits: mx.array) -> mx.array:
        """Logits after repetition, frequency and presence penalties and the bias."""
        scores = logits
        if self.counts is not None and self.prompted is not None:
            answered = self.counts > 0
            repetition = self.params.repetition_penalty
            repeated = mx.where(scores > 0, scores / repetition, scores * repetition)
            scores = mx.where(answered | self.prompted, repeated, scores)
            scores = scores - (self.counts * self.params.frequency_penalty + answered * self.params.presence_penalty)
        return scores if self.bias is None else scores + self.bias


def drawn(scores: mx.array, params: SamplingParams, uniform: float) -> mx.array:
    """One token [1] from [V] scores by inverse CDF of `uniform` over the filtered candidates."""
    ids = ordered(scores, params.top_k or scores.shape[0])
    weights = mx.exp((scores[ids] - scores[ids[0]]) / params.temperature)  # probabilities as shares of the best one's
    mass = cumulated(weights)
    better = (mass - weights) / mass[-1]  # probability of the better candidates
    kept = (better < params.top_p) & (weights >= params.min_p)
    cumulative = cumulated(weights * kept)
    index = (cumulative <= uniform * cumulative[-1]).sum()
    return ids[mx.minimum(index, kept.sum() - 1)].reshape(1)


def ordered(scores: mx.array, k: int) -> mx.array:
    """Ids of the k best of [V] float32 scores: score descending, id ascending.

    They lie in the k rows of a table whose best scores are greatest, of equal ones the first, as ids rise from row to
    row: so one pass over the floats leaves few numbers to sort.
    """
    ids = mx.arange(scores.shape[0], dtype=mx.int64)
    k = min(k, len(ids))
    if k * COLUMNS < len(ids) // 2:
        whole = len(ids) // COLUMNS * COLUMNS
        row_maxima = scores[:whole].reshape(-1, COLUMNS).max(axis=-1)
        rows = best_first(row_maxima, ids[: len(row_maxima)], k)
        ids = mx.concatenate([ids[:whole].reshape(-1, COLUMNS)[rows].flatten(), ids[whole:]])
        scores = scores[ids]
    return best_first(scores, ids, k)


def best_first(scores: mx.array, ids: mx.array, k: int) -> mx.array:
    """The k best of some ids [n] by their scores [n]; of equal scores the smaller ids.

    A score becomes one int64 that holds its order and, below, its id, so that no two are equal.
    """
    bits = (scores + 0.0).view(mx.int32)  # + 0.0: minus zero is zero
    key = mx.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).astype(mx.int64)
    low = mx.array(0xFFFFFFFF, dtype=mx.int64)
    key = (key << 32) + (low - ids)
    return low - (-mx.sort(-key)[:k] & low)


def cumulated(x: mx.array) -> mx.array:
    """Running sums of [n], block by block: in one go the CPU device is off by 1e-3 of the total after 262,400 terms."""
    if x.shape[0] <= COLUMNS:
        return mx.cumsum(x)
    within = mx.cumsum(mx.pad(x, (0, -x.shape[0] % COLUMNS)).reshape(-1, COLUMNS), axis=-1)
    through = cumulated(within[:, -1])
    return (within + (through - within[:, -1])[:, None]).flatten()[: x.shape[0]]


def log_softmax(logits: mx.array) -> mx.array:
    """Log probabilities [V]; summed block by block, for the reason given in `cumulated`."""
    sums = logits
    while sums.shape[0] > COLUMNS:
        blocks = mx.pad(sums, (0, -sums.shape[0] % COLUMNS), constant_values=-mx.inf).reshape(-1, COLUMNS)
        sums = mx.logsumexp(blocks, axis=-1)
    return logits - mx.logsumexp(sums, axis=-1, keepdims=True)
