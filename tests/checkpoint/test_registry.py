"""What is known of conversions: kept in one file, by several processes at once, and never in anybody's way."""

import json
import logging
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from g3n_mlx.checkpoint import registry
from g3n_mlx.checkpoint.registry import Entry


@pytest.fixture
def made(tmp_path):
    """made(name): a folder with a config, as conversions leave them."""

    def folder(name):
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
        return path

    return folder


def test_conversions_are_known_wherever_they_are(cache_folder, made, tmp_path):
    outside, cached, hidden = made("work/e4b"), made("cache/conversions/e2b-4bit"), made("cache/conversions/.x.partial")
    assert registry.conversions() == {cached: Entry()}  # of a version that did not register
    registry.register(outside, "google/gemma-3n-E4B-it", "E2B")
    registry.register(cached, "e4b", None, outside)
    assert registry.conversions() == {
        outside: Entry("google/gemma-3n-E4B-it", "E2B"),
        cached: Entry("e4b", "E2B"),  # made of a slice, so one itself
    }
    assert (registry.named("e4b"), registry.named("e4"), registry.named(hidden.name)) == ([outside], [], [])
    registry.forget(outside)
    assert list(registry.conversions()) == [cached]
    assert sorted(path.name for path in cache_folder.iterdir() if path.name[0] != ".") == ["conversions", "models.json"]


def test_a_use_is_noted_of_what_is_known(cache_folder, made, tmp_path):
    known, other = made("known"), made("other")
    snapshot, cached = made("hub/models--a--b/snapshots/0"), made("cache/conversions/c")
    registry.register(known, "x", "half")
    before = time.time()
    for folder in (known, other, snapshot, cached):
        registry.note_use(folder)
    assert registry.last_use(other) is None
    assert all(before <= registry.last_use(folder) <= time.time() for folder in (known, snapshot, cached))
    assert registry.conversions()[known].slice_name == "half"
    assert snapshot not in registry.conversions()


def test_a_use_is_written_once_a_minute(cache_folder, made, monkeypatch):
    registry.register(folder := made("a"), "x")
    registry.note_use(folder)
    first, now = registry.last_use(folder), time.time()
    registry.note_use(folder)
    assert registry.last_use(folder) == first
    monkeypatch.setattr(registry.time, "time", lambda: now + 3600)
    registry.note_use(folder)
    assert registry.last_use(folder) == now + 3600
    monkeypatch.setattr(registry.time, "time", lambda: now - 3600)  # the clock was put back
    registry.note_use(folder)
    assert registry.last_use(folder) == now - 3600


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"folders": []}', '{"folders": {"/x": 3}}', '{"folders": {"/x": {"used": "now"}}}', "\xff"],
)
def test_a_damaged_file_is_told_once_and_begun_anew(cache_folder, made, caplog, text):
    cache_folder.mkdir()
    (cache_folder / "models.json").write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert registry.conversions() == {}
        assert registry.conversions() == {}
    (record,) = caplog.records
    assert "models.json is damaged: the list of conversions starts anew" in record.message
    assert (cache_folder / "models.damaged.json").read_bytes() == text.encode("latin-1")
    registry.register(folder := made("a"), "x")
    assert registry.conversions() == {folder: Entry("x")}


def test_what_a_later_version_adds_is_passed_over(cache_folder, made):
    cache_folder.mkdir()
    raw = {"folders": {str(folder := made("a")): {"made_of": "x", "colour": "red"}}, "more": 1}
    (cache_folder / "models.json").write_text(json.dumps(raw))
    assert registry.conversions() == {folder: Entry("x")}


def test_a_cache_that_can_not_be_written_to_is_no_error(cache_folder, made, caplog):
    cache_folder.write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING):
        registry.register(folder := made("a"), "x")
        registry.note_use(folder)
        registry.forget(folder)
        assert registry.conversions() == {}
    assert not caplog.records


def test_a_load_waits_for_nobody(cache_folder, made):
    registry.register(folder := made("a"), "x")
    with FileLock(cache_folder / ".models.json.lock"):
        start = time.monotonic()
        registry.note_use(folder)
        assert time.monotonic() - start < registry._WAIT_S / 2
    assert registry.last_use(folder) is None


def test_folders_that_are_gone(cache_folder, made):
    outside, cached, snapshot = made("a"), made("cache/conversions/b"), made("models--a--b/snapshots/0")
    registry.register(outside, "x")
    registry.register(cached, "x")
    registry.note_use(snapshot)
    for folder in (outside, cached, snapshot):
        (folder / "config.json").unlink()
        folder.rmdir()
    assert list(registry.conversions()) == [outside]  # perhaps on a disk that comes back
    registry.register(made("c"), "x")
    assert len(json.loads((cache_folder / "models.json").read_text())["folders"]) == 2
    assert registry.named("a") == []


def test_processes_that_register_at_once(cache_folder, made, tmp_path):
    folders = [made(f"f{index}") for index in range(8)]
    code = f"""
import sys, pathlib, platformdirs
platformdirs.user_cache_path = lambda *_, **__: pathlib.Path({str(cache_folder)!r})
from g3n_mlx.checkpoint import registry
for name in sys.argv[1:]:
    registry.register(pathlib.Path(name), "x")
"""
    running = [subprocess.Popen([sys.executable, "-c", code, *map(str, folders[i::2])]) for i in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert set(registry.conversions()) == set(folders)
