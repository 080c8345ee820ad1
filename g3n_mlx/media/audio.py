"""Audio in any usual form and format to a waveform of one channel.

PyAV decodes to the true end of a file, also where several are joined in one; soxr brings any rate to the one that is
asked for. Source of the weights of channels: ITU-R BS.775-4, table 2.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from g3n_mlx.failures import BadValue
from g3n_mlx.media.containers import check_whole, ogg_links, open_container, with_length
from g3n_mlx.media.fetch import fetch, source_text
from g3n_mlx.media.policy import MediaPolicy

if TYPE_CHECKING:
    import soxr

# In Hz; far outside any audible recording. Below, resampling would make gigabytes of a small file.
MIN_RATE, MAX_RATE = 1_000, 1_000_000

# Of a sample. Resampled and lossy sound passes 1 a little; integers that were not divided pass this.
MAX_LEVEL = 4.0
# Sound that stays this close to its mean holds nothing to hear: 70 dB below the loudest, ten steps of 16 bits.
_SILENT_LEVEL = 3e-4

_PLAYED_RATE = 16_000  # Hz, in a notebook; the released processor's
_BLOCK_SAMPLES = 1 << 15
_CUT_SLACK_S = 0.06  # a frame or two of a lossy format, which decoders leave out at the ends
# What a channel counts for in one channel: the mean of BS.775's left and right. Rear channels stand by two names; those
# of low frequencies are left out, as there.
_SIDE, _CENTRE, _REAR = 0.5, 0.5**0.5, 0.5**1.5
_WEIGHTS = {
    **dict.fromkeys(("FL", "FR", "DL", "DR", "WL", "WR", "FLC", "FRC"), _SIDE),
    **dict.fromkeys(("FC", "BC", "TC", "TFC", "TBC"), _CENTRE),
    **dict.fromkeys(("BL", "BR", "SL", "SR", "TFL", "TFR", "TBL", "TBR"), _REAR),
    **dict.fromkeys(("LFE", "LFE2"), 0.0),
}
# WAV's and FLAC's order of as many channels, where nothing else is said; then "LFE" may be something else, and counts.
_ORDERS = {
    2: "FL FR",
    3: "FL FR FC",
    4: "FL FR BL BR",
    5: "FL FR FC BL BR",
    6: "FL FR FC LFE BL BR",
    7: "FL FR FC LFE BC SL SR",
    8: "FL FR FC LFE BL BR SL SR",
}
# A stretch whose left and right cancel out: their sum is 10 dB weaker than their difference.
_STRETCH_S, _CANCELLED = 0.5, 0.1


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

    @property
    def is_silent(self) -> bool:
        """Whether an array holds nothing to hear, whatever constant it stays at; a file counts as sound unread."""
        samples = self._source
        return isinstance(samples, np.ndarray) and bool(np.abs(samples - samples.mean(axis=0)).max() < _SILENT_LEVEL)

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
    if not data:
        raise BadValue("the audio has no bytes")
    check_whole(data)
    for link in ogg_links(with_length(data)):
        if add_audio_track(link, mono) is None:
            raise BadValue("the file holds no audio")


def add_audio_track(data: bytes, mono: "Mono") -> float | None:
    """Adds the first audio track of a file and returns its start in seconds; None if there is none.

    Raises ValueError when the track is damaged or cut off, or the file is no audio or video.
    """
    with open_container(data) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise BadValue("the audio is in an unknown format, or damaged")
        start_s, begun_s = None, mono.seconds
        block: list[np.ndarray] = []
        last: tuple[int, tuple[str, ...]] = (0, ())
        # The last packet of a file that does not know its length is incomplete.
        open_ended = container.format.name == "wav" or b"data" + b"\xff" * 8 in data[: 1 << 16]
        for frame in _frames(container, stream, open_ended):
            if start_s is None:
                start_s = frame.time or 0.0
            kind = (frame.sample_rate, tuple(channel.name for channel in frame.layout.channels))
            if block and (kind != last or sum(map(len, block)) >= _BLOCK_SAMPLES):
                mono.add(np.concatenate(block), *last)
                block = []
            block.append(_floats(frame))
            last = kind
        if block:
            mono.add(np.concatenate(block), *last)
        missing_s = _declared_s(container, stream) - (mono.seconds - begun_s)
        if missing_s > _CUT_SLACK_S:
            raise BadValue(f"the audio is damaged or cut off: {missing_s:.1f} s of it are missing")
        return 0.0 if start_s is None else start_s


def _frames(container: Any, stream: Any, open_ended: bool) -> Iterator[Any]:
    """The decoded frames of a track; raises ValueError at a damaged one."""
    from av.error import FFmpegError, InvalidDataError

    try:
        for packet in container.demux(stream):
            if packet.is_corrupt and not open_ended:
                raise BadValue("the audio is damaged or cut off: a packet is incomplete")
            try:
                yield from packet.decode()
            except InvalidDataError:
                # Where files are joined, headers and tags stand between the frames.
                if not bytes(packet)[:4].startswith((b"ID3", b"TAG", b"APET", b"fLaC", b"LYRI")):
                    raise
    except FFmpegError as error:
        raise BadValue(f"the audio is damaged or cut off: {error.strerror}") from None


def _floats(frame: Any) -> np.ndarray:
    """A frame's samples, float32 [samples, channels]."""
    array = frame.to_ndarray()
    array = array.T if frame.format.is_planar else array.reshape(-1, frame.layout.nb_channels)
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128) / 128
    if array.dtype.kind == "i":
        return array.astype(np.float32) / np.float32(2.0 ** (8 * array.dtype.itemsize - 1))
    return array.astype(np.float32)


