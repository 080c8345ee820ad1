"""Products and rows of quantized weights against the dequantized weight, and whole quantized models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import decode, logits_of, make_cache, prefill
from checkpoint_files import read_config, read_folder, write_folder
from devices import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoint import write_random

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import BITS, dequantize, pack, unpack
from g3n_mlx.convert import convert
from g3n_mlx.kernels import library
from g3n_mlx.sampling import SamplingParams

PATH = "language_model.embed_tokens"
ONE_LAYER = {
    "num_hidden_layers": 1,
    "num_kv_shared_layers": 0,
    "layer_types": ["full_attention"],
    "intermediate_size": [32],
    "activation_sparsity_pattern": [0.0],
}

# Rows, columns, bits and group size of a weight. 16 · k rows that are no whole block of 64 are packed with a tail, more
# than 1024 in several pieces; the int4 kernels refuse 20 and 133.
WEIGHTS = [
    *((rows, 128, 4, group_size) for rows in (64, 192, 1088) for group_size in (32, 64, 128)),
    *((rows, 256, 4, 64) for rows in (16, 32, 48, 80, 96, 112, 1040, 20, 133)),
    *((70, 128, bits, 64) for bits in BITS),
    *((64, 128, bits, group_size) for bits in (3, 8) for group_size in (32, 128)),
]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """quantized((rows, columns, bits, group size)): a checkpoint whose token table is such a weight."""
    made: dict[tuple, Checkpoint] = {}

    def checkpoint(shape: tuple[int, int, int, int]) -> Checkpoint:
        if shape not in made:
            rows, columns, bits, group_size = shape
            folder = tmp_path_factory.mktemp("quantized")
            changes = {"vocab_size": rows, "vocab_size_per_layer_input": 8, "hidden_size": columns, "eos_token_id": 1}
            source = write_random(folder / "dense", seed=rows + bits, **ONE_LAYER, **changes)
            target = convert(source, folder / "ours", q_bits=bits, q_group_size=group_size, progress=False)
            made[shape] = Checkpoint.open(target)
        return made[shape]

    return checkpoint


@pytest.fixture(params=["kernels", "none"], autouse=True)
def kernels(request: pytest.FixtureRequest, framework: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels in C, where they are built, and with PyTorch's own products."""
    if request.param == "none":
        if framework.name == "mlx":
            pytest.skip("MLX has its own")
        monkeypatch.setattr(library, "library", lambda: None)


def weights_of(framework, checkpoint, dtype):
    return framework.weights(checkpoint, dtype, quantized=True, path=PATH)


def dequantized(checkpoint):
    """The weight [N, K] in float32, by numpy."""
    how = checkpoint.quantization(PATH)
    parts = (checkpoint.read(f"{PATH}.{part}") for part in ("weight", "scales", "biases"))
    return dequantize(*parts, how.bits, how.group_size)


@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_products_and_rows_in_float32(framework, quantized, shape):
    checkpoint = quantized(shape)
    layer = framework.module("layers").linear(weights_of(framework, checkpoint, "float32"))
    weight = dequantized(checkpoint)
    generator = np.random.default_rng(0)
    for rows in (1, 2, 50, 130):
        x = generator.standard_normal((rows, weight.shape[1])).astype(np.float32)
        np.testing.assert_allclose(
            framework.numpy(layer(framework.array(x))), x @ weight.T, rtol=0, atol=tolerance(1e-4)
        )
    if framework.name == "torch" and not framework.module("layers").gives_rows(layer):
        return
    ids = generator.integers(0, weight.shape[0], 9)
    np.testing.assert_allclose(
        framework.numpy(layer.embed(framework.array(ids))), weight[ids], rtol=0, atol=tolerance(1e-6)
    )


@pytest.fixture(scope="module")
def torch_framework(frameworks):
    """MLX's CPU device multiplies quantized weights in bfloat16 with an error of 5 %, so it is never asked to."""
    if "torch" not in frameworks:
        pytest.skip("torch is not installed")
    return frameworks["torch"]


@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_products_and_rows_in_bfloat16(torch_framework, quantized, shape):
    """Within what rounding the weights, zeros and results to bfloat16 does: two units in the last place."""
    import torch

    checkpoint = quantized(shape)
    quant = torch_framework.module("layers")
    layer = quant.linear(weights_of(torch_framework, checkpoint, "bfloat16"))
    weight = dequantized(checkpoint)
    generator = np.random.default_rng(0)
    for rows in (1, 2, 39, 60, 130):
        x = torch.from_numpy(generator.standard_normal((rows, weight.shape[1])).astype(np.float32)).bfloat16()
        expected = x.float().numpy() @ weight.T
        ours = layer(x)
        assert ours.dtype == torch.bfloat16
        error = np.abs(ours.float().numpy() - expected).max()
        assert error <= 2**-7 * np.abs(expected).max()
    if quant.gives_rows(layer):
        ids = generator.integers(0, weight.shape[0], 9)
        rows = layer.embed(torch.from_numpy(ids)).float().numpy()
        np.testing.assert_allclose(rows, weight[ids], rtol=0, atol=2**-8 * np.abs(weight).max())


