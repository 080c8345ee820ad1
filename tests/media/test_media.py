"""Media parts in every spelling to what enters the towers; errors that name the part; videos and long sounds."""

import base64
import dataclasses
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from image_files import drawn, encoded
from media_files import sound_file, tones, video_file
from PIL import Image as pil
from test_fetch import Answers, no_proxy, server, url  # noqa: F401 - fixtures

from g3n_mlx import Audio, Image, Video
from g3n_mlx.config.fields import read_json
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.installation import install_command
from g3n_mlx.media.audio_features import AudioFeatures
from g3n_mlx.media.image import ImageFeatures
from g3n_mlx.media.opener import MediaOpener
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.prompt.preparer import Preparer
from g3n_mlx.prompt.prompt import Prompt
from g3n_mlx.prompt.tokenizer import Tokenizer

ANY = MediaPolicy()
RATE = 16_000


@pytest.fixture(scope="module")
def config(tiny_folder) -> ModelConfig:
    return ModelConfig.from_dict(read_json(tiny_folder / "config.json"))


@pytest.fixture(scope="module")
def opener(tiny_folder, config) -> MediaOpener:
    return MediaOpener(tiny_folder, config)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


@pytest.fixture(scope="module")
def ask(opener, tokenizer):
    def ask(*parts, policy: MediaPolicy = ANY) -> Prompt:
        return Preparer(tokenizer, opener, 10_000).prepare([{"role": "user", "content": list(parts)}], policy)

    return ask


@pytest.fixture(scope="module")
def refused(ask):
    def refused(*parts, policy: MediaPolicy = ANY) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller reads the message
            ask(*parts, policy=policy)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return refused


def digests(prompt: Prompt) -> list[tuple[str, bytes]]:
    return [(span.features.kind, span.features.digest) for span in prompt.media]


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# Spellings.


def test_every_spelling_of_a_picture(ask, tmp_path):
    pixels, data, path = drawn(), encoded(drawn(), "PNG"), tmp_path / "a.png"
    path.write_bytes(data)
    uri = f"data:image/png;base64,{as_base64(data)}"
    expected = digests(ask(Image(pixels)))
    assert [kind for kind, _ in expected] == ["image"]
    for part in (
        Image(path),
        {"type": "image", "image": Image(data)},
        {"type": "image", "image": pixels},
        {"type": "image", "image": str(path)},
        {"type": "image", "image": data},
        {"type": "image", "image": uri},
        {"type": "image", "url": uri},
        {"type": "image", "url": path.as_uri()},
        {"type": "image", "path": str(path)},
        {"type": "image", "path": path},
        {"type": "image", "base64": as_base64(data)},
        {"type": "image_url", "image_url": {"url": uri, "detail": "high"}},
        {"type": "image_url", "image_url": uri},
        {"type": "image", "image": pixels, "url": None, "cache_control": {"type": "ephemeral"}},
    ):
        assert digests(ask(part)) == expected, part


def test_every_spelling_of_a_sound(ask, tmp_path):
    data, path = sound_file("wav"), tmp_path / "a.wav"
    path.write_bytes(data)
    uri = f"data:audio/wav;base64,{as_base64(data)}"
    expected = digests(ask(Audio(path)))
    assert [kind for kind, _ in expected] == ["audio"]
    for part in (
        Audio(data),
        {"type": "audio", "audio": Audio(data)},
        {"type": "audio", "audio": str(path)},
        {"type": "audio", "audio": uri},
        {"type": "audio", "url": uri},
        {"type": "audio", "path": str(path)},
        {"type": "audio", "base64": as_base64(data)},
        {"type": "audio_url", "audio_url": {"url": uri}},
        {"type": "audio_url", "audio_url": uri},
        {"type": "input_audio", "input_audio": {"data": as_base64(data), "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": uri, "format": "wav"}},
    ):
        assert digests(ask(part)) == expected, part
    waveform = tones(RATE)
    expected = digests(ask(Audio(waveform, RATE)))
    assert digests(ask({"type": "audio", "audio": waveform, "sampling_rate": RATE})) == expected
    assert digests(ask({"type": "audio", "audio": {"array": waveform, "sampling_rate": RATE}})) == expected


