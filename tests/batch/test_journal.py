"""The file of results: lines whole, errors taken out to be tried again, one writer at a time."""

import json

import pytest

from g3n_mlx.batch.journal import Journal


def line(custom_id, error=None):
    return {"id": "batch_req_x", "custom_id": custom_id, "response": {"status_code": 200, "body": {}}, "error": error}


ERROR = {"code": "e", "message": "m"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


def test_a_later_run_knows_what_is_done(path):
    with Journal(path) as journal:
        journal.append(line("a"))
        journal.append(line("b\n\u2028ü", ERROR))
    with Journal(path) as journal:
        assert journal.done == {"a", "b\n\u2028ü"}
        assert journal.failed == 1
        assert [found["custom_id"] for found in journal.lines()] == ["a", "b\n\u2028ü"]
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, f".{path.name}.lock"}


@pytest.mark.parametrize("torn", [b'{"id": "batch_req_x", "custom', b"{", b'{"id": "batch_req_' + b"x" * (3 << 20)])
def test_a_torn_line_is_cut_off(path, torn):
    with Journal(path) as journal:
        journal.append(line("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with Journal(path) as journal:
        assert journal.done == {"a"}
        journal.append(line("b"))
    assert path.read_bytes().startswith(whole)
    assert [json.loads(text)["custom_id"] for text in path.read_text().splitlines()] == ["a", "b"]
    path.write_bytes(torn)
    with Journal(path) as journal:
        assert not journal.done
    assert path.read_bytes() == b""


def test_errors_are_taken_out_to_be_tried_again(path):
    with Journal(path) as journal:
        for number in range(6):
            journal.append(line(str(number), ERROR if number % 2 else None))
    with Journal(path, retry_errors=True) as journal:
        assert journal.done == {"0", "2", "4"}
        assert journal.failed == 0
        journal.append(line("1"))
    assert [json.loads(text)["custom_id"] for text in path.read_text().splitlines()] == ["0", "2", "4", "1"]


@pytest.mark.parametrize("text", ["[1]\n", "{}\n", "custom_id\n", '{"custom_id": "a", "body": {}}\n'])
def test_a_file_of_something_else_is_left_alone(path, text):
    path.write_text(text)
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: this is not a result of a batch"):
        Journal(path)
    assert path.read_text() == text


def test_one_writer_at_a_time(path):
    with Journal(path), pytest.raises(OSError, match="is being written by another run"):
        Journal(path)
    with Journal(path):
        pass


@pytest.mark.parametrize("data", [b'{"settings": 1}', b"a note without an end", b'{"id": "other"'])
def test_a_file_of_another_kind_stays_as_it_is(tmp_path, data):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="does not end in a result of a batch"):
        Journal(path)
    assert path.read_bytes() == data
