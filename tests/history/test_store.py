"""What goes into the history comes out of it, whoever else writes and whatever happens to the file."""

import multiprocessing
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n_mlx.failures import BadValue, FileProblem
from g3n_mlx.history.record import Record
from g3n_mlx.history.store import History, without_bytes

letters = st.text(st.characters())  # with those that stand for the bytes of file names
parts = st.one_of(
    letters,
    st.builds(lambda text: {"type": "text", "text": text}, letters),
    st.builds(lambda name: {"type": "image", "image": f"/{name}"}, st.text(max_size=20)),
)
contents = st.one_of(st.text(), st.lists(parts, min_size=1, max_size=3))
pairs = st.tuples(contents, st.text())


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "data" / "history.db")


def messages(*said: tuple[Any, str]) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": content}
        for turn in said
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


@settings(max_examples=30)  # each waits for a disk
@given(st.lists(st.tuples(st.one_of(st.none(), st.text()), st.lists(pairs, max_size=4)), max_size=4))
def test_a_conversation_that_changes_in_any_way_is_kept_as_it_is(states):
    with tempfile.TemporaryDirectory() as folder:
        history = History(Path(folder) / "history.db")
        other = Record(history)
        other.update(None, messages(("other", "other")), "m")
        record = Record(history)
        for system, said in states:
            assert record.update(system, messages(*said), "m") is None
            kept = [history.find(str(entry.id)) for entry in history.entries() if entry.name != "other"]
            assert [entry.messages for entry in kept] == ([messages(*said)] if said else [])
        assert history.find("1").messages == messages(("other", "other"))


@settings(max_examples=30)
@given(system=st.one_of(st.none(), st.text(min_size=1)), said=st.lists(pairs, min_size=1, max_size=3))
def test_a_conversation_is_taken_up_where_it_was(system, said):
    with tempfile.TemporaryDirectory() as folder:
        history = History(Path(folder) / "history.db")
        Record(history).update(system, messages(*said[:-1], ("first", "answer")), "m")
        found = history.last()
        assert found.system == system
        record = Record(history)
        record.take_up(found)
        record.update(found.system, [*found.messages, *messages(said[-1])], "m")
        assert history.last().messages == messages(*said[:-1], ("first", "answer"), said[-1])
        assert len(history.entries()) == 1


def test_bytes_stay_out(history):
    image = {"type": "image", "image": "data:image/png;base64,QUJD"}
    nested = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD", "detail": "low"}}
    naked = {"type": "image", "base64": "A" * 5000}
    text = {"type": "text", "text": "data:" + "A" * 5000}
    content = [image, nested, naked, text, {"type": "audio", "audio": "/a.wav"}, "data:x"]
    record = Record(history)
    record.update(None, messages((content, "yes")), "m")
    assert history.last().messages[0]["content"] == [
        {"type": "image", "image": "data:,"},
        {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}},
        {"type": "image", "base64": "data:,"},
        text,
        {"type": "audio", "audio": "/a.wav"},
        "data:x",
    ]
    assert b"QUJD" not in history.path.read_bytes()
    record.update(None, messages((content, "yes"), ("more", "yes")), "m")
    assert len(history.last().turns) == 2


@given(contents)
def test_bytes_are_all_that_is_left_out(content):
    assert without_bytes(content) == content


@pytest.mark.skipif(os.name != "posix", reason="Windows has no modes")
def test_only_its_user_reads_it(history):
    before = os.umask(0)
    try:
        Record(history).update(None, messages(("a", "b")), "m")
    finally:
        os.umask(before)
    assert stat.S_IMODE(history.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.path.parent.stat().st_mode) == 0o700
    assert [path.name for path in history.path.parent.iterdir()] == ["history.db"]


def test_reading_makes_no_file(history):
    history.check()
    assert history.entries() == history.search("a") == []
    assert history.clear() == 0
    for ask in (history.last, lambda: history.find("1"), lambda: history.find("sky")):
        with pytest.raises(BadValue, match="there is no conversation"):
            ask()
    assert not history.path.parent.exists()


def test_what_is_removed_is_overwritten(history):
    first, second = Record(history), Record(history)
    first.update("a secret", messages(("secret", "secret " * 2000)), "m")
    second.update(None, messages(("open", "open")), "m")
    size = history.path.stat().st_size
    history.remove([1])
    assert b"secret" not in history.path.read_bytes()
    assert history.path.stat().st_size < size
    assert [entry.id for entry in history.entries()] == [2]
    # An id means one conversation for ever.
    history.remove([2])
    second.begin()
    second.update(None, messages(("new", "new")), "m")
    assert [entry.id for entry in history.entries()] == [3]


def test_a_removed_conversation_does_not_come_back(history):
    record = Record(history)
    record.update(None, messages(("a", "b")), "m")
    assert history.clear() == 1
    assert "was removed" in str(record.update(None, messages(("a", "b"), ("c", "d")), "m"))
    assert record.update(None, messages(("a", "b"), ("c", "d"), ("e", "f")), "m") is None
    assert history.entries() == []
    record.begin()
    record.update(None, messages(("g", "h")), "m")
    assert len(history.entries()) == 1


