"""Sound in every form and format, the log-mel frames, clips of long sound; and what is no sound."""

import base64
import contextlib
import dataclasses
import io
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import AV, LEFT_HZ, RIGHT_HZ, SNDFILE, sound_file, tones, video_file, write_sound

from g3n_mlx.config.fields import read_json
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.media.audio import Audio
from g3n_mlx.media.audio_features import MAX_CLIP_SAMPLES, AudioProcessing, split_clips
from g3n_mlx.media.policy import MediaPolicy

CASES = Path(__file__).with_name("cases")
ANY = MediaPolicy()
RATE = 16_000
NAMES = [*SNDFILE, *AV]


def waveform(source, rate: float | None = None, policy: MediaPolicy = ANY) -> np.ndarray:
    return Audio(source, rate).waveform(RATE, policy)


def refused(source, rate: float | None = None, policy: MediaPolicy = ANY) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller reads the message
        waveform(source, rate, policy)
    message = str(caught.value)
    assert "\n" not in message
    return message


def level(sound: np.ndarray, hz: float) -> float:
    """The amplitude of a pitch in a sound at 16 kHz, its ends left out."""
    middle = sound[len(sound) // 4 : -len(sound) // 4]
    turns = np.exp(-2j * np.pi * hz * np.arange(len(middle)) / RATE)
    return 4 * abs((middle * np.hanning(len(middle)) * turns).mean())


def assert_is_tones(sound: np.ndarray, seconds: float = 1.0) -> None:
    """Both channels' tones, each at half its level, and nothing between them."""
    assert sound.dtype == np.float32
    assert sound.ndim == 1
    assert abs(len(sound) / RATE - seconds) < 0.06  # lossy formats pad to whole frames
    for hz, expected in ((LEFT_HZ, 0.2), (RIGHT_HZ, 0.2), (900.0, 0.0)):
        assert abs(level(sound, hz) - expected) < 0.02, hz


@pytest.fixture(scope="module")
def processing(tiny_folder) -> AudioProcessing:
    """The published numbers, which the tiny checkpoint shares, and the published length of a clip."""
    config = ModelConfig.from_dict(read_json(tiny_folder / "config.json"))
    raw = read_json(tiny_folder / "preprocessor_config.json")
    assert config.audio is not None
    found = AudioProcessing.from_dict(raw, config.audio, "preprocessor_config.json")
    return dataclasses.replace(found, max_clip_samples=MAX_CLIP_SAMPLES)


# The processor.


@pytest.mark.parametrize("length", [513, 640, 5000, 12345, 16000, 20837])
def test_goldens(golden_arrays, processing, length):
    golden = golden_arrays("audio_features")
    features = processing.features(golden[f"waveform_{length}"])
    np.testing.assert_allclose(features.frames, golden[f"features_{length}"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(features.mask, golden[f"mask_{length}"])


def test_the_long_golden_is_one_clip_of_its_beginning(golden_arrays, processing):
    """The reference cuts what is longer; here it is one clip of several, none of it lost."""
    golden = golden_arrays("audio_features")
    time_s = np.arange(int(golden["long_num_samples"])) / RATE  # as reference_builder/stimuli.py makes it
    sound = 0.5 * np.sin(2 * np.pi * (200.0 + 40.0 * time_s) * time_s) + 0.1 * np.sin(2 * np.pi * 3000.0 * time_s)
    features = processing.features(sound[:MAX_CLIP_SAMPLES].astype(np.float32))
    assert len(features.frames) == golden["long_num_frames"] == 2997
    assert features.mask.sum() == golden["long_valid_frames"]
    ours = features.frames[:: int(golden["long_frame_stride"])]
    np.testing.assert_allclose(ours, golden["long_features"], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"a clip has 496000 samples, expected 1 to 480000"):
        processing.features(sound.astype(np.float32))


def test_the_shortest_sound_has_one_frame(processing):
    for length in (1, 512):
        features = processing.features(np.ones(length, np.float32))
        assert features.frames.shape == (1, 128)
        assert features.mask.tolist() == [True]


def test_the_digest_is_of_the_content(processing):
    sound = tones(RATE)[:, 0]
    first = processing.features(sound)
    assert processing.features(sound.copy()).digest == first.digest
    assert processing.features(sound * np.float32(0.9)).digest != first.digest
    assert processing.features(sound[:-200]).digest != first.digest


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"feature_size": 80}, "feature_size is 80"),
        ({"fft_length": 512}, "fft_length is 512, expected 1024"),
        ({"dither": 1.0}, "dither is 1.0"),
        ({"padding_side": "left"}, "padding_side is 'left'"),
        ({"per_bin_mean": [0.0]}, "per_bin_mean"),
        ({"hop_length": 0}, "hop_length is 0"),
        ({"sampling_rate": None}, "sampling_rate"),
    ],
)
def test_a_processor_that_is_not_supported(tiny_folder, change, expected):
    config = ModelConfig.from_dict(read_json(tiny_folder / "config.json"))
    raw = {**read_json(tiny_folder / "preprocessor_config.json"), **change}
    with pytest.raises(ValueError, match=r"preprocessor_config\.json") as caught:
        AudioProcessing.from_dict(raw, config.audio, "preprocessor_config.json")
    assert expected in str(caught.value)


