"""Decode steps that begin before their tokens are known: on a GPU, which works beside the host."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from g3n_mlx.backends.torch.sampling import Step
from g3n_mlx.backends.torch.text import LanguageModel, Start
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.rows import Batch, Cache


class Begun(NamedTuple):
    """A decode step on its way: one token of each sequence, taken for one of text."""

    steps: list[Step]  # that drew the tokens
    positions: np.ndarray
    start: Start


class DecodeSteps:
    """Runs the steps that were begun; all others are the language model's own."""

    def __init__(self, network: LanguageModel, config: ModelConfig) -> None:
        self.network, self.config = network, config
        self.begun: Begun | None = None

    def takes(self, batch: Batch) -> bool:
        """Whether a batch is the step that was begun."""
        begun = self.begun
        return (
            begun is not None
            and len(begun.steps) == len(batch.steps)
            and all(ours is theirs for ours, theirs in zip(begun.steps, batch.steps, strict=True))
            and np.array_equal(begun.positions, batch.positions)
            and all(self.config.embedder_of(token_id) is None for token_id in batch.token_ids().tolist())
        )

    def __call__(self, batch: Batch) -> Tensor | None:
        """Finishes the step that was begun -> the final hidden states [T, D]."""
        assert self.begun is not None
        return self.network(self.begun.start, batch)

    def begin(self, steps: Sequence[Step], caches: Sequence[Cache]) -> None:
        """Starts on the step that appends the tokens of these steps to the caches."""
        self.begun = None
        if self.network.device.type == "cuda" and self.network.embedding_rows is None:
            positions = np.array([cache.offset for cache in caches], dtype=np.int32)
            embeddings = self.network.embed(torch.cat([step.token for step in steps]))
            self.begun = Begun(list(steps), positions, self.network.start(embeddings, positions))
