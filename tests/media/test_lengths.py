"""Sound is decoded to its true end: every container and codec against FFmpeg, and files joined to each other."""

import io
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
from media_files import sound_file, tones

from g3n_mlx.media.audio import Audio
from g3n_mlx.media.policy import MediaPolicy

RATE = 16_000
SECONDS = 3.3


def seconds(source) -> float:
    return len(Audio(source).waveform(RATE, MediaPolicy())) / RATE


@pytest.mark.parametrize("name", ["mp3", "ogg", "opus", "flac", "aac"])
def test_files_joined_to_each_other_are_whole(name, capfd):
    data = sound_file(name, 1.0)
    assert seconds(data * 3) == pytest.approx(3.0, abs=0.25)
    assert capfd.readouterr() == ("", "")


def test_a_header_alone_is_empty():
    file = io.BytesIO()
    soundfile.write(file, np.zeros(0, np.float32), RATE, format="WAV")
    with pytest.raises(ValueError, match="empty"):
        seconds(file.getvalue())


def test_a_cut_caf_is_an_error():
    file = io.BytesIO()
    soundfile.write(file, tones(RATE), RATE, format="CAF", subtype="PCM_16")
    assert seconds(file.getvalue()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="cut off"):
        seconds(file.getvalue()[:-100])


# Containers, the codecs that FFmpeg may write into them, and the options of either.
MATRIX = {
    "wav": ["pcm_s16le", "pcm_u8", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le", "pcm_alaw", "pcm_mulaw",
            "adpcm_ms", "adpcm_ima_wav"],
    "aiff": ["pcm_s16be", "pcm_s24be"],
    "caf": ["pcm_s16be", "alac"],
    "flac": ["flac"],
    "ogg": ["libvorbis", "libopus", "flac"],
    "mp3": ["libmp3lame"],
    "mp2": ["mp2"],
    "adts": ["aac"],
    "ac3": ["ac3"],
    "eac3": ["eac3"],
    "ipod": ["aac", "alac"],
    "mp4": ["aac", "ac3", "libmp3lame", "libopus", "flac"],
    "mov": ["aac", "pcm_s16le", "alac"],
    "matroska": ["aac", "libopus", "libvorbis", "flac", "libmp3lame", "pcm_s16le", "ac3"],
    "webm": ["libopus", "libvorbis"],
    "mpegts": ["aac", "libmp3lame", "ac3", "mp2", "libopus"],
    "mpeg": ["mp2", "ac3"],
    "avi": ["libmp3lame", "pcm_s16le", "ac3"],
    "flv": ["aac", "libmp3lame"],
    "asf": ["wmav2", "libmp3lame"],
    "wv": ["wavpack"],
    "amr": ["libopencore_amrnb"],
    "3gp": ["aac", "libopencore_amrnb"],
}  # fmt: skip
PAIRS = [(container, codec) for container, codecs in MATRIX.items() for codec in codecs]


def ffmpeg(*arguments: str, stdin: bytes = b"") -> bytes:
    return subprocess.run(
        ["ffmpeg", "-v", "error", "-nostdin", *arguments] if not stdin else ["ffmpeg", "-v", "error", *arguments],
        input=stdin or None, capture_output=True, check=True,
    ).stdout  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
@pytest.mark.parametrize("piped", [False, True], ids=["file", "pipe"])
@pytest.mark.parametrize(("container", "codec"), PAIRS)
def test_ffmpegs_files_have_ffmpegs_length(tmp_path, container, codec, piped, capfd):
    """Within a frame of the codec."""
    soundfile.write(tmp_path / "in.wav", tones(44_100, SECONDS), 44_100)
    rate = ["-ar", "8000", "-ac", "1"] if "amr" in codec else ["-ar", "48000"] if "opus" in codec else []
    written = tmp_path / "out"
    arguments = ["-i", str(tmp_path / "in.wav"), *rate, "-c:a", codec, "-strict", "-2", "-f", container]
    try:
        if piped:
            written.write_bytes(ffmpeg(*arguments, "-"))
        else:
            ffmpeg(*arguments, str(written))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"FFmpeg does not write it: {error.stderr.decode().strip().splitlines()[-1][:120]}")
    try:
        raw = ffmpeg("-i", str(written), "-ac", "1", "-ar", str(RATE), "-f", "f32le", "-")
    except subprocess.CalledProcessError:
        pytest.skip("FFmpeg does not read what it wrote")
    theirs = len(raw) / 4 / RATE
    capfd.readouterr()
    ours = seconds(written)
    assert capfd.readouterr() == ("", "")
    assert ours == pytest.approx(theirs, abs=0.08)
