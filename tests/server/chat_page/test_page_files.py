"""Text and PDF files on the chat page."""

import base64
import io

import pytest
from asking import answering, ask, drop, saying
from playwright.sync_api import expect
from running import pdf


def test_a_text_file_is_attached(visit, server):
    page = visit(server.url)
    asked = saying(page, "Yes.")
    drop(page, "notes.md", "text/markdown", b"Apples are red.")
    expect(page.locator("#chosen .chip")).to_contain_text("notes.md")
    ask(page, "Read this")
    file = asked[0]["messages"][0]["content"][0]["file"]
    assert file["filename"] == "notes.md"
    assert base64.b64decode(file["file_data"].split(",")[1]) == b"Apples are red."


def test_the_pages_of_a_pdf_are_read(visit, server):
    pytest.importorskip("pypdf")
    page = visit(server.url)
    answering(page, max_tokens=1)
    sizes = []
    for count, pages in enumerate((1, 3), 1):
        file = {"name": "sums.pdf", "mimeType": "application/pdf", "buffer": pdf("What is 12 + 34?", pages)}
        page.set_input_files("#files", file)
        ask(page, "Answer")
        expect(page.locator(".question .chip")).to_have_text("sums.pdf")
        sizes.append(page.evaluate("branch().at(-1).usage.prompt_tokens"))
        page.click("#new")
        expect(page.locator(".answer")).to_have_count(0)
        assert page.evaluate("remembered.conversations.size") == count
    with server.http() as http:
        body = {"messages": [{"role": "user", "content": "\n\nWhat is 12 + 34?" * 2}]}
        more = http.post("/v1/tokenize", json=body).json()["count"]
    assert sizes[0] < sizes[1] <= sizes[0] + more


def encrypted(algorithm: str) -> bytes:
    pypdf = pytest.importorskip("pypdf")
    pytest.importorskip("cryptography")
    writer, written = pypdf.PdfWriter(pypdf.PdfReader(io.BytesIO(pdf("secret")))), io.BytesIO()
    writer.encrypt("sesame", algorithm=algorithm)
    writer.write(written)
    return written.getvalue()


def test_a_file_that_cannot_be_read_is_one_clear_message(visit, server):
    page = visit(server.url)
    said = {}
    files = {
        "locked.pdf": encrypted("RC4-128"),
        "aes.pdf": encrypted("AES-256"),
        "long.pdf": pdf("x", pages=201),
        "cut.pdf": pdf("Hello")[:200],
        "scan.pdf": pdf(" "),
        "book.txt": b"one word after the other " * 20_000,
        "huge.txt": b"x" * (5 << 20),
        "program.py": bytes(range(256)),
    }
    for count, (name, content) in enumerate(files.items(), 1):
        drop(page, name, "", content)
        answer = ask(page, f"Read {name}", count)
        said[name] = answer.locator(".error").inner_text()
        # It is left out, so that the next question is answered.
        expect(answer.locator(".figures")).to_contain_text("left out of the conversation")
    saying(page, "Yes.")
    assert ask(page, "And now?", len(files) + 1).locator(".words").inner_text() == "Yes."
    expected = {
        "locked.pdf": "locked.pdf: the PDF can't be read: it is encrypted",
        "aes.pdf": "it is encrypted",
        "long.pdf": "201 pages, expected at most 200",
        "cut.pdf": "can't be read",
        "scan.pdf": "no text",
        "book.txt": "tokens",
        "huge.txt": "longer than 4 MiB",
        "program.py": "neither UTF-8 text nor a PDF",
    }
    for name, words in expected.items():
        assert words in said[name]
        assert "messages[" not in said[name]
        assert "\n" not in said[name]
