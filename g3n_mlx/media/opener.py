"""Media parts of messages to what enters the towers: the one place that knows how a part may be written.

Hugging Face's parts (`{"type": "image", "image": ...}`, also with "url", "path" or "base64"), OpenAI's (`image_url`,
`audio_url`, `video_url`, `input_audio`), and Image, Audio and Video objects. Keys that are not known are ignored.
"""

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from g3n_mlx.config.fields import read_json
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.media.audio import Audio, AudioFeatures, AudioProcessing, split_clips
from g3n_mlx.media.fetch import FetchPolicy, decode_base64, fetch
from g3n_mlx.media.image import Image, ImageFeatures, ImageProcessing
from g3n_mlx.media.part import Media
from g3n_mlx.media.video import Video, time_stamp

_log = logging.getLogger(__name__)

Opened = str | ImageFeatures | AudioFeatures
Source = Image | Audio | Video


class MediaOpener:
    """Opens the media parts of messages as one checkpoint's towers want them."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """folder: where preprocessor_config.json lies; it is read when the first media part comes."""
        self._folder, self._config = folder, config
        towers = {"image": config.vision, "audio": config.audio}
        self.soft_tokens = {kind: tower.soft_tokens for kind, tower in towers.items() if tower is not None}
        self._kept: WeakKeyDictionary[Source, tuple[FetchPolicy, list[Opened]]] = WeakKeyDictionary()

    def open(self, media: Media, policy: FetchPolicy) -> list[Opened]:
        """What the part brings into the prompt: text (a video's time stamps) and features, in order.

        Raises ValueError naming the part when it is malformed, the policy refuses its source, what it names is
        damaged or of another kind, or the checkpoint has no tower for it.
        """
        try:
            return self._open(media, policy)
        except ValueError as error:
            raise ValueError(f"{media.where}: {error}") from None

    def split_audio(self, audio: Audio, policy: FetchPolicy) -> list[tuple[float, float, Audio]]:
        """A sound as clips that the audio tower hears at once: each one's start and end in seconds, and itself.

        Raises ValueError when the sound can't be opened, or the checkpoint has no audio tower.
        """
        self._require_tower("audio", "audio")
        processing = self._audio_processing
        rate = processing.sampling_rate
        clips = split_clips(audio.waveform(rate, policy), rate, processing.max_clip_samples)
        return [(start / rate, (start + len(clip)) / rate, Audio(clip, rate)) for start, clip in clips]

    def _open(self, media: Media, policy: FetchPolicy) -> list[Opened]:
        self._require_tower("audio" if media.kind == "audio" else "image", media.kind)
        source = _MAKERS[media.kind](media.part, policy)
        # An object that stands in the messages of every turn is opened once: its file may be gone by the next one.
        kept_policy, opened = self._kept.get(source, (None, []))
        if kept_policy != policy:
            opened = self._features(source, policy)
            self._kept[source] = (policy, opened)
        return opened

    def _features(self, source: Source, policy: FetchPolicy) -> list[Opened]:
        match source:
            case Image():
                return [self._image_processing.features(source.rgb(policy))]
            case Audio():
                return [clip for _, clip in self._clips(source, policy)]
            case Video():
                return self._video(source, policy)

    def _require_tower(self, tower: str, kind: str) -> None:
        if tower not in self.soft_tokens:
            raise ValueError(f"this checkpoint can't read {kind} parts: it has no {tower} tower")

    def _clips(self, audio: Audio, policy: FetchPolicy) -> list[tuple[float, AudioFeatures]]:
        processing = self._audio_processing
        return self._counted(processing.clips(audio.waveform(processing.sampling_rate, policy)))

    def _counted(self, clips: list[tuple[float, AudioFeatures]]) -> list[tuple[float, AudioFeatures]]:
        if len(clips) > 1:
            limit_s = self._audio_processing.max_clip_samples / self._audio_processing.sampling_rate
            _log.warning(
                "the sound is longer than a clip's %.1f s: split at quiet places into %d clips, %d soft tokens in all",
                limit_s,
                len(clips),
                len(clips) * self.soft_tokens["audio"],
            )
        return clips

    @cached_property
    def _image_processing(self) -> ImageProcessing:
        raw, where = self._preprocessor("image_processor")
        return ImageProcessing.from_dict(raw, where)

    @cached_property
    def _audio_processing(self) -> AudioProcessing:
        assert self._config.audio is not None
        raw, where = self._preprocessor("feature_extractor")
        return AudioProcessing.from_dict(raw, self._config.audio, where)

    def _preprocessor(self, section: str) -> tuple[dict[str, Any], str]:
        """The processor's numbers: in one flat file, or in a section of transformers 5's processor_config.json."""
        path = self._folder / "preprocessor_config.json"
        nested = self._folder / "processor_config.json"
        if not path.is_file() and nested.is_file():
            raw = read_json(nested).get(section)
            if isinstance(raw, dict):
                return raw, f"processor_config.json, {section}"
        if not path.is_file():
            raise ValueError(f"{self._folder} has no preprocessor_config.json, which says how media are made ready")
        return read_json(path), "preprocessor_config.json"

    def _video(self, video: Video, policy: FetchPolicy) -> list[Opened]:
        data = video.data(policy)
        stamped = [(time_s, self._image_processing.features(rgb)) for time_s, rgb in video.frames(data, policy)]
        opened: list[Opened] = []
        for end_s, clip in self._sound_of(video, data, policy):
            before = [entry for entry in stamped if entry[0] < end_s]
            opened += [*_with_stamps(before), clip]
            stamped = stamped[len(before) :]
        return [*opened, *_with_stamps(stamped)]

    def _sound_of(self, video: Video, data: bytes, policy: FetchPolicy) -> list[tuple[float, AudioFeatures]]:
        """The clips of a video's sound, each with its end in seconds."""
        if "audio" not in self.soft_tokens:
            _log.warning("the sound of the video is left out: this checkpoint has no audio tower")
            return []
        rate = self._audio_processing.sampling_rate
        track = video.sound(data, rate, policy)
        if track is None:
            return []
        start_s, waveform = track
        clips = self._counted(self._audio_processing.clips(waveform))
        ends = [*(start for start, _ in clips[1:]), len(waveform) / rate]
        return [(start_s + end, clip) for end, (_, clip) in zip(ends, clips, strict=True)]


def _with_stamps(stamped: list[tuple[float, ImageFeatures]]) -> list[Opened]:
    return [piece for time_s, picture in stamped for piece in (time_stamp(time_s), picture)]


def _image_of(part: Mapping[str, Any], policy: FetchPolicy) -> Image:
    source = _source_of(part, "image", policy)
    return source if isinstance(source, Image) else Image(source)


def _audio_of(part: Mapping[str, Any], policy: FetchPolicy) -> Audio:
    source: Any = _source_of(part, "audio", policy)
    rate = part.get("sampling_rate")
    if isinstance(source, Mapping):  # as Hugging Face's data sets hold sound
        source, rate = source.get("array"), source.get("sampling_rate")
    if isinstance(source, Audio):
        return source
    return Audio(source, rate if isinstance(source, np.ndarray) else None)


def _video_of(part: Mapping[str, Any], policy: FetchPolicy) -> Video:
    source = _source_of(part, "video", policy)
    if isinstance(source, Video):
        return source
    return Video(source, **{key: part[key] for key in ("fps", "max_frames") if part.get(key) is not None})


_MAKERS = {"image": _image_of, "audio": _audio_of, "video": _video_of}


def _source_of(part: Mapping[str, Any], kind: str, policy: FetchPolicy) -> Any:
    """What an Image, Audio or Video is made of, wherever the part has it."""
    if part["type"] == "input_audio":
        return _input_audio(part.get("input_audio"), policy)
    if part["type"] == f"{kind}_url":
        value = part.get(f"{kind}_url")
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str) or not url:
            raise ValueError(f"the part's '{kind}_url' is {value!r:.80}, expected {{'url': ...}} or a URL")
        return url
    for key in (kind, "url", "path", "base64"):
        value: Any = part.get(key)
        if value is None:
            continue
        if key == kind:
            return value
        if key == "path" and isinstance(value, str | Path):
            return Path(value)
        if not isinstance(value, str):
            raise ValueError(f"the part's {key!r} is {value!r:.80}, expected a string")
        return value if key == "url" else decode_base64(value, policy)
    raise ValueError(f"the {kind} part has none of the keys {kind!r}, 'url', 'path' and 'base64'")


def _input_audio(value: Any, policy: FetchPolicy) -> bytes:
    data = value.get("data") if isinstance(value, Mapping) else None
    if not isinstance(data, str):
        raise ValueError(f"the part's 'input_audio' is {value!r:.80}, expected {{'data': BASE64, 'format': ...}}")
    return fetch(data, policy) if data.startswith("data:") else decode_base64(data, policy)
