"""Decode steps: compiled from one look at the caches to the next, and built before their tokens are known.

A decode step is held back by the count of operations, not by bandwidth alone, so what lies between the attention of two
layers is one compiled function: the end of a layer and the beginning of the next. The arithmetic is DecoderLayer's,
written down there to be read; a test holds the two together.

Of a token the host needs nothing but its row of the PLE table. So while the device computes a token, the whole graph of
the step after it is built, over a buffer that holds no row yet; once the token is known, its row is written there, and
the graph is handed to the device. Python's work for a step is done by then.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from g3n_mlx.backends.mlx.sampling import Step
from g3n_mlx.backends.mlx.text import DecoderLayer, LanguageModel, Rope, by_sequence, stream
from g3n_mlx.backends.mlx.weights import from_numpy
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.rows import Batch, Cache, Context

# Sequences in a step that is compiled: every count is traced on its own.
MAX_SEQUENCES = 16

# What a layer has computed when its attention looks at keys and values: the predictions [T, A, D], the normed active
# stream and LAuReL's update of it [T, D], the queries [T, N, 1, H] and, in a layer that owns keys and values, the new
# ones [T, K, 1, H].
Halfway = tuple[mx.array, ...]


class Begun(NamedTuple):
    """A decode step on its way: one token of each sequence, taken for one of text."""

    steps: list[Step]  # that drew the tokens; none, where the tokens were known
    positions: np.ndarray
    rope: Rope
    projected: mx.array  # [T, L, P], the embeddings' part of the PLE inputs
    halfway: Halfway  # of layer 0


class Ahead(NamedTuple):
    """The rest of a step that was begun, as a graph that nothing has been computed of."""

    rows: mx.array  # float32 [T, L * P]: where the graph reads the rows of the PLE table from
    caches: list[Cache]  # as they are once the step has run
    logits: mx.array  # [T, V]


class DecodeSteps:
    """Runs the batches in which every sequence appends one token and draws the next."""

    def __init__(self, network: LanguageModel, config: ModelConfig) -> None:
        self.network, self.config = network, config
        self.compile()

    def compile(self) -> None:
        """Compiles all steps anew: compiled functions hold the arrays of the layers that they were traced with."""
        layers = self.network.layers
        self.begun: Begun | None = None
        self.ahead: Ahead | None = None
        self._first = mx.compile(self.first)
        self._between = [mx.compile(between(*pair)) for pair in zip(layers, [*layers[1:], None], strict=True)]
        self._last = mx.compile(self.last)
        self._per_layer_inputs = mx.compile(self.per_layer_inputs)

    def takes(self, batch: Batch) -> bool:
        """Whether a batch is a decode step of text tokens."""
        return (
            len(batch.steps) <= MAX_SEQUENCES
            and batch.steps != []
            and batch.kept == batch.counts
            and all(self.config.embedder_of(token_id) is None for token_id in batch.token_ids().tolist())
        )

    def __call__(self, batch: Batch) -> mx.array:
        """The logits [T, V] of a step, whether it was begun or not; appends its tokens to the caches."""
        token_ids, positions, begun, ahead = batch.token_ids(), batch.positions, self.begun, self.ahead
        self.forget()
        if begun is None or not same(begun.steps, batch.steps) or not np.array_equal(begun.positions, positions):
            begun, ahead = self.started(mx.array(token_ids), positions), None
        if ahead is None:
            ahead = self.finished(begun, batch.caches)
        # The device has not been given the graph yet, and shares the host's memory.
        np.array(ahead.rows, copy=False)[:] = self.network.table_rows(token_ids)
        for cache, moved_on in zip(batch.caches, ahead.caches, strict=True):
            for layer_idx, layer in cache.layers.items():  # the very objects: a slice's cache shares them
                vars(layer).update(vars(moved_on.layers[layer_idx]))
        return ahead.logits

    def forget(self) -> None:
        """Drops what was begun: it holds on to keys and values."""
        self.begun = self.ahead = None

    def finished(self, begun: Begun, caches: Sequence[Cache]) -> Ahead:
        """The graph of a step to its end, for tokens that need not be known; the caches stay as they are."""
        caches = [moving(cache) for cache in caches]
        # From the host: evaluating it would wait for the device.
        rows = from_numpy(np.zeros((len(caches), self.network.embed_tokens_per_layer.width), np.float32))
        per_layer_inputs = self._per_layer_inputs(begun.projected, rows)
        context, parts = Context(caches, [1] * len(caches)), begun.halfway
        for layer, step in zip(self.network.layers, self._between, strict=True):
            predictions, x, laurel, queries, *new = parts
            attention = layer.self_attn
            if new:
                context.store(attention.layer_idx, *(by_sequence(x, context) for x in new))
            parts = step(attention.attend(queries, context), predictions, x, laurel, per_layer_inputs, begun.rope)
        return Ahead(rows, caches, self._last(*parts))

    def begin(self, steps: Sequence[Step], caches: Sequence[Cache]) -> None:
        """Starts on the step that appends the tokens of these steps to the caches."""
        positions = np.array([cache.offset for cache in caches], dtype=np.int32)
        tokens = [step.token for step in steps]
        begun = self.started(tokens[0] if len(tokens) == 1 else mx.concatenate(tokens), positions)
        mx.async_eval(*tokens, *(step.told for step in steps), begun.projected, *begun.halfway)
        self.begun = begun._replace(steps=list(steps))
        self.ahead = self.finished(begun, caches)

    def started(self, tokens: mx.array, positions: np.ndarray) -> Begun:
        """The step as far as it needs neither its tokens on the host nor the caches."""
        rope = self.network.rope(positions)
        projected, *halfway = self._first(self.network.embed(tokens), rope)
        return Begun([], positions, rope, projected, tuple(halfway))

    def first(self, embeddings: mx.array, rope: Rope) -> tuple[mx.array, ...]:
        """The embeddings' part of the PLE inputs, and layer 0 as far as its attention."""
        streams = self.network.expanded(embeddings)
        return self.network.projected(embeddings), *before_attention(self.network.layers[0], streams, rope)

    def per_layer_inputs(self, projected: mx.array, rows: mx.array) -> mx.array:
        """The PLE inputs [T, L, P] out of the embeddings' part [T, L, P] and rows of the table [T, L * P]."""
        return (projected + self.network.scaled_rows(rows)) * (1 / math.sqrt(2))

    def last(self, streams: mx.array) -> mx.array:
        """The logits [T, V]."""
        return self.network.logits(self.network.norm(self.network.merged(streams)))


