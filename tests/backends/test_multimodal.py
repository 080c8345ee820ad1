"""Pictures and sounds through the whole model, against the goldens; and their caches, chunks and prefixes."""

import numpy as np
import pytest
from devices import device_for

from g3n_mlx import Audio, Image, load
from g3n_mlx.engine.soft_tokens import EmbeddedMedia

RATE = 16_000
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]}


@pytest.fixture(scope="module")
def model(backend, tiny_folder):
    return load(tiny_folder, backend=backend, dtype="float32", device=device_for(backend))


@pytest.fixture(scope="module")
def golden(golden_arrays):
    return golden_arrays("multimodal")


def conversations(golden) -> dict[str, list[dict]]:
    """What the goldens were asked (reference_builder/golden_multimodal.py), with the media in their places."""
    first, second = (Image(picture) for picture in golden["images"])
    one, two = (Audio(golden[f"waveform_{index}"], RATE) for index in range(2))
    interleaved = [
        "Compare the first image",
        first,
        "with this recording",
        one,
        "and the second image",
        second,
        "with the second recording.",
        two,
    ]
    return {
        "interleaved": [SYSTEM, {"role": "user", "content": interleaved}],
        "one_image": [{"role": "user", "content": [first, "Describe this picture in one sentence."]}],
        "one_audio": [{"role": "user", "content": ["What is the speaker saying?", one]}],
    }


@pytest.mark.parametrize("case", ["interleaved", "one_image", "one_audio"])
def test_goldens(model, golden, case):
    prompt = model.prepare(conversations(golden)[case])
    assert list(prompt.token_ids) == golden[f"{case}.input_ids"][0].tolist()
    expected = golden[f"{case}.logits"][0]
    assert np.abs(model.logits(prompt) - expected).max() <= 1e-3 * np.abs(expected).max()
    tokens, margins = golden[f"{case}.tokens"], golden[f"{case}.margins"]
    answer = model.generate(prompt, temperature=0, max_tokens=len(tokens), ignore_eos=True).token_ids
    clear = next((index for index, margin in enumerate(margins) if margin < 1e-3), len(tokens))
    assert clear > 8
    assert list(answer[:clear]) == tokens[:clear].tolist()


def test_soft_tokens_of_images(model, golden_arrays):
    golden = golden_arrays("vision_tower")
    for picture, expected in zip(golden["images"], golden["soft_tokens"], strict=True):
        ours = model.encode_image(picture)
        assert ours.dtype == np.float32
        assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()


def test_soft_tokens_of_sounds(model, golden, golden_arrays):
    for index in range(2):
        expected = golden_arrays("audio_encoder")[f"clip{index}.padded_soft_tokens"][0]
        ours = model.encode_audio(golden[f"waveform_{index}"], RATE)
        assert ours.shape == expected.shape
        assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()


def test_chunks_may_cut_a_picture(model, golden):
    """One id a chunk is the slow twin of reading the prompt at once."""
    prompt = model.prepare(conversations(golden)["interleaved"])
    options = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
    model.reset()
    at_once = model.generate(prompt, **options, prefill_step_size=4096)
    model.reset()
    one_by_one = model.generate(prompt, **options, prefill_step_size=7)
    assert at_once.token_ids == one_by_one.token_ids
    assert one_by_one.usage.cached_tokens == 0


