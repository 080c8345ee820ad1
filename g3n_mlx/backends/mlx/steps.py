"""Decode steps: compiled from one look at the caches to the next, and begun before their tokens are known.

A decode step is held back by the count of operations, not by bandwidth alone, so what lies between the attention of two
layers is one compiled function: the end of a layer and the beginning of the next. The arithmetic is DecoderLayer's,
written down there to be read; a test holds the two together.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from g3n_mlx.backends.mlx.sampling import Step
from g3n_mlx.backends.mlx.text import DecoderLayer, LanguageModel, Rope, by_sequence
from g3n_mlx.batch import Batch, Cache, Context
from g3n_mlx.config.model import ModelConfig

# Sequences in a step that is compiled: every count is traced on its own.
MAX_SEQUENCES = 16

# What a layer has computed when its attention looks at keys and values: the predictions [T, A, D], LAuReL's output
# [T, D], the queries [T, N, 1, H] and, in a layer that owns keys and values, the new ones [T, K, 1, H].
Halfway = tuple[mx.array, ...]


class Begun(NamedTuple):
    """A decode step on its way: one token of each sequence, taken for one of text."""

    steps: list[Step]  # that drew the tokens; none, where the tokens were known
    positions: np.ndarray
    rope: Rope
    projected: mx.array  # [T, L, P], the embeddings' part of the PLE inputs
    halfway: Halfway  # of layer 0


class DecodeSteps:
    """Runs the batches in which every sequence appends one token and draws the next."""

    def __init__(self, network: LanguageModel, config: ModelConfig) -> None:
        self.network, self.config = network, config
        self.compile()

    def compile(self) -> None:
        """Compiles all steps anew: compiled functions hold the arrays of the layers that they were traced with."""
        layers = self.network.layers
        self.begun: Begun | None = None
        self._first = mx.compile(self.first)
        self._between = [mx.compile(between(*pair)) for pair in zip(layers, [*layers[1:], None], strict=True)]
        self._last = mx.compile(self.last)

    def takes(self, batch: Batch) -> bool:
        """Whether a batch is a decode step of text tokens."""
        return (
            len(batch.steps) <= MAX_SEQUENCES
            and batch.steps != []
            and batch.kept == batch.counts
            and all(self.config.embedder_of(token_id) is None for token_id in batch.token_ids().tolist())
        )

    def __call__(self, batch: Batch) -> mx.array:
        """The final hidden states [T, D] of a step, whether it was begun or not."""
        token_ids, positions, begun = batch.token_ids(), batch.positions, self.begun
        if begun is None or not same(begun.steps, batch.steps) or not np.array_equal(begun.positions, positions):
            begun = self.started(mx.array(token_ids), positions)
        return self.finished(begun, token_ids, batch.caches)

    def finished(self, begun: Begun, token_ids: np.ndarray, caches: Sequence[Cache]) -> mx.array:
        """The final hidden states [T, D] of a step whose tokens are known; appends them to the caches."""
        per_layer_inputs = (begun.projected + self.network.per_layer_rows(token_ids)) * (1 / math.sqrt(2))
        context, parts = Context(caches, [1] * len(caches)), begun.halfway
        for layer, step in zip(self.network.layers, self._between, strict=True):
            predictions, laurel, queries, *new = parts
            attention = layer.self_attn
            if new:
                context.store(attention.layer_idx, *(by_sequence(x, context) for x in new))
            parts = step(attention.attend(queries, context), predictions, laurel, per_layer_inputs, begun.rope)
        return self._last(*parts)

    def begin(self, steps: Sequence[Step], caches: Sequence[Cache]) -> None:
        """Starts on the step that appends the tokens of these steps to the caches."""
        positions = np.array([cache.offset for cache in caches], dtype=np.int32)
        tokens = [step.token for step in steps]
        begun = self.started(tokens[0] if len(tokens) == 1 else mx.concatenate(tokens), positions)
        self.begun = begun._replace(steps=list(steps))
        mx.async_eval(*tokens, *(step.told for step in steps), begun.projected, *begun.halfway)

    def started(self, tokens: mx.array, positions: np.ndarray) -> Begun:
        """The step as far as it needs neither its tokens on the host nor the caches."""
        rope = self.network.rope(positions)
        projected, *halfway = self._first(self.network.embed(tokens), rope)
        return Begun([], positions, rope, projected, tuple(halfway))

    def first(self, embeddings: mx.array, rope: Rope) -> tuple[mx.array, ...]:
        """The embeddings' part of the PLE inputs, and layer 0 as far as its attention."""
        streams = self.network.expanded(embeddings)
        return self.network.projected(embeddings), *before_attention(self.network.layers[0], streams, rope)

    def last(self, streams: mx.array) -> mx.array:
        """The final hidden states [T, D]."""
        return self.network.norm(self.network.merged(streams))


def between(layer: DecoderLayer, following: DecoderLayer | None) -> Callable[..., Halfway]:
    """From one layer's attended values [T, N * H] to the next one's attention; after the last layer to the streams."""

    def step(
        attended: mx.array, predictions: mx.array, laurel: mx.array, per_layer_inputs: mx.array, rope: Rope
    ) -> Halfway:
        streams = after_attention(layer, attended, predictions, laurel, per_layer_inputs[:, layer.self_attn.layer_idx])
        return (streams,) if following is None else before_attention(following, streams, rope)

    return step


def before_attention(layer: DecoderLayer, streams: mx.array, rope: Rope) -> Halfway:
    """The first half of DecoderLayer's forward."""
    predictions = layer.altup.predict(streams)
    x = layer.input_layernorm(predictions[:, layer.active_idx])
    attention = layer.self_attn
    new = attention.keys_values(x, rope) if attention.owner_idx == attention.layer_idx else ()
    return predictions, layer.laurel(x), attention.queries(x, rope), *new


def after_attention(
    layer: DecoderLayer, attended: mx.array, predictions: mx.array, laurel: mx.array, per_layer_input: mx.array
) -> mx.array:
    """The second half: from the attended values and the layer's PLE input [T, P] to the streams [T, A, D]."""
    attention = layer.post_attention_layernorm(layer.self_attn.o_proj(attended))
    x = (predictions[:, layer.active_idx] + attention + laurel) * (1 / math.sqrt(2))
    activated = x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
    return layer.updated(layer.altup.correct(predictions, activated), per_layer_input)


def same(ours: Sequence[object], theirs: Sequence[object]) -> bool:
    """Whether both are the very same steps."""
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))
