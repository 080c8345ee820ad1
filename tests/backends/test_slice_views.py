"""Slices of a loaded model: the same numbers as the slice read from the files, in the loaded model's own memory."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import logits_of, make_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoint import pattern, write_random

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.convert import convert
from g3n_mlx.kernels import library
from g3n_mlx.matformer.plan import SlicePlan
from g3n_mlx.matformer.view import sliced

LAYERS, OWNERS, GROUP = 7, (2, 3), 32  # the layers whose keys and values the last three read
WIDTHS = (256, 128, 256, 512, 96, 256, 224)  # some in eight pieces of whole groups, some in less
BITS = (None, 2, 3, 4, 5, 6, 8)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Any:
    """checkpoints(bits): a random checkpoint whose weights are stored so; None is dense."""
    made: dict[Any, Checkpoint] = {}

    def opened(bits: int | None) -> Checkpoint:
        if bits not in made:
            target = tmp_path_factory.mktemp("slices")
            folder = write_random(
                target / "dense",
                hidden_size=128,
                head_dim=32,
                hidden_size_per_layer_input=32,
                intermediate_size=list(WIDTHS),
                layer_types=pattern(LAYERS, 3),
            )
            if bits is not None:
                folder = convert(folder, target / "q", q_bits=bits, q_group_size=GROUP, progress=False)
            made[bits] = Checkpoint.open(folder)
        return made[bits]

    return opened


@pytest.fixture(params=["kernels", "none"])
def without_kernels(request, framework, monkeypatch) -> bool:
    """torch with the kernels in C, then without them."""
    if request.param == "none":
        if framework.name == "mlx":
            pytest.skip("MLX has its own")
        monkeypatch.setattr(library, "library", lambda: None)
    return request.param == "none"


@st.composite
def plans(draw: st.DrawFn) -> SlicePlan:
    """Any layers but those that others read, and any width in each, of whole groups."""
    skipped = draw(st.sets(st.sampled_from([i for i in range(LAYERS) if i not in OWNERS]), max_size=4))
    kept = tuple(layer for layer in range(LAYERS) if layer not in skipped)
    widths = tuple(GROUP * draw(st.integers(1, WIDTHS[layer] // GROUP)) for layer in kept)
    return SlicePlan("drawn", kept, widths)


def ids_of(config: Any, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.text.vocab_size, count)


def logits(network: Any, rows: int) -> np.ndarray:
    """Of a prompt at once, and of some tokens one by one behind it."""
    ids, cache = ids_of(network.config, rows + 3), make_cache(network)
    parts = [logits_of(network, ids[:rows], cache)]
    parts += [logits_of(network, ids[at : at + 1], cache) for at in range(rows, rows + 3)]
    return np.concatenate([np.asarray(part) for part in parts])


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_a_slice_computes_what_the_slice_from_the_files_does(framework, checkpoints, bits, without_kernels):
    whole = checkpoints(bits)
    network = framework.model(whole)
    before = logits(network, 20)

    @given(plans(), st.sampled_from([1, 20]))
    @settings(max_examples=12, derandomize=True)
    def check(plan: SlicePlan, rows: int) -> None:
        view = sliced(whole, plan)
        ours = logits(network.slice(view, plan), rows)
        expected = logits(framework.model(view), rows)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
        assert (ours.argmax(-1) == expected.argmax(-1)).all()

    check()
    np.testing.assert_allclose(logits(network, 20), before, rtol=0, atol=1e-5 * max(1, np.abs(before).max()))


def spans(framework: Any, network: Any) -> dict[str, list[tuple[int, int]]]:
    """Where the arrays of each linear layer lie in memory: address and length of the addresses that they reach over."""
    found: dict[str, list[tuple[int, int]]] = {}

    def note(path: str, layer: Any) -> None:
        held = [layer] if not hasattr(layer, "slabs") else layer.slabs.pieces[: layer.count]
        names = ("weight", "scales", "biases", "packed", "scales_and_zeros")
        arrays = [getattr(one, name) for one in held for name in names if hasattr(one, name)]
        if type(layer).__name__ == "SlabLinear" and framework.name == "mlx":
            arrays = list(layer._views)
        found[path] = [extent(framework, array) for array in arrays]

    model = network.language_model
    note("embed_tokens", model.embed_tokens)
    for layer_idx, layer in enumerate(model.layers):
        for part, names in {
            "self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "mlp": ["gate_proj", "up_proj", "down_proj"],
            "laurel": ["linear_left", "linear_right"],
            "altup": ["modality_router", "prediction_coefs", "correction_coefs"],
        }.items():
            for name in names:
                if hasattr(getattr(layer, part), name):
                    note(f"{layer_idx}.{part}.{name}", getattr(getattr(layer, part), name))
    return found


def extent(framework: Any, array: Any) -> tuple[int, int]:
    if framework.name == "torch":
        reach = sum((size - 1) * stride for size, stride in zip(array.shape, array.stride(), strict=True)) + 1
        return array.data_ptr(), reach * array.element_size()
    import mlx.core as mx

    mx.eval(array)
    view = np.array(array, copy=False)
    assert not view.flags.owndata
    reach = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)) + view.itemsize
    return view.__array_interface__["data"][0], reach


@pytest.mark.parametrize("bits", [None, 3, 4], ids=str)
def test_every_matrix_of_a_slice_lies_in_the_memory_of_the_whole(framework, checkpoints, bits, without_kernels):
    whole = checkpoints(bits)
    network = framework.model(whole)
    plan = SlicePlan("some", (0, 2, 3, 5, 6), (128, 256, 320, 96, 64))
    slices = [network.slice(sliced(whole, plan), plan) for _ in range(2)]
    logits(slices[0], 3)
    theirs = spans(framework, network)
    for ours in [spans(framework, one) for one in slices]:
        assert {path.partition(".")[0] for path in ours} == {"embed_tokens", "0", "1", "2", "3", "4"}
        for path, arrays in ours.items():
            layer, _, rest = path.partition(".")
            name = f"{plan.kept_layers[int(layer)]}.{rest}" if rest else path
            for address, length in arrays:
                assert any(start <= address and address + length <= start + size for start, size in theirs[name]), path


def test_towers_and_what_they_read_are_shared(framework, tiny_folder):
    whole = Checkpoint.open(tiny_folder)
    network = framework.model(whole)
    plan = SlicePlan("same", tuple(range(whole.config.text.num_hidden_layers)), whole.config.text.intermediate_size)
    one = network.slice(sliced(whole, plan), plan)
    pixels = np.ones((64, 64, 3), np.float32)
    soft = framework.numpy(one.embed_images(pixels[None])[0])
    assert one.towers is network.towers
    assert network.towers.vision_tower is not None
    whole.close()
    network.close()
    gc.collect()
    one.drop_towers()  # read again from files that the whole model has left
    np.testing.assert_array_equal(framework.numpy(one.embed_images(pixels[None])[0]), soft)


MEMORY = """
import sys, json
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from backends.conftest import framework_named
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.matformer.plan import SlicePlan
from g3n_mlx.matformer.view import sliced
from g3n_mlx.memory import return_freed_memory
from g3n_mlx.rows import Batch, Rows
from g3n_mlx.engine.cache import Cache
from g3n_mlx.engine.runner import all_logits
import numpy as np