def test_the_next_turn_finds_the_picture_in_the_cache(model, golden):
    (question,) = conversations(golden)["one_image"]
    model.reset()
    first = model.generate([question], temperature=0, max_tokens=4, ignore_eos=True)
    messages = [question, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And why?"}]
    second = model.generate(messages, temperature=0, max_tokens=4)
    assert second.usage.cached_tokens >= len(model.prepare([question]).token_ids)
    model.reset()
    assert model.generate(messages, temperature=0, max_tokens=4).token_ids == second.token_ids


def test_another_picture_in_the_same_place_is_not_taken_for_the_first(model, golden):
    first, second = (Image(picture) for picture in golden["images"])
    ask = "Describe this picture in one sentence."
    model.reset()
    model.generate([{"role": "user", "content": [first, ask]}], temperature=0, max_tokens=2)
    prompt = model.prepare([{"role": "user", "content": [second, ask]}])
    assert prompt.token_ids == model.prepare([{"role": "user", "content": [first, ask]}]).token_ids
    after_another = model.generate(prompt, temperature=0, max_tokens=8, ignore_eos=True)
    assert after_another.usage.cached_tokens <= prompt.media[0].start
    model.reset()
    assert model.generate(prompt, temperature=0, max_tokens=8, ignore_eos=True).token_ids == after_another.token_ids


def test_a_picture_is_encoded_once(model, golden, monkeypatch):
    """By content, whatever form it came in; dropped towers come back."""
    calls = []
    embed_images = model.runner.model.embed_images

    def counted(pixels):
        calls.append(pixels.shape)
        return embed_images(pixels)

    monkeypatch.setattr(model.runner.model, "embed_images", counted)
    monkeypatch.setattr(model, "_embedded", EmbeddedMedia(model.runner))
    picture = golden["images"][0]
    expected = model.encode_image(picture)
    np.testing.assert_array_equal(model.encode_image(Image(picture.copy())), expected)
    assert len(calls) == 1
    model.drop_towers()
    assert model.runner.model.towers.vision_tower is None
    np.testing.assert_array_equal(model.encode_image(picture), expected)
    assert len(calls) == 2


def test_media_of_a_prompt_share_a_call(model, monkeypatch):
    """Where the device gains from it: those of one kind and shape, and the answer stays what it was."""
    network, calls = model.runner.model, []
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (32, 32), (24, 24), (32, 32), (32, 32)]
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    clips = [rng.normal(0, 0.1, 4000).astype(np.float32) for _ in range(2)]
    parts = [
        *({"type": "image", "image": picture} for picture in pictures),
        *({"type": "audio", "audio": Audio(clip, 16000)} for clip in clips),
    ]
    prompt = model.prepare([{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}])

    def counted(name):
        encode = getattr(network, name)

        def run(*arrays):
            calls.append((name, len(arrays[0])))
            return encode(*arrays)

        return run

    logits = {}
    for together in (1, 3):
        with monkeypatch.context() as patch:
            patch.setattr(model, "_embedded", EmbeddedMedia(model.runner))
            patch.setattr(type(network), "media_together", together)
            for name in ("embed_images", "embed_audio"):
                patch.setattr(network, name, counted(name))
            calls.clear()
            model.reset()
            logits[together] = model.logits(prompt)
            found = list(calls)
        shapes = [features.features.values().shape for features in prompt.media if features.features.kind == "image"]
        most = max(map(shapes.count, shapes))
        assert sum(count for _, count in found) == len(parts)
        assert max(count for _, count in found) == min(together, most)
        assert together == 1 or ("embed_audio", 2) in found
    np.testing.assert_allclose(logits[3], logits[1], rtol=0, atol=1e-4)


def test_a_border_follows_every_media_block(model, golden):
    prompt = model.prepare(conversations(golden)["interleaved"])
    assert {span.start + span.length + 1 for span in prompt.media} <= set(prompt.borders)
    assert [span.features.kind for span in prompt.media] == ["image", "audio", "image", "audio"]


def test_bfloat16_stays_bfloat16(backend, tiny_folder, golden):
    model = load(tiny_folder, backend=backend, dtype="bfloat16", device=device_for(backend))
    exact = load(tiny_folder, backend=backend, dtype="float32", device=device_for(backend))
    for prepared in conversations(golden).values():
        for span in model.prepare(prepared).media:
            soft = model._embedded(span.features)
            assert "bfloat16" in str(soft.dtype)
            rows, expected = model.runner.model.numpy(soft), exact.runner.model.numpy(exact._embedded(span.features))
            assert 0 < np.abs(rows - expected).max() <= 0.15 * np.abs(expected).max()