# Clips of a long sound.


@given(
    length=st.integers(1, 400),
    max_samples=st.integers(1, 120),
    rate=st.sampled_from([10, 100, 16_000]),
    seed=st.integers(0, 9),
)
@settings(max_examples=200, deadline=None)
def test_clips_are_the_whole_sound(length, max_samples, rate, seed):
    sound = np.random.default_rng(seed).standard_normal(length).astype(np.float32)
    clips = split_clips(sound, rate, max_samples)
    np.testing.assert_array_equal(np.concatenate([clip for _, clip in clips]), sound)
    assert all(0 < len(clip) <= max_samples for _, clip in clips)
    assert [start for start, _ in clips] == np.cumsum([0, *(len(clip) for _, clip in clips[:-1])]).tolist()


def test_cuts_fall_into_pauses():
    """Words of 1.3 s with pauses of 0.2 s between them, none of which is at a clip's end."""
    word, pause = tones(RATE, 1.3)[:, 0], np.zeros(RATE // 5, np.float32)
    sound = np.concatenate([part for _ in range(40) for part in (word, pause)])
    clips = split_clips(sound, RATE, 10 * RATE)
    assert len(clips) == 7
    for start, clip in clips[1:]:
        assert not sound[start - 800 : start + 800].any(), start / RATE
        assert len(clip) > 6 * RATE or start + len(clip) == len(sound)


@pytest.mark.parametrize("noise", [0.0, 0.001])
def test_a_clip_has_its_share_of_the_pause(noise):
    """Cuts keep away from the words on both sides, in silence and over a hum, and choose the longer pause."""
    rng = np.random.default_rng(0)
    for pause_s, before_s, after_s in ((0.3, 0.15, 0.15), (0.6, 0.35, 0.25), (1.5, 1.25, 0.25)):
        sound = tones(RATE, 10)[:, 0]
        for second in range(8):
            sound[second * RATE : second * RATE + RATE // 10] = 0
        sound[int(7.5 * RATE) : int((7.5 + pause_s) * RATE)] = 0
        sound += rng.standard_normal(len(sound)).astype(np.float32) * noise
        (_, clip), *_ = split_clips(sound, RATE, int(9.5 * RATE))
        assert len(clip) / RATE == pytest.approx(7.5 + before_s, abs=0.03)
        assert len(clip) / RATE == pytest.approx(7.5 + pause_s - after_s, abs=0.03)


def test_noise_without_pauses_is_cut_where_it_must_be():
    sound = np.ones(31 * RATE, np.float32)
    clips = split_clips(sound, RATE, 30 * RATE)
    assert len(clips) == 2
    assert sum(len(clip) for _, clip in clips) == len(sound)


def test_sound_of_a_clips_length_is_one_clip(processing):
    assert len(processing.clips(np.zeros(MAX_CLIP_SAMPLES, np.float32))) == 1
    clips = processing.clips(np.zeros(MAX_CLIP_SAMPLES + 1, np.float32))
    assert len(clips) == 2
    assert clips[0][0] == 0


def test_a_clip_fills_its_soft_tokens_and_no_more(tiny_folder):
    """Whatever the config's numbers; the published ones are test_sound_of_a_clips_length_is_one_clip's."""
    config = ModelConfig.from_dict(read_json(tiny_folder / "config.json")).audio
    for soft_tokens in (3, config.soft_tokens):
        smaller = dataclasses.replace(config, soft_tokens=soft_tokens)
        found = AudioProcessing.from_dict(read_json(tiny_folder / "preprocessor_config.json"), smaller, "")
        frames = len(found.features(np.zeros(found.max_clip_samples, np.float32)).frames)
        assert -(-frames // config.total_reduction) == soft_tokens
        assert found.max_clip_samples < MAX_CLIP_SAMPLES


# Forms and formats.


def test_every_form(tmp_path):
    data = sound_file("flac")
    path = tmp_path / "a sound.flac"
    path.write_bytes(data)
    uri = f"data:audio/flac;base64,{base64.b64encode(data).decode()}"
    sounds = [waveform(source) for source in (str(path), path, data, uri, path.as_uri())]
    sounds.append(waveform(np.rint(tones(44_100) * 32768).astype(np.int16), 44_100))
    for sound in sounds:
        assert_is_tones(sound)
        np.testing.assert_allclose(sound, sounds[0], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_formats(name):
    assert_is_tones(waveform(sound_file(name)))


def test_the_sound_of_a_video():
    assert_is_tones(waveform(video_file(2.0, sound=tones(48_000, 2.0))), 2.0)


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_rates(rate):
    assert_is_tones(waveform(tones(rate), rate))


def test_what_a_lower_rate_can_not_hold_is_filtered_out():
    """A tone of 10 kHz must not come back as one of 6 kHz."""
    time_s = np.arange(48_000) / 48_000
    assert np.abs(waveform(np.sin(2 * np.pi * 10_000 * time_s), 48_000)[1000:-1000]).max() < 1e-3


def test_arrays():
    mono = tones(RATE)[:, 0]
    np.testing.assert_array_equal(waveform(mono, RATE), mono)
    np.testing.assert_array_equal(waveform(mono.astype(np.float64), RATE), mono)
    np.testing.assert_array_equal(waveform(mono[:, None], np.int64(RATE)), mono)
    for dtype, scale in ((np.int16, 2**15), (np.int32, 2**31)):
        whole = np.rint(mono.astype(np.float64) * scale).astype(dtype)
        np.testing.assert_allclose(waveform(whole, RATE), mono, atol=2 / 2**15)
    swapped = np.rint(mono * 2**15).astype(">i2")  # as numpy reads what a machine of the other kind wrote
    np.testing.assert_allclose(waveform(swapped, RATE), mono, atol=2 / 2**15)
    eight = np.rint(mono * 127 + 128).astype(np.uint8)
    np.testing.assert_allclose(waveform(eight, RATE), mono, atol=0.01)


@pytest.mark.parametrize("channels", [1, 2, 9])
def test_channels_without_an_order_are_mixed_evenly(channels):
    sound = np.zeros((RATE, channels), np.float32)
    sound[:, 0] = 0.6
    np.testing.assert_allclose(waveform(sound, RATE), 0.6 / channels, rtol=1e-6)


@pytest.mark.parametrize(
    ("channels", "at", "expected"),
    [(6, 0, 0.5), (6, 2, 0.5**0.5), (6, 4, 0.5**1.5), (8, 2, 0.5**0.5), (3, 2, 0.5**0.5), (4, 3, 0.5**1.5)],
)
def test_channels_are_mixed_by_their_order(channels, at, expected):
    """ITU-R BS.775's left and right, and the mean of both."""
    sound = np.zeros((RATE, channels), np.float32)
    sound[:, at] = tones(RATE)[:, 0]
    np.testing.assert_allclose(waveform(sound, RATE), expected * sound[:, at], atol=1e-6)


def test_opposite_channels_do_not_cancel_out():
    left = tones(RATE, 4.0)[:, 0]
    for right in (-left, -0.97 * left):
        sound = np.stack([left, right], axis=-1)
        np.testing.assert_allclose(waveform(sound, RATE), (left - right) / 2, atol=1e-6)
    half = np.stack([left, np.where(np.arange(len(left)) < 2 * RATE, left, -left)], axis=-1)
    assert np.abs(waveform(half, RATE)[3 * RATE :]).max() > 0.39


@pytest.mark.parametrize("scale", [127, 32767, 2**31])
def test_floats_that_were_not_divided(scale):
    expected = "expected floats from -1 to 1: divide them by their range"
    samples = tones(RATE)[:, 0] * np.float32(scale)
    with pytest.raises(ValueError, match=expected):
        Audio(samples, RATE)
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="FLOAT")
    assert expected in refused(file.getvalue())


# Files as people have them: tests/media/cases.


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("piped_vbr.mp3", 5.30),
        ("piped_vbr_quiet_start.mp3", 7.29),
        ("joined.mp3", 3.60),
        ("chained_opus.ogg", 3.50),
        ("length_zero.wav", 1.75),
        ("opposite_channels.wav", 1.75),
        ("centre_of_5_1.flac", 1.75),
    ],
)
def test_files_as_people_have_them(name, seconds, capfd):
    sound = waveform((CASES / name).read_bytes())
    assert abs(len(sound) / RATE - seconds) < 0.01
    assert np.abs(sound).max() > 0.1
    assert capfd.readouterr() == ("", "")


def test_a_live_recording_that_was_cut_off():
    assert "cut off" in refused((CASES / "live_cut.webm").read_bytes())


@pytest.mark.parametrize("name", ["mp3", "flac", "ogg", "opus", "aac"])
def test_joined_files_are_heard_to_the_end(name):
    one = len(waveform(sound_file(name)))
    assert abs(len(waveform(sound_file(name) * 3)) - 3 * one) < 0.2 * RATE


def test_a_chain_whose_links_differ():
    """In their rates and channels."""
    first, second = io.BytesIO(), io.BytesIO()
    soundfile.write(first, tones(44_100), 44_100, format="OGG", subtype="VORBIS")
    soundfile.write(second, tones(16_000)[:, 0], 16_000, format="OGG", subtype="VORBIS")
    assert abs(len(waveform(first.getvalue() + second.getvalue())) / RATE - 2) < 0.02


def ffmpeg(*arguments: str) -> bytes:
    return subprocess.run(["ffmpeg", "-v", "error", "-y", *arguments], capture_output=True, check=True).stdout


# Containers and codecs that FFmpeg writes.
MATRIX = [
    *(("wav", codec) for codec in ("pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le")),
    *(("wav", codec) for codec in ("pcm_alaw", "pcm_mulaw", "adpcm_ms", "adpcm_ima_wav", "libmp3lame")),
    *(("aiff", codec) for codec in ("pcm_s16be", "pcm_s24be")),
    *(("caf", codec) for codec in ("pcm_s16be", "alac", "libopus")),
    *(
        ("w64", "pcm_s16le"),
        ("au", "pcm_s16be"),
        ("voc", "pcm_u8"),
        ("flac", "flac"),
        ("wv", "wavpack"),
        ("tta", "tta"),
    ),
    *(("tta", "tta"), ("mp3", "libmp3lame"), ("adts", "aac"), ("ac3", "ac3"), ("eac3", "eac3"), ("asf", "wmav2")),
    *(("mp2", "mp2"),),
    *(("ogg", codec) for codec in ("libvorbis", "libopus", "flac", "libspeex")),
    *(("webm", codec) for codec in ("libvorbis", "libopus")),
    *(("matroska", codec) for codec in ("libvorbis", "libopus", "flac", "aac", "libmp3lame", "ac3", "pcm_s16le")),
    *(("mp4", codec) for codec in ("aac", "libmp3lame", "ac3", "alac", "libopus", "flac")),
    *(("mov", codec) for codec in ("aac", "pcm_s16le", "alac")),
    *(("mpegts", codec) for codec in ("aac", "mp2", "libmp3lame", "ac3", "libopus")),
    *(("mpeg", codec) for codec in ("mp2", "ac3")),
    *(("avi", codec) for codec in ("pcm_s16le", "libmp3lame", "ac3")),
    *(("flv", codec) for codec in ("aac", "libmp3lame")),
]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="FFmpeg is not installed")
@pytest.mark.parametrize(("container", "codec"), MATRIX)
def test_lengths_are_ffmpegs(container, codec, tmp_path):
    path, source = tmp_path / "sound", tmp_path / "source.wav"
    soundfile.write(source, tones(44_100, 3.3), 44_100)
    try:
        ffmpeg("-i", str(source), "-c:a", codec, "-strict", "-2", "-f", container, str(path))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this FFmpeg does not write it: {error.stderr[:200]!r}")
    theirs = len(ffmpeg("-i", str(path), "-f", "s16le", "-ac", "1", "-ar", str(RATE), "-")) / 2 / RATE
    ours = len(waveform(path.read_bytes())) / RATE
    print(f"| {container} | {codec} | {ours:.3f} | {theirs:.3f} |")
    assert abs(ours - theirs) < 0.03


