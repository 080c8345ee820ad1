"""Products of the kernels in C against numpy, with every instruction set that this processor has."""

import ctypes
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from g3n_mlx.checkpoint.quantization import BITS, dequantize, pack
from g3n_mlx.kernels import library

# The instructions stay chosen for all inputs of a test.
SAME_KERNELS = (HealthCheck.function_scoped_fixture,)


def address(array):
    return array.ctypes.data


class Weight:
    """A random weight in the stored layout, perhaps a part of wider rows, and its numbers in float64."""

    def __init__(self, rows, groups, bits, group_size, scales=ml_dtypes.bfloat16, margin=0, seed=0):
        generator = np.random.default_rng(seed)
        columns = groups * group_size
        wide = columns + margin * group_size
        codes = generator.integers(0, 2**bits, (rows, wide), dtype=np.uint8)
        self.codes = pack(codes, bits)[:, : columns * bits // 32]
        self.scales = generator.normal(0, 0.02, (rows, groups + margin)).astype(scales)[:, :groups]
        self.biases = generator.normal(0, 0.1, (rows, groups + margin)).astype(scales)[:, :groups]
        whole = dequantize(
            np.ascontiguousarray(self.codes),
            self.scales.astype(np.float32),
            self.biases.astype(np.float32),
            bits,
            group_size,
        )
        self.values = whole.astype(np.float64)
        self.matrix = library.Matrix(
            codes=address(self.codes),
            scales=address(self.scales),
            biases=address(self.biases),
            code_stride=self.codes.strides[0],
            scale_stride=self.scales.strides[0] // self.scales.itemsize,
            rows=rows,
            columns=columns,
            bits=bits,
            group=group_size,
            scale_bits=8 * self.scales.itemsize,
        )


class DenseWeight:
    """A random dense weight."""

    def __init__(self, rows, columns, dtype, seed=0):
        self.stored = np.random.default_rng(seed).normal(0, 1, (rows, columns)).astype(dtype)
        self.values = self.stored.astype(np.float64)
        itemsize = self.stored.itemsize
        self.matrix = library.Matrix(
            codes=address(self.stored), code_stride=columns * itemsize, rows=rows, columns=columns, bits=8 * itemsize
        )


def product(calls, weight, x, rounded):
    y = np.full((len(x), weight.matrix.rows), np.nan, np.float32)
    calls.g3n_product(weight.matrix, address(x), rounded, len(x), address(y))
    return y


def check(calls, weight, rounded, seed):
    """A product of every number of rows is right, and its rows are those of the product of one."""
    x = np.random.default_rng(seed).normal(0, 1, (library.MAX_ROWS, weight.matrix.columns)).astype(np.float32)
    used = x.astype(ml_dtypes.bfloat16).astype(np.float64) if rounded else x.astype(np.float64)
    expected = used @ weight.values.T
    # What float32 sums may lose, by the size of what is summed.
    bound = 2e-6 * (np.abs(used) @ np.abs(weight.values).T) + 1e-6
    alone = np.concatenate([product(calls, weight, row[None], rounded) for row in x])
    assert (np.abs(alone - expected) <= bound).all()
    for rows in range(2, library.MAX_ROWS + 1):
        np.testing.assert_array_equal(product(calls, weight, x[:rows], rounded), alone[:rows])


@settings(max_examples=40, deadline=None, suppress_health_check=SAME_KERNELS)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 40),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from((32, 64, 128)),
    scales=st.sampled_from((ml_dtypes.bfloat16, np.float32)),
    margin=st.integers(0, 2),
    rounded=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_quantized(kernels, rows, groups, bits, group_size, scales, margin, rounded, seed):
    check(kernels, Weight(rows, groups, bits, group_size, scales, margin, seed), rounded, seed)


@settings(max_examples=20, deadline=None, suppress_health_check=SAME_KERNELS)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 700),
    dtype=st.sampled_from((ml_dtypes.bfloat16, np.float32)),
    rounded=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_dense(kernels, rows, columns, dtype, rounded, seed):
    check(kernels, DenseWeight(rows, columns, dtype, seed), rounded, seed)