def anonymous():
    network.drop_towers()  # gives back what the framework keeps of freed arrays
    return_freed_memory()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024

def run(network):
    all_logits(network, Rows(Cache(network.config.text, network.kv_arrays), np.array([5, 6])))

framework = framework_named(sys.argv[1])
whole = Checkpoint.open(Path(sys.argv[3]))
network = framework.model(whole)
layers = whole.config.text.num_hidden_layers
plans = [SlicePlan(str(width), tuple(range(layers)), (width,) * layers) for width in (1024, 2048, 3072, 4096)]
warm = network.slice(sliced(whole, plans[0]), plans[0])  # what the first slice arranges is no copy for each
run(warm), run(network)
before = anonymous()
if getattr(network, "fused", None) is not None:  # the kernels' room for a call, which is no weight
    room = [network.fused.calls.g3n_step_new(network.fused.model) for _ in plans]
room, before = anonymous() - before, anonymous()
slices = [network.slice(sliced(whole, plan), plan) for plan in plans]
taken = anonymous() - before
for one in slices:
    run(one)
print(json.dumps([taken, anonymous() - before - room, len(slices) * whole.nbytes_per_token]))
"""


@pytest.mark.parametrize(("bits", "kernels"), [(None, ""), (4, ""), (4, "off")], ids=str)
def test_slices_take_little_memory_of_the_process(backend, tmp_path, bits, kernels, repository):
    """At most 1 % of the weights for each, when it is taken and after a call, beside the kernels' room for one."""
    if sys.platform != "linux":
        pytest.skip("asks Linux for the process's own memory")
    if backend == "mlx" and kernels:
        pytest.skip("MLX has its own")
    layers = 3 if bits is None else 8
    folder = write_random(
        tmp_path / "dense",
        hidden_size=1024,
        head_dim=64,
        num_hidden_layers=layers,
        num_kv_shared_layers=1,
        intermediate_size=[8192] * layers,
        activation_sparsity_pattern=[0.0] * layers,
        layer_types=pattern(layers, 1),
    )
    if bits is not None:
        folder = convert(folder, tmp_path / "q", q_bits=bits, progress=False)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, backend, str(Path(__file__).resolve().parents[1]), str(folder)],
        capture_output=True,
        text=True,
        cwd=repository,
        env={**os.environ, "G3N_CPU": kernels},
    )
    assert run.returncode == 0, run.stderr
    taken, grown, nbytes = json.loads(run.stdout.splitlines()[-1])
    assert nbytes > 4 * 100e6
    assert taken < 0.01 * nbytes
    assert grown < 0.01 * nbytes, (taken, grown, nbytes)
