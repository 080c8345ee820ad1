"""Writes a checkpoint folder: shards filled by all cores, index, config, and the small files beside them.

Only the blocks in progress are in memory. The folder is filled under a temporary name and renamed at the end, so a
folder with the final name is complete.
"""

import json
import os
import shutil
import sys
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from g3n_mlx.checkpoint.files import INDEX, WHOLE
from g3n_mlx.checkpoint.shards import DTYPES
from g3n_mlx.config.adapter import SETTINGS as ADAPTER_SETTINGS
from g3n_mlx.convert.quantize import Output, TensorJob
from g3n_mlx.failures import FileInTheWay, FileProblem, NotPermitted, size_in_words
from g3n_mlx.matformer.table import OWN_TABLE

# As Hugging Face splits.
MAX_SHARD_BYTES = 5_000_000_000
# Source bytes that a thread reads, converts and writes at once.
_BLOCK_BYTES = 4 << 20
# Small files that belong to a model, besides its weights and config.json.
_SIDECARS = ("*.json", "*.jinja", "*.model", "LICENSE*", "NOTICE*")


class _ShardFile:
    """A safetensors file whose tensors may be written in any order, from any thread."""

    def __init__(self, path: Path, outputs: Iterable[Output]):
        raw, places, end = _header(outputs)
        start = 8 + len(raw)
        self._places = {name: start + place for name, place in places.items()}
        self._lock = threading.Lock()
        self._file = path.open("wb", buffering=0)
        self._file.write(len(raw).to_bytes(8, "little") + raw)
        self._file.truncate(start + end)

    def write(self, output: Output, first_row: int, rows: np.ndarray) -> None:
        """Writes some rows of a tensor."""
        row_bytes = output.num_bytes // output.shape[0] if output.shape else 0
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        with self._lock:  # Windows has no pwrite: seek and write belong together
            self._file.seek(self._places[output.name] + first_row * row_bytes)
            while len(data):
                data = data[self._file.write(data) :]

    def close(self) -> None:
        self._file.close()


def _header(outputs: Iterable[Output]) -> tuple[bytes, dict[str, int], int]:
    """The header of a file, where each tensor begins behind it, and where the last one ends."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    # Wide types first, so that every tensor is aligned.
    for output in sorted(outputs, key=lambda output: -DTYPES[output.dtype].itemsize):
        places[output.name] = end
        end += output.num_bytes
        offsets = [places[output.name], end]
        header[output.name] = {"dtype": output.dtype, "shape": output.shape, "data_offsets": offsets}
    raw = json.dumps(header, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8), places, end


@dataclass(frozen=True, slots=True)
class _Block:
    job: TensorJob
    shard: _ShardFile
    start: int
    stop: int

    def run(self) -> int:
        """Converts the block; returns the source bytes that are done."""
        for output, rows in zip(self.job.outputs, self.job.produce(self.start, self.stop), strict=True):
            self.shard.write(output, self.start, rows)
        return self.job.source_bytes * (self.stop - self.start) // self.job.num_rows


def check_space(folder: Path, jobs: Iterable[TensorJob]) -> int:
    """The bytes that a conversion will write; raises OSError when the disk has less room."""
    needed = sum(output.num_bytes for job in jobs for output in job.outputs)
    parent = next(path for path in folder.absolute().parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise FileProblem(f"{folder} needs {size_in_words(needed)}, {parent} has {size_in_words(free)} free")
    return needed


@contextmanager
def appearing_folder(
    folder: Path, wait_for_others: bool, otherwise: str = "choose another place for the output folder"
) -> Generator[Path]:
    """A folder to fill, which gets its name when the block succeeds and is removed when it fails.

    Leftovers of a killed run are removed first. Raises FileExistsError when the name is taken, or when another
    process is filling it and wait_for_others is false. PermissionError when its parent is not writable; its
    message ends with `otherwise`, what the user can do.
    """
    folder = folder.absolute()
    partial = folder.parent / f".{folder.name}.partial"
    lock_file = folder.parent / f".{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock_file.touch()  # FileLock reports a folder that cannot be written to as locked
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "it is no folder" if in_the_way else (error.strerror or str(error)).lower()
        raise NotPermitted(f"{folder.parent} can't be written to ({reason}): {otherwise}") from None
    lock = FileLock(lock_file, timeout=-1 if wait_for_others else 0)
    try:
        lock.acquire()
    except Timeout:
        raise FileInTheWay(f"another process is writing {folder} right now") from None
    try:
        check_free_name(folder)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            yield partial
            if folder.exists():
                folder.rmdir()  # an empty one; Windows does not rename onto it
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        if sys.platform != "win32":  # there an open file cannot be removed, and releasing the lock removes it
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def check_free_name(folder: Path) -> None:
    """Raises FileExistsError unless a folder of this name can be made."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileInTheWay(f"{folder} exists already; choose another output folder, or remove it")


