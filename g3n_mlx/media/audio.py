"""Audio in any usual form and format to the log-mel frames that enter the audio tower.

libsndfile decodes what it can (WAV, FLAC, OGG, MP3), PyAV the rest and the audio of videos (extra `video`); soxr brings
any rate to the processor's. Audio longer than a clip may be is split at quiet places, never cut off.
Source: transformers, feature_extraction_gemma3n.py; a clip is padded alone, never to the length of its neighbours.
"""

import base64
import io
import math
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from g3n_mlx.config.audio import AudioConfig
from g3n_mlx.config.fields import Fields
from g3n_mlx.failures import BadValue
from g3n_mlx.media.containers import check_whole, import_av, mp3_declares_length, open_container
from g3n_mlx.media.fetch import fetch, source_text
from g3n_mlx.media.policy import MediaPolicy

if TYPE_CHECKING:
    import soxr

# Source: feature_extraction_gemma3n.py, `__call__`: max_length and pad_to_multiple_of have no key in the config.
MAX_CLIP_SAMPLES = 480_000
PAD_MULTIPLE = 128
# In Hz; far outside any audible recording. Below, resampling would make gigabytes of a small file.
MIN_RATE, MAX_RATE = 1_000, 1_000_000

_PLAYED_RATE = 16_000  # Hz, in a notebook; the released processor's
_BLOCK_FRAMES = 1 << 17
# Quiet places are looked for in stretches of 100 ms, shorter than most pauses between words.
_QUIET_S, _QUIET_STEP_S = 0.1, 0.01
# What libsndfile says of a FLAC whose writer did not know its length.
_UNKNOWN_FRAMES = 1 << 62


@dataclass(frozen=True, slots=True)
class AudioFeatures:
    """A clip as the audio tower reads it."""

    kind: ClassVar[str] = "audio"
    frames: np.ndarray  # float32 [T, mel]
    mask: np.ndarray  # bool [T], True where a frame begins in sound, not in padding
    digest: bytes  # of both


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