@pytest.mark.parametrize("columns", [2048, 8192])
def test_wide_rows(kernels, columns):
    """Rows as the published models have them, short ones taken four at a time."""
    check(kernels, Weight(67, columns // 64, 4, 64, seed=1), True, 2)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(kernels, threads):
    weight = Weight(700, 5, 4, 64)
    x = np.random.default_rng(0).normal(0, 1, (3, 320)).astype(np.float32)
    usual = product(kernels, weight, x, 1)
    kernels.g3n_threads(threads)
    np.testing.assert_array_equal(product(kernels, weight, x, 1), usual)


def int8_product(calls, weight, x, rounded):
    dtype = ml_dtypes.bfloat16 if rounded else np.float32
    x = x.astype(dtype)
    y = np.full((len(x), weight.matrix.rows), np.nan, dtype)
    calls.g3n_int8_product(weight.matrix, address(x), rounded, len(x), address(y))
    return y.astype(np.float64)


@settings(max_examples=40, deadline=None, suppress_health_check=SAME_KERNELS)
@given(
    count=st.sampled_from((1, 5, 17, 40, 515)),
    rows=st.integers(1, 70),
    groups=st.integers(1, 40),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from((32, 64, 128)),
    scales=st.sampled_from((ml_dtypes.bfloat16, np.float32)),
    margin=st.integers(0, 2),
    rounded=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_activations_in_8_bits(kernels, count, rows, groups, bits, group_size, scales, margin, rounded, seed):
    """The product of the dequantized weight with activations rounded to 255 levels in every group."""
    if bits > kernels.g3n_int8_bits():
        return
    weight = Weight(rows, groups, bits, group_size, scales, margin, seed)
    x = np.random.default_rng(seed).normal(0, 1, (count, groups * group_size)).astype(np.float32)
    x[0, : min(group_size, 40)] = 0
    used = (x.astype(ml_dtypes.bfloat16).astype(np.float64) if rounded else x).reshape(count, groups, group_size)
    step = np.abs(used).max(2, keepdims=True) / 127
    levels = np.round(np.divide(used, step, out=np.zeros_like(used, np.float64), where=step > 0))
    nearest = (levels * step).reshape(count, -1)
    found, expected = int8_product(kernels, weight, x, rounded), nearest @ weight.values.T
    # A number between two levels may go to either; the output may be rounded to bfloat16.
    close = np.abs(np.abs(np.divide(used, step, out=np.zeros_like(used, np.float64), where=step > 0) - levels) - 0.5)
    either = np.where(close < 1e-4, step, 0).reshape(count, -1) @ np.abs(weight.values).T
    slack = 2e-6 * (np.abs(nearest) @ np.abs(weight.values).T) + 1e-6
    slack += (rounded * 2**-8) * (np.abs(expected) + either)
    assert (np.abs(found - expected) <= slack + either).all()


def test_activations_that_are_not_finite_stay_so_in_8_bits(kernels):
    if not kernels.g3n_int8_bits():
        pytest.skip("these instructions have no products of bytes")
    weight = Weight(40, 3, 4, 64)
    x = np.random.default_rng(0).normal(0, 1, (20, 192)).astype(np.float32)
    usual = int8_product(kernels, weight, x, 0)
    x[3, 70], x[5, 1], x[6, 191] = np.nan, np.inf, -np.inf
    found = int8_product(kernels, weight, x, 0)
    assert not np.isfinite(found[[3, 5, 6]]).any()
    np.testing.assert_array_equal(np.delete(found, [3, 5, 6], 0), np.delete(usual, [3, 5, 6], 0))


@settings(max_examples=30, deadline=None, suppress_health_check=SAME_KERNELS)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 9),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from((32, 64, 128)),
    margin=st.integers(0, 2),
    data=st.data(),
)
def test_dequantized_rows(kernels, rows, groups, bits, group_size, margin, data):
    weight = Weight(rows, groups, bits, group_size, margin=margin, seed=rows)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    columns = groups * group_size
    exact = np.full((stop - start, columns), np.nan, np.float32)
    kernels.g3n_dequantize(weight.matrix, start, stop, 0, address(exact))
    np.testing.assert_allclose(exact, weight.values[start:stop], rtol=1e-6, atol=1e-7)
    halves = np.zeros((stop - start, columns), ml_dtypes.bfloat16)
    kernels.g3n_dequantize(weight.matrix, start, stop, 1, address(halves))
    np.testing.assert_array_equal(halves, exact.astype(ml_dtypes.bfloat16))
    ids = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5)), np.int64)
    gathered = np.full((len(ids), columns), np.nan, np.float32)
    kernels.g3n_embed(weight.matrix, address(ids), len(ids), address(gathered))
    np.testing.assert_allclose(gathered, weight.values[ids], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_units_are_the_columns(kernels, group_size):
    weight = Weight(128, 3, 4, group_size)
    units = 3 * group_size
    codes = np.zeros((units, 64), np.uint8)
    scales, biases = np.zeros((2, 3, 128), ml_dtypes.bfloat16)
    kernels.g3n_units(weight.matrix, address(codes), address(scales), address(biases))
    pairs = codes.reshape(units, 4, 16)
    numbers = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(units, 128).astype(np.float64)
    of_unit = np.repeat(scales.astype(np.float64), group_size, 0), np.repeat(biases.astype(np.float64), group_size, 0)
    np.testing.assert_allclose(numbers * of_unit[0] + of_unit[1], weight.values.T, rtol=1e-6, atol=1e-7)


def test_a_row_that_is_not_finite_spoils_no_later_one(kernels):
    weight = Weight(9, 3, 4, 64)
    x = np.random.default_rng(0).normal(0, 1, (2, 192)).astype(np.float32)
    usual = product(kernels, weight, x, 1)
    assert np.isnan(product(kernels, weight, np.full_like(x, np.nan), 1)).all()
    np.testing.assert_array_equal(product(kernels, weight, x, 1), usual)


def test_a_forked_child_multiplies(kernels):
    weight = Weight(64, 3, 4, 64)
    x = np.random.default_rng(0).normal(0, 1, (1, 192)).astype(np.float32)
    usual = product(kernels, weight, x, 1)  # the threads run by now
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(product(kernels, weight, x, 1), usual) else 1)
    assert os.waitpid(child, 0)[1] == 0


