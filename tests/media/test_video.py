"""Videos: which picture stands at which time, the sound, and what is no video. Pictures tell their time (`shade`)."""

import base64
import contextlib
import io

import numpy as np
import pytest
from media_files import shade, sound_file, tones, video_file
from PIL import Image as pil

from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.media.video import Video, time_stamp

ANY = MediaPolicy()
# Container and codec, and whether the container declares how long its pictures last.
KINDS = {
    "mp4": ("mp4", "mpeg4"),
    "mov": ("mov", "mpeg4"),
    "mp4 h264": ("mp4", "libx264"),
    "webm": ("webm", "libvpx-vp9"),
    "mkv": ("matroska", "mpeg4"),
    "avi": ("avi", "mpeg4"),
    "mpeg-ts": ("mpegts", "mpeg2video"),
}


def frames(video: Video, policy: MediaPolicy = ANY) -> list[tuple[float, np.ndarray]]:
    return list(video.open(policy).frames())


def refused(video: Video, policy: MediaPolicy = ANY) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller reads the message
        frames(video, policy)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_shows(found: list[tuple[float, np.ndarray]], times: list[float]) -> None:
    """The pictures on show at these times."""
    assert [time_s for time_s, _ in found] == pytest.approx(times)
    for time_s, pixels in found:
        assert abs(float(pixels[-20:, -20:].mean()) - shade(time_s)) < 8, time_s


@pytest.mark.parametrize("kind", KINDS)
def test_one_picture_a_second(kind):
    container, codec = KINDS[kind]
    options = {"frames_per_s": 25} if codec == "mpeg2video" else {}
    found = frames(Video(video_file(4.0, container, codec, **options)))
    assert_shows(found, [0, 1, 2, 3])
    assert all(pixels.shape == (48, 64, 3) for _, pixels in found)
    assert all(pixels[:8, :8].min() > 200 for _, pixels in found)


def test_other_rates_and_limits(caplog):
    data = video_file(4.0)
    assert_shows(frames(Video(data, fps=2)), [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5])
    assert_shows(frames(Video(data, fps=0.5)), [0, 2])
    assert_shows(frames(Video(data, fps=0.1)), [0])
    assert not caplog.messages
    assert_shows(frames(Video(data, max_frames=2)), [0, 2])
    assert caplog.messages == ["the video of 4.0 s is shown in 2 frames, not 4"]


def test_more_pictures_than_the_video_has():
    """The same picture stands for several times; none is invented beyond the end."""
    found = frames(Video(video_file(1.0, frames_per_s=2), fps=8))
    assert_shows(found, [index / 8 for index in range(8)])


def test_far_jumps_land_on_the_right_picture():
    data = video_file(23.0, frames_per_s=2)
    found = frames(Video(data, fps=1 / 11))
    assert [time_s for time_s, _ in found] == pytest.approx([0, 11, 22])
    everything = frames(Video(data, fps=1.0))
    for time_s, pixels in found:
        np.testing.assert_array_equal(pixels, everything[round(time_s)][1])


def test_every_form(tmp_path):
    data = video_file(2.0)
    path = tmp_path / "my video.mp4"
    path.write_bytes(data)
    uri = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    for source in (str(path), path, data, uri, path.as_uri()):
        assert_shows(frames(Video(source)), [0, 1])


def test_a_turned_video_stands_upright():
    """The corner is white: a quarter against the clock brings it from the upper left to the lower left."""
    import av

    data = video_file(1.0)
    buffer = bytearray(data)
    matrix = buffer.index(b"tkhd") + 4 + 40  # 3 x 3 fixed point numbers, version 0
    cosine, one = 0x10000, 0x40000000
    turned = [0, -cosine & 0xFFFFFFFF, 0, cosine, 0, 0, 0, 0, one]
    buffer[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big") for value in turned)
    with av.open(io.BytesIO(bytes(buffer))) as container:
        rotation = next(container.decode(video=0)).rotation
    assert abs(rotation) == 90
    (_, pixels), *_ = frames(Video(bytes(buffer)))
    assert pixels.shape == (64, 48, 3)
    corner = pixels[-8:, :8] if rotation == 90 else pixels[:8, -8:]
    assert corner.min() > 200
    assert pixels[:8, :8].max() < 100


def test_sound():
    video = Video(video_file(3.0, sound=tones(48_000, 3.0)))
    start_s, waveform = video.open(ANY).audio(16_000)
    assert abs(start_s) < 0.05
    assert abs(len(waveform) / 16_000 - 3) < 0.1
    assert 0.15 < np.abs(waveform).max() < 0.5
    silent = Video(video_file(1.0))
    assert silent.open(ANY).audio(16_000) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00"), (3, "00:03"), (3.5, "00:03.5"), (3.04, "00:03"), (59.96, "01:00"), (61, "01:01"), (3723, "1:02:03")],
)
def test_time_stamps(seconds, text):
    assert time_stamp(seconds) == text


