"""What the kernels in C do number by number in many rows, against numpy in float64, with every instruction set."""

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# The instructions stay chosen for all inputs of a test.
SAME_KERNELS = (HealthCheck.function_scoped_fixture,)
HALVES = ml_dtypes.bfloat16
DTYPES = st.sampled_from((HALVES, np.float32))
SHAPES = {"rows": st.integers(1, 40), "columns": st.integers(1, 700), "seed": st.integers(0, 2**31)}


def numbers(shape, dtype, seed):
    return np.random.default_rng(seed).normal(0, 2, shape).astype(dtype)


def assert_near(found, expected):
    """Equal but for one rounding to the dtype, and what sums in float32 lose."""
    relative = 2**-8 if found.dtype == HALVES else 1e-5
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=relative, atol=1e-5)


@settings(max_examples=60, deadline=None, suppress_health_check=SAME_KERNELS)
@given(dtype=DTYPES, weighted=st.booleans(), **SHAPES)
def test_norm(kernels, rows, columns, dtype, weighted, seed):
    x, weight = numbers((rows, columns), dtype, seed), numbers(columns, dtype, seed + 1)
    out = np.full_like(x, np.nan)
    address = weight.ctypes.data if weighted else None
    kernels.g3n_norm(x.ctypes.data, address, dtype == HALVES, rows, columns, 1e-6, out.ctypes.data)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    assert_near(out, expected * weight.astype(np.float64) if weighted else expected)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@settings(max_examples=60, deadline=None, suppress_health_check=SAME_KERNELS)
@given(dtype=DTYPES, cutoff=st.one_of(st.none(), st.floats(-3, 3, width=32)), **SHAPES)
def test_gate(kernels, rows, columns, dtype, cutoff, seed):
    gate, up = numbers((rows, columns), dtype, seed), numbers((rows, columns), dtype, seed + 1)
    kept = gate.astype(np.float64)
    if cutoff is not None:
        kept = np.maximum(kept - (kept.mean(-1, keepdims=True) + cutoff * kept.std(-1, keepdims=True)), 0)
    expected = gelu(kept) * up.astype(np.float64)
    kernels.g3n_gate(gate.ctypes.data, up.ctypes.data, dtype == HALVES, rows, columns, cutoff is not None, cutoff or 0)
    assert_near(gate, expected)


def test_numbers_that_are_not_finite_stay_so(kernels):
    for cutoff in (0.0, 1.5):
        gate, up = numbers((3, 100), np.float32, 0), numbers((3, 100), np.float32, 1)
        gate[1, 37] = np.nan
        kernels.g3n_gate(gate.ctypes.data, up.ctypes.data, False, 3, 100, cutoff > 0, cutoff)
        assert np.isnan(gate[1, 37])
        assert np.isfinite(gate[[0, 2]]).all()
