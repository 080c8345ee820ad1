"""This program's cache folder, and the conversions that are known there: what they were made of, and their last use.

They stand in a small JSON file, which names folders anywhere on the disk. It is a convenience: where it can't be read
or written, nothing else fails.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from g3n_mlx.failures import BadValue

logger = logging.getLogger(__name__)

_FILE = "models.json"
_DAMAGED = "models.damaged.json"
# Other processes hold the file for milliseconds.
_WAIT_S = 5
# A use within this time of the last one is not written down again.
_USE_STEP_S = 60


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a model's folder."""

    made_of: str | None = None  # a hub id, or the name of a folder or file; None where only the use is known
    slice_name: str | None = None  # None: all of what it was made of
    used: float | None = None  # seconds since 1970 at the last load


def cache_folder() -> Path:
    """The user's cache folder of this program; it may not exist yet."""
    return platformdirs.user_cache_path("g3n_mlx", appauthor=False)


def is_cached(folder: Path) -> bool:
    """Whether a folder lies below the cache folder."""
    return cache_folder().resolve() in folder.resolve().parents


def conversions() -> dict[Path, Entry]:
    """Every conversion in the cache, and those elsewhere that are registered, of which the folder may be gone."""
    entries = _read()
    found = {folder: entry for folder, entry in entries.items() if entry.made_of is not None and not is_cached(folder)}
    for config in sorted(cache_folder().glob("**/config.json")):
        if config.parent.name[0] != ".":  # of one under way
            found[config.parent] = entries.get(config.parent.resolve(), Entry())
    return found


def named(name: str) -> list[Path]:
    """The conversions whose folders have this name and are there."""
    return [folder for folder in conversions() if folder.name == name and (folder / "config.json").is_file()]


def last_use(folder: Path) -> float | None:
    """When a model was last loaded, in seconds since 1970, as far as that is known."""
    return _read().get(folder.resolve(), Entry()).used


def register(folder: Path, made_of: str, slice_name: str | None = None, source: Path | None = None) -> None:
    """Notes a folder that a conversion has filled. source: the folder it was made of, which may be a slice itself."""

    def add(entries: dict[Path, Entry]) -> None:
        before = Entry() if source is None else entries.get(source.resolve(), Entry())
        entries[folder.resolve()] = Entry(made_of, slice_name or before.slice_name)

    _change(add, _WAIT_S)


def note_use(folder: Path) -> None:
    """Notes that a model is loaded: a conversion or one of the hub's cache. Waits for nobody."""
    folder = folder.resolve()
    entry, now = _read().get(folder), time.time()
    of_hub = any(part.startswith("models--") for part in folder.parts)
    if entry is None and not of_hub and not is_cached(folder):
        return
    if entry is not None and entry.used is not None and 0 <= now - entry.used < _USE_STEP_S:
        return
    _change(lambda entries: entries.update({folder: replace(entries.get(folder, Entry()), used=now)}), 0)


def forget(folder: Path) -> None:
    """Takes a folder out of the registry."""
    _change(lambda entries: entries.pop(folder.resolve(), None), _WAIT_S)


def _read() -> dict[Path, Entry]:
    path = cache_folder() / _FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {Path(folder): _entry(fields) for folder, fields in raw["folders"].items()}
    except OSError:  # there is none, or it can't be read
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        kept = path.with_name(_DAMAGED)
        logger.warning("%s is damaged: the list of conversions starts anew, the file is now %s", path, kept.name)
        try:
            os.replace(path, kept)
        except OSError as error:
            logger.info("%s can't be renamed: %s", path, error)
        return {}


def _entry(fields: dict[str, Any]) -> Entry:
    entry = Entry(fields.get("made_of"), fields.get("slice_name"), fields.get("used"))
    words_are_text = all(isinstance(word, str | None) for word in (entry.made_of, entry.slice_name))
    if not words_are_text or not isinstance(entry.used, int | float | None):
        raise BadValue(f"an entry is {fields}")
    return entry


def _change(change: Callable[[dict[Path, Entry]], object], wait_s: float) -> None:
    """Rewrites the file, at once for all who read it; without a word to the user where that is not possible."""
    path = cache_folder() / _FILE
    lock, partial = path.with_name(f".{_FILE}.lock"), path.with_name(f".{_FILE}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()  # FileLock waits for a folder that can't be written to
        with FileLock(lock, timeout=wait_s):
            entries = _read()
            change(entries)
            kept = {str(folder): asdict(entry) for folder, entry in entries.items() if _is_worth_keeping(folder, entry)}
            partial.write_text(json.dumps({"folders": kept}, indent=1), encoding="utf-8")
            os.replace(partial, path)
    except (OSError, NotImplementedError) as error:  # the latter from a file system without locks
        logger.info("%s was not written: %s", path, error)


def _is_worth_keeping(folder: Path, entry: Entry) -> bool:
    """A folder outside the cache may be on a disk that is not there now."""
    return folder.is_dir() or (entry.made_of is not None and not is_cached(folder))
