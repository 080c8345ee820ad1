"""Audio in any usual form and format to a waveform of one channel.

libsndfile decodes what it can (WAV, FLAC, OGG, MP3), PyAV the rest and the audio of videos (extra `video`); soxr brings
any rate to the one that is asked for.
"""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from g3n_mlx.failures import BadValue
from g3n_mlx.media.containers import check_whole, import_av, mp3_declares_length, open_container
from g3n_mlx.media.fetch import fetch, source_text
from g3n_mlx.media.policy import MediaPolicy

if TYPE_CHECKING:
    import soxr

# In Hz; far outside any audible recording. Below, resampling would make gigabytes of a small file.
MIN_RATE, MAX_RATE = 1_000, 1_000_000

_PLAYED_RATE = 16_000  # Hz, in a notebook; the released processor's
_BLOCK_FRAMES = 1 << 17
# What libsndfile says of a FLAC whose writer did not know its length.
_UNKNOWN_FRAMES = 1 << 62


class Audio:
    """Audio for a message: a path, bytes, a `data:` URI or an http(s) URL, or an array with its rate in Hz.

    An array is [samples] or [samples, channels], floats from -1 to 1 or integers as sound files have them. Files are
    opened when the message is first used. Raises ValueError for any other source, or an array that can't be audio.
    """

    def __init__(self, source: str | Path | bytes | np.ndarray, rate: float | None = None) -> None:
        if isinstance(source, np.ndarray):
            if isinstance(rate, bool) or not isinstance(rate, int | float | np.number):
                raise BadValue(
                    f"the audio's sample rate is {rate!r}, expected samples per second: Audio(waveform, rate)"
                )
            _check_rate(rate)
            source = _samples_of(source)
        elif not isinstance(source, str | Path | bytes):
            raise BadValue(f"audio is of type {type(source).__name__}, expected a path, bytes, an array or a URL")
        elif rate is not None:
            raise BadValue(f"the audio's sample rate is {rate!r}, but a file brings its own: leave it out")
        self._source, self._rate = source, rate

    def __repr__(self) -> str:
        return f"Audio({source_text(self._source)}{'' if self._rate is None else f', {self._rate} Hz'})"

    def _repr_html_(self) -> str:
        """What a notebook shows: a player for the first minute, as the model would hear it."""
        import soundfile

        waveform = self.waveform(_PLAYED_RATE, MediaPolicy())[: _PLAYED_RATE * 60]
        wav = io.BytesIO()
        soundfile.write(wav, waveform, _PLAYED_RATE, format="WAV", subtype="PCM_16")
        data = base64.b64encode(wav.getvalue()).decode()
        return f'<audio controls src="data:audio/wav;base64,{data}"></audio>'

    def waveform(self, rate: int, policy: MediaPolicy) -> np.ndarray:
        """The audio as one channel at `rate` Hz, float32 [samples].

        Raises ValueError when it can't be fetched, is no audio, is damaged, empty, too long or not finite.
        """
        source, mono = self._source, Mono(rate, policy)
        if isinstance(source, np.ndarray):
            assert self._rate is not None
            mono.add(source, float(self._rate))
        else:
            _decode(source if isinstance(source, bytes) else fetch(source, policy), mono)
        return mono.finish()


def _decode(data: bytes, mono: "Mono") -> None:
    """Adds the audio of a file, or of a video."""
    import soundfile

    if not data:
        raise BadValue("the audio has no bytes")
    check_whole(data)
    try:
        opened = soundfile.SoundFile(_Bytes(data))
    except (soundfile.LibsndfileError, TypeError):  # TypeError: it takes the bytes for headerless samples
        return _decode_with_av(data, mono)
    with opened as file:
        if file.frames >= _UNKNOWN_FRAMES:
            return _decode_with_av(data, mono)
        left = file.frames
        # Of other MP3s libsndfile estimates the length from the size of the file.
        declared = file.format != "MP3" or mp3_declares_length(data)
        try:
            # Not file.blocks(): it hands out stale samples where a damaged file holds less than it says.
            while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
                mono.add(block, file.samplerate)
                left -= len(block)
        except soundfile.LibsndfileError as error:
            raise BadValue(f"the audio is damaged or cut off: {error.error_string}") from None
        if declared and left > 0:
            raise BadValue(f"the audio is damaged or cut off: {left / file.samplerate:.1f} s of it are missing")


