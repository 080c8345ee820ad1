"""The numpy quantizer against MLX's own, bit for bit, and against itself."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n_mlx.checkpoint.quantization import (
    BITS,
    GROUP_SIZES,
    Quantization,
    dequantize,
    pack,
    quantize,
    to_float32,
    unpack,
)

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def some_weight(seed: int, rows: int, width: int, kind: str) -> np.ndarray:
    """float32 [rows, width] of one character."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((rows, width), np.float32)
    match kind:
        case "normal":
            return normal
        case "zero":
            return np.zeros_like(normal)
        case "constant":
            return np.full_like(normal, normal[0, 0])
        case "tiny":
            return normal * np.float32(1e-8)
        case "huge":
            return np.clip(normal.astype(np.float64) * 1e38, -3e38, 3e38).astype(np.float32)
        case "one-sided":
            return np.abs(normal) + np.float32(100)
        case "few values":
            return rng.integers(-2, 3, normal.shape).astype(np.float32)
        case "halves":  # codes fall in the middle between integers
            return (rng.integers(-15, 16, normal.shape) / 2).astype(np.float32)
        case "outlier":
            normal[:, :: width // 32] *= 1000
            return normal
    raise AssertionError(kind)


KINDS = ("normal", "zero", "constant", "tiny", "huge", "one-sided", "few values", "halves", "outlier")


def as_dtype(weight: np.ndarray, dtype: type) -> np.ndarray:
    if dtype is np.float16:
        weight = np.clip(weight, -6e4, 6e4)
    return weight.astype(dtype)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    groups=st.integers(1, 6),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
)
def test_equals_mlx_bit_for_bit(
    seed: int, rows: int, groups: int, bits: int, group_size: int, dtype: type, kind: str
) -> None:
    mx = pytest.importorskip("mlx.core")
    weight = as_dtype(some_weight(seed, rows, groups * group_size, kind), dtype)
    with mx.stream(mx.cpu):
        array = mx.array(to_float32(weight)).astype(getattr(mx, np.dtype(dtype).name))
        expected = mx.quantize(array, group_size=group_size, bits=bits)
        widened = [expected[0], *(part.astype(mx.float32) for part in expected[1:])]
        packed, scales, biases = (np.array(part) for part in widened)
        restored = np.array(mx.dequantize(*widened, group_size=group_size, bits=bits))
    found = quantize(weight, bits, group_size)
    assert found[0].dtype == np.uint32
    assert found[1].dtype == found[2].dtype == weight.dtype
    np.testing.assert_array_equal(found[0], packed)
    # Bits, not values: the sign of a zero counts.
    np.testing.assert_array_equal(to_float32(found[1]).view(np.uint32), scales.view(np.uint32))
    np.testing.assert_array_equal(to_float32(found[2]).view(np.uint32), biases.view(np.uint32))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(dequantize(*found, bits, group_size), restored)


@given(
    seed=st.integers(0, 2**32 - 1),
    lead=st.lists(st.integers(1, 3), max_size=2),
    words=st.integers(1, 4),
    bits=st.sampled_from(BITS),
)
def test_unpack_reverses_pack(seed: int, lead: list[int], words: int, bits: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (*lead, words * 32)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (*lead, words * bits)
    np.testing.assert_array_equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_codes_lie_lsb_first_in_one_bit_stream(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, 64).astype(np.uint8)
    stream = sum(int(code) << (place * bits) for place, code in enumerate(codes))
    assert pack(codes, bits).tobytes() == stream.to_bytes(8 * bits, "little")


@pytest.mark.parametrize("bits", BITS)
def test_dequantized_is_within_half_a_step(bits: int) -> None:
    weight = some_weight(1, 4, 256, "normal")
    packed, scales, biases = quantize(weight, bits, 64)
    error = np.abs(dequantize(packed, scales, biases, bits, 64) - weight).reshape(4, 4, 64)
    # A group's far end may be a little outside of the grid once its edge is on it.
    assert (error <= np.abs(scales)[..., None] * 1.01).all()
    assert np.median(error / np.abs(scales)[..., None]) < 0.3


def test_blocks_do_not_change_the_result() -> None:
    weight = some_weight(2, 600, 1024, "normal").astype(ml_dtypes.bfloat16)  # several blocks
    whole = quantize(weight, 4, 64)
    for row in (0, 129, 599):
        for part, found in zip(quantize(weight[row], 4, 64), whole, strict=True):
            np.testing.assert_array_equal(part.view(np.uint8), found[row].view(np.uint8))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_refuses_what_is_not_finite(value: float, dtype: type) -> None:
    weight = some_weight(3, 2, 128, "normal").astype(dtype)
    weight[1, 70] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(weight, 4, 64)


def test_refuses_what_cannot_be_stored() -> None:
    with pytest.raises(ValueError, match="7 bits"):
        Quantization(7, 64)
    with pytest.raises(ValueError, match="rows of 96"):
        quantize(np.zeros((2, 96), np.float32), 4, 64)


def test_to_float32_keeps_every_bfloat16() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(to_float32(every), every.astype(np.float32))
