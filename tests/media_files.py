"""Sounds and videos in real files, for tests: tones whose pitch can be measured, pictures whose time can be read."""

import io
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

LEFT_HZ, RIGHT_HZ = 440.0, 1500.0
# Names of sound files: what libsndfile writes, and what PyAV writes with container and codec.
SNDFILE = {
    "wav": ("WAV", "PCM_16", 44_100),
    "wav8": ("WAV", "PCM_U8", 22_050),
    "wav24": ("WAV", "PCM_24", 48_000),
    "wav_float": ("WAV", "FLOAT", 16_000),
    "aiff": ("AIFF", "PCM_16", 44_100),
    "flac": ("FLAC", "PCM_16", 44_100),
    "ogg": ("OGG", "VORBIS", 44_100),
    "opus": ("OGG", "OPUS", 48_000),
    "mp3": ("MP3", "MPEG_LAYER_III", 44_100),
}
AV = {
    "aac": ("adts", "aac", 44_100),
    "m4a": ("ipod", "aac", 44_100),
    "webm": ("webm", "libopus", 48_000),
    "mka": ("matroska", "flac", 44_100),
}


def tones(rate: float, seconds: float = 1.0) -> np.ndarray:
    """440 Hz on the left and 1500 Hz on the right, float32 [samples, 2]."""
    time_s = np.arange(round(rate * seconds)) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * hz * time_s) for hz in (LEFT_HZ, RIGHT_HZ)], axis=-1).astype(np.float32)


def sound_file(name: str, seconds: float = 1.0) -> bytes:
    """`tones` in a file of one of the names above."""
    if name in SNDFILE:
        container, codec, rate = SNDFILE[name]
        buffer = io.BytesIO()
        soundfile.write(buffer, tones(rate, seconds), rate, format=container, subtype=codec)
        return buffer.getvalue()
    container, codec, rate = AV[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound"
        with av.open(str(path), "w", format=container) as output:
            write_sound(output, codec, rate, tones(rate, seconds))
        return path.read_bytes()


def write_sound(output: av.container.OutputContainer, codec: str, rate: int, waveform: np.ndarray) -> None:
    """Adds a stereo track, float32 [samples, 2]."""
    encode_sound(output, output.add_stream(codec, rate=rate, layout="stereo"), rate, waveform)


def encode_sound(output: av.container.OutputContainer, stream: av.AudioStream, rate: int, waveform: np.ndarray) -> None:
    whole = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform.T), format="fltp", layout="stereo")
    whole.sample_rate = rate
    queue, position = av.AudioFifo(), 0
    queue.write(whole)
    while frame := queue.read(stream.codec_context.frame_size or 1024, partial=True):
        frame.pts, frame.time_base = position, Fraction(1, rate)
        position += frame.samples
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))


def shade(time_s: float) -> int:
    """The grey of a video's picture at a time: 20 more for every half second, for six seconds."""
    return 20 + 20 * (int(time_s * 2) % 12)


def video_file(
    seconds: float = 4.0,
    container: str = "mp4",
    codec: str = "mpeg4",
    frames_per_s: int = 10,
    sound: np.ndarray | None = None,
    size: tuple[int, int] = (64, 48),
    sound_codec: str = "aac",
) -> bytes:
    """A video, width x height, whose pictures are of one `shade` and white in the upper left corner.

    sound: float32 [samples, 2] at 48 kHz.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        with av.open(str(path), "w", format=container) as output:
            stream = output.add_stream(codec, rate=frames_per_s)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            stream.bit_rate = 1_000_000
            track = None if sound is None else output.add_stream(sound_codec, rate=48_000, layout="stereo")
            for index in range(round(seconds * frames_per_s)):
                pixels = np.full((size[1], size[0], 3), shade(index / frames_per_s), np.uint8)
                pixels[: size[1] // 4, : size[0] // 4] = 255
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, frames_per_s)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
            if track is not None and sound is not None:
                encode_sound(output, track, 48_000, sound)
        return path.read_bytes()
