"""The CPU's norms, 1 x 1 convolutions and attention of the towers beside torch's own in float64."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from g3n_mlx.backends.torch.kernels import towers  # noqa: E402
from g3n_mlx.backends.torch.vision import gelu  # noqa: E402

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SIZES = st.integers(1, 40)


def near(found, expected, dtype) -> None:
    scale = expected.abs().max().clamp(min=1.0)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= scale * (1e-5 if dtype == torch.float32 else 2e-2)


@given(DTYPES, SIZES, SIZES, SIZES, st.sampled_from([1, 64, 1 << 19]), st.booleans(), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_norm(dtype, height, width, channels, block, act, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, height, width, channels, generator=generator).to(dtype)
    weight = torch.randn(channels, generator=generator).to(dtype)
    expected = F.rms_norm(x.double(), (channels,), weight.double(), 1e-6)
    expected = gelu(expected) if act else expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(towers, "_NORM_BLOCK", block)
        found = towers.rms_norm_(x, weight, 1e-6, gelu if act else None)
    assert found is x
    near(found, expected, dtype)


def test_norm_of_a_map_whose_channels_are_apart():
    x = torch.randn(1, 8, 5, 7, generator=torch.Generator().manual_seed(1)).permute(0, 2, 3, 1)
    weight = torch.linspace(1, 2, 8)
    near(towers.rms_norm_(x, weight, 1e-6), F.rms_norm(x.double(), (8,), weight.double(), 1e-6), torch.float32)


@given(DTYPES, st.integers(1, 150), SIZES, SIZES, st.sampled_from(["AVX2", "AVX512"]), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_pointwise(dtype, rows, inputs, outputs, capability, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype) / inputs**0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        found = towers.pointwise(x, weight)
    assert found.shape == (2, rows, outputs)
    near(found, F.linear(x.double(), weight.double()), dtype)


@given(DTYPES, SIZES, SIZES, st.booleans(), st.sampled_from([1, 7, 2304]), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_attention(dtype, queries, keys, in_blocks, block, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 1, n, 16, generator=generator).to(dtype) for n in (queries, keys, keys))
    scores = q.double() @ k.double().transpose(-1, -2) * 0.25
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(towers, "_QUERY_BLOCK", block)
        patch.setattr(towers, "multiplies_bfloat16", lambda: in_blocks)
        found = towers.attention(q, k, v, 0.25)
    near(found, torch.softmax(scores, dim=-1) @ v.double(), dtype)
