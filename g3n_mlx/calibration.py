"""What the modules of a model multiply when it reads a text or examples: their inputs' second moments, for GPTQ.

Many prompts are read in one call, whose layers run one after the other, and each module's sums are written as soon as
they are known: memory stays small, and a calibration that was stopped goes on with the call in which that was.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.recipe import is_quantized_module
from g3n_mlx.checkpoint.registry import cache_folder
from g3n_mlx.config.fields import parse_json
from g3n_mlx.config.manifest import PLE_TABLE, TOKEN_TABLE, text_manifest
from g3n_mlx.convert import fingerprint
from g3n_mlx.convert.methods import moments_file
from g3n_mlx.engine.scores import PromptReader
from g3n_mlx.engine.sequence import prefill_spans
from g3n_mlx.failures import BadValue
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.model import Gemma3n
from g3n_mlx.prompt.prompt import Prompt, of_token_ids
from g3n_mlx.rows import Batch

# Columns whose products count together, a multiple of every group size; what lies in different blocks is taken as
# independent. All of E4B's 16,384 FFN units would be 1 GiB a layer.
BLOCK_WIDTH = 2048
# Tokens read in one call; what E4B makes of them takes about 1.5 GiB.
_CALL_TOKENS = 4096
# Rows of these are read as they are, of which errors of the head's products say nothing: on the demo model at 3 bits
# the divergence was 0.0042 with the token table's moments, 0.0029 without.
_TABLES = (TOKEN_TABLE, PLE_TABLE)
# Tokens of a text that are read at once, with <bos> in front.
_WINDOW_TOKENS = 512
# Of a tensor that is read for its contents alone, at once.
_READ_ROWS = 1024


def measure(
    model: Gemma3n, data: Path, *, only: Callable[[str], bool] = is_quantized_module, progress: bool = True
) -> Path:
    """Measures what a model's quantizable modules multiply; returns the folder, for `convert(..., moments=)`.

    data: UTF-8 text, or JSON lines of objects with `messages` and perhaps an `answer`, as `g3n eval` takes them; media
    lie below the file's folder. only: whether a module, by its path in the model, is wanted. The folder is in the
    user's cache. Raises OSError, or ValueError naming the line.
    """
    prompts = [prompt for prompt, _ in read_prompts(model, data)]
    plan = (model.slice_name, model.config.text.intermediate_size)
    key = hashlib.sha256(repr((fingerprint(model.checkpoint.folder), plan, BLOCK_WIDTH, _CALL_TOKENS)).encode())
    for part in _contents(model.checkpoint, prompts):
        key.update(part)
    folder = cache_folder() / "moments" / f"{model.checkpoint.folder.resolve().name}-{key.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        path
        for name, shape in text_manifest(model.config.text).items()
        if only(path := name.removesuffix(".weight")) and path not in _TABLES and len(shape) == 2
    ]
    left = {path: _Sums(folder, path) for path in paths if not moments_file(folder, path).is_file()}
    if left:
        _measure(model, prompts, left, progress=progress)
    return folder


class _Sums:
    """The sums of a module's moments over the calls that were made so far, in a file."""

    def __init__(self, folder: Path, path: str) -> None:
        self._folder, self._path = folder, path
        self._file = folder / f"{path}.sums"
        self.num_calls = 0
        if self._file.is_file():
            with np.load(self._file) as stored:
                self.num_calls = int(stored["calls"])

    def add(self, blocks: list[np.ndarray], whole: int | None) -> None:
        """Adds those of one more call. whole: rows of all calls, when this is the last one."""
        before: list[np.ndarray] = []
        if self.num_calls:
            with np.load(self._file) as stored:
                before = [stored[name] for name in sorted(stored.files) if name != "calls"]
        sums = [block + other for block, other in zip(blocks, before, strict=True)] if before else blocks
        self.num_calls += 1
        if whole is None:
            self._write(self._file, sums, calls=np.array(self.num_calls))
        else:
            self._write(moments_file(self._folder, self._path), [block / whole for block in sums])
            self._file.unlink(missing_ok=True)

    def _write(self, file: Path, blocks: list[np.ndarray], **others: np.ndarray) -> None:
        partly = file.with_suffix(".partial")
        with partly.open("wb") as out:
            np.savez(out, allow_pickle=False, **{f"{i:04}": block for i, block in enumerate(blocks)}, **others)
        partly.replace(file)  # whole, or not there


