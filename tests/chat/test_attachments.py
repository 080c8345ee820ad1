"""Files, clipboard and microphone as parts of a question."""

import re
import shlex
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n_mlx.chat import attachments
from g3n_mlx.installation import install_command


@pytest.fixture
def cat(tmp_path):
    path = tmp_path / "my cat's (1).PNG"
    path.write_bytes(b"png")
    return path


def image(path) -> dict:
    return {"type": "image", "image": str(path)}


SPELLINGS = {
    "quoted": '"{path}"',
    "escaped": "{escaped}",
    "quoted as GNOME's terminal does": "{shell}",
    "uri": "file://{uri}",
}


@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
def test_a_dropped_file_becomes_a_part_in_its_place(cat, spelled):
    escaped = "".join(f"\\{letter}" if letter in " '()" else letter for letter in str(cat))
    uri = str(cat).replace(" ", "%20").replace("'", "%27")
    text = spelled.format(path=cat, escaped=escaped, uri=uri, shell=shlex.quote(str(cat)))
    assert attachments.content(text, []) == [image(cat)]
    assert attachments.content(f"{text} What's here?", []) == [image(cat), "What's here?"]
    assert attachments.content(f"What's in {text} ", []) == ["What's in", image(cat)]
    assert attachments.content(f"What's in {text}?", []) == ["What's in", image(cat), "?"]
    assert attachments.content(f"{text}\n{text} alike?", []) == [image(cat), image(cat), "alike?"]
    assert attachments.content(f"{text} or {text} {text}?", []) == [image(cat), "or", image(cat), image(cat), "?"]


def test_a_path_that_needs_no_quotes(tmp_path):
    path = tmp_path / "two-words.wav"
    path.write_bytes(b"wav")
    part = {"type": "audio", "audio": str(path)}
    assert attachments.content(f"{path} What is said?", []) == [part, "What is said?"]
    assert attachments.content(f"Transcribe {path}", []) == ["Transcribe", part]


def test_what_is_no_dropped_file_stays_text(tmp_path, cat, monkeypatch):
    """Names in prose above all: nothing that a message merely speaks of is sent along."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "dog.png").write_bytes(b"png")
    (tmp_path / "notes.txt").write_text("")
    for text in (
        "dog.png",
        "dog.png What is this?",
        "What is in dog.png?",
        "./dog.png what?",
        "~/dog.png",
        "'dog.png' what?",
        f"Is {tmp_path}/dog.png in the middle?",
        f"Read {tmp_path}/notes.txt",
        f"{tmp_path}/missing.png",
        str(cat),  # neither quoted nor escaped
        "/usr/bin is what?",
        f'a"{cat}"',
        "",
    ):
        assert attachments.content(text, []) == text


def test_notes_say_what_was_taken_and_what_was_left(tmp_path):
    for name in ("cat.png", "dog.png"):
        (tmp_path / name).write_bytes(b"png")
    attached = [image("/a/mouse.png")]
    text = f"{tmp_path}/cat.png and {tmp_path}/dog.png are which?"
    content = attachments.content(text, attached)
    assert content == [*attached, image(tmp_path / "cat.png"), f"and {tmp_path}/dog.png are which?"]
    assert attachments.notes(content, attached) == [
        "with cat.png",
        "note: dog.png is text; drop a file at the beginning or end of a message",
    ]
    assert attachments.notes("/no/such.png dog.png", []) == []


def test_attached_parts_come_first(cat):
    assert attachments.content("What is this?", [image(cat)]) == [image(cat), "What is this?"]


@settings(deadline=None)
@given(st.text())
def test_any_text_without_files_is_kept(text):
    assert attachments.content(text, []) == text


def test_names_after_a_command(cat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("'a b.png'", '"a b.png"', "a\\ b.png", "a b.png"):
        assert attachments.name_and_rest(name) == ("a b.png", "")  # there is no such file: all of it is the name
    for spelled in (cat.name, str(cat), shlex.quote(str(cat)), cat.name.replace(" ", "\\ ").replace("'", "\\'")):
        assert attachments.name_and_rest(spelled)[1] == ""
        assert attachments.name_and_rest(spelled)[0] in (cat.name, str(cat))
    (tmp_path / "dog.png").write_bytes(b"png")
    assert attachments.name_and_rest("dog.png What is it?") == ("dog.png", "What is it?")
    assert attachments.name_and_rest(f"{shlex.quote(cat.name)}  What's that?") == (cat.name, "What's that?")
    assert attachments.name_and_rest("https://example.org/a%20b.png?c=d") == ("https://example.org/a%20b.png?c=d", "")
    assert attachments.name_and_rest("https://example.org/a.png Who?") == ("https://example.org/a.png", "Who?")


def test_what_a_part_is_called():
    names = [attachments.name_of(attachments.part("image", source)) for source in (
        "/a/b c.png", "https://example.org/d.png", "https://example.org/", "data:image/png;base64,AA==")]  # fmt: skip
    assert names == ["b c.png", "d.png", "https://example.org/", "the image"]


def test_objects_are_made_once():
    opened = attachments.OpenedMedia()
    messages = [
        {"role": "user", "content": ["Look:", attachments.part("image", "/a.png"), {"type": "image"}]},
        {"role": "assistant", "content": "Yes."},
    ]
    first, again = opened.in_messages(messages), opened.in_messages(messages)
    assert first[0]["content"][1]["image"] is again[0]["content"][1]["image"]
    assert [first[0]["content"][index] for index in (0, 2)] == ["Look:", {"type": "image"}]
    assert first[1] == messages[1]


def test_a_part_names_a_file_by_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert attachments.part("image", "cat.png") == image(tmp_path / "cat.png")
    for source in ("https://example.org/cat.png", "data:image/png;base64,AA==", "file:///cat.png"):
        assert attachments.part("image", source) == image(source)


def test_without_a_microphone_there_is_one_clear_error(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sounddevice", None)
        with pytest.raises(ValueError, match=re.escape(f"recording needs sounddevice: {install_command('mic')}")):
            attachments.recording(lambda: None)


def test_no_picture_is_shown_in_a_pipe():
    assert attachments.show(None) is False
