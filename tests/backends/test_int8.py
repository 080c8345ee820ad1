"""Activations in 8 bits: what a prompt's products take of it, and where it is refused."""

import numpy as np
import pytest

from g3n_mlx import load
from g3n_mlx.convert import convert
from g3n_mlx.failures import BadValue
from g3n_mlx.kernels import library

PROMPT = list(range(2, 42))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("int8") / "q"
    return convert(tiny_folder, folder, q_bits=4, q_group_size=32, progress=False)


@pytest.fixture
def able():
    calls = library.library()
    if calls is None or not calls.g3n_int8_bits():
        pytest.skip("the kernels are off, or this processor has no products of bytes")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_is_read_nearly_as_exactly(able, quantized, dtype):
    pytest.importorskip("torch")
    with load(quantized, backend="torch", dtype="float32") as model:
        exact = model.logits(PROMPT)
    with load(quantized, backend="torch", dtype=dtype, activations="int8") as model:
        rounded = model.logits(PROMPT)
    difference = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0 < difference < 0.1


def test_a_decode_step_stays_exact(able, quantized):
    """Up to 16 rows go through the exact kernels."""
    pytest.importorskip("torch")
    with load(quantized, backend="torch", dtype="float32") as model:
        exact = model.logits(PROMPT[:16])
    with load(quantized, backend="torch", dtype="float32", activations="int8") as model:
        np.testing.assert_array_equal(model.logits(PROMPT[:16]), exact)


def test_a_dense_checkpoint_is_refused(able, tiny_folder):
    pytest.importorskip("torch")
    with pytest.raises(BadValue, match="activations='int8' needs quantized weights"):
        load(tiny_folder, backend="torch", activations="int8")


def test_mlx_is_refused(quantized):
    pytest.importorskip("mlx.core")
    with pytest.raises(BadValue, match="activations='int8' is for the torch backend"):
        load(quantized, backend="mlx", activations="int8")


def test_what_is_neither(quantized):
    with pytest.raises(BadValue, match="activations is 'int4', expected one of exact, int8"):
        load(quantized, activations="int4")