def write_shards(
    folder: Path, jobs: Sequence[TensorJob], progress: bool, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Runs all jobs into model.safetensors, or into numbered shards and their index."""
    groups = _named_groups(jobs, max_shard_bytes)
    with ExitStack() as opened:
        blocks: list[_Block] = []
        for name, group in groups.items():
            shard = _ShardFile(folder / name, (output for job in group for output in job.outputs))
            opened.callback(shard.close)
            blocks += (block for job in group for block in _blocks(job, shard))
        total = sum(job.source_bytes for job in jobs)
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="converting", disable=not progress, mininterval=0.5
        ) as bar:
            for done in _run_all(blocks):
                bar.update(done)
    if len(groups) > 1:
        write_json(folder / INDEX, _index(groups))


def num_bytes_written(jobs: Sequence[TensorJob], max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """The size of the files that `write_shards` makes."""
    groups = _named_groups(jobs, max_shard_bytes)
    headers = [_header(output for job in group for output in job.outputs) for group in groups.values()]
    size = sum(8 + len(raw) + end for raw, _, end in headers)
    return size + (len(json_bytes(_index(groups))) if len(groups) > 1 else 0)


def _named_groups(jobs: Sequence[TensorJob], max_shard_bytes: int) -> dict[str, list[TensorJob]]:
    """What goes into each file."""
    groups = list(_split(jobs, max_shard_bytes))
    if len(groups) == 1:
        return {WHOLE: groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": group for number, group in enumerate(groups, 1)}


def _index(groups: Mapping[str, Sequence[TensorJob]]) -> dict[str, Any]:
    outputs = {output.name: (name, output) for name, group in groups.items() for job in group for output in job.outputs}
    size = sum(output.num_bytes for _, output in outputs.values())
    weight_map = {output: name for output, (name, _) in sorted(outputs.items())}
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def copy_sidecars(source: Path, folder: Path, whole: bool) -> None:
    """Tokenizer, chat template, generation and processor settings, licence; of a whole model its slices too."""
    for path in sidecars(source, whole):
        shutil.copyfile(path, folder / path.name)


def sidecars(source: Path, whole: bool) -> Iterator[Path]:
    """The files that `copy_sidecars` copies."""
    for pattern in (*_SIDECARS, *([OWN_TABLE] if whole else [])):
        for path in source.glob(pattern):
            left = path.name in ("config.json", INDEX, ADAPTER_SETTINGS) or path.name.startswith(".")
            if path.is_file() and not left:
                yield path


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON as the published files have it."""
    path.write_bytes(json_bytes(value))


def json_bytes(value: dict[str, Any]) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=2) + "\n").encode()


def _split(jobs: Sequence[TensorJob], max_bytes: int) -> Iterator[list[TensorJob]]:
    """Groups that fit a shard; the tensors of one weight stay together."""
    group: list[TensorJob] = []
    filled = 0
    for job in jobs:
        size = sum(output.num_bytes for output in job.outputs)
        if group and filled + size > max_bytes:
            yield group
            group, filled = [], 0
        group.append(job)
        filled += size
    if group:
        yield group


def _blocks(job: TensorJob, shard: _ShardFile) -> Iterator[_Block]:
    step = max(job.least_rows, _BLOCK_BYTES * job.num_rows // max(1, job.source_bytes))
    for start in range(0, job.num_rows, step):
        yield _Block(job, shard, start, min(start + step, job.num_rows))


def _run_all(blocks: Iterable[_Block]) -> Iterator[int]:
    """Runs blocks on all cores (numpy's loops and file calls release the GIL); yields bytes done."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending: set[Future[int]] = set()
        try:
            for block in blocks:
                if len(pending) >= 2 * workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
                pending.add(pool.submit(block.run))
            for future in pending:
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
