"""The models on this machine: conversions, wherever they are, and what the hub's cache has of Gemma 3n."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from g3n_mlx.checkpoint import registry
from g3n_mlx.checkpoint.hub import snapshots_here
from g3n_mlx.config.fields import read_json
from g3n_mlx.failures import BadValue, FileProblem, MissingFile, size_in_words

_HEADER = ("NAME", "SIZE", "SLICE", "BITS", "LAST USE", "FOLDER")


@dataclass(frozen=True, slots=True)
class Model:
    """A model's folder and what is known of it."""

    name: str  # what --model takes: a conversion's own name, or a hub id
    folder: Path
    num_bytes: int | None  # of its files; None where the folder is gone
    slice_name: str | None  # "whole" for all of the source; None where it is not known
    bits: int | None  # that most quantized modules have; None where none is quantized, or the folder is gone
    used: float | None  # seconds since 1970 at the last load that is known


def models() -> list[Model]:
    """All of them, the last used first; those that were never loaded follow by their age."""
    found = [
        _described(folder.name, folder, entry.slice_name or (entry.made_of and "whole"), entry.used)
        for folder, entry in registry.conversions().items()
    ]
    found += [_described(hub_id, folder, None, registry.last_use(folder)) for folder, hub_id in snapshots_here()]
    return sorted(found, key=lambda model: (model.used or 0.0, _made(model.folder)), reverse=True)


def table(found: Sequence[Model]) -> list[str]:
    """The models in lines, one each below a header."""
    rows = [_HEADER, *(_row(model) for model in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def remove(name: str) -> str:
    """Deletes a conversion below the cache folder, or forgets one that lies elsewhere; returns what was done.

    name: of the folder, or the folder itself. Raises FileNotFoundError or ValueError when no conversion, or more than
    one, has the name, and OSError when it can't be deleted.
    """
    folder = _conversion(name)
    if not registry.is_cached(folder):
        registry.forget(folder)
        if not folder.is_dir():
            return f"forgot {folder}, which was gone"
        return f"forgot {folder}, which is not in the cache: its files stay where they are"
    size = _num_bytes(folder)
    # A name of its own first: what is left of a deletion that was stopped is never taken for a whole model.
    doomed = folder.with_name(f".{folder.name}.deleted")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise FileProblem(f"{folder} can't be deleted ({reason}): is a program using it?") from error
    registry.forget(folder)
    return f"deleted {folder}, {size_in_words(size)}"


def _conversion(name: str) -> Path:
    path = Path(name).expanduser().resolve()
    every = list(registry.conversions())
    found = [folder for folder in every if folder.resolve() == path] or [f for f in every if f.name == name]
    if len(found) > 1:
        raise BadValue(f"{name!r} is the name of {len(found)} conversions, give a folder: {', '.join(map(str, found))}")
    if found:
        return found[0]
    if any(hub_id == name for _, hub_id in snapshots_here()):
        raise BadValue(f"{name} is in the cache of the Hugging Face hub: `hf cache rm model/{name}` deletes it")
    raise MissingFile(f"no conversion is called {name!r}: `g3n models` lists those that are known")


def _described(name: str, folder: Path, slice_name: str | None, used: float | None) -> Model:
    here = (folder / "config.json").is_file()
    return Model(name, folder, _num_bytes(folder) if here else None, slice_name, _bits(folder), used)


def _bits(folder: Path) -> int | None:
    try:
        return read_json(folder / "config.json")["quantization"]["bits"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _made(folder: Path) -> float:
    config = folder / "config.json"
    return config.stat().st_mtime if config.is_file() else 0.0


def _row(model: Model) -> tuple[str, ...]:
    size, bits = "gone", "-"
    if model.num_bytes is not None:
        size, bits = size_in_words(model.num_bytes), "dense" if model.bits is None else str(model.bits)
    used = "-" if model.used is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(model.used))
    return model.name, size, model.slice_name or "-", bits, used, str(model.folder)
