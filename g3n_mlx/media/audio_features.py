"""A waveform to the clips of log-mel frames that enter the audio tower.

Audio longer than a clip may be is split at quiet places, never cut off.
Source: transformers, feature_extraction_gemma3n.py; a clip is padded alone, never to the length of its neighbours.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np

from g3n_mlx.config.audio import AudioConfig
from g3n_mlx.config.fields import Fields
from g3n_mlx.failures import BadValue

# Source: feature_extraction_gemma3n.py, `__call__`: max_length and pad_to_multiple_of have no key in the config.
MAX_CLIP_SAMPLES = 480_000
PAD_MULTIPLE = 128
# Quiet places are looked for in stretches of 100 ms, shorter than most pauses between words. Neighbours of up to four
# times the least energy (6 dB) belong to the same pause, and below 80 dB under full scale everything does.
_QUIET_S, _QUIET_STEP_S = 0.1, 0.01
_PAUSE_RATIO, _PAUSE_FLOOR = 4, 1e-8
# What a clip keeps of a pause behind it and before it, where the pause is long enough.
_MARGIN_S = 0.25
# Hz, of what sound is brought to for the tower: twice what studios record with.
MAX_RATE = 384_000


@dataclass(frozen=True, slots=True)
class AudioFeatures:
    """A clip as the audio tower reads it."""

    kind: ClassVar[str] = "audio"
    frames: np.ndarray  # float32 [T, mel]
    mask: np.ndarray  # bool [T], True where a frame begins in sound, not in padding
    digest: bytes  # of both


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
            sampling_rate=fields.integer("sampling_rate", at_least=1, at_most=MAX_RATE),
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

    waveform: float32 [samples] at `rate` Hz. A cut falls into the longest of the quietest pauses in the last third of
    what a clip may hold: in its middle, or where it is long a quarter of a second before the sound goes on.
    """
    clips: list[tuple[int, np.ndarray]] = []
    start = 0
    while len(waveform) - start > max_samples:
        first = start + max(1, max_samples * 2 // 3)
        cut = first + _pause(waveform[first : start + max_samples], rate)
        clips.append((start, waveform[start:cut]))
        start = cut
    return [*clips, (start, waveform[start:])]


def _pause(stretch: np.ndarray, rate: int) -> int:
    """Where to cut, as an index: in the longest pause, the last one of several that are long enough."""
    window, step = max(1, int(_QUIET_S * rate)), max(1, int(_QUIET_STEP_S * rate))
    if len(stretch) <= window:
        return len(stretch)
    total = np.concatenate([[0.0], np.cumsum(np.square(stretch, dtype=np.float64))])
    energies = (total[window:] - total[:-window])[::step]
    quiet = energies <= energies.min() * _PAUSE_RATIO + window * _PAUSE_FLOOR
    borders = np.flatnonzero(np.diff(quiet, prepend=False, append=False)).reshape(-1, 2)
    starts, ends = borders[:, 0] * step, (borders[:, 1] - 1) * step + window
    margin = int(_MARGIN_S * rate)
    lengths = np.minimum(ends - starts, 2 * margin)
    last = len(lengths) - 1 - int(np.argmax(lengths[::-1]))
    start, end = int(starts[last]), int(ends[last])
    return max((start + end) // 2, end - margin)


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
