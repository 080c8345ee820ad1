"""Transcriptions and translations by the official client: every format, sounds of several clips, streams."""

import io
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import soundfile
from running import sound, wait_until

from g3n_mlx import Audio
from g3n_mlx.server import transcriptions

CLOCK = r"\d\d:\d\d:\d\d"
CLIP_TOKENS = 12


@pytest.fixture(autouse=True)
def short_clips(monkeypatch):
    """A model that talks noise would go on to the limit."""
    monkeypatch.setattr(transcriptions, "CLIP_TOKENS", CLIP_TOKENS)


@pytest.fixture(scope="module")
def clip_s(model):
    """The longest clip that the model hears at once, in seconds."""
    processing = model.preparer.opener.audio_processing
    return processing.max_clip_samples / processing.sampling_rate


@pytest.fixture(scope="module")
def long_sound(clip_s):
    """A sound of two clips."""
    return sound(clip_s * 1.2)


def transcribe(client, data, name="speech.wav", **options):
    file = data if name is None else (name, data)
    return client.audio.transcriptions.create(**{"model": "default", "file": file, **options})


def test_json_and_text(client, model):
    """The words are the model's own answer about the sound."""
    answer = transcribe(client, sound())
    assert isinstance(answer.text, str)
    assert answer.usage.type == "duration"
    assert answer.usage.seconds == pytest.approx(0.5, abs=0.01)
    assert transcribe(client, sound(), response_format="text") == answer.text + "\n"
    question = "Transcribe the following speech segment. Answer with the words alone."
    asked = [{"role": "user", "content": [question, Audio(sound())]}]
    assert answer.text == model.generate(asked, max_tokens=CLIP_TOKENS, temperature=0.0).text.strip()


def test_spoken_digits(client, repository):
    """What the embedded model was trained for."""
    said = transcribe(client, repository / "examples" / "media" / "digits.ogg", name=None).text
    assert said == "3 1 4"


def test_files_of_other_formats(client):
    wav = transcribe(client, sound(), response_format="verbose_json")
    flac = transcribe(client, sound(file_format="FLAC"), name="speech", response_format="verbose_json")
    assert wav.text == flac.text
    vorbis = transcribe(client, io.BytesIO(sound(file_format="OGG")), name="speech.ogg")
    assert vorbis.usage.seconds == pytest.approx(wav.duration, abs=0.02)  # FFmpeg leaves out half a block of Vorbis


def test_segments_of_a_long_sound(client, long_sound, clip_s):
    answer = transcribe(client, long_sound, response_format="verbose_json", language="en")
    first, second = answer.segments
    assert answer.language == "English"
    assert (first.id, first.start) == (0, 0)
    assert clip_s / 2 < first.end <= clip_s
    assert (second.start, second.end) == (first.end, answer.duration)
    assert answer.duration == pytest.approx(clip_s * 1.2, abs=0.01)
    assert answer.text == " ".join(segment.text for segment in answer.segments if segment.text)
    for segment in answer.segments:
        assert segment.avg_logprob <= 0
        assert (segment.tokens == []) or segment.text is not None


def test_subtitles(client, long_sound, clip_s):
    segments = transcribe(client, long_sound, response_format="verbose_json").segments
    srt = transcribe(client, long_sound, response_format="srt")
    times = re.findall(rf"^({CLOCK},\d\d\d) --> ({CLOCK},\d\d\d)$", srt, re.MULTILINE)
    assert len(times) == 2
    assert times[0][0] == "00:00:00,000"
    assert times[0][1] == times[1][0]
    assert re.match(r"1\n", srt)
    assert "\n\n2\n" in srt
    vtt = transcribe(client, long_sound, response_format="vtt")
    assert vtt.startswith("WEBVTT\n\n")
    assert re.findall(rf"^({CLOCK}\.\d\d\d) --> ({CLOCK}\.\d\d\d)$", vtt, re.MULTILINE) == [
        tuple(time.replace(",", ".") for time in pair) for pair in times
    ]
    lines = [line for segment in segments for line in segment.text.splitlines() if line.strip()]
    for line in lines:
        assert line.replace("-->", "->").strip() in srt


def test_a_stream_is_the_same_words_in_pieces(client, long_sound):
    whole = transcribe(client, long_sound)
    *deltas, done = list(transcribe(client, long_sound, stream=True))
    assert {event.type for event in deltas} <= {"transcript.text.delta"}
    assert done.type == "transcript.text.done"
    assert done.text == whole.text
    assert "".join(event.delta for event in deltas).split() == whole.text.split()