class _Bytes(io.BytesIO):
    """A file in memory. A damaged one sends libsndfile before its beginning; it stays there, without an exception that
    soundfile would print and ignore.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = (0, self.tell(), len(self.getbuffer()))[whence]
        return super().seek(max(0, start + offset))


def _decode_with_av(data: bytes, mono: "Mono") -> None:
    if add_audio_track(data, mono) is None:
        raise BadValue("the file holds no audio")


def add_audio_track(data: bytes, mono: "Mono") -> float | None:
    """Adds the first audio track of a file that PyAV reads, and returns its start in seconds; None if there is none.

    Raises ValueError when the track is damaged, or the file is no audio or video.
    """
    av = import_av("neither WAV, FLAC, OGG nor MP3")
    with open_container(data) as container:
        if not container.streams.audio:
            return None
        if container.streams.audio[0].codec_context is None:
            raise BadValue("the audio is in an unknown format, or damaged")
        to_floats, start_s = av.AudioResampler(format="flt"), None
        try:
            for frame in container.decode(container.streams.audio[0]):
                for block in to_floats.resample(frame):
                    if start_s is None:
                        start_s = block.time or 0.0
                    mono.add(block.to_ndarray().reshape(-1, block.layout.nb_channels), block.sample_rate)
        except av.FFmpegError as error:
            raise BadValue(f"the audio is damaged or cut off: {error.strerror}") from None
        return start_s


class Mono:
    """Blocks of audio, mixed to one channel and resampled as they come, so that only the result is held."""

    def __init__(self, rate: int, policy: MediaPolicy) -> None:
        """rate: of the result, in Hz."""
        self._rate, self._policy = rate, policy
        self._resampler: soxr.ResampleStream | None = None
        self._blocks: list[np.ndarray] = []
        self._num_samples = 0

    def add(self, block: np.ndarray, rate: float) -> None:
        """Takes [samples] or [samples, channels], float32, of the first block's rate in Hz.

        Raises ValueError for a rate out of range, or beyond the policy's duration.
        """
        import soxr

        self._policy.check_time()
        if not self._blocks:
            _check_rate(rate)
            if rate != self._rate:
                self._resampler = soxr.ResampleStream(rate, self._rate, 1, dtype="float32")
        self._num_samples += len(block)
        if self._num_samples > self._policy.max_seconds * rate:
            raise BadValue(f"the audio is longer than {self._policy.max_seconds:g} s, the most that is accepted")
        self._append(block if block.ndim == 1 else block.mean(axis=1, dtype=np.float32), last=False)

    def _append(self, block: np.ndarray, last: bool) -> None:
        self._blocks.append(block if self._resampler is None else self._resampler.resample_chunk(block, last=last))

    def finish(self) -> np.ndarray:
        """The whole, float32 [samples]; raises ValueError when it is empty or not finite."""
        if not self._num_samples:
            raise BadValue("the audio is empty")
        self._append(np.zeros(0, dtype=np.float32), last=True)
        waveform = np.concatenate(self._blocks)
        if not len(waveform):
            raise BadValue("the audio is shorter than one sample of 16 kHz")
        if not np.isfinite(waveform).all():
            raise BadValue("the audio has samples that are not finite numbers (NaN or infinity)")
        return waveform


def _check_rate(rate: Any) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise BadValue(
            f"the audio's sample rate is {rate} Hz, expected {MIN_RATE:,} to {MAX_RATE:,} samples per second"
        )


def _samples_of(array: np.ndarray) -> np.ndarray:
    """An array of a user's, checked, as float32 [samples] or [samples, channels]."""
    if array.size == 0:
        raise BadValue(f"an audio array has the shape {array.shape}, which holds no samples")
    if array.ndim not in (1, 2):
        raise BadValue(f"an audio array has the shape {array.shape}, expected [samples] or [samples, channels]")
    if array.ndim == 2 and array.shape[1] > array.shape[0]:
        raise BadValue(f"an audio array has the shape {array.shape}, expected [samples, channels]: transpose it")
    if array.dtype == np.uint8:  # WAV's 8 bits are the only unsigned ones
        return (array.astype(np.float32) - 128) / 128
    if array.dtype.kind == "i" and array.dtype.itemsize in (2, 4):
        return (array / -float(np.iinfo(array.dtype).min)).astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        raise BadValue(f"an audio array is {array.dtype}, expected floats from -1 to 1, int16, int32 or uint8")
    with np.errstate(over="ignore"):  # what float32 can't hold becomes infinity
        samples = array.astype(np.float32)
    if not np.isfinite(samples).all():
        raise BadValue("an audio array has values that are not finite numbers (NaN or infinity)")
    return samples
