"""Transcription: the model's own answers about its clips, and the command that writes them into files."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from devices import served_backend

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.engine.transcript import CLIP_TOKENS, Segment, as_json, question, srt, vtt
from g3n_mlx.media.audio import Audio
from g3n_mlx.transcribe.__main__ import main
from g3n_mlx.transcribe.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "examples" / "media" / "digits.ogg"


@pytest.fixture(scope="module")
def model():
    return load(demo_folder(), backend=served_backend(), dtype="float32")


@pytest.fixture(scope="module")
def clip_s(model):
    processing = model.preparer.opener.audio_processing
    return processing.max_clip_samples / processing.sampling_rate


def speech(clip_s, num_clips):
    """The digits again and again, two clips of silence in the middle."""
    waveform, rate = soundfile.read(DIGITS, dtype="float32")
    length = int(clip_s * rate)
    voiced = np.resize(waveform, length * num_clips)
    voiced[length : 3 * length] = 0
    written = io.BytesIO()
    soundfile.write(written, voiced, rate, format="WAV")
    return written.getvalue()


def test_segments_are_the_answers_about_the_clips(model, clip_s):
    data = speech(clip_s, 5)
    heard = model.transcribe(data)
    clips = model.split_audio(Audio(data))
    assert [(s.start_s, s.end_s) for s in heard.segments] == [clip[:2] for clip in clips]
    assert any(clip.is_silent for _, _, clip in clips)
    asked = question(None, None, translate=False)
    for segment, (_, _, clip) in zip(heard.segments, clips, strict=True):
        content = [{"type": "text", "text": asked}, clip]
        alone = (
            ""
            if clip.is_silent
            else model.generate(
                [{"role": "user", "content": content}], temperature=0.0, max_tokens=CLIP_TOKENS
            ).text.strip()
        )
        assert segment.text == alone
    assert heard.text == " ".join(segment.text for segment in heard.segments if segment.text)
    rest = list(model.transcribe_stream(data, skip=2))
    assert [s.text for s in rest] == [s.text for s in heard.segments[2:]]


def test_questions():
    assert "in German." in question("de", None, translate=False)
    assert "into English" in question("de", None, translate=True)
    assert question(None, " Bern ", translate=False).endswith("of this kind: Bern")


def test_formats():
    segments = [Segment(0.0, 1.5, " one\n\ntwo --> "), Segment(3661.25, 3662.0, "three")]
    assert srt(segments).startswith("1\n00:00:00,000 --> 00:00:01,500\none\ntwo ->\n")
    assert "01:01:01.250 --> 01:01:02.000\nthree" in vtt(segments)
    assert json.loads(as_json(segments))["segments"][1] == {"id": 1, "start": 3661.25, "end": 3662.0, "text": "three"}


def run(*arguments):
    return main([*map(str, arguments), "--model", "demo", "--backend", served_backend()])


def test_files_beside_the_input(tmp_path, capsys, model):
    for name in ("a.ogg", "b.ogg"):
        (tmp_path / name).write_bytes(DIGITS.read_bytes())
    (tmp_path / "bad.ogg").write_bytes(b"no sound")
    assert run(tmp_path / "a.ogg", tmp_path / "bad.ogg", tmp_path / "b.ogg", "-f", "vtt") == 1  # bad.ogg alone failed
    assert sorted(path.name for path in tmp_path.glob("*.vtt*")) == ["a.vtt", "b.vtt"]
    assert (tmp_path / "a.vtt").read_text("utf-8").startswith("WEBVTT")
    assert "bad.ogg: " in capsys.readouterr().err
    folder = tmp_path / "texts"
    folder.mkdir()
    assert run(tmp_path / "a.ogg", "-o", folder) == 0
    assert run(tmp_path / "a.ogg", "-o", "-") == 0
    assert capsys.readouterr().out == (folder / "a.txt").read_text("utf-8") == model.transcribe(DIGITS).text + "\n"


def test_a_stopped_run_goes_on(tmp_path, capsys, clip_s):
    """What is in the part file is not heard again; another question begins anew."""
    source = tmp_path / "long.wav"
    source.write_bytes(speech(clip_s, 3))
    assert run(source) == 0
    whole = (tmp_path / "long.txt").read_text("utf-8")
    assert list(tmp_path.glob("*.part")) == []
    stat = source.stat()
    asked = {"language": None, "prompt": None, "translate": False, "model": "demo", "slice": None}
    asked |= {
        "adapters": [],
        "weights": str(demo_folder()),
        "dtype": None,
        "backend": served_backend(),
        "activations": "exact",
    }
    asked |= {"revision": None, "source": str(source), "bytes": stat.st_size, "modified": stat.st_mtime_ns}
    kept = Progress(tmp_path / "long.txt.part", asked)
    kept.begin()
    kept.add(Segment(0.0, 1.0, "kept from before"))
    with (tmp_path / "long.txt.part").open("a") as file:
        file.write('{"start_s": 1.0, "te')  # cut off in the middle of a line
    capsys.readouterr()
    assert run(source) == 0
    found = (tmp_path / "long.txt").read_text("utf-8")
    assert found.startswith("kept from before\n")
    assert found.splitlines()[1:] == whole.splitlines()[1:]
    assert "going on at 1 s" in capsys.readouterr().err
    kept.begin()
    kept.add(Segment(0.0, 1.0, "kept from before"))
    assert run(source, "--translate") == 0
    assert "kept from before" not in (tmp_path / "long.txt").read_text("utf-8")


def test_progress_that_is_damaged_or_of_another_program(tmp_path):
    kept = Progress(tmp_path / "a.txt.part", {"language": None})
    assert kept.begin() == []
    kept.add(Segment(0.0, 1.0, "whole"))
    with (tmp_path / "a.txt.part").open("ab") as file:
        file.write(b'{"other": 1}\n\xff\n')
    assert kept.begin() == [Segment(0.0, 1.0, "whole")]
    (tmp_path / "a.txt.part").write_text("a download\n")
    with pytest.raises(FileExistsError, match="is not a transcription's progress"):
        kept.begin()
    assert (tmp_path / "a.txt.part").read_text() == "a download\n"


def test_no_transcript_overwrites_another_of_the_same_run(tmp_path, capsys):
    assert run(tmp_path / "a.mp3", tmp_path / "a.wav") == 1
    assert "would get the same transcript" in capsys.readouterr().err


def test_usage(capsys, tmp_path):
    for arguments in ([], ["a.wav", "--mic"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert "audio files, or --mic" in capsys.readouterr().err
    assert run("a.wav", "-o", tmp_path / "nowhere") == 1
    assert re.search("is not a folder", capsys.readouterr().err)