@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_which_layer_and_what_it_holds(framework, quantized, shape):
    """Codes once, packed or as stored, and scales and biases once; nothing else of any size."""
    rows, columns, bits, group_size = shape
    quant = framework.module("layers")
    weights = weights_of(framework, quantized(shape), "float32")
    layer = quant.linear(weights)
    kernels = framework.name == "torch" and library.library() is not None
    packs = framework.name == "torch" and bits == 4 and rows % 16 == 0 and not kernels
    assert type(layer).__name__ == ("PackedLinear" if packs else "QuantizedLinear")
    held = vars(layer).values() if framework.name == "torch" else layer.parameters().values()
    nbytes = sum(value.nbytes for value in held if hasattr(value, "nbytes"))
    codes, per_group = rows * columns * bits // 8, rows * columns // group_size
    assert nbytes == codes + 2 * per_group * (2 if framework.name == "torch" and not packs else 4)


def test_a_table_with_a_packed_tail_gives_its_rows_from_the_file(torch_framework, quantized, monkeypatch):
    """Only whole blocks can be taken apart by row; the model then gathers from the file."""
    monkeypatch.setattr(library, "library", lambda: None)
    quant = torch_framework.module("layers")
    layer = quant.linear(weights_of(torch_framework, quantized((80, 256, 4, 64)), "float32"))
    assert isinstance(layer, quant.PackedLinear)
    assert not quant.gives_rows(layer)
    checkpoint = quantized((80, 256, 4, 64))
    network = torch_framework.model(checkpoint)
    ids = np.array([0, 63, 64, 79])
    rows = dequantized(checkpoint)[ids] * np.float32(np.sqrt(np.float32(256)))
    np.testing.assert_allclose(network.embed(ids).numpy(), rows, rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(BITS), rows=st.integers(1, 4), groups=st.integers(1, 4), seed=st.integers(0, 99))
def test_unpacked_is_numpys_unpack(torch_framework, bits, rows, groups, seed):
    import torch

    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, 32 * groups)).astype(np.uint8)
    words = pack(codes, bits)
    ours = torch_framework.module("kernels.dense").unpacked(torch.from_numpy(words.view(np.int32)), bits).numpy()
    np.testing.assert_array_equal(ours, unpack(words, bits))
    np.testing.assert_array_equal(ours, codes)


# Whole models.


def dense_twin(folder: Path, target: Path) -> Path:
    """A quantized checkpoint's weights, dequantized and dense, in float32."""
    stored, checkpoint = read_folder(folder), Checkpoint.open(folder)
    tensors = {}
    for name, array in stored.items():
        path, _, part = name.rpartition(".")
        if part in ("scales", "biases"):
            continue
        scales = stored.get(f"{path}.scales")
        if scales is None:
            tensors[name] = array
            continue
        bits = array.shape[-1] * 32 // (scales.shape[-1] * group_size_of(checkpoint))
        tensors[name] = dequantize(array, scales, stored[f"{path}.biases"], bits, group_size_of(checkpoint))
    config = {key: value for key, value in read_config(folder).items() if not key.startswith("quantization")}
    return write_folder(target, config, tensors)


def group_size_of(checkpoint):
    (group_size,) = {how.group_size for how in checkpoint.quantizations.values()}
    return group_size


def assert_quantized_equals_dense(frameworks, folder, target, ids, new_tokens):
    """Logits of every backend on the quantized checkpoint against the first one's on the dense twin; greedy tokens."""
    dense = next(iter(frameworks.values())).model(Checkpoint.open(dense_twin(folder, target)))
    expected = logits_of(dense, ids, make_cache(dense))
    answers = []
    for name, framework in frameworks.items():
        network = framework.model(Checkpoint.open(folder))
        np.testing.assert_allclose(
            logits_of(network, ids, make_cache(network)), expected, rtol=0, atol=tolerance(1e-3), err_msg=f"{name}"
        )
        cache, sampler = make_cache(network), network.make_sampler(SamplingParams(temperature=0), ids)
        step, tokens = prefill(network, ids, cache, sampler), []
        for _ in range(new_tokens):
            logits = np.sort(np.asarray(step.logits))
            if logits[-1] - logits[-2] < 2e-4:  # rounding may decide
                break
            tokens.append(int(step))
            step = decode(network, step, cache, sampler)
        answers.append(tokens)
    shortest = min(map(len, answers))
    assert shortest >= new_tokens // 4, "the margins are too small to tell"
    assert all(tokens[:shortest] == answers[0][:shortest] for tokens in answers)


