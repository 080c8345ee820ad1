"""Media through the model as users hold it: every spelling answers alike, nothing is encoded twice."""

import base64
import weakref

import numpy as np
import pytest
from devices import device_for
from image_files import drawn, encoded
from media_files import sound_file, tones, video_file

from g3n_mlx import Audio, Image, Video, load
from g3n_mlx.engine.sequence import PromptTooLong
from g3n_mlx.engine.soft_tokens import EmbeddedMedia

RATE = 16_000
SHORT = {"temperature": 0, "ignore_eos": True, "max_tokens": 5}


@pytest.fixture(scope="module")
def model(backend, tiny_folder):
    return load(tiny_folder, backend=backend, dtype="float32", device=device_for(backend))


@pytest.fixture
def encodings(model, monkeypatch):
    """What the towers are asked for, from an empty store on; on a CPU one at a time."""
    calls: list[str] = []

    def counted(kind: str, name: str):
        original = getattr(model.runner.model, name)

        def embed(*arguments):
            calls.extend([kind] * len(arguments[0]))
            return original(*arguments)

        return embed

    for kind, name in (("image", "embed_images"), ("audio", "embed_audio")):
        monkeypatch.setattr(model.runner.model, name, counted(kind, name))
    monkeypatch.setattr(model, "_embedded", EmbeddedMedia(model.runner))
    model.reset()
    return calls


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def test_three_spellings_answer_alike(model):
    picture, sound = encoded(drawn(), "PNG"), sound_file("wav")
    image_uri = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    ours = [user("What is this?", Image(drawn()), "And this?", Audio(sound))]
    hugging_face = [
        user(
            {"type": "text", "text": "What is this?"},
            {"type": "image", "image": drawn()},
            {"type": "text", "text": "And this?"},
            {"type": "audio", "audio": sound},
        )
    ]
    openai = [
        user(
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": image_uri}},
            {"type": "text", "text": "And this?"},
            {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound).decode(), "format": "wav"}},
        )
    ]
    prompt = model.prepare(ours)
    expected = model.generate(prompt, **SHORT)
    for messages in (hugging_face, openai):
        assert model.prepare(messages).identity == prompt.identity
        assert model.generate(messages, **SHORT).token_ids == expected.token_ids
        assert "".join(chunk.text for chunk in model.stream(messages, **SHORT)) == expected.text


def test_a_video_is_answered_about(model, encodings):
    seconds = 2.0
    messages = [user(Video(video_file(seconds, sound=tones(48_000, seconds))), "What happens in this video?")]
    result = model.generate(messages, **SHORT)
    assert len(result.token_ids) == 5
    assert encodings == ["image", "image", "audio"]
    assert model.logits(model.prepare(messages)).shape == (result.usage.prompt_tokens, model.config.text.vocab_size)


def test_soft_tokens_enter_the_text_model_in_place(model):
    """Another picture changes the logits from its place on, and none before it."""
    first, second = (model.logits(model.prepare([user("Look:", Image(p), "Well?")])) for p in (drawn(), drawn()[::-1]))
    prompt = model.prepare([user("Look:", Image(drawn()), "Well?")])
    start = prompt.media[0].start
    np.testing.assert_array_equal(first[:start], second[:start])
    assert np.abs(first[start:] - second[start:]).max() > 1e-3


def test_shapes_of_encodings(model):
    width, soft = model.config.text.hidden_size, model.preparer.opener.soft_tokens
    for source in (Image(drawn()), drawn(), encoded(drawn(), "PNG")):
        rows = model.encode_image(source)
        assert (rows.shape, rows.dtype) == ((soft["image"], width), np.float32)
    for arguments in ((tones(RATE), RATE), (Audio(sound_file("wav")),)):
        rows = model.encode_audio(*arguments)
        assert (rows.shape, rows.dtype) == ((soft["audio"], width), np.float32)
    seconds = 2.5 * model.preparer.opener.audio_processing.max_clip_samples / RATE
    clips = len(model.split_audio(Audio(tones(RATE, seconds), RATE)))
    assert model.encode_audio(tones(RATE, seconds), RATE).shape == (clips * soft["audio"], width)
    for wrong in (lambda: model.encode_image("/no/such.png"), lambda: model.encode_audio(np.array([np.nan]), RATE)):
        with pytest.raises(ValueError, match=r"does not exist|not finite"):
            wrong()


def test_the_second_turn_encodes_nothing(model, encodings):
    question = user(Image(drawn()), Audio(tones(RATE), RATE), "What are these?")
    first = model.generate([question], **SHORT)
    assert encodings == ["image", "audio"]
    turns = [question, {"role": "assistant", "content": first.text}, user("And why?")]
    second = model.generate(turns, **SHORT)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    model.reset()  # without the cache of the conversation the soft tokens are still there
    assert model.generate(turns, **SHORT).token_ids == second.token_ids
    assert encodings == ["image", "audio"]
    model.generate([user(Image(drawn()[::-1]), "And this?")], **SHORT)
    assert encodings == ["image", "audio", "image"]


def test_dropped_towers_are_gone_and_come_back(model, encodings):
    question = [user(Image(drawn()), Audio(tones(RATE), RATE), "What are these?")]
    answer = model.generate(question, **SHORT).token_ids
    towers = [weakref.ref(model.runner.model.towers.vision_tower), weakref.ref(model.runner.model.towers.audio_tower)]
    assert all(tower() is not None for tower in towers)
    model.drop_towers()
    assert all(tower() is None for tower in towers)
    assert model.generate("No picture", **SHORT).token_ids
    assert model.runner.model.towers.vision_tower is None
    assert model.generate(question, **SHORT).token_ids == answer


def test_bad_media_are_said_before_the_model_runs(model, encodings, monkeypatch):
    def never(*_):
        raise AssertionError("the model ran")

    monkeypatch.setattr(model.runner, "advance", never)
    with pytest.raises(ValueError, match=r"messages\[0\]\.content\[1\]: not an image"):
        model.stream([user(Image(drawn()), Image(b"no picture"))])
    assert not encodings


def test_more_media_than_the_context_holds(model, encodings, monkeypatch, caplog):
    """Said before anything is encoded, with what it is that takes the room and what to do."""
    import dataclasses

    small = dataclasses.replace(model.config.text, max_position_embeddings=120)
    monkeypatch.setattr(model.checkpoint, "config", dataclasses.replace(model.config, text=small))
    seconds = 6 * model.preparer.opener.audio_processing.max_clip_samples / RATE
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)
    messages = [user(Image(drawn()), Audio(noise, RATE), "What is this?")]
    assert not caplog.messages
    soft = sum(span.length for span in model.prepare(messages).media)
    clips = len(model.split_audio(Audio(noise, RATE)))
    advice = "shorten it, or send less or shorter media"
    expected = f"120 tokens and an answer: {advice}: {soft} tokens stand for 1 image and {clips} audio clips"
    for ask in (model.generate, model.stream):
        with pytest.raises(PromptTooLong, match=expected):
            ask(messages, **SHORT)
    with pytest.raises(PromptTooLong, match=f"too many for the context of 120 tokens: {advice}"):
        model.logits(messages)
    assert not encodings
    assert "split at quiet places" in caplog.text