def test_translations(client):
    answer = client.audio.translations.create(model="default", file=("a.wav", sound()), response_format="verbose_json")
    assert answer.task == "translate"
    assert answer.language == "English"
    assert client.audio.translations.create(model="default", file=("a.wav", sound())).text == answer.text


def test_temperature_prompt_and_language_reach_the_model(client):
    calm = transcribe(client, sound())
    assert transcribe(client, sound(), temperature=0).text == calm.text
    for options in ({"prompt": "Names: Ada"}, {"language": "de"}, {"temperature": 0.9}):
        assert isinstance(transcribe(client, sound(), **options).text, str)


@pytest.mark.parametrize(
    ("data", "options", "param"),
    [
        (b"no sound at all", {}, "file"),
        (b"", {}, "file"),
        (sound()[:30], {}, "file"),
        (sound()[:24] + (1).to_bytes(4, "little") + sound()[28:], {}, "file"),  # a header that says 1 Hz
        (sound(), {"response_format": "docx"}, "response_format"),
        (sound(), {"temperature": 9}, "temperature"),
        (sound(), {"stream": True, "response_format": "srt"}, "stream"),
        (sound(), {"timestamp_granularities": ["word"], "response_format": "verbose_json"}, "timestamp_granularities"),
    ],
)
def test_what_is_refused(client, data, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        transcribe(client, data, **options)
    assert refused.value.param == param


def test_no_more_sounds_are_open_than_are_answered(serve, monkeypatch):
    """One that waits for its turn holds its file alone: an hour of sound is a quarter of a gigabyte."""
    server, held = serve(parallel=2), []
    places, split = server.engine.long_audio, server.engine.model.split_audio

    def noted(*args):
        held.append(places._value < 2)
        return split(*args)

    monkeypatch.setattr(server.engine.model, "split_audio", noted)
    with ThreadPoolExecutor(4) as threads:
        texts = list(threads.map(lambda data: transcribe(server.openai(), data).text, [sound()] * 4))
    with pytest.raises(openai.BadRequestError):
        transcribe(server.openai(), b"no sound")
    assert len(set(texts)) == 1
    assert held == [True] * 5
    wait_until(lambda: places._value == 2)


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError):
        transcribe(client, sound(), model="whisper-9")


@pytest.mark.parametrize("task", ["transcriptions", "translations"])
def test_events_end_with_done(server, task, caplog):
    caplog.set_level("INFO", logger="g3n_mlx.server")
    form = {"model": "default", "stream": "true", "chunking_strategy": "auto"}
    with server.http() as http:
        answer = http.post(f"/v1/audio/{task}", files={"file": ("a.wav", sound())}, data=form)
    lines = [record.getMessage() for record in caplog.records if "ignored fields" in record.getMessage()]
    assert lines == ["ignored fields: 'chunking_strategy'"]
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[-3].removeprefix("data: "))["type"] == "transcript.text.done"


def test_silence_has_no_words(client):
    data = io.BytesIO()
    soundfile.write(data, np.zeros(16_000), 16_000, format="WAV")
    assert transcribe(client, data.getvalue()).text == ""


def test_a_place_for_audio_is_kept_while_its_thread_decodes(serve, monkeypatch):
    """Also when the client has gone: hours of sound are in memory until the thread ends."""
    server, begun, go_on = serve(parallel=1), threading.Event(), threading.Event()
    split = server.engine.model.split_audio

    def slow(*args):
        begun.set()
        assert go_on.wait(60)
        return split(*args)

    monkeypatch.setattr(server.engine.model, "split_audio", slow)
    with pytest.raises(openai.APITimeoutError):
        transcribe(server.openai(timeout=1, max_retries=0), sound())
    assert begun.is_set()
    wait_until(lambda: server.engine.places_taken == 0)
    assert server.engine.long_audio._value == 0
    go_on.set()
    wait_until(lambda: server.engine.long_audio._value == 1)


@pytest.mark.parametrize("field", ["language", "prompt"])
def test_fields_with_half_a_character(server, field):
    """A form's charset may be one that expresses lone surrogates."""
    parts = [b'name="file"; filename="a.wav"\r\n\r\n' + sound(), f'name="{field}"\r\n\r\n+2AA-'.encode()]
    body = b"".join(b"--x\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + b"--x--\r\n"
    with server.http() as http:
        reply = http.post(
            "/v1/audio/transcriptions",
            content=body,
            headers={"Content-Type": "multipart/form-data; boundary=x; charset=utf-7"},
        )
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == field