def moving(cache: Cache) -> Cache:
    """The same keys and values in layers that move on by themselves.

    An update of MLX's arrays makes new ones, but assigning to rows changes what a Python object stands for: so each
    layer gets objects of its own, without a copy of what they hold.
    """
    other: Any = copy.copy(cache)
    other.layers = {}
    for layer_idx, layer in cache.layers.items():
        moved = other.layers[layer_idx] = copy.copy(layer)
        if layer.keys is not None:
            moved.keys, moved.values = (x.reshape(x.shape) for x in (layer.keys, layer.values))
    return other


def between(layer: DecoderLayer, following: DecoderLayer | None) -> Callable[..., Halfway]:
    """From one layer's attended values [T, N * H] to the next one's attention; after the last layer to the streams."""

    def step(
        attended: mx.array, predictions: mx.array, x: mx.array, laurel: mx.array, per_layer_inputs: mx.array, rope: Rope
    ) -> Halfway:
        per_layer_input = per_layer_inputs[:, layer.self_attn.layer_idx]
        streams = after_attention(layer, attended, predictions, x + laurel, per_layer_input)
        return (streams,) if following is None else before_attention(following, streams, rope)

    return step


def before_attention(layer: DecoderLayer, streams: mx.array, rope: Rope) -> Halfway:
    """The first half of DecoderLayer's forward."""
    predictions = layer.altup.predict(streams)
    x = layer.input_layernorm(stream(predictions, layer.active_idx))
    # LAuReL's sum is left to the second half, where it is one kernel with those that follow.
    return predictions, x, layer.laurel.added(x), *layer.self_attn.decode_inputs(x, rope)


def after_attention(
    layer: DecoderLayer, attended: mx.array, predictions: mx.array, laurel: mx.array, per_layer_input: mx.array
) -> mx.array:
    """The second half: from the attended values and the layer's PLE input [T, P] to the streams [T, A, D]."""
    attention = layer.post_attention_layernorm(layer.self_attn.o_proj(attended))
    x = (stream(predictions, layer.active_idx) + attention + laurel) * (1 / math.sqrt(2))
    activated = x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
    return layer.updated(layer.altup.correct(predictions, activated), per_layer_input)


def same(ours: Sequence[object], theirs: Sequence[object]) -> bool:
    """Whether both are the very same steps."""
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))
