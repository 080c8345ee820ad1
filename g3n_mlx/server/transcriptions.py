"""POST /v1/audio/transcriptions and /v1/audio/translations: sound in, its words out, in OpenAI's five formats.

Gemma 3n does the work itself: a sound of any length is split at quiet places into clips that it hears at once, and
each clip is a question of its own. Segments are clips, so their times are the clips' borders.
Source of the questions' wording: "Audio understanding" of Gemma's documentation, ai.google.dev.
"""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Request, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import Field, FiniteFloat

from g3n_mlx.media.audio import Audio
from g3n_mlx.server.engine import Place, PlaceOf, unless_gone
from g3n_mlx.server.errors import ApiError
from g3n_mlx.server.scheduler import Answer
from g3n_mlx.server.schemas import report_unknown
from g3n_mlx.server.stream import END_OF_STREAM, SSE, first_of, sampling_params, with_errors

# Of a clip of half a minute nobody says more, so an answer that runs away ends here.
CLIP_TOKENS = 512
MAX_SOUND_S = 4 * 3600.0  # of one file, half a gigabyte an hour while it is decoded; chat messages have a limit below
LANGUAGES = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "ms": "Malay",
    "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tr": "Turkish",
    "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip

FIELDS = (
    *("file", "model", "language", "prompt", "response_format", "temperature", "stream"),
    "timestamp_granularities[]",
)
Format = Literal["json", "text", "verbose_json", "srt", "vtt"]
Temperature = Annotated[FiniteFloat, Field(ge=0, le=2)]

router = APIRouter()


@dataclass(slots=True)
class Segment:
    """A clip and its words."""

    start_s: float
    end_s: float
    text: str
    token_ids: list[int]
    logprobs: list[float]


@router.post("/v1/audio/transcriptions", response_class=Response)
async def create_transcription(
    request: Request,
    place: PlaceOf,
    file: UploadFile,
    model: Annotated[str, Form()] = "default",
    language: Annotated[str | None, Form(max_length=40)] = None,
    prompt: Annotated[str | None, Form()] = None,
    response_format: Annotated[Format, Form()] = "json",
    temperature: Annotated[Temperature, Form()] = 0.0,
    stream: Annotated[bool, Form()] = False,
    granularities: Annotated[list[Literal["segment", "word"]] | None, Form(alias="timestamp_granularities[]")] = None,
) -> Response:
    """The words of a sound, in its own language."""
    await _report_unknown(request)
    request.app.state.models.find(model)
    if granularities is not None and "word" in granularities:
        raise ApiError(400, "the model knows no times of words, only of segments", param="timestamp_granularities")
    spoken = LANGUAGES.get((language or "").lower(), language)
    question = f"Transcribe the following speech segment{f' in {spoken}' if spoken else ''}"
    work = _Work(place, "transcribe", spoken, _asked(question, prompt), temperature)
    return await _answered(request, work, await file.read(), response_format, stream)


@router.post("/v1/audio/translations", response_class=Response)
async def create_translation(
    request: Request,
    place: PlaceOf,
    file: UploadFile,
    model: Annotated[str, Form()] = "default",
    prompt: Annotated[str | None, Form()] = None,
    response_format: Annotated[Format, Form()] = "json",
    temperature: Annotated[Temperature, Form()] = 0.0,
    stream: Annotated[bool, Form()] = False,
) -> Response:
    """The words of a sound, in English."""
    await _report_unknown(request)
    request.app.state.models.find(model)
    question = _asked("Translate the following speech segment into English", prompt)
    work = _Work(place, "translate", "English", question, temperature)
    return await _answered(request, work, await file.read(), response_format, stream)


async def _answered(request: Request, work: "_Work", data: bytes, wanted: Format, stream: bool) -> Response:
    if not stream:
        return await unless_gone(request, work.whole(data, wanted))
    if wanted not in ("json", "text"):
        raise ApiError(400, f"{wanted} can't be streamed: use json", param="stream")
    deltas = work.deltas(data)
    first = await unless_gone(request, first_of(deltas))
    return StreamingResponse(with_errors(work.events(first, deltas)), media_type=SSE)