def test_the_content_says_the_format_not_the_name(tmp_path):
    for name in ("sound.mp3", "sound", "sound.png"):
        (tmp_path / name).write_bytes(sound_file("wav"))
        assert_is_tones(waveform(tmp_path / name))


def test_files_of_a_length_that_the_writer_did_not_know():
    """As espeak-ng, FFmpeg and browsers write them into a pipe."""
    wav = bytearray(sound_file("wav"))
    data = wav.index(b"data")
    for open_length in (0x7FFFF000, 0xFFFFFFFF):
        wav[4:8] = wav[data + 4 : data + 8] = open_length.to_bytes(4, "little")
        assert_is_tones(waveform(bytes(wav)))
    flac = bytearray(sound_file("flac"))
    flac[21] &= 0xF0  # the count of samples, 36 bits of the STREAMINFO block
    flac[22:26] = bytes(4)
    assert_is_tones(waveform(bytes(flac)))


@pytest.mark.parametrize("container", ["AIFF", "AU", "CAF", "WAV"])
def test_files_whose_writer_was_interrupted(container):
    """Their lengths are still 0, or unknown in CAF."""
    buffer = io.BytesIO()
    soundfile.write(buffer, tones(44_100), 44_100, format=container, subtype="PCM_16")
    data = bytearray(buffer.getvalue())
    match container:
        case "AIFF":
            at = data.index(b"SSND")
            data[4:8] = data[at + 4 : at + 8] = bytes(4)
        case "AU":
            data[8:12] = bytes(4)
        case "CAF":
            at = data.index(b"data")
            data[at + 4 : at + 12] = b"\xff" * 8
        case "WAV":
            at = data.index(b"data")
            data[4:8] = data[at + 4 : at + 8] = bytes(4)
    assert_is_tones(waveform(bytes(data)))


