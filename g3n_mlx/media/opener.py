"""Images, audio and videos to what enters one checkpoint's towers."""

import logging
import threading
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from g3n_mlx.config.fields import read_json
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.failures import BadValue
from g3n_mlx.media.audio import Audio
from g3n_mlx.media.audio_features import AudioFeatures, AudioProcessing, split_clips
from g3n_mlx.media.image import Image, ImageFeatures, ImageProcessing
from g3n_mlx.media.part import Source
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.media.video import OpenVideo, Video, time_stamp

_log = logging.getLogger(__name__)

Opened = str | ImageFeatures | AudioFeatures


class MediaOpener:
    """Opens images, audio and videos as one checkpoint's towers want them. Safe for several threads at once."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """folder: where preprocessor_config.json lies; it is read when the first media come."""
        self._folder, self._config = folder, config
        towers = {"image": config.vision, "audio": config.audio}
        self.soft_tokens = {kind: tower.soft_tokens for kind, tower in towers.items() if tower is not None}
        self._kept: WeakKeyDictionary[Source, tuple[MediaPolicy, list[Opened]]] = WeakKeyDictionary()
        self._kept_lock = threading.Lock()

    def open(self, source: Source, policy: MediaPolicy) -> list[Opened]:
        """What an object brings into the prompt: text (a video's time stamps) and features, in order.

        Raises ValueError when the policy refuses it, it is damaged or of another kind, or the checkpoint has no tower
        for it, and TimeoutError after the policy's deadline.
        """
        # An object that stands in the messages of every turn is opened once: its file may be gone by the next one.
        with self._kept_lock:
            kept_policy, opened = self._kept.get(source, (None, []))
        if kept_policy != policy:
            opened = self._opened(source, policy)
            with self._kept_lock:
                self._kept[source] = (policy, opened)
        return opened

    def split_audio(self, audio: Audio, policy: MediaPolicy) -> list[tuple[float, float, Audio]]:
        """Audio as clips that the audio tower takes at once: start and end in seconds, and the clip.

        Raises ValueError when the audio can't be opened, or the checkpoint has no audio tower.
        """
        self._require_tower("audio", "audio")
        rate = self.audio_processing.sampling_rate
        clips = split_clips(audio.waveform(rate, policy), rate, self.audio_processing.max_clip_samples)
        return [(start / rate, (start + len(clip)) / rate, Audio(clip, rate)) for start, clip in clips]

    def _opened(self, source: Source, policy: MediaPolicy) -> list[Opened]:
        match source:
            case Image():
                self._require_tower("image", "image")
                processing = self.image_processing
                return [processing.features(source.rgb(policy, processing.height, processing.width))]
            case Audio():
                self._require_tower("audio", "audio")
                return [clip for _, clip in self._clips(source.waveform(self.audio_processing.sampling_rate, policy))]
            case Video():
                self._require_tower("image", "video")
                return self._interleaved(source.open(policy))

    def _require_tower(self, tower: str, kind: str) -> None:
        if tower not in self.soft_tokens:
            raise BadValue(f"this checkpoint can't read {kind} parts: it has no {tower} tower")

    def _clips(self, waveform: np.ndarray) -> list[tuple[float, AudioFeatures]]:
        clips = self.audio_processing.clips(waveform)
        if len(clips) > 1:
            _log.warning(
                "the audio is longer than a clip's %.1f s: split at quiet places into %d clips, %d soft tokens in all",
                self.audio_processing.max_clip_samples / self.audio_processing.sampling_rate,
                len(clips),
                len(clips) * self.soft_tokens["audio"],
            )
        return clips

    def _interleaved(self, video: OpenVideo) -> list[Opened]:
        """The frames, each after its time stamp; each audio clip after the frames of its stretch."""
        stamped = [(time_s, self.image_processing.features(rgb)) for time_s, rgb in video.frames()]
        opened: list[Opened] = []
        for end_s, clip in self._audio_of(video):
            before = [entry for entry in stamped if entry[0] < end_s]
            opened += [*_with_stamps(before), clip]
            stamped = stamped[len(before) :]
        return [*opened, *_with_stamps(stamped)]

    def _audio_of(self, video: OpenVideo) -> list[tuple[float, AudioFeatures]]:
        """The clips of a video's audio, each with its end in seconds."""
        if "audio" not in self.soft_tokens:
            _log.warning("the audio of the video is left out: this checkpoint has no audio tower")
            return []
        rate = self.audio_processing.sampling_rate
        track = video.audio(rate)
        if track is None:
            return []
        start_s, waveform = track
        clips = self._clips(waveform)
        ends = [*(start for start, _ in clips[1:]), len(waveform) / rate]
        return [(start_s + end, clip) for end, (_, clip) in zip(ends, clips, strict=True)]

    @cached_property
    def image_processing(self) -> ImageProcessing:
        """How images are made ready; raises ValueError when the checkpoint's file says nothing usable."""
        raw, where = self._preprocessor("image_processor")
        return ImageProcessing.from_dict(raw, where)

    @cached_property
    def audio_processing(self) -> AudioProcessing:
        """How audio is made ready; raises ValueError when the checkpoint's file says nothing usable."""
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
            raise BadValue(
                f"the checkpoint {self._folder.name!r} has no preprocessor_config.json, which says how media are made "
                "ready: copy it from the model that this checkpoint was made from, google/gemma-3n-E2B-it say"
            )
        return read_json(path), "preprocessor_config.json"


def _with_stamps(stamped: list[tuple[float, ImageFeatures]]) -> list[Opened]:
    return [piece for time_s, features in stamped for piece in (time_stamp(time_s), features)]