def instructions_with(value):
    code = "from g3n_mlx.kernels import library; print(library.instructions())"
    environment = {**os.environ, library.VARIABLE: value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_chooses(kernels):
    name = kernels.g3n_instructions().decode()
    assert instructions_with(name).stdout == f"{name}\n"


def test_the_environment_switches_off():
    assert instructions_with("off").stdout == "None\n"


def test_unknown_instructions_are_an_error():
    done = instructions_with("sse9")
    assert done.returncode == 1
    assert "G3N_CPU=sse9" in done.stderr.splitlines()[-1]


def test_the_structs_are_those_of_the_header(tmp_path, repository):
    """Sizes as the C compiler has them."""
    source = tmp_path / "sizes.c"
    names = ("Matrix", "Units", "Layer", "Model", "Sequence")
    lines = "".join(f'printf("%zu\\n", sizeof({name}));' for name in names)
    source.write_text(f'#include <stdio.h>\n#include "g3n.h"\nint main(void) {{ {lines} }}\n')
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-I", str(repository / "g3n_mlx/kernels/src"), str(source), "-o", str(tmp_path / "sizes")]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no C compiler")
    sizes = subprocess.run([str(tmp_path / "sizes")], check=True, capture_output=True, text=True).stdout.split()
    assert [int(size) for size in sizes] == [ctypes.sizeof(getattr(library, name)) for name in names]