@pytest.mark.parametrize("kind", KINDS)
def test_cut_off(kind):
    """An error, never a shorter video; what a transport stream lacks at its end nobody can know."""
    container, codec = KINDS[kind]
    if container == "mpegts":
        pytest.skip("a transport stream has no declared length")
    data = video_file(
        6.0, container, codec, sound=tones(48_000, 6.0), sound_codec="libopus" if "webm" in kind else "aac"
    )
    for part in (0.95, 0.5, 0.2):
        assert any(word in refused(Video(data[: int(len(data) * part)])) for word in ("cut off", "damaged"))


@pytest.mark.parametrize("kind", ["mp4", "webm", "mkv", "avi"])
def test_damage_is_an_error_of_ours_or_none(kind):
    rng = np.random.default_rng(1)
    container, codec = KINDS[kind]
    sound_codec = "libopus" if kind == "webm" else "aac"
    whole = np.frombuffer(video_file(1.0, container, codec, sound=tones(48_000), sound_codec=sound_codec), np.uint8)
    for _ in range(20):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 6)] = rng.integers(0, 256, 6)
        with contextlib.suppress(ValueError):
            video = Video(damaged.tobytes())
            assert frames(video)
            video.open(ANY).audio(16_000)


def test_codecs_that_are_not_known():
    data = video_file(1.0, "avi", sound=tones(48_000))
    unknown = Video(data.replace(b"FMP4", b"zzzz"))
    assert refused(unknown) == "the video's frames are in an unknown format, or damaged"
    with pytest.raises(ValueError, match="frames are in an unknown format"):
        unknown.open(ANY).audio(16_000)


def test_what_is_no_video(tmp_path):
    assert refused(Video(b"")) == "the video has no bytes"
    assert refused(Video(b"no video")).startswith("not audio or video in a known format, or damaged")
    assert refused(Video(sound_file("m4a"))) == "the file has no video stream; if it is audio, send it as an audio part"
    buffer = io.BytesIO()
    pil.new("RGB", (9, 9)).save(buffer, "PNG")
    assert refused(Video(buffer.getvalue())).startswith("not audio or video in a known format")
    assert "does not exist" in refused(Video(tmp_path / "missing.mp4"))


def test_a_playlist_opens_no_other_file(tmp_path):
    (tmp_path / "a.mp4").write_bytes(video_file(1.0))
    playlist = f"ffconcat version 1.0\nfile {tmp_path / 'a.mp4'}\n".encode()
    for data in (playlist, f"#EXTM3U\n#EXTINF:1\nfile://{tmp_path / 'a.mp4'}\n".encode()):
        assert refused(Video(data)).startswith("not audio or video in a known format")


def test_limits():
    data = video_file(2.0)
    assert (
        refused(Video(data), MediaPolicy(max_seconds=1.5))
        == "the video is longer than 1.5 s, the most that is accepted"
    )
    expected = "the video's frames are 64 × 48, more than 3,000 pixels"
    assert refused(Video(data), MediaPolicy(max_pixels=3000)) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": "1"}, "fps is '1'"),
        ({"max_frames": 0}, "max_frames is 0"),
        ({"max_frames": 1.5}, "max_frames is 1.5"),
    ],
)
def test_numbers_that_make_no_sense(options, expected):
    with pytest.raises(ValueError, match=expected):
        Video("a.mp4", **options)


def test_numbers_of_numpy():
    video = Video("a.mp4", fps=np.float32(2), max_frames=np.int64(3))
    assert repr(video) == "Video('a.mp4', fps=2.0, max_frames=3)"


def test_sources_that_are_no_video():
    for source in (None, 7, np.zeros((2, 4, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=f"a video is of type {type(source).__name__}, expected a path"):
            Video(source)
