"""What a decode step costs in operations, on E4B's layers at small widths, and that it is the model's forward."""

import io
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from calls import decode, logits_of, make_cache, prefill
from devices import tolerance

from g3n_mlx.bench.engines.mlx_graph import MLX_VIEWS, opaque_kernels
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.engine.runner import run
from g3n_mlx.rows import Batch, Draw, Rows
from g3n_mlx.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)
# Counted before the layers were made readable again: nodes of MLX's graph, operations that reach torch's dispatcher.
MLX_OPERATIONS, TORCH_OPERATIONS = 4993, 6518
# What a GPU runs for E4B's layers; 1,534 before the products of one row were stacked and sums fused.
MLX_KERNELS = 1309


@pytest.fixture(scope="module")
def overhead(tmp_path_factory, repository):
    folder = tmp_path_factory.mktemp("full_size") / "overhead"
    script = repository / "tests" / "full_size" / "write_random_checkpoint.py"
    command = [sys.executable, str(script), "--size", "overhead", "--tokenizer", str(repository / "tests/tiny-gemma3n")]
    done = subprocess.run([*command, "-o", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_operations_of_an_mlx_step(overhead, frameworks):
    if "mlx" not in frameworks:
        pytest.skip("mlx is not installed")
    from g3n_mlx.bench.engines.mlx_graph import count_graph

    network = frameworks["mlx"].model(Checkpoint.open(overhead))
    cache = make_cache(network)
    prefill(network, np.arange(16), cache)
    operations, kernels = count_graph(network.decode_graph(7, cache))
    assert kernels < operations <= MLX_OPERATIONS
    with opaque_kernels():
        network.decode_steps.compile()
        _, kernels = count_graph(network.decode_graph(7, cache))
    assert kernels <= MLX_KERNELS


def test_an_mlx_step_of_more_sequences_adds_their_attention_alone(frameworks, tiny_folder):
    """Every sequence has a cache of its own to write and to attend to; everything else is one call for all."""
    if "mlx" not in frameworks:
        pytest.skip("mlx is not installed")
    import mlx.core as mx

    network = frameworks["mlx"].model(Checkpoint.open(tiny_folder))

    def kernels(sequences):
        caches = [make_cache(network) for _ in range(sequences)]
        for cache in caches:
            prefill(network, np.arange(16), cache)
        with opaque_kernels():
            network.decode_steps.compile()
            positions = np.array([cache.offset for cache in caches], dtype=np.int32)
            begun = network.decode_steps.started(mx.array([7] * sequences), positions)
            dot = io.StringIO()
            mx.export_to_dot(dot, network.decode_steps.finished(begun, caches).logits)
        return Counter(
            kind for kind in re.findall(r'label ="(\w+)", shape=rectangle', dot.getvalue()) if kind not in MLX_VIEWS
        )

    text = network.config.text
    layers, own = text.num_hidden_layers, text.num_hidden_layers - text.num_kv_shared_layers
    added = kernels(4) - kernels(2)
    assert added == {"Depends": 2 * layers, "SliceUpdate": 2 * 2 * own}  # attention, and the caches' keys and values


def weights_only(network, cache):
    """The operations of a decode step, by kind, that depend on nothing but weights and constants."""
    import mlx.core as mx

    steps, ids = network.decode_steps, np.array([7])
    tokens = mx.array(ids)
    begun = steps.started(tokens, np.array([cache.offset], dtype=np.int32))
    ahead = steps.finished(begun, [cache])
    named = {"tokens": tokens, "rows": ahead.rows, "positions": next(iter(begun.rope.values()))[0]}
    for layer_idx, layer in cache.layers.items():
        named |= {f"keys{layer_idx}": layer.keys, f"values{layer_idx}": layer.values}
    # RoPE is a kernel on a GPU; the CPU device takes the periods' inverses in every step.
    named |= {kind: periods for kind, (_, periods) in begun.rope.items()}
    dot = io.StringIO()
    mx.export_to_dot(dot, ahead.logits, **named)
    kinds = dict(re.findall(r'(\d+) \[label ="(\w+)", shape=rectangle', dot.getvalue()))
    inputs = {}
    for source, target in re.findall(r'^\{? ?"?(\w+)"? -> "?(\w+)"?', dot.getvalue(), re.MULTILINE):
        inputs.setdefault(target, []).append(source)
    reached, fresh = set(named), set(named)
    while fresh:
        fresh = {target for target, sources in inputs.items() if fresh & set(sources)} - reached
        reached |= fresh
    assert set(named) <= {source for sources in inputs.values() for source in sources}
    return [kind for node, kind in kinds.items() if node not in reached and node in inputs and kind not in MLX_VIEWS]


def test_no_product_of_weights_alone_is_left_in_an_mlx_step(overhead, frameworks):
    """Norm weights are scaled at load: a step that is compiled with a lazy product computes it for every token."""
    if "mlx" not in frameworks:
        pytest.skip("mlx is not installed")
    network = frameworks["mlx"].model(Checkpoint.open(overhead))
    cache = make_cache(network)
    prefill(network, np.arange(16), cache)
    steps = network.decode_steps
    with opaque_kernels():  # traced as for a GPU, where a norm's weight is no part of a larger kernel
        steps.compile()
        assert weights_only(network, cache) == []
    norm = network.language_model.layers[20].pre_feedforward_layernorm
    norm.weight = norm.weight * 2
    with opaque_kernels():
        steps.compile()
        assert weights_only(network, cache) == ["CompiledBroadcastMultiply"]


def test_operations_of_a_torch_step(overhead, frameworks):
    if "torch" not in frameworks:
        pytest.skip("torch is not installed")
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    network = frameworks["torch"].model(Checkpoint.open(overhead), "bfloat16")
    cache, sampler = make_cache(network), network.make_sampler(GREEDY, [])
    step = prefill(network, np.arange(16), cache, sampler)
    with torch.no_grad(), Counter() as counter:
        decode(network, step, cache, sampler)
    assert counter.count <= TORCH_OPERATIONS


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_decode_step_is_the_models_forward(network, framework, sequences):
    """Compiled in halves or not: the logits of the layers' own forward."""
    prompts = [np.arange(5 + i, 25 + 3 * i) for i in range(sequences)]
    caches, plain = ([make_cache(network) for _ in prompts] for _ in range(2))
    samplers = [network.make_sampler(GREEDY, ids) for ids in prompts]
    steps = []
    for ids, cache, other, sampler in zip(prompts, caches, plain, samplers, strict=True):
        steps.append(prefill(network, ids, cache, sampler))
        prefill(network, ids, other)
    for _ in range(3):
        rows = [Rows(c, np.array([int(step)])) for c, step in zip(plain, steps, strict=True)]
        batch = Batch(rows, keep_all=True)
        start = network.language_model.start(network.embed(batch.token_ids()), batch.positions)
        expected = framework.numpy(network.language_model.logits(network.language_model(start, batch)))
        wishes = [Rows(c, s, draw=Draw(sampler, 1)) for c, s, sampler in zip(caches, steps, samplers, strict=True)]
        steps = [step for (step,) in run(network, wishes)]
        found = np.stack([framework.numpy(step.logits) for step in steps])
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(1e-4))


def test_one_chunk_of_a_prompt_is_computed_while_the_next_is_built(frameworks, tiny_folder, monkeypatch):
    if "mlx" not in frameworks:
        pytest.skip("mlx is not installed")
    import mlx.core as mx

    network = frameworks["mlx"].model(Checkpoint.open(tiny_folder))
    cache, calls = make_cache(network), []
    evaluate, start = mx.eval, mx.async_eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (calls.append("wait"), evaluate(*arrays)))
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (calls.append("start"), start(*arrays)))
    for first in range(0, 60, 20):
        prefill(network, np.arange(first, first + 20), cache)
    assert calls == ["start", "start", "wait", "start", "wait"]
    found = logits_of(network, np.array([3]), cache)
    plain = make_cache(network)
    expected = logits_of(network, np.array([*range(60), 3]), plain)[-1:]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(1e-4))


