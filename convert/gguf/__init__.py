"""GGUF files, llama.cpp's format, as checkpoint folders: weights, config and tokenizer, streamed block by block.

The language model is one file, the towers are another, if there are any.

Weights of types that are affine in groups of 32 keep their exact values, as do dense ones; others are rounded anew to
8 bits.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.gguf import GgufTensor
from g3n_mlx.checkpoint.registry import cache_folder, register
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.convert.card import Origin
from g3n_mlx.convert.gguf.blocks import stored_as, type_named
from g3n_mlx.convert.gguf.config import check_architecture, generation_config, text_config
from g3n_mlx.convert.gguf.file import GgufFile
from g3n_mlx.convert.gguf.names import PLE
from g3n_mlx.convert.gguf.tokenizer import ends_of_answers, tokenizer_json
from g3n_mlx.convert.gguf.towers import check_towers, published_towers, tower_config, tower_weights
from g3n_mlx.convert.gguf.weights import text_weights, zeros_of_unused
from g3n_mlx.convert.quantize import quantization_entry
from g3n_mlx.convert.write import appearing_folder, check_space, copy_sidecars, write_json, write_shards
from g3n_mlx.failures import MissingFile

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
# Raised when the folders that are made change, so that cached ones are made again.
_CACHE_VERSION = 2
# Of a file, what tells it from another of the same name, size and time.
_HEAD_BYTES = 1 << 20


def is_gguf(path_or_id: str | Path) -> bool:
    """Whether a model was named by a GGUF file."""
    return str(path_or_id).lower().endswith(SUFFIX) and not Path(path_or_id).expanduser().is_dir()


def cached_gguf(path: Path, tokenizer: Path | None = None, mmproj: Path | None = None) -> Path:
    """The folder made of a GGUF file, from the user's cache folder; made on first use.

    tokenizer, mmproj: as of `write_gguf`, which says what is raised; processes that want the same folder wait for each
    other.
    """
    towers = mmproj and _fingerprint(mmproj)
    wanted = (_CACHE_VERSION, _fingerprint(path), tokenizer and str(tokenizer.resolve()), towers)
    key = hashlib.sha256(repr(wanted).encode()).hexdigest()
    target = cache_folder() / "conversions" / f"{path.stem}-{key[:16]}"
    if not target.is_dir():
        logger.info("reading %s once, into %s", path, target)
        try:
            write_gguf(path, target, appearing_folder(target, wait_for_others=True), tokenizer, mmproj)
        except FileExistsError:
            if not target.is_dir():
                raise
    return target


def write_gguf(
    path: Path,
    output: Path,
    place: AbstractContextManager[Path],
    tokenizer: Path | None = None,
    mmproj: Path | None = None,
    progress: bool = True,
) -> None:
    """Writes a GGUF file's model as a checkpoint folder, into a place that becomes `output` and is registered.

    tokenizer: a folder with tokenizer.json and chat template to take instead of what the metadata hold. mmproj: the
    file of the towers; None: text alone.
    Raises FileNotFoundError or ValueError when a file can't be read or is no Gemma 3n.
    """
    file = GgufFile(path, check_architecture)
    towers = None if mmproj is None else GgufFile(mmproj, check_towers)
    text = text_config(path, file.header, file.rows_before_zeros(PLE))
    metadata = file.header.metadata
    ends = ends_of_answers(metadata)
    raw: dict[str, Any] = {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "eos_token_id": ends,
    }
    if towers is not None:
        raw |= tower_config(towers)
    config = ModelConfig.from_dict(raw, str(path))
    words = tokenizer_json(path, metadata) if tokenizer is None else None
    weights = list(text_weights(file, config))
    weights += zeros_of_unused(weights, config)
    if towers is not None:
        weights += tower_weights(towers, config)
    quantizations = {weight.path: weight.quantization for weight in weights if weight.quantization is not None}
    if quantizations:
        raw["quantization"] = raw["quantization_config"] = quantization_entry(quantizations)
    _tell_what_is_rounded(path, file)
    with place as folder:
        jobs = [weight.job() for weight in weights]
        check_space(output, jobs)
        write_shards(folder, jobs, progress)
        if tokenizer is not None:
            copy_sidecars(tokenizer, folder, whole=False)
        else:
            assert words is not None
            write_json(folder / "tokenizer.json", words)
            template = metadata.get("tokenizer.chat_template")
            if isinstance(template, str):
                (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
            write_json(folder / "generation_config.json", generation_config(metadata, ends))
        if towers is not None:
            write_json(folder / "preprocessor_config.json", published_towers()["preprocessor_config"])
        # Written last: a folder without config.json is never taken for a checkpoint.
        write_json(folder / "config.json", raw)
        Checkpoint.open(folder).close()  # tensors that are missing or misshapen are an error now
    register(output, Origin(str(path), path).name)
    _tell_what_it_reads(path, config)


def _tell_what_it_reads(path: Path, config: ModelConfig) -> None:
    match config.media_kinds:
        case ():
            advice = "for more, put the file of its towers, mmproj, beside it"
            logger.warning("%s has no towers: the model reads text alone; %s", path, advice)
        case ("image",):
            logger.warning("%s has no audio tower: the model reads text and images", path)
        case _:
            pass


def _tell_what_is_rounded(path: Path, file: GgufFile) -> None:
    anew: Mapping[str, int] = Counter(
        known[0]
        for tensor in file.header.tensors.values()
        if (known := type_named(tensor.kind)) is not None and _is_rounded(tensor)
    )
    if anew:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(anew.items()))
        logger.warning("%s: tensors %s are rounded anew, to 8 bits; all others keep their exact values", path, kinds)


def _is_rounded(tensor: GgufTensor) -> bool:
    how = stored_as(tensor.kind, tensor.shape[-1])
    return how is not None and how.group_size != 32


def _fingerprint(path: Path) -> tuple[Any, ...]:
    if not path.is_file():
        raise MissingFile(f"{path} does not exist; give a GGUF file of a Gemma 3n")
    status = path.stat()
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()
    return path.name, status.st_size, status.st_mtime_ns, head
