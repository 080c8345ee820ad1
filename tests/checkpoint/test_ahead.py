"""Weights that are read ahead: everything that a first token of text needs, in pieces that Linux does read."""

import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from g3n_mlx.checkpoint.ahead import read_ahead
from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.checkpoint.names import TOWERS, canonical_name
from g3n_mlx.checkpoint.shards import open_shards
from g3n_mlx.config.manifest import PLE_TABLE

# Linux reads no more at a call unless the device asks for more.
READ_AT_A_CALL = 128 << 10


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges that the system is asked for."""
    ranges: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, start, count, advice: ranges.append((start, count)), raising=False
    )
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    return ranges


def wait_for_it() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("read-ahead"):
            thread.join(60)


def test_all_that_text_needs_is_asked_for_in_small_pieces(asked: list[tuple[int, int]]) -> None:
    read_ahead(demo_folder())
    wait_for_it()
    assert asked
    assert max(count for _, count in asked) <= READ_AT_A_CALL
    covered = {byte for start, count in asked for byte in range(start, start + count, 512)}
    shards, tensors = open_shards(demo_folder())
    for shard in shards:
        shard.close()
    for name, stored in tensors.items():
        left = canonical_name(name).startswith((PLE_TABLE, *TOWERS.values()))
        assert (stored.offset in covered) is not left, name
    assert sum(count for _, count in asked) == sum(
        stored.num_bytes
        for name, stored in tensors.items()
        if not canonical_name(name).startswith((PLE_TABLE, *TOWERS.values()))
    )


def test_nothing_is_read_ahead_that_memory_cannot_hold(
    asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    read_ahead(demo_folder())
    wait_for_it()
    assert not asked


def test_a_damaged_folder_is_left_to_who_opens_it(
    asked: list[tuple[int, int]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(demo_folder(), damaged)
    (damaged / "model.safetensors").write_bytes(b"no weights")
    read_ahead(damaged)
    read_ahead(tmp_path / "nowhere")
    wait_for_it()
    assert not asked
    assert capfd.readouterr().err == ""


def test_a_folder_is_not_read_ahead_where_the_system_has_no_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    before = threading.active_count()
    read_ahead(demo_folder())
    assert threading.active_count() == before