@dataclass(frozen=True)
class AudioProcessing:
    """How a waveform becomes frames: the audio part of preprocessor_config.json, and how long a clip may be."""

    sampling_rate: int  # Hz
    frame_length: int  # samples
    hop_length: int  # samples
    fft_length: int
    feature_size: int  # mel bands
    min_frequency: float  # Hz
    max_frequency: float  # Hz
    preemphasis: float
    preemphasis_htk_flavor: bool  # within a frame, instead of over the sample before it
    mel_floor: float
    input_scale_factor: float
    per_bin_mean: tuple[float, ...] | None
    per_bin_stddev: tuple[float, ...] | None
    max_clip_samples: int

    @staticmethod
    def from_dict(raw: dict[str, Any], config: AudioConfig, where: str) -> "AudioProcessing":
        """Reads preprocessor_config.json; raises ValueError naming the key that is missing or not supported."""
        fields = Fields(raw, where)
        for key, expected in {"dither": 0.0, "padding_side": "right", "padding_value": 0.0}.items():
            if fields.get(key) != expected:
                raise BadValue(f"{where}: {key} is {fields.get(key)!r}, only {expected!r} is supported")
        frame, hop = fields.integer("frame_length", at_least=2), fields.integer("hop_length", at_least=1)
        bands, fft = fields.integer("feature_size", at_least=1), fields.integer("fft_length", at_least=2)
        expected_fft = 2 ** math.ceil(math.log2(frame)) * (2 if fields.get("fft_overdrive") else 1)
        if fft != expected_fft:
            raise BadValue(
                f"{where}: fft_length is {fft}, expected {expected_fft} "
                f"by frame_length {frame} and fft_overdrive {fields.get('fft_overdrive')}"
            )
        if bands != config.input_feat_size:
            raise BadValue(
                f"{where}: feature_size is {bands}, the audio tower's input_feat_size is {config.input_feat_size}"
            )
        return AudioProcessing(
            sampling_rate=fields.integer("sampling_rate", at_least=1),
            frame_length=frame,
            hop_length=hop,
            fft_length=fft,
            feature_size=bands,
            min_frequency=fields.number("min_frequency"),
            max_frequency=fields.number("max_frequency"),
            preemphasis=fields.number("preemphasis"),
            preemphasis_htk_flavor=bool(fields.get("preemphasis_htk_flavor")),
            mel_floor=fields.number("mel_floor"),
            input_scale_factor=fields.number("input_scale_factor"),
            per_bin_mean=_bands(fields, "per_bin_mean", bands, where),
            per_bin_stddev=_bands(fields, "per_bin_stddev", bands, where),
            max_clip_samples=_max_clip_samples(config, frame, hop),
        )

    def clips(self, waveform: np.ndarray) -> list[tuple[float, AudioFeatures]]:
        """The clips of a waveform at the processor's rate, each with its start in seconds.

        Longer audio is split at quiet places, each clip with soft tokens of its own.
        """
        parts = split_clips(waveform, self.sampling_rate, self.max_clip_samples)
        return [(start / self.sampling_rate, self.features(part)) for start, part in parts]

    def features(self, waveform: np.ndarray) -> AudioFeatures:
        """Frames of one clip, float32 [samples] at the processor's rate; raises ValueError if it is too long."""
        if not 0 < len(waveform) <= self.max_clip_samples:
            raise BadValue(f"a clip has {len(waveform)} samples, expected 1 to {self.max_clip_samples}")
        # The reference makes no frame of less than frame_length + 1 samples; the shortest audio gets one here.
        samples = max(len(waveform), self.frame_length + 1)
        padded = np.zeros(math.ceil(samples / PAD_MULTIPLE) * PAD_MULTIPLE, dtype=np.float32)
        padded[: len(waveform)] = waveform
        frames = self._log_mel(padded)
        mask = np.arange(len(frames)) * self.hop_length < len(waveform)
        digest = blake2b(repr(frames.shape).encode(), digest_size=32, person=b"audio")
        digest.update(frames.tobytes() + mask.tobytes())
        return AudioFeatures(frames, mask, digest.digest())

    def _log_mel(self, waveform: np.ndarray) -> np.ndarray:
        """Source: feature_extraction_gemma3n.py, `_extract_spectrogram`."""
        scaled = waveform * np.float32(self.input_scale_factor)
        # One sample more than a frame: what the pre-emphasis of the other flavour needs.
        windows = np.lib.stride_tricks.sliding_window_view(scaled, self.frame_length + 1)[:: self.hop_length]
        emphasis = np.float32(self.preemphasis)
        if self.preemphasis <= 0:
            frames = windows[:, :-1]
        elif self.preemphasis_htk_flavor:
            frames = windows[:, :-1].copy()
            frames[:, 0] *= np.float32(1 - self.preemphasis)
            frames[:, 1:] -= emphasis * windows[:, :-2]
        else:
            frames = windows[:, 1:] - emphasis * windows[:, :-1]
        magnitudes = np.abs(np.fft.rfft(frames * self._hann, n=self.fft_length))  # [T, fft / 2 + 1]
        log_mel = np.log(np.maximum(magnitudes @ self._mel_filters, self.mel_floor))  # [T, mel]
        if self.per_bin_mean is not None:
            log_mel = log_mel - np.array(self.per_bin_mean)
        if self.per_bin_stddev is not None:
            log_mel = log_mel / np.array(self.per_bin_stddev)
        return log_mel.astype(np.float32)

    @cached_property
    def _hann(self) -> np.ndarray:
        """The periodic Hann window."""
        turns = np.arange(self.frame_length, dtype=np.float32) / self.frame_length
        return (0.5 * (1 - np.cos(2 * np.pi * turns))).astype(np.float32)

    @cached_property
    def _mel_filters(self) -> np.ndarray:
        """Triangles on the HTK mel scale, not normalised, float64 [fft / 2 + 1, mel]."""
        frequencies = np.arange(self.fft_length // 2 + 1) * (self.sampling_rate / self.fft_length)
        low, high = (2595 * math.log10(1 + hz / 700) for hz in (self.min_frequency, self.max_frequency))
        edges = 700 * (10 ** (np.linspace(low, high, self.feature_size + 2) / 2595) - 1)
        widths = np.diff(edges)
        rising = (frequencies[:, None] - edges[:-2]) / widths[:-1]
        falling = (edges[2:] - frequencies[:, None]) / widths[1:]
        return np.maximum(0, np.minimum(rising, falling))


def split_clips(waveform: np.ndarray, rate: int, max_samples: int) -> list[tuple[int, np.ndarray]]:
    """Clips of at most `max_samples`, each with the index of its first sample; together they are the whole waveform.

    waveform: float32 [samples] at `rate` Hz. A cut falls on the quietest tenth of a second in the last third of what a
    clip may hold.
    """
    clips: list[tuple[int, np.ndarray]] = []
    start = 0
    while len(waveform) - start > max_samples:
        first = start + max(1, max_samples * 2 // 3)
        cut = first + _quietest(waveform[first : start + max_samples], rate)
        clips.append((start, waveform[start:cut]))
        start = cut
    return [*clips, (start, waveform[start:])]


def _quietest(stretch: np.ndarray, rate: int) -> int:
    """The middle of the stretch of least energy, as an index; the last of several."""
    window, step = max(1, int(_QUIET_S * rate)), max(1, int(_QUIET_STEP_S * rate))
    if len(stretch) <= window:
        return len(stretch)
    total = np.concatenate([[0.0], np.cumsum(np.square(stretch, dtype=np.float64))])
    energies = (total[window:] - total[:-window])[::step]
    return (len(energies) - 1 - int(np.argmin(energies[::-1]))) * step + window // 2


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


def _max_clip_samples(config: AudioConfig, frame_length: int, hop_length: int) -> int:
    """The most samples whose soft tokens a clip has room for, as the padding leaves them."""
    frames = config.soft_tokens * config.total_reduction
    samples = (frames * hop_length + frame_length) // PAD_MULTIPLE * PAD_MULTIPLE
    return min(MAX_CLIP_SAMPLES, samples)


def _bands(fields: Fields, key: str, bands: int, where: str) -> tuple[float, ...] | None:
    values = fields.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != bands or not all(isinstance(v, int | float) for v in values):
        raise BadValue(f"{where}: {key} is {values!r:.80}, expected null or {bands} numbers")
    return tuple(float(value) for value in values)
