"""POST /v1/audio/transcriptions and /v1/audio/translations: audio in, its words out, in OpenAI's five formats.

The clips, the questions and the formats are those of engine/transcript.py.
"""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Form, Request, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import AfterValidator, Field, FiniteFloat

from g3n_mlx.engine.transcript import CLIP_TOKENS, Segment, joined, language_name, messages_about, question, srt, vtt
from g3n_mlx.media.audio import Audio
from g3n_mlx.server.engine import Place, PlaceOf
from g3n_mlx.server.errors import ApiError
from g3n_mlx.server.exchange import DONE, EVENT_STREAM, event, respond, sampling_params
from g3n_mlx.server.scheduler import Task
from g3n_mlx.server.schemas.base import PlainText, RequestBody
from g3n_mlx.server.schemas.generation import divisible

MAX_AUDIO_S = 4 * 3600.0  # of one file, half a gigabyte an hour while it is decoded; chat messages have a limit below
# The names that clients of these routes send unasked.
AUDIO_MODELS = ("whisper-1", "gpt-4o-transcribe", "gpt-4o-mini-transcribe")
MULTIPART = Form(media_type="multipart/form-data")

router = APIRouter()


class AudioForm(RequestBody):
    """What transcriptions and translations have in common."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "to_language": "/v1/audio/translations translates into English",
        "task": "the path says whether to transcribe or to translate",
        **dict.fromkeys(("include[]", "timestamp_granularities"), "see verbose_json"),
    }
    NEUTRAL: ClassVar[Mapping[str, Any]] = {"task": "transcribe", "timestamp_granularities": "segment"}

    file: UploadFile
    prompt: PlainText | None = None
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = "json"
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2), AfterValidator(divisible)] = 0.0
    stream: bool = False


class TranscriptionForm(AudioForm):
    """POST /v1/audio/transcriptions."""

    language: Annotated[PlainText | None, Field(max_length=40)] = None
    granularities: Annotated[list[Literal["segment", "word"]] | None, Field(alias="timestamp_granularities[]")] = None


@router.post("/v1/audio/transcriptions", response_class=Response)
async def create_transcription(
    request: Request, place: PlaceOf, form: Annotated[TranscriptionForm, MULTIPART]
) -> Response:
    """The words of some audio, in its own language."""
    if "word" in (form.granularities or ()):
        raise ApiError(400, "there are no timestamps of words, only of segments", param="timestamp_granularities")
    asked = question(form.language, form.prompt, translate=False)
    return await _respond(request, _Transcript(place, form, "transcribe", language_name(form.language), asked))


@router.post("/v1/audio/translations", response_class=Response)
async def create_translation(request: Request, place: PlaceOf, form: Annotated[AudioForm, MULTIPART]) -> Response:
    """The words of some audio, in English."""
    asked = question(None, form.prompt, translate=True)
    return await _respond(request, _Transcript(place, form, "translate", "English", asked))


async def _respond(request: Request, transcript: "_Transcript") -> Response:
    form = transcript.form
    name = "default" if form.model in AUDIO_MODELS else form.model
    transcript.place.served = request.app.state.models.find(name)
    if form.stream and form.response_format not in ("json", "text"):
        raise ApiError(400, f"{form.response_format} can't be streamed: use json", param="stream")
    return await respond(request, transcript, stream=form.stream)


@dataclass(slots=True)
class _Transcript:
    """The exchange of one audio file, clip by clip."""

    stream_type: ClassVar[str] = EVENT_STREAM

    place: Place
    form: AudioForm
    task: str
    language: str
    asked: str  # of each clip
    segments: list[Segment] = field(default_factory=list[Segment])

    async def pieces(self) -> AsyncIterator[str]:
        """The words as they come; at the end of each clip at least an empty text."""
        place, model, data = self.place, self.place.engine.model, await self.form.file.read()
        policy = replace(place.policy, max_seconds=MAX_AUDIO_S)
        params = sampling_params(model, temperature=self.form.temperature, logprobs=True, max_tokens=CLIP_TOKENS)
        await place.hold_audio()
        clips = await place.opened(lambda: model.split_audio(Audio(data), policy), "file", place.engine.media_threads)
        for start_s, end_s, clip in clips:
            if clip.is_silent:
                self.segments.append(Segment(start_s, end_s))
                continue
            prompt = await place.prepared(messages_about(clip, self.asked), "file")
            between = " " if any(segment.text for segment in self.segments) else ""
            segment = Segment(start_s, end_s)
            self.segments.append(segment)
            async for _, chunk in place.run([Task(prompt, params)]):
                if chunk.token is not None:
                    segment.token_ids.append(chunk.token)
                    segment.logprobs.append(chunk.logprob)
                text = chunk.text if segment.text else chunk.text.lstrip()
                segment.text += text
                if text or chunk.token is None:
                    yield between + text
                    between = ""

    async def whole(self, pieces: AsyncIterator[str]) -> Response:
        """The words in the requested format."""
        async for _ in pieces:
            pass
        match self.form.response_format:
            case "json":
                return JSONResponse({"text": self._text(), "usage": self._usage()})
            case "verbose_json":
                return JSONResponse(self._verbose())
            case "text":
                return PlainTextResponse(self._text() + "\n")
            case "srt":
                return PlainTextResponse(srt(self.segments))
            case "vtt":
                return PlainTextResponse(vtt(self.segments))

    async def events(self, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
        """The words, all of them once more in the last event."""
        async for delta in pieces:
            if delta:
                yield event(json.dumps({"type": "transcript.text.delta", "delta": delta}))
        yield event(json.dumps({"type": "transcript.text.done", "text": self._text(), "usage": self._usage()}))
        yield DONE

    def failed(self, error: ApiError) -> str:
        """OpenAI's error as an event."""
        return event(json.dumps(error.body()))

    def _text(self) -> str:
        return joined(self.segments)

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
                "temperature": self.form.temperature,
                "avg_logprob": sum(segment.logprobs) / len(segment.logprobs) if segment.logprobs else 0.0,
            }
            for number, segment in enumerate(self.segments)
        ]
        return {
            "task": self.task,
            "language": self.language,
            "duration": self.segments[-1].end_s,
            "text": self._text(),
            "segments": segments,
            "usage": self._usage(),
        }