def test_every_spelling_of_a_video(ask, tmp_path):
    data, path = video_file(2.0), tmp_path / "a.mp4"
    path.write_bytes(data)
    uri = f"data:video/mp4;base64,{as_base64(data)}"
    expected = ask(Video(path))
    assert [kind for kind, _ in digests(expected)] == ["image", "image"]
    for part in (
        {"type": "video", "video": Video(data)},
        {"type": "video", "video": str(path)},
        {"type": "video", "url": uri},
        {"type": "video", "path": path},
        {"type": "video", "base64": as_base64(data)},
        {"type": "video_url", "video_url": {"url": uri}},
    ):
        assert ask(part).identity == expected.identity, part
    slower = ask({"type": "video", "video": str(path), "fps": 0.5})
    assert slower.identity == ask(Video(path, fps=0.5)).identity
    assert len(slower.media) == len(ask({"type": "video", "path": str(path), "max_frames": 1}).media) == 1


def test_urls(ask, refused, server, url, monkeypatch):  # noqa: F811
    files = {"a.png": encoded(drawn(), "PNG"), "a.wav": sound_file("wav"), "a.mp4": video_file(1.0)}

    def answer(handler, name: str) -> None:
        handler.head(200, Content_Length=len(files[name]))
        handler.wfile.write(files[name])

    monkeypatch.setattr(Answers, "answer_file", answer, raising=False)
    picture, sound, video = (f"{url}/file/{name}" for name in files)
    assert digests(ask({"type": "image_url", "image_url": {"url": picture}})) == digests(ask(Image(files["a.png"])))
    assert digests(ask({"type": "audio_url", "audio_url": {"url": sound}})) == digests(ask(Audio(files["a.wav"])))
    assert digests(ask({"type": "video_url", "video_url": {"url": video}})) == digests(ask(Video(files["a.mp4"])))
    assert digests(ask({"type": "image", "url": picture})) == digests(ask(Image(picture)))
    message = refused("Look:", Image(f"{url}/missing"))
    assert message.startswith("messages[0].content[1]: ")
    assert "answered 404" in message
    assert "private address" in refused(Image(picture), policy=MediaPolicy(private_hosts=False))


def test_the_order_of_parts_is_kept(ask, tokenizer):
    prompt = ask("first", Image(drawn()), "then", Audio(tones(RATE), RATE), Image(drawn()[::-1]), "last")
    assert [kind for kind, _ in digests(prompt)] == ["image", "audio", "image"]
    text = tokenizer.decode(prompt.token_ids)
    assert text.index("first") < text.index("then") < text.index("last")
    assert [span.start for span in prompt.media] == sorted(span.start for span in prompt.media)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_soft_tokens_in_a_text_are_text(ask, tokenizer, opener, kind):
    words = (f"<start_of_{kind}>", f"<{kind}_soft_token>", f"<end_of_{kind}>")
    prompt = ask("What is " + "".join(words) + "?", Image(drawn()) if kind == "image" else Audio(tones(RATE), RATE))
    assert len(prompt.media) == 1
    for word, count in zip(words, (1, opener.soft_tokens[kind], 1), strict=True):
        assert prompt.token_ids.count(tokenizer.id_of(word)) == count, word
    text_alone = ask("What is " + "".join(words) + "?")
    assert not {tokenizer.id_of(word) for word in words} & set(text_alone.token_ids)
    assert "".join(words) in tokenizer.decode(text_alone.token_ids)


# Errors name the part.


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image"}, "the image part has none of the keys 'image', 'url', 'path' and 'base64'"),
        (
            {"type": "image", "image": 7},
            "an image is of type int, expected a path, bytes, a PIL image, an array or a URL",
        ),
        ({"type": "image", "image": "/no/such.png"}, "'/no/such.png' does not exist"),
        ({"type": "image", "url": 7}, "the part's 'url' is 7, expected a string"),
        ({"type": "image", "path": b"a"}, "the part's 'path' is b'a', expected a string"),
        ({"type": "image", "base64": "???"}, "'???' is not base64"),
        ({"type": "image_url", "image_url": {}}, "the part's 'image_url' is {}, expected {'url': ...} or a URL"),
        ({"type": "image_url"}, "the part's 'image_url' is None"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "not an image in one of"),
        ({"type": "audio", "audio": [0.1]}, "audio is of type list"),
        ({"type": "audio", "audio": np.zeros(9, np.float32)}, "the audio's sample rate is None"),
        ({"type": "audio", "audio": {"array": None}}, "audio is of type NoneType"),
        ({"type": "audio", "audio": {"array": np.array([np.nan]), "sampling_rate": 16_000}}, "not finite numbers"),
        ({"type": "input_audio", "input_audio": "AAAA"}, "the part's 'input_audio' is 'AAAA', expected {'data'"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "not audio or video"),
        ({"type": "video", "video": np.zeros((2, 4, 4, 3))}, "a video is of type ndarray"),
        ({"type": "video", "video": "a.mp4", "fps": 0}, "a video's fps is 0"),
        ({"type": "video_url", "video_url": {"url": "http://"}}, "names no host"),
    ],
)
def test_bad_parts_are_named(refused, part, expected):
    message = refused("Look:", part)
    assert message.startswith("messages[0].content[1]: ")
    assert expected in message


