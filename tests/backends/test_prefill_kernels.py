"""A prefill through the kernels in C, beside PyTorch's own operations."""

import numpy as np
import pytest

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.kernels import library

PROMPT = [2 + i * 7 % 500 for i in range(90)]  # longer than both models' windows


@pytest.fixture(params=["tiny", "demo"])
def folder(request, tiny_folder):
    if library.library() is None:
        pytest.skip("the kernels are not built, or switched off")
    return tiny_folder if request.param == "tiny" else demo_folder()


def logits(folder, dtype, with_kernels):
    """Of every token of the prompt, [T, V]."""
    from g3n_mlx.backends.torch.kernels import attention, elementwise

    with pytest.MonkeyPatch.context() as patch:
        if not with_kernels:
            patch.setattr(elementwise, "takes", lambda *tensors: False)
            patch.setattr(attention, "takes", lambda queries, keys, values: False)
        with load(folder, backend="torch", device="cpu", dtype=dtype) as model:
            return model.logits(PROMPT)


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_float32_is_the_same_but_for_the_order_of_sums(folder):
    pytest.importorskip("torch")
    assert distance(logits(folder, "float32", True), logits(folder, "float32", False)) < 1e-5


def test_bfloat16_is_no_farther_from_float32_than_without_them(folder):
    pytest.importorskip("torch")
    exact = logits(folder, "float32", False)
    ours, theirs = (distance(logits(folder, "bfloat16", kernels), exact) for kernels in (True, False))
    assert ours < 1.1 * theirs
