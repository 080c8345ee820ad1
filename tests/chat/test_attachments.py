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
    assert attachments.content(f"What is in {text} here?", []) == ["What is in", image(cat), "here?"]
    assert attachments.content(text, []) == [image(cat)]
    assert attachments.content(f"What's in {text}?", []) == ["What's in", image(cat), "?"]
    assert attachments.content(f"{text}\n{text} alike?", []) == [image(cat), image(cat), "alike?"]


def test_a_path_without_quotes_at_the_end_of_a_line(cat, tmp_path):
    assert attachments.content(f"What is in {cat}", []) == ["What is in", image(cat)]
    plain = tmp_path / "it's.png"
    plain.write_bytes(b"png")
    assert attachments.content(f"Is {plain} a cat, don't you think?", []) == [
        "Is",
        image(plain),
        "a cat, don't you think?",
    ]
    assert attachments.content(f"And {plain}, or not?", []) == ["And", image(plain), ", or not?"]


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
