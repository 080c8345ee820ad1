"""Files in messages: text as it is, PDF files through a process of their own."""

import base64

import pytest
from running import pdf

from g3n_mlx.media.document import document_text
from g3n_mlx.server import documents

pypdf = pytest.importorskip("pypdf")


def test_texts():
    assert document_text("\ufeffété".encode()) == "été"
    assert document_text(pdf("Hello there", pages=2)) == "Hello there\n\nHello there"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x00\x01\x02", "neither UTF-8 text nor a PDF"),
        (b"\xff\xfe\xfd", "neither UTF-8 text nor a PDF"),
        (b"  \n", "no text"),
        (b"%PDF-1.7\nnothing of the kind", "can't be read"),
        (pdf("x", pages=201), "201 pages, expected at most 200"),
        (pdf(" "), "no text"),
    ],
)
def test_what_has_no_text(data, words):
    with pytest.raises(ValueError, match=words):
        document_text(data)


def test_a_file_in_a_chat(server, client):
    file = {"file_data": base64.b64encode(pdf("What is 12 + 34?")).decode(), "filename": "question.pdf"}
    content = [{"type": "text", "text": text} for text in ("Look:", "And?", "Now.")]
    content.insert(1, {"type": "file", "file": file})
    found = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": content}], max_tokens=1
    )
    text = "Look:\n\nquestion.pdf:\n```\nWhat is 12 + 34?\n```\n\nAnd?"  # parts of text stay as they are
    same = [{"type": "text", "text": text}, content[-1]]
    with server.http() as http:
        body = {"messages": [{"role": "user", "content": same}]}
        assert found.usage.prompt_tokens == http.post("/v1/tokenize", json=body).json()["count"]


def test_files_are_bounded_by_number_and_text(server, monkeypatch):
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 1000)

    def refusal(text, number):
        file = {"file_data": base64.b64encode(text).decode(), "filename": "a.txt"}
        content = [{"type": "file", "file": file}] * number
        with server.http() as http:
            reply = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
        assert reply.status_code == 400, reply.text
        return reply.json()["error"]["message"]

    assert "the media cost 132, expected at most 128" in refusal(b"a", 33)
    assert "the files have more than 1000 characters" in refusal(b"a" * 300, 4)


def test_tokens_of_a_file_are_counted(server):
    file = {"file_data": base64.b64encode(b"Hello").decode(), "filename": "a.txt"}
    with server.http() as http:

        def count(part):
            return http.post("/v1/tokenize", json={"messages": [{"role": "user", "content": [part]}]}).json()["count"]

        assert count({"type": "file", "file": file}) == count({"type": "text", "text": "a.txt:\n```\nHello\n```"})