def _declared_s(container: Any, stream: Any) -> float:
    """How long a file says its sound is at least; 0 when it does not. Most say it in bytes: see containers.py."""
    if container.format.name == "flac" and stream.duration:
        return float(stream.duration * stream.time_base)
    return 0.0


class Mono:
    """Blocks of audio, mixed to one channel and resampled as they come, so that only the result is held.

    Where left and right cancel out, as in a recording with one of them reversed, right counts reversed.
    """

    def __init__(self, rate: int, policy: MediaPolicy) -> None:
        """rate: of the result, in Hz."""
        self._rate, self._policy = rate, policy
        self._block_rate: float | None = None
        self._resampler: soxr.ResampleStream | None = None
        self._blocks: list[np.ndarray] = []
        self._reversed: float | None = None  # 1 where right was reversed last
        self.seconds = 0.0  # of what was added

    def add(self, block: np.ndarray, rate: float, channels: Sequence[str] = ()) -> None:
        """Takes [samples] or [samples, channels], float32, at a rate in Hz; channels: their names as FFmpeg has them.

        Raises ValueError for a rate or samples out of range, or beyond the policy's duration.
        """
        if rate != self._block_rate:
            self._begin(rate)
        if block.ndim == 1:
            block = block[:, None]
        weights = _weights(channels, block.shape[1])
        step = max(1, round(rate * _STRETCH_S))
        for start in range(0, len(block), step):
            self._policy.check_time()
            stretch = block[start : start + step]
            self.seconds += len(stretch) / rate
            if self.seconds > self._policy.max_seconds + 1e-6:
                raise BadValue(f"the audio is longer than {self._policy.max_seconds:g} s, the most that is accepted")
            _check_level(stretch, "the audio")
            self._append(self._mixed(stretch, weights))

    def finish(self) -> np.ndarray:
        """The whole, float32 [samples]; raises ValueError when it is empty or not finite."""
        if not self.seconds:
            raise BadValue("the audio is empty")
        self._flush()
        waveform = np.concatenate(self._blocks)
        if not len(waveform):
            raise BadValue("the audio is shorter than one sample of 16 kHz")
        return waveform

    def _begin(self, rate: float) -> None:
        """Makes ready for blocks of another rate, as joined files have them."""
        import soxr

        _check_rate(rate)
        self._flush()
        self._block_rate = rate
        if rate != self._rate:
            self._resampler = soxr.ResampleStream(rate, self._rate, 1, dtype="float32")

    def _flush(self) -> None:
        if self._resampler is not None:
            self._append(np.zeros(0, dtype=np.float32), last=True)
        self._resampler = None

    def _append(self, block: np.ndarray, last: bool = False) -> None:
        self._blocks.append(block if self._resampler is None else self._resampler.resample_chunk(block, last=last))

    def _mixed(self, stretch: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """One channel of several, by weights [2, channels]: as they are, and with right reversed."""
        if stretch.shape[1] == 1:
            return stretch[:, 0]
        mix, difference = (stretch @ row for row in weights)
        now = float(np.square(mix).mean() < _CANCELLED * np.square(difference).mean())
        before, self._reversed = now if self._reversed is None else self._reversed, now
        if before == now == 0:
            return mix
        share = np.linspace(before, now, len(mix), dtype=np.float32)  # a jump would click
        return mix + share * (difference - mix)


def _weights(channels: Sequence[str], count: int) -> np.ndarray:
    """What each channel counts for, float32 [2, channels]: in their sum, and with right reversed."""
    weights = dict(_WEIGHTS)
    if len(channels) != count or not set(channels) <= set(weights):
        if count not in _ORDERS:
            even = np.full(count, 1 / count)
            return np.stack([even, even * (-1.0) ** np.arange(count)]).astype(np.float32)
        channels = _ORDERS[count].split()
        weights["LFE"] = _REAR
    row = np.array([weights[name] for name in channels])
    return np.stack([row, row * [-1 if "R" in name else 1 for name in channels]]).astype(np.float32)


def _check_level(samples: np.ndarray, what: str) -> None:
    """Raises ValueError when samples are not finite, or far from the range of -1 to 1."""
    level = np.abs(samples).max(initial=0.0)
    if not np.isfinite(level):
        raise BadValue(f"{what} has samples that are not finite numbers (NaN or infinity)")
    if level > MAX_LEVEL:
        raise BadValue(f"{what} has samples up to {level:g}, expected floats from -1 to 1: divide them by their range")


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
    _check_level(samples, "an audio array")
    return samples
