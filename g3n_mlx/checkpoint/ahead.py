"""Weights on their way from the disk while Python imports and the tokenizer is read."""

import os
import threading
from contextlib import suppress
from pathlib import Path

import psutil

from g3n_mlx.checkpoint.names import TOWERS, canonical_name
from g3n_mlx.checkpoint.shards import open_shards
from g3n_mlx.config.manifest import PLE_TABLE


def read_ahead(folder: Path) -> None:
    """Begins to read a checkpoint's text weights into the system's cache, in a thread of its own; returns at once.

    Nothing happens where the system can't be asked for that (macOS, Windows), or where memory is too small. What is
    wrong with the files is left to whoever opens them.
    """
    name = f"read-ahead {folder}"
    if hasattr(os, "posix_fadvise") and all(thread.name != name for thread in threading.enumerate()):
        threading.Thread(target=_read, args=(folder,), name=name, daemon=True).start()


def _read(folder: Path) -> None:
    with suppress(OSError, ValueError):
        shards, tensors = open_shards(folder)
        try:
            wanted = [stored for name, stored in tensors.items() if not _stays_on_disk(canonical_name(name))]
            if sum(stored.num_bytes for stored in wanted) > psutil.virtual_memory().available:
                return
            for stored in sorted(wanted, key=lambda stored: (stored.shard.path, stored.offset)):
                stored.shard.read_ahead(stored.offset, stored.num_bytes)
        finally:
            for shard in shards:
                shard.close()


def _stays_on_disk(name: str) -> bool:
    """Whether a start needs nothing of a tensor, or a few rows: the PLE table, and towers without media."""
    return name.startswith((PLE_TABLE, *TOWERS.values()))
