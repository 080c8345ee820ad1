"""The language model as calls of the kernels, against the torch modules, layer by layer and whole."""

import ctypes
import os
from contextlib import contextmanager

import numpy as np
import pytest
from calls import logits_of, make_cache
from random_checkpoint import pattern, write_random

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.convert import convert
from g3n_mlx.engine.runner import run
from g3n_mlx.kernels import library
from g3n_mlx.rows import Batch, Context, Draw, Rows
from g3n_mlx.sampling import SamplingParams

torch = pytest.importorskip("torch")

TOLERANCE = 3e-4  # of logits up to 10: the noise of these weights grows from layer to layer more than a trained model's

SHAPES = {
    "plain": {"head_dim": 32},
    "one_key_head": {"head_dim": 64, "num_key_value_heads": 1, "num_attention_heads": 5, "hidden_size": 160},
    "two_streams": {"head_dim": 32, "altup_num_inputs": 2, "altup_active_idx": 1, "altup_correct_scale": False},
    "no_sharing": {"head_dim": 32, "num_kv_shared_layers": 0, "final_logit_softcapping": None},
    "all_full": {"head_dim": 32, "layer_types": pattern(7, 1)},
    "units": {"head_dim": 32, "hidden_size": 128, "intermediate_size": [64, 256, 512, 1024, 64, 128, 192]},
}
QUANTIZED = {"units": (4, 64), "plain": (4, 32), "no_sharing": (8, 32), "all_full": (3, 32)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name): a random checkpoint of a shape, quantized where the table says so."""
    made = {}

    def folder(name):
        if name not in made:
            target = tmp_path_factory.mktemp(name)
            changes = {"hidden_size_per_layer_input": 32, "intermediate_size": [64, 96, 160, 64, 32, 128, 96]}
            source = write_random(target / "dense", seed=len(name), **{**changes, **SHAPES[name]})
            made[name] = source
            if name in QUANTIZED:
                bits, group_size = QUANTIZED[name]
                made[name] = convert(source, target / "q", q_bits=bits, q_group_size=group_size, progress=False)
        return made[name]

    return folder


def network_of(folder, dtype):
    from g3n_mlx.backends.torch.model import Gemma3nModel

    return Gemma3nModel(Checkpoint.open(folder), dtype, torch.device("cpu"))


@contextmanager
def in_torch(network):
    """The network through its torch modules alone."""
    fused, network.fused = network.fused, None
    yield
    network.fused = fused


def rms(x):
    return float(np.sqrt(np.square(x).mean()))


def ids_of(network, count, seed=0):
    return np.random.default_rng(seed).integers(0, network.config.text.vocab_size, count)


def logits_in_parts(network, ids, counts):
    """The logits of all ids, appended in calls of so many."""
    cache, rows = make_cache(network), []
    for start, count in zip(np.cumsum([0, *counts[:-1]]), counts, strict=True):
        rows.append(np.asarray(logits_of(network, ids[start : start + count], cache)))
    return np.concatenate(rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_in_float32(kernels, folders, shape):
    """Single rows, calls of several, and a longer prefill by torch before them; the window's border lies within."""
    network = network_of(folders(shape), torch.float32)
    assert network.fused is not None
    ids = ids_of(network, 40)
    with in_torch(network):
        expected = logits_in_parts(network, ids, [40])
    for counts in ([1] * 40, [16, 5, 2, 9, 8], [20, 1, 3, 16]):
        np.testing.assert_allclose(logits_in_parts(network, ids, counts), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_in_bfloat16(kernels, folders, shape):
    """No farther from those in float32 than torch's, which rounds after every operation."""
    exact = network_of(folders(shape), torch.float32)
    network = network_of(folders(shape), torch.bfloat16)
    ids = ids_of(network, 40)
    with in_torch(exact), in_torch(network):
        expected = logits_in_parts(exact, ids, [40])
        torchs = logits_in_parts(network, ids, [40])
    ours = logits_in_parts(network, ids, [16, 5, 2, 9, 8])
    assert rms(ours - expected) <= 1.25 * rms(torchs - expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_of_a_row_do_not_depend_on_the_call(kernels, folders, shape):
    network = network_of(folders(shape), torch.bfloat16)
    ids = ids_of(network, 40)
    alone = logits_in_parts(network, ids, [1] * 40)
    np.testing.assert_array_equal(logits_in_parts(network, ids, [16, 5, 2, 9, 8]), alone)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_layer(kernels, folders, shape):
    """The streams after each layer, from the same streams before it."""
    network = network_of(folders(shape), torch.float32)
    model, fused, rows = network.language_model, network.fused, 5
    ids, batch = ids_of(network, rows), None
    caches = {name: make_cache(network) for name in ("ours", "torch")}
    batch = Batch([Rows(caches["ours"], ids)], keep_all=True)
    embeddings = network.embed(ids)
    start = model.start(embeddings, batch.positions)
    per_layer_inputs = (start.projected + model.per_layer_rows(ids)) * np.float32(np.sqrt(0.5))
    seen = []
    width = -(-model.config.hidden_size // 256) * 256
    array = ctypes.c_float * (rows * model.config.altup_num_inputs * width)

    class Looking:
        """The library, with a look at the streams before every layer and at the end."""

        def __getattr__(self, name):
            call = getattr(library.library(), name)
            if name in ("g3n_queries", "g3n_logits"):
                address = library.library().g3n_step_streams(fused.step)
                padded = np.ctypeslib.as_array(array.from_address(address)).reshape(rows, -1, width)
                seen.append(padded[..., : model.config.hidden_size].copy())
            return call

    from g3n_mlx.backends.torch.kernels import fused as module

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "calls", Looking)
        fused(embeddings, batch)
    np.testing.assert_allclose(seen[0], start.streams.numpy(), rtol=0, atol=TOLERANCE)
    context = Context([caches["torch"]], [rows])
    with torch.no_grad():
        for layer_idx, layer in enumerate(model.layers):
            before = torch.from_numpy(seen[layer_idx])
            after = layer(before, per_layer_inputs[:, layer_idx], start.rope, context)
            np.testing.assert_allclose(seen[layer_idx + 1], after.numpy(), rtol=1e-4, atol=TOLERANCE)


def test_several_sequences_get_the_bits_that_each_gets_alone(kernels, folders):
    network = network_of(folders("units"), torch.bfloat16)
    prompts = [ids_of(network, count, count) for count in (3, 1, 6)]
    alone = [logits_in_parts(network, ids, [len(ids)]) for ids in prompts]
    batch = Batch([Rows(make_cache(network), ids) for ids in prompts], keep_all=True)
    together = np.asarray(network(batch))
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_only_the_rows_that_are_drawn_after_go_to_the_end(kernels, folders):
    network = network_of(folders("units"), torch.float32)
    ids = ids_of(network, 9)
    expected = logits_in_parts(network, ids, [9])
    sampler = network.make_sampler(SamplingParams(temperature=0), [])
    wishes = [
        Rows(make_cache(network), ids, draw=Draw(sampler, 0)),
        Rows(make_cache(network), ids[:4]),  # prefill alone
        Rows(make_cache(network), ids[:3], draw=Draw(sampler, 0, (None, None))),
    ]
    steps = run(network, wishes)
    np.testing.assert_array_equal(np.asarray(steps[0][0].logits), expected[8])
    np.testing.assert_array_equal(np.stack([np.asarray(step.logits) for step in steps[2]]), expected[1:3])


def test_units_of_sparse_layers_are_read_alone(kernels, folders):
    """Sparse layers of 4 bits have their down_proj once more, unit by unit; dense layers do not."""
    network = network_of(folders("units"), torch.float32)
    sparse = [bool(layer.units.codes) for layer in network.fused.layers]
    assert sparse == [share > 0 for share in network.config.text.activation_sparsity_pattern]
    assert any(sparse)
    assert not all(sparse)


def test_a_long_cache_is_attended_in_chunks(kernels, folders):
    """Keys over several chunks of 256, and the split at the same places however the calls were cut."""
    network = network_of(folders("all_full"), torch.float32)
    ids = ids_of(network, 700)
    with in_torch(network):
        expected = logits_in_parts(network, ids, [700])[-9:]
    for counts in ([691, *[1] * 9], [691, 9], [695, 1, 4]):
        np.testing.assert_allclose(logits_in_parts(network, ids, counts)[-9:], expected, rtol=0, atol=TOLERANCE)


def test_a_forked_child_decodes(kernels, folders):
    """On threads of its own: PyTorch's stay in the parent."""
    network = network_of(folders("units"), torch.float32)
    ids = ids_of(network, 3)
    usual = logits_in_parts(network, ids, [3])
    rows = network.embed(ids).numpy()
    child = os.fork()
    if child == 0:
        embeddings, batch = torch.from_numpy(rows), Batch([Rows(make_cache(network), ids)], keep_all=True)
        os._exit(0 if np.array_equal(network.fused(embeddings, batch).numpy(), usual) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_log_and_doctor_say_which_path_runs(kernels, folders, caplog):
    from g3n_mlx.backends.torch.device import describe

    name = kernels.g3n_instructions().decode()
    with caplog.at_level("INFO"):
        network_of(folders("units"), torch.float32)
    assert f"decode steps on cpu run through the kernels in C ({name})" in caplog.messages
    if not torch.cuda.is_available():
        assert describe()["products"].startswith(f"own kernels ({name}) up to ")


def test_without_kernels_torch_serves(folders, monkeypatch, caplog):
    from g3n_mlx.backends.torch.device import describe

    monkeypatch.setattr(library, "library", lambda: None)
    with caplog.at_level("INFO"):
        network = network_of(folders("units"), torch.float32)
    assert network.fused is None
    assert "decode steps on cpu run through PyTorch's operations" in caplog.messages
    assert "own kernels" not in describe()["products"]
    assert logits_in_parts(network, ids_of(network, 3), [2, 1]).shape[0] == 3


def test_heads_that_no_vector_divides_go_through_torch(tmp_path):
    network = network_of(write_random(tmp_path / "dense", head_dim=24), torch.float32)
    assert network.fused is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_alone_and_among_others(kernels, folders, shape, dtype):
    """So a draft changes no draw, not even between equal tokens."""
    network = network_of(folders(shape), getattr(torch, dtype))
    ids = ids_of(network, 48)
    alone = logits_in_parts(network, ids, [1] * 48)
    for count in (2, 3, 4, 6, 8, 12, 16):
        np.testing.assert_array_equal(logits_in_parts(network, ids, [count] * (48 // count)), alone)
