"""Every part of the text model against what the reference computed there, fed with the reference's own inputs."""

import numpy as np
import pytest
from calls import make_cache
from devices import tolerance

from g3n_mlx.rows import Context

TOLERANCE = tolerance(1e-4)  # max abs; three times golden/noise.json's largest float32 column is below it
LAYERS = (0, 3, 4, 5, 9)  # the first, the two owners, the two kinds of reader


@pytest.fixture(scope="module")
def golden(golden_arrays):
    return golden_arrays("text_layers")


def close(framework, ours, reference, tolerance=TOLERANCE):
    np.testing.assert_allclose(framework.numpy(ours), reference, rtol=0, atol=tolerance)


def streams(golden, layer_idx):
    """The golden [A, B, T, D] before a layer, as [T, A, D]."""
    return np.ascontiguousarray(golden["hidden_states"][layer_idx][:, 0].swapaxes(0, 1))


def test_embeddings_and_ple(framework, network, golden):
    model, ids = network.language_model, golden["input_ids"][0].astype(np.int64)
    embeddings = network.embed(ids)
    close(framework, embeddings, golden["embeddings"][0])
    ple = (framework.numpy(model.projected(embeddings)) + framework.numpy(model.per_layer_rows(ids))) / np.sqrt(
        np.float32(2)
    )
    np.testing.assert_allclose(ple, golden["per_layer_inputs"][0], rtol=0, atol=TOLERANCE)
    close(framework, model.expanded(embeddings), streams(golden, 0))


@pytest.mark.parametrize("layer_idx", LAYERS)
def test_parts_of_a_layer(framework, network, golden, layer_idx):
    model = network.language_model
    config, layer = model.config, model.layers[layer_idx]

    def part(name, index=layer_idx):
        return golden[f"layer{index}.{name}"][0]

    predictions = golden[f"layer{layer_idx}.altup_predictions"][:, 0].swapaxes(0, 1)
    close(framework, layer.altup.predict(framework.array(streams(golden, layer_idx))), predictions)
    active = framework.array(predictions[:, config.altup_active_idx])
    close(framework, layer.input_layernorm(active), part("input_layernorm"))
    x = framework.array(part("input_layernorm"))
    close(framework, layer.laurel(x), part("laurel"))
    rows = len(part("laurel"))
    rope, context = model.rope(np.arange(rows, dtype=np.int32)), Context([make_cache(network)], [rows])
    owner = config.kv_owners[layer_idx]
    model.layers[owner].self_attn.store(framework.array(part("input_layernorm", owner)), rope, context)
    close(framework, layer.self_attn(x, rope, context), part("self_attn"))
    normed = layer.post_attention_layernorm(framework.array(part("self_attn")))
    close(framework, normed, part("post_attention_layernorm"))
    close(framework, layer.mlp(framework.array(part("pre_feedforward_layernorm"))), part("mlp"))
    normed = layer.post_feedforward_layernorm(framework.array(part("mlp")))
    close(framework, normed, part("post_feedforward_layernorm"))


def test_streams_after_every_layer(framework, network, golden):
    model, ids = network.language_model, golden["input_ids"][0].astype(np.int64)
    ple = framework.array(golden["per_layer_inputs"][0])
    now, _, rope = model.start(network.embed(ids), np.arange(len(ids), dtype=np.int32))
    context = Context([make_cache(network)], [len(ids)])
    for layer_idx, layer in enumerate(model.layers):
        now = layer(now, ple[:, layer_idx], rope, context)
        assert context.holds(layer_idx) == (model.config.kv_owners[layer_idx] == layer_idx)
        close(framework, now, streams(golden, layer_idx + 1))
    close(framework, model.norm(model.merged(now)), golden["final_norm"][0])
