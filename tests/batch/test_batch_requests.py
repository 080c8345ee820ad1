"""Lines of a batch file, one question about many files, and the order in which they run."""

import json

import pytest

from g3n_mlx.batch.journal import Journal
from g3n_mlx.batch.question import FilesOfQuestion, Question, kind_of
from g3n_mlx.batch.requests import Request, RequestFile
from g3n_mlx.batch.run import pending

GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}


def file_of(tmp_path, *lines):
    path = tmp_path / "requests.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return RequestFile(path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{broken", "the line is not JSON"),
        (b"\xff\xfe", "the line is not JSON"),
        (b"[" * 100_000, "the line is not JSON"),
        ([1], "the line is not a JSON object"),
        ({**GOOD, "custom_id": ""}, "custom_id is ''"),
        ({**GOOD, "custom_id": 5}, "custom_id is 5"),
        ({**GOOD, "method": "GET"}, "method is 'GET'"),
        ({**GOOD, "url": "/v1/embeddings"}, "url is '/v1/embeddings', expected one of /v1/chat/completions"),
        ({**GOOD, "body": "x"}, "body is 'x'"),
        ({**GOOD, "body": {"prompt": "x", "stream": True}}, "stream is set"),
    ],
)
def test_a_line_that_is_no_request_says_why(tmp_path, line, problem):
    source = file_of(tmp_path, b"", {**GOOD, "custom_id": "first"}, line)
    entries = source.entries()
    assert len(entries) == 2
    assert source.request(entries[0]).problem is None
    found = source.request(entries[1])
    assert problem in (found.problem or "")
    assert found.custom_id in ("line-3", "a")


def test_two_requests_need_two_ids(tmp_path):
    with pytest.raises(ValueError, match=r"lines 1 and 3 have the custom_id 'a'"):
        file_of(tmp_path, GOOD, b"{broken", GOOD).entries()


@pytest.mark.parametrize("lines", [(b"", b"  "), (b"# A title", b"", b"And [text]."), (b"[1]", b"{broken")])
def test_a_file_of_something_else(tmp_path, lines):
    with pytest.raises(ValueError, match="has no requests"):
        file_of(tmp_path, *lines).entries()


def chat(custom_id, *texts):
    messages = [{"role": role, "content": text} for role, text in zip(("system", "user"), texts, strict=False)]
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": {"messages": messages}}


def test_prompts_that_begin_alike_run_next_to_each_other(tmp_path):
    lines = [chat(f"{i}", f"You are {'a cook' if i % 2 else 'a tailor'}.", f"Question {i}") for i in range(6)]
    source = file_of(tmp_path, *lines)
    with Journal(tmp_path / "results.jsonl") as journal:
        order = [int(entry.custom_id) for entry in pending(source, journal)]
        assert order == [1, 3, 5, 0, 2, 4]
        assert [source.request(entry).body for entry in pending(source, journal)] == [lines[i]["body"] for i in order]
        journal.append({"custom_id": "3", "response": {}, "error": None})
        assert [int(entry.custom_id) for entry in pending(source, journal)] == [1, 5, 0, 2, 4]


def test_kinds_of_files():
    names = {"image": "a.JPG b.webp c.heic d.tif", "audio": "a.mp3 b.opus c.flac d.WAV e.m4a", "video": "a.mp4 b.mkv"}
    for kind, listed in names.items():
        assert {kind_of(f"folder.x/{name}") for name in listed.split()} == {kind}
    assert kind_of("notes.txt") is None
    assert kind_of("jpg") is None


def test_files_by_globs(tmp_path):
    for name in ("a.jpg", "deep/er/b.png", "deep/notes.txt", "c.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    question = Question("What?", "Be brief.", {"type": "object"}, max_tokens=5, temperature=0.0)
    missing = str(tmp_path / "no.jpg")
    source = FilesOfQuestion(question, [str(tmp_path / "**"), str(tmp_path / "*.jpg"), missing])
    paths = [str(tmp_path / name) for name in ("a.jpg", "c.wav", "deep/er/b.png")]
    assert [entry.custom_id for entry in source.entries()] == [*paths, missing]
    assert source.skipped == 4  # three folders and the notes
    body = source.request(source.entries()[1]).body
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["messages"][1]["content"][0] == {"type": "audio_url", "audio_url": {"url": paths[1]}}
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert (body["max_tokens"], body["temperature"], "seed" in body) == (5, 0.0, False)
    with pytest.raises(ValueError, match="matches no file"):
        FilesOfQuestion(question, [str(tmp_path / "*.gif")])
    with pytest.raises(ValueError, match="none of the 1 files is an image"):
        FilesOfQuestion(question, [str(tmp_path / "deep/notes.txt")])


def test_nested_content_is_sorted_as_any_other():
    content = "x"
    for _ in range(700):
        content = [content]
    line = json.dumps({"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": content}})
    assert Request.of_line(line.encode(), 1).beginning == "/v1/chat/completions x"
