"""Quantization with more care than MLX's own: less error in the same layout."""

from pathlib import Path

import checkpoint_files as files
import ml_dtypes
import numpy as np
import pytest

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import BITS, Quantization, dequantize, quantize
from g3n_mlx.convert import convert
from g3n_mlx.convert.__main__ import main
from g3n_mlx.convert.fitting import Moments, compensated, fitted, inverse_factors
from g3n_mlx.convert.methods import method_named, moments_file
from g3n_mlx.failures import Error

WIDTH = 256


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.05, (96, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def moments() -> np.ndarray:
    """Of inputs that depend on each other, as activations do."""
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(2000, WIDTH)) @ (np.eye(WIDTH) + 0.1 * rng.normal(size=(WIDTH, WIDTH)))
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def made(found: tuple, bits: int, group_size: int) -> np.ndarray:
    return dequantize(*found, bits, group_size)


def product_error(found: np.ndarray, weight: np.ndarray, moments: np.ndarray) -> float:
    """The mean square of what products with inputs of these moments are off by."""
    return float(np.einsum("nj,jk,nk->", found - weight, moments, found - weight)) / len(weight)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_fitted_groups_are_never_worse_and_mostly_better(weight, bits, group_size, dtype) -> None:
    weight = weight.astype(dtype)
    plain, ours = quantize(weight, bits, group_size), fitted(weight, bits, group_size)
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in plain]
    errors = [
        np.square(made(x, bits, group_size) - weight.astype(np.float32)).reshape(-1, group_size).sum(axis=1)
        for x in (plain, ours)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    least = {2: 0.75, 3: 0.85, 4: 0.92}.get(bits, 1)
    assert errors[1].sum() < least * errors[0].sum()


def test_groups_that_are_simple_stay_exact() -> None:
    """Zeros, one value, two values, one outlier: what any grid can hold."""
    rows = np.zeros((4, 64), np.float32)
    rows[1] = 0.25
    rows[2, ::2] = -1.5
    rows[3, 7] = 8.0
    for bits in (2, 3, 4):
        np.testing.assert_allclose(made(fitted(rows, bits, 64), bits, 64), rows, atol=1e-6)


def test_importance_moves_the_error_to_where_it_counts_least(weight) -> None:
    importance = np.ones(WIDTH, np.float32)
    importance[::8] = 1000
    even, uneven = (made(fitted(weight, 3, 64, x), 3, 64) - weight for x in (None, importance))
    assert np.square(uneven[:, ::8]).sum() < 0.7 * np.square(even[:, ::8]).sum()


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compensated_products_are_closer(weight, moments, bits, group_size) -> None:
    found = compensated(weight, bits, group_size, inverse_factors(Moments([moments])))
    plain, ours = quantize(weight, bits, group_size), made(found, bits, group_size)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in plain]
    error = product_error(ours, weight, moments)
    assert error < 0.65 * product_error(made(plain, bits, group_size), weight, moments)
    assert error < 0.85 * product_error(made(fitted(weight, bits, group_size), bits, group_size), weight, moments)


@pytest.mark.parametrize("width", [1, 32, 96, 130])
def test_factors_are_those_of_the_inverse(width) -> None:
    inputs = np.random.default_rng(width).normal(size=(4 * width, width))
    moments = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    (factor,) = inverse_factors(Moments([moments]))
    damped = moments + 0.01 * np.mean(np.diag(moments)) * np.eye(width)
    assert np.array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(width), atol=1e-4)


def test_blocks_of_columns_are_taken_apart(weight, moments) -> None:
    """Inputs in two blocks are those of two matrices beside each other; rows do not depend on each other."""
    half = WIDTH // 2
    blocks = [moments[:half, :half], moments[half:, half:]]
    found = compensated(weight, 3, 64, inverse_factors(Moments(blocks)))
    for number, block in enumerate(blocks):
        columns = slice(number * half, (number + 1) * half)
        alone = compensated(weight[:, columns], 3, 64, inverse_factors(Moments([block])))
        np.testing.assert_array_equal(made(found, 3, 64)[:, columns], made(alone, 3, 64))
    some = compensated(weight[10:30], 3, 64, inverse_factors(Moments(blocks)))
    np.testing.assert_allclose(made(some, 3, 64), made(found, 3, 64)[10:30], atol=1e-6)


def test_inputs_that_never_came_are_no_trouble(weight) -> None:
    """A column that was always 0, and a module whose inputs were all 0."""
    moments = np.eye(WIDTH, dtype=np.float32)
    moments[5, 5] = 0
    for measured in (moments, np.zeros_like(moments)):
        found = made(compensated(weight, 4, 64, inverse_factors(Moments([measured]))), 4, 64)
        assert np.abs(found - weight).max() < 0.1


