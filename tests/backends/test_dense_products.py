"""Dense products and towers on a CPU that does not multiply bfloat16: in float32, over weights as they are."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from random_audio import write_audio  # noqa: E402
from random_vision import write_random_vision  # noqa: E402

from g3n_mlx.backends.torch import audio, text, vision  # noqa: E402
from g3n_mlx.backends.torch.kernels import dense  # noqa: E402
from g3n_mlx.backends.torch.weights import Placement, Weights  # noqa: E402
from g3n_mlx.checkpoint.folder import Checkpoint  # noqa: E402

HALVES = torch.bfloat16


@pytest.fixture
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for it."""
    for module in (dense, text, audio, vision):
        monkeypatch.setattr(module, "dense_product_dtype", lambda dtype, device: torch.float32)


@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_products_are_exact_up_to_their_rounding(rows, columns, outputs, wide, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, columns, generator=generator).to(HALVES) for n in (rows, outputs))
    if wide:
        x = x.float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "dense_product_dtype", lambda dtype, device: torch.float32)
        patch.setattr(dense, "BLOCK_WEIGHTS", 4 * columns)  # several blocks
        found = dense.product(x, weight)
        batched = dense.product(x[None], weight)
    assert found.dtype == x.dtype
    exact = x.double() @ weight.double().T
    bound = torch.finfo(x.dtype).eps * (x.double().abs() @ weight.double().abs().T + 1e-6)
    assert ((found.double() - exact).abs() <= bound).all()
    torch.testing.assert_close(batched[0], found)


def test_an_image_is_encoded_in_float32(no_bfloat16, tiny_folder, tmp_path):
    checkpoint = Checkpoint.open(write_random_vision(tmp_path / "vision", tiny_folder, None, hidden_size=64))
    tower, wide = (
        vision.VisionTower(
            checkpoint.config.vision, Weights(checkpoint, Placement(dtype, torch.device("cpu")), "vision_tower")
        )
        for dtype in (HALVES, torch.float32)
    )
    assert {weight.dtype for weight in tower.parameters()} == {HALVES}
    pixels = torch.from_numpy(np.random.default_rng(0).random((1, 3, 64, 96), np.float32))
    with torch.no_grad():
        found, expected = tower(pixels), wide(pixels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_clip_is_encoded_in_float32(no_bfloat16, tmp_path):
    import ml_dtypes

    checkpoint = Checkpoint.open(write_audio(tmp_path / "audio", dtype=ml_dtypes.bfloat16))
    tower, wide = (
        audio.AudioTower(
            checkpoint.config.audio, Weights(checkpoint, Placement(dtype, torch.device("cpu")), "audio_tower")
        )
        for dtype in (HALVES, torch.float32)
    )
    config = checkpoint.config.audio
    assert {weight.dtype for weight in tower.parameters()} == {HALVES}
    frames = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 96, config.input_feat_size), np.float32))
    mask = torch.arange(96)[None] < torch.tensor([[96], [50]])
    with torch.no_grad():
        (found, _), (expected, _) = tower(frames, mask), wide(frames, mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