@pytest.mark.parametrize("bits", BITS)
def test_the_tiny_model_quantized(frameworks, tiny_folder, golden_arrays, tmp_path, bits):
    ids = golden_arrays("text_generation")["input_ids"][0].astype(np.int64)
    folder = convert(tiny_folder, tmp_path / "ours", q_bits=bits, progress=False)
    assert_quantized_equals_dense(frameworks, folder, tmp_path / "dense", ids, 32)


def test_another_shape_quantized(frameworks, tmp_path):
    """Groups of 32, a vocabulary that no kernel takes, rows of 24 that stay dense."""
    folder = convert(write_random(tmp_path / "source"), tmp_path / "ours", q_bits=4, q_group_size=32, progress=False)
    assert Checkpoint.open(folder).quantization("language_model.layers.0.per_layer_projection") is None
    ids = np.random.default_rng(0).integers(0, 133, 30)
    assert_quantized_equals_dense(frameworks, folder, tmp_path / "dense", ids, 16)


def test_packed_products_in_bfloat16_cost_what_bfloat16_costs(
    torch_framework, tiny_folder, golden_arrays, golden_json, tmp_path
):
    """The 4-bit model in bfloat16, in one piece (dense blocks) and token by token (the int4 kernel), against itself in
    float32: twice what golden/noise.json says that bfloat16 does to the reference."""
    allowed = 2 * golden_json("noise")["text_logits.logits"]["bfloat16"]
    ids = golden_arrays("text_logits")["input_ids"][0].astype(np.int64)
    folder = convert(tiny_folder, tmp_path / "ours", q_bits=4, progress=False)
    exact = torch_framework.model(Checkpoint.open(folder))
    expected = logits_of(exact, ids, make_cache(exact))
    network = torch_framework.model(Checkpoint.open(folder), "bfloat16")
    assert np.abs(logits_of(network, ids, make_cache(network)) - expected).max() <= allowed
    for rows in (1, 2, 7, 39):  # few rows: the int4 kernel, also fed with slices of the streams
        cache = make_cache(network)
        parts = [logits_of(network, ids[i : i + rows], cache) for i in range(0, len(ids), rows)]
        assert np.abs(np.concatenate(parts) - expected).max() <= allowed


def test_mlx_takes_float32_for_quantized_weights_on_its_cpu(frameworks):
    if "mlx" not in frameworks:
        pytest.skip("mlx is not installed")
    import mlx.core as mx

    device = frameworks["mlx"].module("device")
    cpu = device.device_of("cpu")
    assert device.dtype_of(None, cpu, True) == mx.float32
    assert device.dtype_of(None, cpu, False) == mx.bfloat16
    assert device.dtype_of("bfloat16", cpu, True) == mx.bfloat16


def test_bfloat16_products_on_the_cpu_meet_few_counts_of_rows(torch_framework):
    """PyTorch keeps a kernel for every count: over all lengths of a part of a prompt there are some thirty."""
    import torch

    quant = torch_framework.module("kernels.dense")
    found = {rows: quant.padded(torch.ones(rows, 4, dtype=torch.bfloat16)).shape[0] for rows in range(1, 513)}
    assert all(rows <= padded <= max(rows * 1.25, rows) for rows, padded in found.items())
    assert len(set(found.values())) == 32
    assert quant.padded(torch.ones(130, 4)).shape[0] == 130, "float32 kernels are the same for every count"


@pytest.mark.parametrize("rows", [1, 9, 17, 33, 129])
def test_rows_of_padding_leave_no_trace(torch_framework, rows):
    import torch

    quant, text = torch_framework.module("layers"), torch_framework.module("text")
    generator = torch.Generator().manual_seed(rows)

    def values(*shape):
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    layer = quant.Linear.__new__(quant.Linear)
    torch.nn.Module.__init__(layer)
    layer.weight = torch.nn.Parameter(values(24, 64), requires_grad=False)
    x, streams, coefs = values(rows, 64), values(rows, 4, 64), values(rows, 4, 4)
    for entered in (x, x[None]):
        wanted = (entered.double() @ layer.weight.double().T).to(torch.float32)
        torch.testing.assert_close(layer(entered).float(), wanted, rtol=2**-7, atol=2**-7)
    wanted = torch.baddbmm(streams.double(), coefs.double(), streams.double()).to(torch.float32)
    torch.testing.assert_close(text.mixed(streams, coefs).float(), wanted, rtol=2**-6, atol=2**-6)
