"""How likely a model finds the tokens of a prompt."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from g3n_mlx.config.text import TextConfig
from g3n_mlx.engine.cache import Cache
from g3n_mlx.engine.runner import Runner, all_logits, run
from g3n_mlx.engine.sequence import Embed, prefill_spans, soft_tokens
from g3n_mlx.prompt.prompt import Prompt
from g3n_mlx.rows import Rows

# Rows of logits at once in `score`: 64 MiB at the released vocabulary, in float32.
SCORED_ROWS = 64


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token of a prompt, and how likely the ones before it made it."""

    token: int
    logprob: float | None  # None of the first one
    top_logprobs: tuple[tuple[int, float], ...] | None  # the most likely ones in its place, best first


def token_scores(token_ids: np.ndarray, logits: np.ndarray, top: int) -> list[TokenScore]:
    """The scores of ids [T] under the logits [T, V] before each, with the `top` most likely ones, ties by id."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    found: list[TokenScore] = []
    for token_id, row in zip(token_ids, logprobs, strict=True):
        most_likely = np.argpartition(-row, top - 1)[:top] if top else np.zeros(0, dtype=np.int64)
        best = sorted(((int(i), float(row[i])) for i in most_likely), key=lambda entry: (-entry[1], entry[0]))
        found.append(TokenScore(int(token_id), float(row[token_id]), tuple(best)))
    return found


class PromptReader:
    """Reads a prompt part by part for the logits of its tokens, over a cache of its own."""

    def __init__(self, runner: Runner, config: TextConfig, prompt: Prompt, embed: Embed) -> None:
        self._runner, self._prompt, self._embed = runner, prompt, embed
        self._ids = np.asarray(prompt.token_ids, dtype=np.int64)
        self._cache = Cache(config, runner.model.kv_arrays)

    def skip(self, start: int, stop: int) -> None:
        """Reads the tokens [start, stop) and wants no logits."""
        self._runner.call(lambda: run(self._runner.model, [self.rows(start, stop)]))

    def logits(self, start: int, stop: int) -> np.ndarray:
        """Reads the tokens [start, stop); float32 [stop - start, V]. Raises ValueError when they are not finite."""
        return self._runner.checked(self._runner.call(lambda: all_logits(self._runner.model, self.rows(start, stop))))

    def scores(self, top: int) -> Iterator[list[TokenScore]]:
        """The scores of all tokens, part by part."""
        last: np.ndarray | None = None
        for a, b in prefill_spans(0, len(self._ids), self._prompt.borders, SCORED_ROWS):
            logits = self.logits(a, b)
            before = logits[:-1] if last is None else np.concatenate([last, logits[:-1]])
            last = logits[-1:]
            scores = token_scores(self._ids[b - len(before) : b], before, top)
            yield scores if a else [TokenScore(int(self._ids[0]), None, None), *scores]

    def rows(self, start: int, stop: int) -> Rows:
        """What a call takes to read the tokens [start, stop); to be made in the runner's thread."""
        soft = soft_tokens(self._prompt.media, start, stop, self._embed)
        return Rows(self._cache, self._ids[start:stop], soft)