def test_two_chats_that_go_on_with_one_conversation_lose_nothing(history):
    Record(history).update(None, messages(("a", "b")), "m")
    one, two = Record(history), Record(history)
    one.take_up(history.last())
    two.take_up(history.last())
    one.update(None, messages(("a", "b"), ("one", "1")), "m")
    assert "kept as 2" in str(two.update(None, messages(("a", "b"), ("two", "2")), "m"))
    assert two.update(None, messages(("a", "b"), ("two", "2"), ("three", "3")), "m") is None
    assert history.find("1").messages == messages(("a", "b"), ("one", "1"))
    assert history.find("2").messages == messages(("a", "b"), ("two", "2"), ("three", "3"))
    # Taking all of it back in one chat is not for the other.
    one.take_up(history.find("2"))
    two.update(None, messages(("a", "b"), ("two", "2")), "m")
    assert one.update(None, [], "m") is None
    assert len(history.entries()) == 2


def write_many(path: Path, name: str) -> None:
    record = Record(History(path))
    said: list[tuple[Any, str]] = []
    for index in range(20):
        said.append((f"{name} {index}", "answer"))
        record.update(None, messages(*said), "m")


def test_two_writers_at_once(history):
    """From the very beginning: both may create the file."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(history.path, name)) for name in ("one", "two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    for entry in history.entries():
        said = history.find(str(entry.id)).messages[::2]
        name = entry.name.split()[0]
        assert [message["content"] for message in said] == [f"{name} {index}" for index in range(20)]
    assert len(history.entries()) == 2


WRITER = """
import sys
from pathlib import Path
from g3n_mlx.history.record import Record
from g3n_mlx.history.store import History
record, said = Record(History(Path(sys.argv[1]))), []
for index in range(100_000):
    said += [{"role": "user", "content": str(index)}, {"role": "assistant", "content": "x" * 3000}]
    record.update(None, said, "m")
    print(index, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
@pytest.mark.parametrize("after", [0, 3, 11])
def test_a_killed_writer_loses_at_most_the_turn_in_progress(history, after):
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(history.path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        while int(child.stdout.readline()) < after:
            pass
        child.send_signal(signal.SIGKILL)
        written = [int(line) for line in child.stdout]
    last = written[-1] if written else after
    questions = [message["content"] for message in history.last().messages[::2]]
    assert questions == [str(index) for index in range(len(questions))]
    assert len(questions) in (last + 1, last + 2)
    with sqlite3.connect(history.path) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def damage_text(path: Path) -> None:
    path.write_text("no database, but a letter\n" * 100)


def damage_pages(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100:] = b"\xa5" * (len(data) - 100)
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def drop_a_table(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE turns")


def no_json(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE turns SET question = '{'")


def newer(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 2")


def of_something_else(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE turns (x)")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_text, "is damaged .*move it away"),
        (damage_pages, "is damaged .*move it away"),
        (cut, "is damaged .*move it away"),
        (drop_a_table, "is damaged .*move it away"),
        (no_json, "is damaged .*move it away"),
        (newer, "by a newer g3n-mlx .*upgrade"),
        (of_something_else, "of something else; move it away"),
    ],
)
def test_a_file_that_is_no_history_is_said_and_left_as_it_is(history, damage, words):
    record = Record(history)
    record.update(None, messages(("a", "b" * 9000)), "m")
    damage(history.path)
    before = history.path.read_bytes()
    with pytest.raises(BadValue, match=f"{history.path.name} .*{words}"):
        history.entries()
    if damage is not no_json:
        with pytest.raises(BadValue, match=words):
            history.check()
        with pytest.raises(BadValue, match=words):
            record.update(None, messages(("a", "b" * 9000), ("c", "d")), "m")
        assert history.path.read_bytes() == before


def test_what_could_not_be_written_is_written_later(tmp_path):
    (tmp_path / "data").write_text("a file in the folder's place")
    history = History(tmp_path / "data" / "history.db")
    record = Record(history)
    with pytest.raises(FileProblem, match=r"history\.db can't be used: "):
        record.update(None, messages(("a", "b")), "m")
    (tmp_path / "data").unlink()
    record.update(None, messages(("a", "b"), ("c", "d")), "m")
    assert history.last().messages == messages(("a", "b"), ("c", "d"))


def test_a_writer_that_takes_too_long_is_no_damage(history, monkeypatch):
    monkeypatch.setattr("g3n_mlx.history.store.BUSY_S", 0.05)
    record = Record(history)
    record.update(None, messages(("a", "b")), "m")
    with sqlite3.connect(history.path, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(FileProblem, match="locked"):
            record.update(None, messages(("a", "b"), ("c", "d")), "m")
    other.close()
    record.update(None, messages(("a", "b"), ("c", "d")), "m")
    assert len(history.last().turns) == 2


def test_the_last_is_the_one_that_was_spoken_in_last(history):
    one, two = Record(history), Record(history)
    one.update(None, messages(("one", "1")), "m")
    two.update(None, messages(("two", "2")), "m")
    one.update(None, messages(("one", "1"), ("more", "1")), "m")
    assert history.last().id == 1
    assert [(entry.id, entry.questions) for entry in history.entries()] == [(1, 2), (2, 1)]
