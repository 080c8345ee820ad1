"""Pictures, sounds and videos in a chat: flags, commands, dropped files, the clipboard, the microphone, the preview."""

import io
import json
import shlex
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image as pil
from PIL import ImageGrab
from test_chat import Typist, echo, program, session, talk, terminal  # noqa: F401 - fixtures among them

from g3n_mlx import Audio, Image, Video
from g3n_mlx.chat import __main__ as command
from g3n_mlx.chat import attachments
from g3n_mlx.media.download import short
from g3n_mlx.media.policy import MediaPolicy

MEDIA = Path(__file__).resolve().parents[2] / "examples" / "media"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the chat is started: the example media, one of them under an awkward name."""
    for path in MEDIA.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    shutil.copy(MEDIA / "shapes.png", tmp_path / "my pic's (1).png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(echo, index: int = -1) -> list:  # noqa: F811
    """The content of the last question, media by their kind alone."""
    kinds = {Image: "image", Audio: "audio", Video: "video"}
    content = echo.asked[index][0][-1]["content"]
    if isinstance(content, str):
        return [content]
    return [part if isinstance(part, str) else kinds[type(part[part["type"]])] for part in content]


def test_commands(session, echo, folder, capsys):  # noqa: F811
    image, audio = (session.model.opener.soft_tokens[kind] for kind in ("image", "audio"))
    talk(session, "/image shapes.png", "/audio 'digits.ogg'", "/video clip.mp4", "What are these?", "And now?")
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        f"shapes.png, 256 x 256: {image} tokens, with the next question",
        f"digits.ogg: {audio} tokens, with the next question",
        f"clip.mp4, 3 frames, 1 audio clip: {3 * image + audio} tokens, with the next question",
    ]
    assert captured.out == "WHAT ARE THESE?\nAND NOW?\n"
    assert asked(echo, 0) == ["image", "audio", "video", "What are these?"]
    assert asked(echo, 1) == ["And now?"]


@pytest.mark.parametrize("name", ["my pic's (1).png", '"my pic\'s (1).png"', "my\\ pic\\'s\\ \\(1\\).png"])
def test_awkward_names(session, echo, folder, capsys, name):  # noqa: F811
    talk(session, f"/image {name}", "What is this?")
    assert capsys.readouterr().err.startswith("my pic's (1).png, 256 x 256: ")
    assert asked(echo) == ["image", "What is this?"]


def test_a_question_behind_the_file(session, echo, folder, capsys):  # noqa: F811
    talk(
        session,
        "/audio digits.ogg Transcribe this.",
        f"/image {shlex.quote(chr(39).join(['my pic', 's (1).png']))} What?",
    )
    assert capsys.readouterr() == ("TRANSCRIBE THIS.\nWHAT?\n", "")
    assert [asked(echo, index) for index in (0, 1)] == [["audio", "Transcribe this."], ["image", "What?"]]


def test_dropped_files(session, echo, folder):  # noqa: F811
    awkward = shlex.quote(str(folder / "my pic's (1).png"))
    talk(session, f"{awkward} Compare this with {folder}/tone.wav!")
    assert asked(echo) == ["image", "Compare this with", "audio", "!"]


def test_bad_files_are_named_and_the_chat_goes_on(session, echo, folder, capsys):  # noqa: F811
    (folder / "cut.png").write_bytes((folder / "sign.png").read_bytes()[:900])
    talk(
        session,
        "/image missing.png",
        "/image digits.ogg",
        "/audio shapes.png",
        "/video sign.png",
        "/image",
        "/image cut.png",
    )
    talk(session, f"What is {folder}/cut.png?", "hello")
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert errors[0] == f"error: {short(folder / 'missing.png')} does not exist"
    assert errors[1].startswith("error: digits.ogg: not an image in one of the formats")
    assert errors[2] == "error: shapes.png: not audio or video in a known format, or damaged"
    assert errors[3].startswith("error: sign.png: ")
    assert errors[4] == "error: /image needs a file name or URL"
    assert errors[5].startswith("error: cut.png: the image is damaged")
    assert errors[6] == "with cut.png"
    assert errors[7].startswith("error: cut.png: the image is damaged")
    assert len(errors) == 8
    assert captured.out == "HELLO\n"
    assert asked(echo) == ["hello"]


def test_what_was_attached_stays_until_it_was_asked_about(session, echo, folder, capsys):  # noqa: F811
    talk(session, "/image shapes.png", "x" * 2000, "short", "next")
    assert asked(echo, 1) == ["image", "short"]
    assert asked(echo, 2) == ["next"]
    talk(session, "/image shapes.png", "x" * 2000, "/set top_k 3", "/undo", "/image sign.png", "/undo", "alone")
    assert "forgotten: sign.png" in capsys.readouterr().err
    assert "image" not in asked(echo)
    talk(session, "/image shapes.png", "/clear", "alone")
    assert asked(echo) == ["alone"]


def test_the_next_turn_needs_no_file(session, echo, folder, capsys):  # noqa: F811
    talk(session, "/audio tone.wav", f"{folder}/shapes.png ?")
    for name in ("tone.wav", "shapes.png"):
        (folder / name).unlink()
    talk(session, "and now?", "/retry")
    first = [message["content"] for message in echo.asked[0][0]]
    assert [message["content"] for message in echo.asked[-1][0]][:1] == first
    assert not [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]


def test_a_long_sound_warns_once(session, folder, caplog):  # noqa: F811
    soundfile.write(folder / "long.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 16_000 * 40), 16_000)
    with caplog.at_level("WARNING"):
        talk(session, "/audio long.wav", "What?", "And?")
    assert len([message for message in caplog.messages if "split at quiet places" in message]) == 1


def test_saved_conversations_hold_their_media(session, echo, folder, capsys):  # noqa: F811
    talk(session, "/image shapes.png", "What is it?", "/save talk.json", "/clear", "/load talk.json", "And now?")
    saved = json.loads((folder / "talk.json").read_text("utf-8"))
    part = {"type": "image", "image": str(folder / "shapes.png")}
    assert saved["messages"][0]["content"] == [part, "What is it?"]
    content = echo.asked[-1][0][0]["content"]
    assert isinstance(content[0]["image"], Image)
    (folder / "shapes.png").unlink()
    talk(session, "/clear", "/load talk.json")
    assert f"error: messages[0].content[0]: {short(folder / 'shapes.png')} does not exist" in capsys.readouterr().err


# Clipboard and microphone.


def test_paste(session, echo, folder, capsys, monkeypatch):  # noqa: F811
    held = [pil.new("RGB", (7, 5)), [str(folder / "a.txt"), str(folder / "sign.png")], [str(folder / "a.txt")], None]
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: held.pop(0))
    talk(session, "/paste", "/paste", "What are these?", "/paste", "/paste")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("the image, 7 x 5: ")
    assert lines[1].startswith("sign.png, 192 x 192: ")
    assert asked(echo) == ["image", "image", "What are these?"]
    assert lines[2:] == [
        "error: the clipboard holds files, but no image among them",
        "error: the clipboard holds no image; copy one first",
    ]

    def nothing_to_look_with():
        raise NotImplementedError("wl-paste or xclip is required")

    monkeypatch.setattr(ImageGrab, "grabclipboard", nothing_to_look_with)
    talk(session, "/paste")
    assert "error: the clipboard can't be read: wl-paste or xclip is required" in capsys.readouterr().err


class PortAudioError(Exception):
    pass


def microphone(monkeypatch, blocks: list[np.ndarray], error: Exception | None = None) -> None:
    """A sounddevice module that hears these blocks."""

    class InputStream:
        def __init__(self, *, callback, samplerate, channels, dtype):
            if error is not None:
                raise error
            assert (samplerate, channels, dtype) == (16_000, 1, "float32")
            self.callback = callback

        def __enter__(self):
            for block in blocks:
                self.callback(block, len(block), None, None)

        def __exit__(self, *_):
            pass

    module = types.SimpleNamespace(InputStream=InputStream, PortAudioError=PortAudioError)
    monkeypatch.setitem(sys.modules, "sounddevice", module)


def test_mic(session, echo, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n" * 9))
    spoken = [np.full((800, 1), 0.25, np.float32)] * 10
    microphone(monkeypatch, spoken)
    talk(session, "/mic", "What did I say?")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "recording; Enter ends it, Ctrl-C gives it up"
    assert lines[1].startswith("the audio: ")
    assert asked(echo) == ["audio", "What did I say?"]
    source = session.messages[0]["content"][0]["audio"]
    np.testing.assert_allclose(Audio(source).waveform(16_000, MediaPolicy()), 0.25, atol=1e-4)
    microphone(monkeypatch, [])
    talk(session, "/mic")
    microphone(monkeypatch, spoken, PortAudioError("no device"))
    talk(session, "/mic")
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")] == [
        "error: nothing was recorded",
        "error: the microphone can't be opened: no device",
    ]


# The program.


def test_flags(backend, folder, tiny_folder):
    """All kinds, one of them twice, in the order of the flags."""
    files = ["--image", "shapes.png", "--audio", "digits.ogg", "--image", "my pic's (1).png", "--video", "clip.mp4"]
    flags = ["--model", str(tiny_folder), "--backend", backend, "--max-tokens", "6", "--seed", "1", "--verbose"]
    done = program(*flags, *files, "-p", "What are these?", home=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "prompt tokens" in done.stderr
    tokens = int(done.stderr.split(" prompt tokens")[0].split()[-1])
    assert tokens > 7 * 9  # five pictures and two sounds


def test_parts_of_the_flags_are_in_order():
    arguments = command.command_line().parse_args(
        ["--image", "a.png", "--audio", "https://b/c.wav", "--image", "d.png"]
    )
    assert [part["type"] for part in arguments.attached] == ["image", "audio", "image"]
    assert arguments.attached[1] == {"type": "audio", "audio": "https://b/c.wav"}


def test_a_bad_flag_is_one_line(folder, tiny_folder):
    done = program("--model", str(tiny_folder), "--audio", "shapes.png", "-p", "What?", home=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "g3n-chat: shapes.png: not audio or video in a known format, or damaged\n"


@terminal
def test_a_session_in_a_terminal(folder, tiny_folder):
    """As a terminal that shows sixel pictures: it is asked what it can do at the first picture."""
    pytest.importorskip("textual_image")
    with Typist(folder, "--model", str(tiny_folder), "--max-tokens", "4", "--seed", "1") as typist:
        typist.child.send("/image my pic's (1).png\r")
        typist.child.expect(r"\x1b\[c")
        line = r"my pic's \(1\)\.png, 256 x 256: \d+ tokens, with the next question"
        typist.type("\x1b[?62;4c", r"\x1bP[0-9;]*q.*\x1b\\", line)
        typist.type("What is this?\r", "cut off")
        dropped = shlex.quote(str(folder / "my pic's (1).png"))
        typist.type(f"\x1b[200~{dropped} \x1b[201~And this?\r", "cut off")
        typist.type("/audio digits.ogg Transcribe this.\r", "cut off")
        typist.type(
            "/video missing.mp4\r", "error: ", r"does\s+not\s+exist"
        )  # with a path, on as many lines as it takes
        typist.type(f"/save {folder / 'talk.json'}\r", "saved 6 messages")
        typist.end("/exit\r")
    kinds = [
        [part if isinstance(part, str) else part["type"] for part in message["content"]]
        for message in json.loads((folder / "talk.json").read_text("utf-8"))["messages"][::2]
    ]
    assert kinds == [["image", "What is this?"], ["image", "And this?"], ["audio", "Transcribe this."]]


def test_nothing_is_shown_where_no_picture_can_be(capsys):
    assert attachments.show(np.zeros((4, 4, 3), np.uint8)) is False
    assert capsys.readouterr() == ("", "")
