"""What a model hears in audio: its words, segment by segment, and the formats that they are written in.

Audio of any length is split at quiet places into clips that the model hears in one go, and each clip is a prompt of its
own, but for one that holds nothing to hear: its text is empty. Segments are clips, so their times are the clips'
borders.
Source of the questions' wording: "Audio understanding" of Gemma's documentation, ai.google.dev.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from g3n_mlx.engine.results import Result
from g3n_mlx.media.audio import Audio

CLIP_TOKENS = 512  # nobody says more in half a minute, so an answer that runs away ends here
LANGUAGES = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "ms": "Malay",
    "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tr": "Turkish",
    "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


@dataclass(slots=True)
class Segment:
    """A clip and its words."""

    start_s: float
    end_s: float
    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])


@dataclass(frozen=True, slots=True)
class Transcript:
    """The words of some audio."""

    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """All words."""
        return joined(self.segments)


def language_name(language: str | None) -> str:
    """A language in English, given so or as a code of two letters; "" for none."""
    return LANGUAGES.get((language or "").lower(), language or "")


def question(language: str | None, prompt: str | None, *, translate: bool) -> str:
    """What the model is asked about each clip. prompt: a hint at the words."""
    named = language_name(language)
    if translate:
        task = "Translate the following speech segment into English"
    else:
        task = f"Transcribe the following speech segment{f' in {named}' if named else ''}"
    hint = (prompt or "").strip()
    words = f" The words may be of this kind: {hint}" if hint else ""
    return f"{task}. Answer with the words alone.{words}"


def messages_about(clip: Audio, asked: str) -> list[dict[str, Any]]:
    """The prompt of one clip."""
    return [{"role": "user", "content": [{"type": "text", "text": asked}, {"type": "audio", "audio": clip}]}]


def segments(
    clips: Sequence[tuple[float, float, Audio]], asked: str, answers: Callable[[Iterable[Any]], Iterator[Any]]
) -> Iterator[Segment]:
    """The words of clips in their order, as `Gemma3n.split_audio` gives them.

    answers: prompts to pairs of a prompt's number and its Result or error, as they are complete.
    """
    heard = {number: index for index, number in enumerate(n for n, clip in enumerate(clips) if not clip[2].is_silent)}
    coming = answers(messages_about(clips[number][2], asked) for number in heard)
    results: dict[int, Result | Exception] = {}  # by prompt
    for number, (start_s, end_s, _) in enumerate(clips):
        segment = Segment(start_s, end_s)
        if number in heard:
            while heard[number] not in results:
                index, result = next(coming)
                results[index] = result
            result = results.pop(heard[number])
            if isinstance(result, Exception):
                raise result
            segment.text, segment.token_ids = result.text.strip(), list(result.token_ids)
        yield segment


def joined(segments: Sequence[Segment]) -> str:
    """The words of all segments."""
    return " ".join(segment.text.strip() for segment in segments if segment.text.strip())


def srt(segments: Sequence[Segment]) -> str:
    """Segments as SubRip subtitles."""
    return "\n".join(
        f"{number}\n{_clock(segment.start_s, ',')} --> {_clock(segment.end_s, ',')}\n{_one_block(segment.text)}\n"
        for number, segment in enumerate(segments, 1)
    )


def vtt(segments: Sequence[Segment]) -> str:
    """Segments as WebVTT subtitles."""
    cues = [
        f"{_clock(segment.start_s, '.')} --> {_clock(segment.end_s, '.')}\n{_one_block(segment.text)}\n"
        for segment in segments
    ]
    return "\n".join(["WEBVTT\n", *cues])


def as_json(segments: Sequence[Segment]) -> str:
    """The text and the segments, with whisper's names."""
    listed = [
        {"id": number, "start": segment.start_s, "end": segment.end_s, "text": segment.text.strip()}
        for number, segment in enumerate(segments)
    ]
    return json.dumps({"text": joined(segments), "segments": listed}, ensure_ascii=False, indent=2) + "\n"


def lines(segments: Sequence[Segment]) -> str:
    """A line of words for each segment that has some."""
    return "".join(f"{text}\n" for segment in segments if (text := segment.text.strip()))


FORMATS: Mapping[str, Callable[[Sequence[Segment]], str]] = {"txt": lines, "srt": srt, "vtt": vtt, "json": as_json}


def _clock(time_s: float, point: str) -> str:
    milliseconds = round(time_s * 1000)
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{milliseconds:03}"


def _one_block(text: str) -> str:
    """The text without the empty lines and arrows that would break a subtitle file."""
    return "\n".join(line for line in text.strip().splitlines() if line.strip()).replace("-->", "->")