def _measure(model: Gemma3n, prompts: Sequence[Prompt], sums: dict[str, _Sums], *, progress: bool) -> None:
    """Reads the prompts, call by call, and adds what modules multiply to their sums."""
    lengths = [len(prompt.token_ids) for prompt in prompts]
    calls = _calls(lengths)
    first = min(one.num_calls for one in sums.values())
    while calls[first][0][1]:  # a prompt goes on there: its cache is made anew
        first -= 1
    with tqdm(total=(len(calls) - first) * len(sums), desc="calibrating", disable=not progress) as bar:
        readers: dict[int, PromptReader] = {}
        for number, parts in enumerate(calls[first:], first):
            readers = {index: readers[index] if start else model.reader(prompts[index]) for index, start, _ in parts}
            read = [(readers[index], start, stop) for index, start, stop in parts]
            wanted = {path: one for path, one in sums.items() if one.num_calls == number}
            bar.update(len(sums) - len(wanted))
            whole = sum(lengths) if number == len(calls) - 1 else None
            model.runner.call(partial(_record, model, read, wanted, whole, bar.update))


def _record(
    model: Gemma3n,
    parts: Sequence[tuple[PromptReader, int, int]],
    sums: dict[str, _Sums],
    whole: int | None,
    done: Callable[[], object],
) -> None:
    """Makes one call. whole: see `_Sums.add`. done: told of each module that was measured."""

    def found(path: str, blocks: list[np.ndarray]) -> None:
        for block in blocks:
            model.runner.checked(block)
        sums[path].add(blocks, whole)
        done()

    batch = Batch([reader.rows(start, stop) for reader, start, stop in parts], keep_all=True)
    model.runner.model.second_moments(batch, list(sums), BLOCK_WIDTH, found)


_Part = tuple[int, int, int]  # of a prompt by its index: tokens [start, stop)


def _calls(lengths: Sequence[int]) -> list[list[_Part]]:
    """What is read in each call: many prompts, or a part of a long one."""
    calls: list[list[_Part]] = [[]]
    taken = 0
    for index, length in enumerate(lengths):
        for start, stop in prefill_spans(0, length, (), _CALL_TOKENS):
            if calls[-1] and taken + stop - start > _CALL_TOKENS:
                calls.append([])
                taken = 0
            calls[-1].append((index, start, stop))
            taken += stop - start
    return calls


def _contents(checkpoint: Checkpoint, prompts: Sequence[Prompt]) -> Iterator[bytes]:
    """What the measured numbers depend on besides the model's own files: what is read, and what adapters change."""
    for prompt in prompts:  # of media their contents, wherever the files lie
        yield repr((prompt.token_ids, [(span.start, span.features.digest) for span in prompt.media])).encode()
    low_ranks = dict(checkpoint.low_ranks)
    for name, source in checkpoint.sources.items():
        if source.low_rank is not None:
            low_ranks[name] = source.low_rank
        if source.stored.shard.path.parent != checkpoint.folder:  # an adapter's, instead of the model's
            yield name.encode()
            for start in range(0, source.shape[0], _READ_ROWS):
                yield source.read(start, min(start + _READ_ROWS, source.shape[0])).tobytes()
    for name, low_rank in low_ranks.items():
        yield name.encode()
        for array in (low_rank.down, low_rank.up, low_rank.factor):
            yield b"" if array is None else array.tobytes()


def read_prompts(model: Gemma3n, data: Path) -> list[tuple[Prompt, int]]:
    """What a model reads of calibration data, and from which of its tokens on the next one's distribution counts.

    Of examples with an answer that is the answer's. Raises OSError, or ValueError naming the line.
    """
    try:
        text = data.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadValue(f"{data} is not UTF-8 text: {error}") from None
    if not text.strip():
        raise BadValue(f"{data} is empty")
    if data.suffix in (".jsonl", ".ndjson"):
        return [
            _example(model, line, data, f"{data}, line {number}")
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    ids, vocab_size = model.tokenizer.encode(text), model.config.text.vocab_size
    size = min(_WINDOW_TOKENS, model.config.text.max_position_embeddings) - 1
    windows = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [(of_token_ids([model.tokenizer.bos_id, *window], vocab_size), 0) for window in windows]


def _example(model: Gemma3n, line: str, data: Path, where: str) -> tuple[Prompt, int]:
    try:
        entry = parse_json(line)
        if not isinstance(entry, dict) or not isinstance(entry.get("messages"), list):
            raise BadValue("expected an object with messages")
        prompt = model.prepare(entry["messages"], MediaPolicy(paths=data.absolute().parent))
        answer = entry.get("answer")
        if not isinstance(answer, str):
            return prompt, 0
        whole = replace(prompt, token_ids=(*prompt.token_ids, *model.tokenizer.encode(answer)))
        return whole, len(prompt.token_ids) - 1
    except ValueError as error:
        raise BadValue(f"{where}: {error}") from None