def test_a_conversion_takes_the_method(tiny_folder: Path, tmp_path: Path, moments) -> None:
    """Same names, shapes and config.json; smaller errors; measured modules by their moments, the others without."""
    plain = convert(tiny_folder, tmp_path / "plain", q_bits=3, q_group_size=32, progress=False)
    fit = convert(tiny_folder, tmp_path / "mse", q_bits=3, q_group_size=32, method="mse", progress=False)
    measured = tmp_path / "moments"
    measured.mkdir()
    path = "language_model.layers.0.self_attn.q_proj"
    np.savez(moments_file(measured, path), **{"0000": moments[:128, :128]})
    options = {"method": "gptq", "moments": measured, "progress": False}
    gptq = convert(tiny_folder, tmp_path / "gptq", q_bits=3, q_group_size=32, **options)
    assert files.read_config(plain) == files.read_config(fit) == files.read_config(gptq)
    tensors = [files.read_folder(folder) for folder in (plain, fit, gptq)]
    for name in tensors[0]:
        assert len({(found[name].shape, found[name].dtype) for found in tensors}) == 1
        if not name.startswith(f"model.{path}"):
            assert files.same(tensors[1][name], tensors[2][name]), name
    dense = Checkpoint.open(tiny_folder)
    ours = [Checkpoint.open(folder) for folder in (plain, fit, gptq)]
    for module, how in ours[0].quantizations.items():
        weight = dense.read(f"{module}.weight").astype(np.float32)
        parts = [[x.read(f"{module}.{part}") for part in ("weight", "scales", "biases")] for x in ours[:2]]
        errors = [np.square(made(tuple(p), how.bits, how.group_size) - weight).sum() for p in parts]
        assert errors[1] <= errors[0]
    weight = dense.read(f"{path}.weight").astype(np.float32)
    errors = [
        product_error(
            made(tuple(x.read(f"{path}.{part}") for part in ("weight", "scales", "biases")), 3, 32),
            weight,
            moments[:128, :128],
        )
        for x in ours
    ]
    assert errors[2] < errors[1] < errors[0]


def test_moments_that_can_not_be_used_are_not_blamed_on_the_weight(tiny_folder: Path, tmp_path: Path, moments) -> None:
    measured = tmp_path / "moments"
    measured.mkdir()
    file = moments_file(measured, "language_model.layers.0.self_attn.q_proj")
    for wrong in (moments[:128, :128] * np.nan, -moments[:128, :128]):
        np.savez(file, **{"0000": wrong})
        with pytest.raises(Error, match=r"q_proj.npz: what was measured there can't be used .*: delete it") as error:
            convert(tiny_folder, tmp_path / "out", q_bits=3, method="gptq", moments=measured, progress=False)
        assert "source is damaged" not in str(error.value)
        assert not (tmp_path / "out").exists()


def test_dequantized_weights_are_the_numbers_that_they_stood_for(quantized_folder: Path, tmp_path: Path) -> None:
    dense = convert(quantized_folder, tmp_path / "dense", dequantize=True, dtype="float32", progress=False)
    before, after = Checkpoint.open(quantized_folder), Checkpoint.open(dense)
    assert not after.quantizations
    assert "quantization" not in files.read_config(dense)
    for name in after.names:
        path = name.removesuffix(".weight")
        expected = before.read(name).astype(np.float32) if path not in before.quantizations else None
        if expected is None:
            how = before.quantizations[path]
            parts = (before.read(f"{path}.{part}") for part in ("weight", "scales", "biases"))
            expected = dequantize(*parts, how.bits, how.group_size)
        np.testing.assert_array_equal(after.read(name), expected)
    again = convert(quantized_folder, tmp_path / "q", dequantize=True, q_bits=6, progress=False)
    assert {how.bits for how in Checkpoint.open(again).quantizations.values()} == {6, 8}
    with pytest.raises(Error, match="is not quantized: there is nothing to dequantize"):
        convert(dense, tmp_path / "out", dequantize=True, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best", "q_bits": 4}, "method is 'best', expected one of affine, mse, gptq"),
        ({"method": "mse"}, "nothing is quantized: give q_bits or a recipe"),
        ({"method": "gptq", "q_bits": 4}, "needs the moments that a calibration measured"),
        ({"method": "mse", "q_bits": 4, "moments": "x"}, "the others take none"),
        ({"method": "gptq", "q_bits": 4, "moments": "nowhere"}, "nowhere is not a folder"),
    ],
)
def test_options_that_do_not_go_together(tiny_folder: Path, tmp_path: Path, options, message) -> None:
    with pytest.raises(Error, match=message):
        convert(tiny_folder, tmp_path / "out", progress=False, **options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "mse"], "--method is for a conversion with -q, --recipe or --budget"),
        (["-q", "--method", "gptq"], "--method gptq needs --calibration"),
        (["-q", "--calibration", "x"], "the others take none"),
    ],
)
def test_flags_that_do_not_go_together(tiny_folder: Path, tmp_path: Path, capsys, flags, message) -> None:
    with pytest.raises(SystemExit):
        main(["--hf-path", str(tiny_folder), "-o", str(tmp_path / "out"), *flags])
    assert message in capsys.readouterr().err


def test_the_plain_method_is_the_default(weight) -> None:
    how = Quantization(4, 64)
    plain = method_named("affine", None)("x", weight, how)
    assert all(files.same(a, b) for a, b in zip(plain, quantize(weight, 4, 64), strict=True))