def test_what_an_object_is_made_of_is_seen():
    """In a traceback or a notebook, without its bytes."""
    data_uri = "data:image/png;base64," + "A" * 1000
    assert repr(Image("a.png")) == "Image('a.png')"
    assert repr(Image(Path("a") / "b.png")) == f"Image({str(Path('a') / 'b.png')!r})"
    assert repr(Image(bytes(12_345))) == "Image(12,345 bytes)"
    assert repr(Image(np.zeros((4, 6, 3), np.uint8))) == "Image(uint8 [4, 6, 3])"
    assert repr(Image(pil.new("L", (6, 4)))) == "Image(L, 6 × 4)"
    assert len(repr(Image(data_uri))) < 100
    assert repr(Audio("a.wav")) == "Audio('a.wav')"
    assert repr(Audio(np.zeros(9, np.int16), 16_000)) == "Audio(float32 [9], 16000 Hz)"
    assert repr(Video("a.mp4", fps=2)) == "Video('a.mp4', fps=2.0, max_frames=60)"


def test_damaged_files_are_named(refused):
    files = {
        "image": encoded(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8), "JPEG"),
        "audio": sound_file("flac"),
        "video": video_file(2.0),
    }
    for kind, data in files.items():
        message = refused("This:", {"type": kind, kind: data[: len(data) // 2]})
        assert message.startswith("messages[0].content[1]: ")
        assert "damaged" in message or "cut off" in message, message


def test_a_part_of_another_kind_is_named(refused):
    picture, sound = encoded(drawn(), "PNG"), sound_file("wav")
    for kind, data in (("image", sound), ("audio", picture), ("video", picture), ("video", sound)):
        assert refused({"type": kind, kind: data}).startswith("messages[0].content[0]: "), kind


def test_what_the_checkpoint_can_not_read(tiny_folder, config, tokenizer):
    deaf = MediaOpener(tiny_folder, dataclasses.replace(config, audio=None))
    blind = MediaOpener(tiny_folder, dataclasses.replace(config, vision=None))
    for opener, part, tower in (
        (deaf, Audio(tones(RATE), RATE), "audio"),
        (blind, Image(drawn()), "image"),
        (blind, Video(b"unread"), "image"),
    ):
        with pytest.raises(ValueError, match=rf"content\[0\]: this checkpoint can't read .* it has no {tower} tower"):
            Preparer(tokenizer, opener, 10_000).prepare([{"role": "user", "content": [part]}])


def test_a_missing_extra_is_named(refused, monkeypatch):
    heic = encoded(drawn(), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    message = refused("Look:", Image(heic))
    assert message.startswith("messages[0].content[1]: ")
    assert message.endswith(f": {install_command('heif')}")


def test_nothing_remote_or_local_beyond_the_policy(refused):
    policy = MediaPolicy(paths=None, private_hosts=False)
    assert "local files are not allowed here" in refused({"type": "image", "path": "/etc/passwd"}, policy=policy)
    assert "private address" in refused({"type": "image", "url": "http://127.0.0.1/a.png"}, policy=policy)


# Objects are opened once.


def test_an_object_is_opened_once(ask, refused, tmp_path, caplog):
    """So the next turn needs no file, and warns of nothing a second time."""
    path = tmp_path / "a.png"
    path.write_bytes(encoded(drawn(), "PNG"))
    picture = Image(path)
    first = ask(picture)
    path.unlink()
    assert ask(picture, "And now?").media[0].features is first.media[0].features
    assert "does not exist" in refused(Image(path))
    sound = Audio(tones(RATE, 40.0), RATE)
    assert ask(sound).identity == ask(sound).identity
    assert len(caplog.messages) == 1


def test_what_one_policy_opened_another_still_refuses(ask, refused, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(drawn(), "PNG"))
    picture = Image(path)
    ask(picture)
    assert "local files are not allowed here" in refused(picture, policy=MediaPolicy(paths=None))
    ask(picture)


# Videos and long sounds.


def test_pictures_and_sound_of_a_video(opener, ask, tokenizer, config):
    """Every picture after its time, and each clip after the pictures of its stretch."""
    seconds = 3 * opener.audio_processing.max_clip_samples / RATE
    data = video_file(seconds, sound=tones(48_000, seconds))
    prompt = ask("Watch:", Video(data))
    kinds = [kind for kind, _ in digests(prompt)]
    clips, pictures = kinds.count("audio"), kinds.count("image")
    assert pictures == int(np.ceil(seconds - 0.01))
    assert clips >= 3
    stretches = "".join(kind[0] for kind in kinds).split("a")[:-1]
    assert all(stretches), "a clip without a picture before it"
    text = tokenizer.decode(prompt.token_ids)
    places = [text.index(f"00:{second:02}") for second in range(pictures)]
    assert places == sorted(places)


def test_long_sound_is_whole_and_says_what_it_costs(opener, ask, caplog):
    processing = opener.audio_processing
    seconds = 2.5 * processing.max_clip_samples / RATE
    waveform = np.random.default_rng(1).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)
    prompt = ask("Listen:", Audio(waveform, RATE))
    clips = processing.clips(waveform)
    assert [span.features.digest for span in prompt.media] == [clip.digest for _, clip in clips]
    lost = processing.frame_length // processing.hop_length  # frames that would begin in a clip's last samples
    assert sum(clip.mask.sum() + lost for _, clip in clips) >= len(waveform) // processing.hop_length
    soft = len(clips) * opener.soft_tokens["audio"]
    (warning,) = caplog.messages
    assert f"split at quiet places into {len(clips)} clips, {soft} soft tokens in all" in warning
    caplog.clear()
    ask(Audio(tones(RATE), RATE))
    assert not caplog.messages


def test_split_audio_gives_the_clips_that_a_prompt_has(opener, ask):
    seconds = 2.5 * opener.audio_processing.max_clip_samples / RATE
    waveform = tones(RATE, seconds)
    clips = opener.split_audio(Audio(waveform, RATE), ANY)
    assert clips[0][0] == 0
    assert clips[-1][1] == pytest.approx(seconds, abs=1e-3)
    for (_, end_s, _), (start_s, _, _) in pairwise(clips):
        assert start_s == end_s
    whole = digests(ask(Audio(waveform, RATE)))
    assert [digest for _, _, clip in clips for _, digest in digests(ask(clip))] == [digest for _, digest in whole]


def test_features_are_of_the_towers_sizes(opener, ask, config):
    prompt = ask(Image(drawn()), Audio(tones(RATE), RATE))
    picture, sound = (span.features for span in prompt.media)
    assert isinstance(picture, ImageFeatures)
    assert isinstance(sound, AudioFeatures)
    assert sound.frames.shape[1] == config.audio.input_feat_size
    assert [span.length for span in prompt.media] == [opener.soft_tokens["image"], opener.soft_tokens["audio"]]


def test_a_processor_file_that_is_missing(config, tokenizer, tmp_path):
    opener = MediaOpener(tmp_path, config)
    with pytest.raises(ValueError, match=r"content\[0\]: .* has no preprocessor_config\.json"):
        Preparer(tokenizer, opener, 10_000).prepare([{"role": "user", "content": [Image(drawn())]}])


def test_processor_config_of_transformers_5(tiny_folder, config, tokenizer, tmp_path):
    import json

    raw = read_json(tiny_folder / "preprocessor_config.json")
    nested = {"image_processor": raw, "feature_extractor": raw, "processor_class": "Gemma3nProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    parts = [Image(drawn()), Audio(tones(RATE), RATE)]
    prompts = [
        Preparer(tokenizer, MediaOpener(folder, config), 10_000).prepare([{"role": "user", "content": parts}])
        for folder in (Path(tmp_path), tiny_folder)
    ]
    assert prompts[0].identity == prompts[1].identity