@pytest.mark.parametrize("container", ["AU", "CAF", "W64", "RF64", "VOC"])
def test_rarer_containers_that_are_cut_off(container):
    buffer = io.BytesIO()
    soundfile.write(buffer, tones(44_100), 44_100, format=container, subtype="PCM_16")
    assert_is_tones(waveform(buffer.getvalue()))
    assert "cut off" in refused(buffer.getvalue()[: len(buffer.getvalue()) // 2])


@pytest.mark.parametrize("options", [{}, {"id3v2_version": "0"}, {"write_id3v1": "1"}], ids=str)
def test_mp3_without_a_header_that_declares_its_length(options):
    """libsndfile estimates it from the size of the file, which is always a little off."""
    sound = waveform(mp3(write_xing="0", **options))
    assert_is_tones(sound, 1.04)  # nothing says either how much of the encoder's padding to leave out


@pytest.mark.parametrize("id3v2_version", ["0", "4"])
def test_mp3_with_a_header_that_declares_its_length(id3v2_version):
    data = mp3(write_xing="1", id3v2_version=id3v2_version)
    assert_is_tones(waveform(data))
    for part in (0.99, 0.5):
        assert "cut off" in refused(data[: int(len(data) * part)])


def mp3(**options: str) -> bytes:
    """A second of `tones` as FFmpeg writes it."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp3", options=options) as output:
        write_sound(output, "libmp3lame", 44_100, tones(44_100))
    return buffer.getvalue()


def test_the_speech_of_espeak(processing):
    try:
        done = subprocess.run(["espeak-ng", "--stdout", "three one four"], capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("espeak-ng is not installed")
    sound = waveform(done.stdout)
    assert 0.8 < len(sound) / RATE < 2
    assert len(processing.clips(sound)) == 1


# What is no sound.


@pytest.mark.parametrize("name", [name for name in NAMES if name != "wav8"])
def test_cut_off(name):
    """Never a part of the sound as if it were all."""
    data = sound_file(name, 3.0)
    for part in (0.95, 0.5, 0.2):
        assert any(word in refused(data[: int(len(data) * part)]) for word in ("cut off", "damaged"))


@pytest.mark.parametrize("name", ["wav", "aiff", "flac", "ogg", "mp3", "m4a", "webm"])
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_an_error_of_ours_or_none(name):
    """Nor does a library swallow an exception, and print its traceback."""
    rng = np.random.default_rng(3)
    data = np.frombuffer(sound_file(name, 0.3), np.uint8)
    for reach in [len(data)] * 25 + [min(len(data), 100)] * 25:
        damaged = data.copy()
        damaged[rng.integers(0, reach, 5)] = rng.integers(0, 256, 5)
        with contextlib.suppress(ValueError):
            assert np.isfinite(waveform(damaged.tobytes())).all()


def test_what_is_no_sound(tmp_path):
    assert refused(b"") == "the audio has no bytes"
    for data in (b"no sound at all", b"\x89PNG\r\n\x1a\n", b"#EXTM3U\nhttp://localhost/a.mp3\n"):
        assert refused(data).startswith("not audio or video in a known format, or damaged")
    assert "does not exist" in refused(tmp_path / "missing.wav")
    assert refused(video_file(1.0)) == "the file holds no audio"


def test_files_that_are_empty_or_not_finite():
    for samples, expected in (
        (np.zeros(0, np.float32), "the audio is empty"),
        (np.array([0.1, np.nan, 0.2] * 100, np.float32), "samples that are not finite numbers (NaN or infinity)"),
        (np.array([0.1, np.inf, 0.2] * 100, np.float32), "samples that are not finite numbers (NaN or infinity)"),
    ):
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, 44_100, format="WAV", subtype="FLOAT")
        assert expected in refused(buffer.getvalue())


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros(0, np.float32), "the shape (0,), which holds no samples"),
        (np.zeros((0, 2), np.float32), "the shape (0, 2), which holds no samples"),
        (np.zeros((2, 3, 4), np.float32), "the shape (2, 3, 4)"),
        (np.zeros((2, 100), np.float32), "the shape (2, 100), expected [samples, channels]: transpose it"),
        (np.array([0.0, np.nan]), "not finite numbers"),
        (np.array([0.0, -np.inf]), "not finite numbers"),
        (np.array([0.0, 1e300]), "not finite numbers"),
        (np.zeros(9, np.int64), "int64, expected floats"),
        (np.zeros(9, np.complex64), "complex64"),
    ],
)
def test_arrays_that_are_no_sound(array, expected):
    with pytest.raises(ValueError, match="an audio array") as caught:
        Audio(array, RATE)
    assert expected in str(caught.value)


@pytest.mark.parametrize("rate", [None, 0, -1, float("nan"), True, "16000", 10**9, 999])
def test_rates_that_are_none(rate):
    with pytest.raises(ValueError, match="the audio's sample rate is"):
        Audio(np.zeros(9, np.float32), rate)


@pytest.mark.parametrize("rate", [1, 999])
def test_a_file_of_a_rate_that_is_none(rate):
    """A megabyte at 1 Hz would be 16 GB at the model's rate."""
    data = io.BytesIO()
    soundfile.write(data, np.zeros(9, np.float32), rate, format="WAV")
    assert (
        refused(data.getvalue())
        == f"the audio's sample rate is {rate} Hz, expected 1,000 to 1,000,000 samples per second"
    )


def test_time_that_is_over():
    policy = MediaPolicy(deadline=time.monotonic() - 1)
    for source in (sound_file("wav"), sound_file("m4a")):
        with pytest.raises(TimeoutError):
            Audio(source).waveform(RATE, policy)


def test_sources_that_are_no_sound():
    for source in (None, 7, [0.1, 0.2], {"url": "a.wav"}):
        with pytest.raises(ValueError, match=f"audio is of type {type(source).__name__}, expected a path, bytes"):
            Audio(source)
    with pytest.raises(ValueError, match="a file brings its own: leave it out"):
        Audio("sound.wav", RATE)


def test_too_long():
    policy = MediaPolicy(max_seconds=0.9)
    for source, rate in ((sound_file("wav"), None), (sound_file("m4a"), None), (tones(RATE), RATE)):
        assert refused(source, rate, policy) == "the audio is longer than 0.9 s, the most that is accepted"


def test_a_notebook_plays_the_first_minute():
    sound = tones(RATE, 70.0)
    html = Audio(sound, RATE)._repr_html_()
    prefix, suffix = '<audio controls src="data:audio/wav;base64,', '"></audio>'
    assert html.startswith(prefix)
    assert html.endswith(suffix)
    played, rate = soundfile.read(io.BytesIO(base64.b64decode(html[len(prefix) : -len(suffix)])), dtype="float32")
    assert (rate, played.shape) == (RATE, (60 * RATE,))
    expected = waveform(sound, RATE)[: 60 * RATE]
    np.testing.assert_allclose(played, expected, rtol=0, atol=2**-14)


def test_silence():
    noise = np.random.default_rng(0).uniform(-1, 1, RATE)
    assert Audio(np.zeros(RATE, np.float32), RATE).is_silent
    assert Audio(0.2 + noise * 1e-4, RATE).is_silent
    assert not Audio(noise * 1e-3, RATE).is_silent
    assert not Audio(sound_file("wav")).is_silent
