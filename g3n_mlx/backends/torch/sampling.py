"""The draw on the device; its reference is g3n_mlx/sampling.py, which it must match token for token."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from g3n_mlx.sampling import NOT_FINITE, SamplingParams, Uniforms

# Columns of the table whose row maxima decide which rows can hold one of the k best.
COLUMNS = 64


class Step:
    """One drawn token on the device."""

    def __init__(self, token: Tensor, logits: Tensor) -> None:
        self.token = token  # [1] int64, that the next step may begin with
        self.logits = logits  # [V] float32, before penalties
        # What the host is told, in the copy that it waits for anyway. One sum shows any number that is not finite.
        self.told = torch.where(logits.sum().isfinite(), token, NOT_FINITE)
        self._token_id: int | None = None

    def __int__(self) -> int:
        if self._token_id is None:  # waited for and copied once, however often it is asked
            self._token_id = int(self.told.item())
        return self._token_id

    def logprob(self) -> float:
        """Log probability of the token before penalties and filters."""
        return float(torch.log_softmax(self.logits, dim=-1)[self.token].item())

    def top_logprobs(self, count: int) -> list[tuple[int, float]]:
        """The most likely (token id, log probability), best first, ties by id."""
        ids = ordered(self.logits, count)
        values = torch.log_softmax(self.logits, dim=-1)[ids]
        return list(zip(ids.tolist(), values.tolist(), strict=True))


class Sampler:
    """Draws the tokens of one answer."""

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int, device: torch.device
    ) -> None:
        self.params = params
        self.uniforms = Uniforms(params.seed)
        self.tokens: list[Tensor] = []  # [1] each: the answer so far, where penalties count it
        self.counts: Tensor | None = None  # [V] float32: how often each token is in the answer
        self.prompted: Tensor | None = None  # [V] bool: whether it is in the prompt
        if params.penalizes:
            self.counts = torch.zeros(vocab_size, device=device)
            self.prompted = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.prompted[torch.tensor(list(prompt_ids), dtype=torch.int64, device=device)] = True
        self.bias: Tensor | None = None  # [V] float32
        if params.logit_bias:
            self.bias = torch.zeros(vocab_size, device=device)
            for token_id, bias in params.logit_bias.items():
                self.bias[token_id] = bias

    def draw(self, logits: Tensor, position: int, mask: np.ndarray | None = None) -> Step:
        """The token at a position of the answer from [V] float32 logits, of those that the mask [V] lets through."""
        scores = self.penalized(logits)
        if mask is not None:
            scores = torch.where(torch.from_numpy(mask).to(scores.device), scores, -math.inf)
        if self.params.greedy:
            token = scores.argmax(dim=-1, keepdim=True)
        else:
            token = drawn(scores, self.params, self.uniforms.at(position))
        self.add(token)
        return Step(token, logits)

    def count(self, token_ids: Sequence[int]) -> None:
        """Counts tokens that need no draw, as if they had been drawn."""
        for token_id in token_ids:
            self.add(torch.tensor([token_id], device=None if self.counts is None else self.counts.device))

    def add(self, token: Tensor) -> None:
        """Adds a token [1] of the answer to the penalties' counts."""
        if self.counts is not None:
            self.counts[token] += 1
            self.tokens.append(token)

    def forget(self, n: int) -> None:
        """Takes the last n tokens back out of the penalties' counts."""
        for token in [self.tokens.pop() for _ in range(n if self.counts is not None else 0)]:
            assert self.counts is not None
            self.counts[token] -= 1

    def penalized(self, logits: Tensor) -> Tensor:
        """Logits after repetition, frequency and presence penalties and the bias."""
        scores = logits
        if self.counts is not None and self.prompted is not None:
            answered = self.counts > 0
            repetition = self.params.repetition_penalty
            repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
            scores = torch.where(answered | self.prompted, repeated, scores)
            scores = scores - (self.counts * self.params.frequency_penalty + answered * self.params.presence_penalty)
        return scores if self.bias is None else scores + self.bias


def drawn(scores: Tensor, params: SamplingParams, uniform: float) -> Tensor:
    """One token [1] from [V] scores by inverse CDF of `uniform` over the filtered candidates."""
    ids = ordered(scores, params.top_k or scores.shape[0])
    weights = torch.exp((scores[ids] - scores[ids[0]]) / params.temperature)  # probabilities as shares of the best's
    mass = weights.cumsum(-1)
    better = (mass - weights) / mass[-1]  # probability of the better candidates
    kept = (better < params.top_p) & (weights >= params.min_p)
    cumulative = (weights * kept).cumsum(-1)
    index = (cumulative <= uniform * cumulative[-1]).sum()
    return ids[index.clamp(max=kept.sum() - 1)].view(1)


def ordered(scores: Tensor, k: int) -> Tensor:
    """Ids of the k best of [V] float32 scores: score descending, id ascending.

    They lie in the k rows of a table whose best scores are greatest, of equal ones the first, as ids rise from row to
    row: so one pass over the floats leaves few numbers to sort.
    """
    ids = torch.arange(scores.shape[0], device=scores.device)
    k = min(k, len(ids))
    if k * COLUMNS < len(ids) // 2:
        whole = len(ids) // COLUMNS * COLUMNS
        row_maxima = scores[:whole].view(-1, COLUMNS).amax(-1)
        rows = best_first(row_maxima, ids[: len(row_maxima)], k)
        ids = torch.cat([ids[:whole].view(-1, COLUMNS)[rows].flatten(), ids[whole:]])
        scores = scores[ids]
    return best_first(scores, ids, k)


def best_first(scores: Tensor, ids: Tensor, k: int) -> Tensor:
    """The k best of some ids [n] by their scores [n]; of equal scores the smaller ids.

    A score becomes one int64 that holds its order and, below, its id, so that no two are equal.
    """
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: minus zero is zero
    key = (torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) << 32) + (0xFFFFFFFF - ids)
    return 0xFFFFFFFF - (key.topk(k).values & 0xFFFFFFFF)
