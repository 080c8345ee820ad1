"""Files, clipboard and microphone as parts of a question."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g3n_mlx import attachments


@pytest.fixture
def cat(tmp_path):
    path = tmp_path / "my cat's (1).PNG"
    path.write_bytes(b"png")
    return path


def image(path) -> dict:
    return {"type": "image", "image": str(path)}


@pytest.mark.parametrize(
    "spelled",
    ['"{path}"', "{escaped}", "file://{uri}"],
    ids=["quoted", "escaped", "uri"],
)
def test_a_dropped_file_becomes_a_part_in_its_place(cat, spelled):
    escaped = "".join(f"\\{letter}" if letter in " '()" else letter for letter in str(cat))
    text = spelled.format(path=cat, escaped=escaped, uri=str(cat).replace(" ", "%20").replace("'", "%27"))
    assert attachments.content(f"What is in {text} here?", []) == ["What is in", image(cat), "here?"]
    assert attachments.content(text, []) == [image(cat)]


def test_single_quotes(tmp_path):
    path = tmp_path / "two words.wav"
    path.write_bytes(b"wav")
    assert attachments.content(f"'{path}' What is said?", []) == [
        {"type": "audio", "audio": str(path)},
        "What is said?",
    ]


def test_what_is_no_media_file_stays_text(tmp_path, cat):
    notes = tmp_path / "notes.txt"
    notes.write_text("")
    for text in (f"Read {notes}", f"{tmp_path}/missing.png", "cat.png", "/usr/bin is what?", f'a"{cat}"', ""):
        assert attachments.content(text, []) == text


def test_attached_parts_come_first(cat):
    assert attachments.content("What is this?", [image(cat)]) == [image(cat), "What is this?"]


@given(st.text())
def test_any_text_without_files_is_kept(text):
    assert attachments.content(text, []) == text


def test_names_after_a_command():
    assert attachments.unquoted("'a b.png'") == attachments.unquoted('"a b.png"') == "a b.png"
    assert attachments.unquoted("a\\ b.png") == "a b.png"


def test_a_part_names_a_file_by_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert attachments.part("image", "cat.png") == image(tmp_path / "cat.png")
    for source in ("https://example.org/cat.png", "data:image/png;base64,AA==", "file:///cat.png"):
        assert attachments.part("image", source) == image(source)


def test_without_a_microphone_there_is_one_clear_error(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sounddevice", None)
        with pytest.raises(ValueError, match=r"recording needs sounddevice: pip install 'g3n-mlx\[mic\]'"):
            attachments.recording(lambda: None)


def test_no_picture_is_shown_in_a_pipe():
    assert attachments.show(None) is False