def test_a_step_that_was_built_ahead_is_dropped_when_another_comes(network, framework):
    """The graph of the next step belongs to one token and one offset: other ids and a trim leave nothing of it."""
    ids = np.arange(5, 25)
    cache, plain, sampler = make_cache(network), make_cache(network), network.make_sampler(GREEDY, ids)
    step = prefill(network, ids, cache, sampler)
    step = decode(network, step, cache, sampler)  # begins the step after it
    assert cache.offset == 21
    prefill(network, np.array([9, 8, 7]), cache)
    cache.trim(1)
    first = prefill(network, ids, plain, sampler)
    prefill(network, np.array([int(first), 9, 8]), plain)
    found = logits_of(network, np.array([3]), cache)
    np.testing.assert_allclose(found, logits_of(network, np.array([3]), plain), rtol=0, atol=tolerance(1e-4))


def test_a_built_step_moves_no_cache_and_copies_none(frameworks, tiny_folder):
    """Keys and values are written in place: a step that is built ahead must not hold on to the buffers before it."""
    if "mlx" not in frameworks:
        pytest.skip("mlx is not installed")
    network = frameworks["mlx"].model(Checkpoint.open(tiny_folder))
    cache, sampler = make_cache(network), network.make_sampler(GREEDY, [])
    step = prefill(network, np.arange(20), cache, sampler)

    def buffers():
        arrays = (x for layer in cache.layers.values() for x in (layer.keys, layer.values))
        return [np.array(x, copy=False).__array_interface__["data"][0] for x in arrays]

    step = decode(network, step, cache, sampler)
    before = buffers()
    for position in range(2, 8):
        step = decode(network, step, cache, sampler, position)
        int(step)
        assert cache.offset == 20 + position
    assert buffers() == before
