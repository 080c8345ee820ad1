"""What the modules of a model multiply when it reads a text or examples: their inputs' second moments, for GPTQ.

They are measured in several passes over the data, a few layers in each, so that memory stays small, and written module
by module: a calibration that was stopped goes on with the layers that are missing.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
from g3n_mlx.failures import BadValue
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.model import Gemma3n
from g3n_mlx.prompt.prompt import Prompt, of_token_ids

logger = logging.getLogger(__name__)

# Columns whose products count together, a multiple of every group size; what lies in different blocks is taken as
# independent. All of E4B's 16,384 FFN units would be 1 GiB a layer.
BLOCK_WIDTH = 2048
# Moments held at a time.
_PASS_BYTES = 1 << 30
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
    key = hashlib.sha256(repr((fingerprint(model.checkpoint.folder), plan, BLOCK_WIDTH)).encode())
    for part in _contents(model.checkpoint, prompts):
        key.update(part)
    folder = cache_folder() / "moments" / f"{model.checkpoint.folder.resolve().name}-{key.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    widths = {
        name.removesuffix(".weight"): shape[1]
        for name, shape in text_manifest(model.config.text).items()
        if only(name.removesuffix(".weight")) and name.removesuffix(".weight") not in _TABLES and len(shape) == 2
    }
    left = {path: width for path, width in widths.items() if not moments_file(folder, path).is_file()}
    passes = list(_passes(left))
    with tqdm(total=len(passes) * len(prompts), desc="calibrating", unit="prompt", disable=not progress) as bar:
        for some in passes:
            _write(folder, model.runner.call(lambda some=some: _measured(model, some, prompts, bar.update)))
    return folder


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


def _measured(
    model: Gemma3n, widths: dict[str, int], prompts: Sequence[Prompt], done: Callable[[], object]
) -> dict[str, list[np.ndarray]]:
    def run() -> None:
        for prompt in prompts:
            for _ in model.logit_chunks(prompt):
                pass
            done()

    return model.runner.model.second_moments(widths, BLOCK_WIDTH, run)


def _passes(widths: dict[str, int]) -> Iterator[dict[str, int]]:
    """Modules whose moments fit into memory together."""
    some: dict[str, int] = {}
    for path, width in widths.items():
        size = sum(4 * min(BLOCK_WIDTH, width - start) ** 2 for start in range(0, width, BLOCK_WIDTH))
        taken = sum(4 * min(BLOCK_WIDTH, w - start) ** 2 for w in some.values() for start in range(0, w, BLOCK_WIDTH))
        if some and taken + size > _PASS_BYTES:
            yield some
            some = {}
        some[path] = width
    if some:
        yield some


def _write(folder: Path, moments: dict[str, list[np.ndarray]]) -> None:
    for path, blocks in moments.items():
        file = moments_file(folder, path)
        partial = file.with_suffix(".partial")
        if blocks:
            with partial.open("wb") as out:
                np.savez(out, allow_pickle=False, **{f"{index:04}": block for index, block in enumerate(blocks)})
            shutil.move(partial, file)  # whole, or not there


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
