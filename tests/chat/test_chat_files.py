"""Text and PDF files in a question."""

import io
import json

import pypdf
import pytest
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject
from test_chat import echo, session, talk  # noqa: F401 - fixtures among them

from g3n_mlx import load
from g3n_mlx.chat import __main__ as command
from g3n_mlx.chat import models


def pdf(*pages: str) -> bytes:
    writer = pypdf.PdfWriter()
    font = DictionaryObject(
        {NameObject(f"/{key}"): NameObject(f"/{name}") for key, name in
         {"Type": "Font", "Subtype": "Type1", "BaseFont": "Helvetica"}.items()}
    )  # fmt: skip
    for words in pages:
        page = writer.add_blank_page(200, 200)
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F"): font})}
        )
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F 12 Tf 10 100 Td ({words}) Tj ET".encode())
        page[NameObject("/Contents")] = stream
    made = io.BytesIO()
    writer.write(made)
    return made.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my notes.txt").write_text("Twelve.\n```\ncode\n```\n")
    (tmp_path / "two.pdf").write_bytes(pdf("Page one", "Page two"))
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.7 nonsense")
    (tmp_path / "noise.bin").write_bytes(b"\xff\x00")
    (tmp_path / "empty.txt").write_text(" ")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_text_of_files_stands_before_the_question(session, echo, folder, capsys):  # noqa: F811
    talk(session, "/file my notes.txt What is said?", "/file two.pdf", "And here?", "/retry")
    assert session.failures == 0
    first, second = (echo.asked[index][0][-1]["content"] for index in (0, 1))
    assert first == ["my notes.txt:\n````\nTwelve.\n```\ncode\n```\n````\n\nWhat is said?"]
    assert second == ["two.pdf:\n```\nPage one\n\nPage two\n```\n\nAnd here?"]
    assert echo.asked[2][0][-1]["content"] == second
    assert "two.pdf: " in capsys.readouterr().err
    assert session.messages[0]["content"][0] == {"type": "file", "file": str(folder / "my notes.txt")}


def test_files_without_text_are_refused_by_name(session, folder, capsys):  # noqa: F811
    talk(session, "/file bad.pdf", "/file noise.bin", "/file empty.txt", "/file none.txt", "/file")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: bad.pdf: the PDF can't be read")
    assert lines[1] == "error: noise.bin: the file is neither UTF-8 text nor a PDF"
    assert lines[2].startswith("error: empty.txt: the file has no text")
    assert lines[3] == f"error: '{folder}/none.txt' does not exist"
    assert lines[4] == "error: /file needs a file name or URL"
    assert session.attached == []


def test_files_are_saved_by_path(session, echo, folder):  # noqa: F811
    talk(session, "/file two.pdf what?", "/save talk.json", "/clear", "/load talk.json", "more")
    assert session.failures == 0
    saved = json.loads((folder / "talk.json").read_text())["messages"]
    assert saved[0]["content"] == [{"type": "file", "file": str(folder / "two.pdf")}, "what?"]
    assert "Page two" in echo.asked[-1][0][0]["content"][0]


def test_a_flag_gives_files_to_one_question(echo, folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(models, "load_from", lambda arguments, **_: echo)
    assert command.main(["--model", "demo", "--file", "two.pdf", "--file", "my notes.txt", "What?"]) == 0
    (text,) = echo.asked[-1][0][-1]["content"]
    assert text.startswith("two.pdf:\n```\n")
    assert "\n```\n\nmy notes.txt:\n````\n" in text
    assert text.endswith("````\n\nWhat?")
    assert command.main(["--model", "demo", "--file", "bad.pdf", "What?"]) == 1


def test_a_model_reads_them(folder, capsys):
    pytest.importorskip("torch")
    flags = ["--model", "demo", "--backend", "torch", "--temp", "0", "--max-tokens", "4", "--file", "two.pdf", "What?"]
    assert command.main(flags) == 0
    asked = "two.pdf:\n```\nPage one\n\nPage two\n```\n\nWhat?"
    with load("demo", backend="torch") as model:
        assert capsys.readouterr().out.strip() == model.generate(asked, temperature=0.0, max_tokens=4).text.strip()
