"""MLX on a Mac's GPU against the reference: text, an image, audio, and a quantized checkpoint."""

import numpy as np
import pytest

from g3n_mlx import load
from g3n_mlx.convert import convert

RATE = 16_000
# Sums run in another order on a GPU; a wrong kernel is off by far more.
TOLERANCE = 1e-3

pytestmark = pytest.mark.metal


@pytest.fixture(scope="module")
def on_metal():
    """on_metal(folder): a model in float32 on the GPU. The default device is the old one afterwards."""
    mx = pytest.importorskip("mlx.core")
    if not mx.metal.is_available():
        pytest.skip("there is no Metal here")
    before = mx.default_device()
    mx.set_default_device(mx.gpu)
    yield lambda folder: load(folder, backend="mlx", dtype="float32")
    mx.set_default_device(before)


@pytest.fixture(scope="module")
def model(on_metal, tiny_folder):
    model = on_metal(tiny_folder)
    assert model.device == "gpu"
    return model


def assert_near(ours, expected):
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("case", ["", "media_token_"])
def test_logits(model, golden_arrays, case):
    golden = golden_arrays("text_logits")
    assert_near(model.logits(golden[f"{case}input_ids"][0].tolist()), golden[f"{case}logits"][0])


def test_greedy_tokens(model, golden_arrays):
    golden = golden_arrays("text_generation")
    prompt = golden["input_ids"][0].tolist()
    clear = next((index for index, margin in enumerate(golden["margins"]) if margin < 1e-3), len(golden["tokens"]))
    assert clear > 8
    answer = model.generate(prompt, temperature=0, max_tokens=clear, ignore_eos=True)
    assert list(answer.token_ids) == golden["tokens"][:clear].tolist()


def test_soft_tokens(model, golden_arrays):
    vision, audio = golden_arrays("vision_tower"), golden_arrays("audio_encoder")
    for picture, expected in zip(vision["images"], vision["soft_tokens"], strict=True):
        assert_near(model.encode_image(picture), expected)
    for index in range(2):
        waveform = golden_arrays("multimodal")[f"waveform_{index}"]
        assert_near(model.encode_audio(waveform, RATE), audio[f"clip{index}.padded_soft_tokens"][0])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_products_are_the_cpus(on_metal, tiny_folder, golden_arrays, tmp_path, bits):
    """Exact on the CPU in float32; there they are compared with the reference."""
    folder = convert(tiny_folder, tmp_path / "packed", q_bits=bits, dtype="float32", progress=False)
    ids = golden_arrays("text_logits")["input_ids"][0].tolist()
    ours = on_metal(folder).logits(ids)
    assert_near(ours, load(folder, backend="torch", dtype="float32", device="cpu").logits(ids))
