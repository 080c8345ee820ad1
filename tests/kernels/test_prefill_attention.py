"""A prefill's attention in C against numpy in float64, where the processor multiplies bfloat16."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from g3n_mlx.kernels import library

HALVES = ml_dtypes.bfloat16
# The instructions stay chosen for all inputs of a test.
SAME_KERNELS = (HealthCheck.function_scoped_fixture,)


def attended(queries, keys, values, window):
    """Queries [T, N, H] of the last T of S positions, keys and values [K, S, H] -> [T, N, H], float64."""
    rows, heads, _ = queries.shape
    group, length = heads // keys.shape[0], keys.shape[1]
    own = np.arange(length - rows, length)[:, None]
    seen = (np.arange(length) <= own) & (np.arange(length) > own - (window or length))
    out = np.empty(queries.shape)
    for head in range(heads):
        scores = np.where(seen, queries[:, head] @ keys[head // group].T, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ values[head // group]
    return out


def called(kernels, queries, keys, values, length, window):
    """What the kernel makes of the first `length` keys and values."""
    if not kernels.g3n_attends():
        pytest.skip("these instructions leave a prefill's attention to PyTorch")
    (rows, heads, head_dim), kv_heads = queries.shape, keys.shape[0]
    out = np.full(queries.shape, np.nan, HALVES)
    stride = keys.shape[1] * head_dim
    sequence = library.Sequence(keys.ctypes.data, values.ctypes.data, stride, stride, length, rows, 0)
    kernels.g3n_attend(sequence, queries.ctypes.data, heads, kv_heads, head_dim, window or 0, out.ctypes.data)
    return out


def check(kernels, rows, past, kv_heads, group, head_dim, window, room, scale, seed):
    generator, length = np.random.default_rng(seed), past + rows
    queries = generator.normal(0, scale, (rows, kv_heads * group, head_dim)).astype(HALVES)
    keys, values = (generator.normal(0, 1, (kv_heads, length + room, head_dim)).astype(HALVES) for _ in range(2))
    out = called(kernels, queries, keys, values, length, window)
    wide = (x.astype(np.float64) for x in (queries, keys[:, :length], values[:, :length]))
    # Weights and the result are rounded to 8 bits.
    np.testing.assert_allclose(out.astype(np.float64), attended(*wide, window), rtol=2**-7, atol=2**-6)


@settings(max_examples=60, deadline=None, suppress_health_check=SAME_KERNELS)
@given(
    rows=st.integers(1, 120),
    past=st.integers(0, 150),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from((1, 2, 3, 4, 5, 8, 96)),
    head_dim=st.sampled_from((32, 64, 96, 256)),
    window=st.one_of(st.none(), st.integers(1, 100)),
    room=st.integers(0, 3),
    scale=st.sampled_from((0.01, 0.3, 3.0)),
    seed=st.integers(0, 2**31),
)
def test_any_shape(kernels, rows, past, kv_heads, group, head_dim, window, room, scale, seed):
    check(kernels, rows, past, kv_heads, group, head_dim, window, room, scale, seed)


@pytest.mark.parametrize("window", [None, 512])
def test_a_chunk_of_a_long_prompt(kernels, window):
    check(kernels, 300, 1000, 2, 4, 256, window, 0, 0.3, 0)


def test_numbers_that_are_not_finite_are_not_hidden(kernels):
    """Rows that see a key with a NaN give NaN, those before it do not."""
    queries, keys, values = (np.ones((2, 20, 32), HALVES) for _ in range(3))
    keys[0, 7, 3] = np.nan
    out = called(kernels, np.ascontiguousarray(queries.swapaxes(0, 1)), keys, values, 20, None)
    assert np.isnan(out[7:, 0].astype(np.float32)).all()
    assert np.isfinite(out[:7].astype(np.float32)).all()
    assert np.isfinite(out[:, 1].astype(np.float32)).all()