async def _report_unknown(request: Request) -> None:
    """One log line with the names of the fields that this server ignores, if there are any."""
    report_unknown([name for name in await request.form() if name not in FIELDS])


def _asked(question: str, prompt: str | None) -> str:
    hint = f" The words may be of this kind: {prompt.strip()}" if prompt and prompt.strip() else ""
    return f"{question}. Answer with the words alone.{hint}"


class _Work:
    """One sound, and what is asked about every clip of it."""

    def __init__(self, place: Place, task: str, language: str | None, question: str, temperature: float) -> None:
        self._place, self._task, self._language = place, task, language
        self._question, self._temperature = question, temperature
        self.segments: list[Segment] = []

    async def deltas(self, data: bytes) -> AsyncIterator[str]:
        """The words as they come; an empty text, if nothing else, at the end of each clip."""
        engine = self._place.engine
        policy = replace(self._place.policy, max_seconds=MAX_SOUND_S)
        options = {"temperature": 0.0 if self._temperature < 1e-3 else self._temperature, "logprobs": True}
        params = sampling_params(engine.model, **options, max_tokens=CLIP_TOKENS)
        await self._place.hold_sound()
        clips = await self._place.opened(lambda: engine.model.split_audio(Audio(data), policy), "file", media=True)
        for start_s, end_s, clip in clips:
            content = [{"type": "text", "text": self._question}, {"type": "audio", "audio": clip}]
            prompt = await self._place.prepared([{"role": "user", "content": content}], "file")
            segment = Segment(start_s, end_s, "", [], [])
            between = " " if self.segments and self.segments[-1].text else ""
            self.segments.append(segment)
            async for _, chunk in self._place.run([Answer(prompt, params)]):
                if chunk.token is not None:
                    segment.token_ids.append(chunk.token)
                    segment.logprobs.append(chunk.logprob)
                text = chunk.text if segment.text else chunk.text.lstrip()
                segment.text += text
                if text or chunk.token is None:
                    yield between + text
                    between = ""

    @property
    def text(self) -> str:
        """The words of all clips so far."""
        return " ".join(segment.text.strip() for segment in self.segments if segment.text.strip())

    async def whole(self, data: bytes, wanted: Format) -> Response:
        """The answer in a format, complete."""
        async for _ in self.deltas(data):
            pass
        if wanted == "json":
            return JSONResponse({"text": self.text, "usage": self._usage()})
        if wanted == "verbose_json":
            return JSONResponse(self._verbose())
        if wanted == "text":
            return PlainTextResponse(self.text + "\n")
        return PlainTextResponse(srt(self.segments) if wanted == "srt" else vtt(self.segments))

    async def events(self, first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
        """The words as server-sent events, all of them once more in the last one."""
        yield _event({"type": "transcript.text.delta", "delta": first})
        async for delta in rest:
            if delta:
                yield _event({"type": "transcript.text.delta", "delta": delta})
        yield _event({"type": "transcript.text.done", "text": self.text, "usage": self._usage()})
        yield END_OF_STREAM

    def _usage(self) -> dict[str, Any]:
        return {"type": "duration", "seconds": self.segments[-1].end_s}

    def _verbose(self) -> dict[str, Any]:
        segments = [
            {
                "id": number,
                "start": segment.start_s,
                "end": segment.end_s,
                "text": segment.text.strip(),
                "tokens": segment.token_ids,
                "temperature": self._temperature,
                "avg_logprob": sum(segment.logprobs) / len(segment.logprobs) if segment.logprobs else 0.0,
            }
            for number, segment in enumerate(self.segments)
        ]
        return {
            "task": self._task,
            "language": self._language or "",
            "duration": self.segments[-1].end_s,
            "text": self.text,
            "segments": segments,
            "usage": self._usage(),
        }


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


def _clock(time_s: float, point: str) -> str:
    milliseconds = round(time_s * 1000)
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{milliseconds:03}"


def _one_block(text: str) -> str:
    """A text without the empty lines and arrows that would end it in a subtitle file."""
    return "\n".join(line for line in text.strip().splitlines() if line.strip()).replace("-->", "->")


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
