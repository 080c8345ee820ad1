"""Videos to frames at regular times, each after its time as text, and their audio.

A frame is the one on show at its time, whatever the rate of the file's frames, turned as the file says. The audio is
split at quiet places; each clip stands after the frames of its stretch. PyAV decodes.
"""

import logging
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from g3n_mlx.failures import BadValue
from g3n_mlx.media.audio import Mono, add_audio_track
from g3n_mlx.media.containers import check_whole, open_container
from g3n_mlx.media.fetch import fetch, source_text
from g3n_mlx.media.policy import MediaPolicy

_log = logging.getLogger(__name__)

# As many frames as leave half of the published context of 32,768 tokens to words and audio.
MAX_FRAMES = 60
# A gap between two wanted times that is worth a jump to the key frame before the second, in seconds.
_SEEK_GAP_S = 10.0
# Slack for the rounding of time stamps, and for a video track that ends a little before its declared end, in seconds.
_SLACK_S = 1e-3
_END_SLACK_S = 1.0


def reads_video() -> bool:
    """Whether PyAV is installed, which reads videos."""
    return find_spec("av") is not None


class Video:
    """A video for a message: a path, bytes, a `data:` URI or an http(s) URL.

    fps: frames per second; max_frames: the most frames, which a longer video spreads over its length. The file is
    opened when the message is first used. Raises ValueError for any other source, or a number that makes no sense.
    """

    def __init__(self, source: str | Path | bytes, fps: float = 1.0, max_frames: int = MAX_FRAMES) -> None:
        if not isinstance(source, str | Path | bytes):
            raise BadValue(f"a video is of type {type(source).__name__}, expected a path, bytes or a URL")
        if isinstance(fps, bool) or not isinstance(fps, int | float | np.integer | np.floating) or not 0 < fps <= 1000:
            raise BadValue(f"a video's fps is {fps!r}, expected frames per second, more than 0")
        if isinstance(max_frames, bool) or not isinstance(max_frames, int | np.integer) or max_frames < 1:
            raise BadValue(f"a video's max_frames is {max_frames!r}, expected an integer of at least 1")
        self.fps, self.max_frames = float(fps), int(max_frames)
        self._source = source

    def __repr__(self) -> str:
        return f"Video({source_text(self._source)}, fps={self.fps}, max_frames={self.max_frames})"

    def open(self, policy: MediaPolicy) -> "OpenVideo":
        """The video with its file in memory; raises ValueError when that can't be fetched, is empty or cut off."""
        data = self._source if isinstance(self._source, bytes) else fetch(self._source, policy)
        if not data:
            raise BadValue("the video has no bytes")
        check_whole(data)
        return OpenVideo(data, self.fps, self.max_frames, policy)


class OpenVideo:
    """A video's file in memory, decoded within a policy."""

    def __init__(self, data: bytes, fps: float, max_frames: int, policy: MediaPolicy) -> None:
        self._data, self._fps, self._max_frames, self._policy = data, fps, max_frames, policy

    def frames(self) -> Iterator[tuple[float, np.ndarray]]:
        """Frames, uint8 [h, w, 3], each with its time in seconds from the first one.

        Raises ValueError when the file is no video, damaged or too long, or its frames have too many pixels.
        """
        from av.error import FFmpegError

        with open_container(self._data) as container:
            stream = self._stream(container)
            declared_s = None if stream.duration is None else float(stream.duration * stream.time_base)
            times = self._times(_measured_s(self._data) if declared_s is None else declared_s)
            try:
                yield from self._frames_at(times, declared_s, container, stream)
            except FFmpegError as error:
                raise BadValue(f"the video is damaged or cut off: {error.strerror}") from None

    def audio(self, rate: int) -> tuple[float, np.ndarray] | None:
        """When the audio begins in seconds from the first frame, and the audio: float32 [samples] at `rate` Hz.

        None when the video is silent. Raises ValueError when the audio is damaged or too long.
        """
        with open_container(self._data) as container:
            first_frame_s = _start_s(self._stream(container))
        mono = Mono(rate, self._policy)
        start_s = add_audio_track(self._data, mono)
        return None if start_s is None else (start_s - first_frame_s, mono.finish())

    def _stream(self, container: Any) -> Any:
        if not container.streams.video:
            raise BadValue("the file has no video stream; if it is audio, send it as an audio part")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise BadValue("the video's frames are in an unknown format, or damaged")
        width, height, limit = stream.codec_context.width, stream.codec_context.height, self._policy.max_pixels
        if width * height > limit:
            raise BadValue(f"the video's frames are {width} × {height}, more than {limit:,} pixels")
        stream.thread_type = "AUTO"
        return stream

    def _times(self, duration_s: float) -> list[float]:
        if duration_s > self._policy.max_seconds:
            raise BadValue(f"the video is longer than {self._policy.max_seconds:g} s, the most that is accepted")
        wanted = max(1, math.ceil(duration_s * self._fps - _SLACK_S))
        if wanted <= self._max_frames:
            return [index / self._fps for index in range(wanted)]
        _log.warning("the video of %.1f s is shown in %d frames, not %d", duration_s, self._max_frames, wanted)
        return [index * duration_s / self._max_frames for index in range(self._max_frames)]

    def _frames_at(
        self, times: list[float], declared_s: float | None, container: Any, stream: Any
    ) -> Iterator[tuple[float, np.ndarray]]:
        """The frame on show at each of the ascending times; raises ValueError when they end before `declared_s`."""
        start_s = _start_s(stream)
        decoded = self._timed(container, stream)
        coming: Any = next(decoded, None)
        if coming is None:
            raise BadValue("the video holds no frames")
        shown = coming  # also before its time, when it comes late
        for time_s in times:
            if coming is not None and start_s + time_s - coming.time > _SEEK_GAP_S:
                container.seek(int((start_s + time_s) / stream.time_base), stream=stream)
                decoded = self._timed(container, stream)
                coming = next(decoded, None)
                shown = coming or shown
            while coming is not None and coming.time <= start_s + time_s + _SLACK_S:
                shown, coming = coming, next(decoded, None)
            if coming is None and 0 < _end_s(shown) - start_s < time_s + _SLACK_S:
                end_s = _end_s(shown) - start_s
                if declared_s is not None and end_s < declared_s - _END_SLACK_S:
                    raise BadValue(f"the video is cut off: its frames end at {end_s:.1f} s of {declared_s:.1f} s")
                return
            # The angle counts against the clock, as rot90 does.
            yield time_s, np.rot90(shown.to_ndarray(format="rgb24"), k=round(shown.rotation / 90))

    def _timed(self, container: Any, stream: Any) -> Iterator[Any]:
        for frame in container.decode(stream):
            self._policy.check_time()
            if frame.time is not None:
                yield frame


def time_stamp(seconds: float) -> str:
    """A time as text: `00:03`, `1:02:03`; with tenths where it is no whole second, `00:03.5`."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{rest % 10}" if rest % 10 else ""
    return (f"{hours}:" if hours else "") + f"{minutes:02}:{rest // 10:02}{fraction}"


def _measured_s(data: bytes) -> float:
    """The length of a video track that does not declare it, as in Matroska and in what a browser recorded."""
    with open_container(data) as container:
        stream = container.streams.video[0]
        begun = [(packet.pts, packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None]
        return float(max((pts + duration for pts, duration in begun), default=0) * stream.time_base) - _start_s(stream)


def _start_s(stream: Any) -> float:
    return 0.0 if stream.start_time is None else float(stream.start_time * stream.time_base)


def _end_s(frame: Any) -> float:
    return frame.time + float((frame.duration or 0) * frame.time_base)
