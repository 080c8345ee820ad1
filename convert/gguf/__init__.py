"""GGUF files, llama.cpp's format, as checkpoint folders: weights, config and tokenizer, streamed block by block.

Weights of types that are affine in groups of 32 keep their exact values, as do dense ones; others are rounded anew to
8 bits.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from g3n_mlx.checkpoint.finite import all_finite
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.gguf import GgufTensor, Header, read_header
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.registry import cache_folder, register
from g3n_mlx.checkpoint.shards import DTYPES
from g3n_mlx.config.manifest import TEXT, dead_manifest
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.convert.card import Origin
from g3n_mlx.convert.gguf.blocks import DENSE, numbers, packed_parts, stored_as, type_named
from g3n_mlx.convert.gguf.config import check_architecture, generation_config, text_config
from g3n_mlx.convert.gguf.names import PLE, STACKED, text_name
from g3n_mlx.convert.gguf.names import TOKENS as TOKENS
from g3n_mlx.convert.gguf.tokenizer import ends_of_answers, tokenizer_json
from g3n_mlx.convert.quantize import Output, TensorJob, quantization_entry, quantized_outputs
from g3n_mlx.convert.write import appearing_folder, check_space, copy_sidecars, write_json, write_shards
from g3n_mlx.failures import BadValue, MissingFile

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
# Raised when the folders that are made change, so that cached ones are made again.
_CACHE_VERSION = 1
# Rows of the PLE table that are looked at together for being zeros.
_TAIL_ROWS = 64
# Of a file, what tells it from another of the same name, size and time.
_HEAD_BYTES = 1 << 20

Rows = Callable[[int, int], np.ndarray]  # bytes of the rows [start, stop)


def is_gguf(path_or_id: str | Path) -> bool:
    """Whether a model was named by a GGUF file."""
    return str(path_or_id).lower().endswith(SUFFIX) and not Path(path_or_id).expanduser().is_dir()


def cached_gguf(path: Path, tokenizer: Path | None = None) -> Path:
    """The folder made of a GGUF file, from the user's cache folder; made on first use.

    tokenizer: a folder whose tokenizer and template are taken instead of the file's. Raises as `write_gguf` does;
    processes that want the same folder wait for each other.
    """
    key = hashlib.sha256(repr((_CACHE_VERSION, _fingerprint(path), tokenizer and str(tokenizer.resolve()))).encode())
    target = cache_folder() / "conversions" / f"{path.stem}-{key.hexdigest()[:16]}"
    if not target.is_dir():
        logger.info("reading %s once, into %s", path, target)
        try:
            write_gguf(path, target, appearing_folder(target, wait_for_others=True), tokenizer)
        except FileExistsError:
            if not target.is_dir():
                raise
    return target


def write_gguf(
    path: Path,
    output: Path,
    place: AbstractContextManager[Path],
    tokenizer: Path | None = None,
    progress: bool = True,
) -> None:
    """Writes a GGUF file's model as a checkpoint folder, into a place that becomes `output` and is registered.

    tokenizer: a folder with tokenizer.json and chat template to take instead of what the metadata hold.
    Raises FileNotFoundError or ValueError when a file can't be read or is no Gemma 3n.
    """
    file = _File(path)
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
    config = ModelConfig.from_dict(raw, str(path))
    words = tokenizer_json(path, metadata) if tokenizer is None else None
    weights = list(_text_weights(file, config))
    weights += _zeros_of_unused(weights, config)
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
        # Written last: a folder without config.json is never taken for a checkpoint.
        write_json(folder / "config.json", raw)
        Checkpoint.open(folder).close()  # tensors that are missing or misshapen are an error now
    register(output, Origin(str(path), path).name)
    logger.warning("%s has no towers: the model reads text alone", path)


@dataclass(frozen=True, slots=True)
class _Weight:
    """One tensor of the new folder."""

    name: str  # below `model.`
    shape: tuple[int, ...]
    kind: int  # ggml's type
    quantization: Quantization | None
    rows: Rows

    @property
    def path(self) -> str:
        return self.name.removesuffix(".weight")

    def job(self) -> TensorJob:
        num_rows = self.shape[0] if self.shape else 1
        source_bytes = prod(self.shape) * 4  # of the numbers, which decides how many rows are read at once
        if self.quantization is None:
            dtype = DENSE[self.kind][0] if self.kind in DENSE else "F32"
            outputs = (Output(f"model.{self.name}", dtype, self.shape),)
        else:
            outputs = quantized_outputs(f"model.{self.path}", self.shape, self.quantization, "F32")
        return TensorJob(outputs, num_rows, source_bytes, self._produce)

    def _produce(self, start: int, stop: int) -> tuple[np.ndarray, ...]:
        rows = self.rows(start, stop)
        if self.quantization is not None:
            packed, scales, biases = packed_parts(self.kind, rows)
            self._require_finite(scales, biases)
            return packed, scales, biases
        if self.kind in DENSE:
            found = np.ascontiguousarray(rows).view(DENSE[self.kind][1])
        else:
            found = numbers(self.kind, rows)
        found = found.reshape(stop - start, *self.shape[1:])
        self._require_finite(found)
        return (found,)

    def _require_finite(self, *arrays: np.ndarray) -> None:
        if not all(all_finite(array) for array in arrays):
            raise BadValue(f"{self.name} holds NaN or infinity: the file is damaged")


class _File:
    """A GGUF file whose tensors are read by rows."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise MissingFile(f"{path} does not exist; give a GGUF file of a Gemma 3n")
        self.path = path
        self.header: Header = read_header(path, arrays=True)
        check_architecture(path, self.header)
        self._bytes = np.memmap(path, np.uint8, "r")
        self.kinds: Counter[str] = Counter()
        for name, tensor in self.header.tensors.items():
            self.kinds[self._check(name, tensor)] += 1

    def _check(self, name: str, tensor: GgufTensor) -> str:
        """The name of a tensor's type; raises ValueError where its rows can't be read."""
        known = type_named(tensor.kind)
        if known is None:
            raise BadValue(f"{self.path}: {name:.80} has a type that is not read (ggml's number {tensor.kind})")
        kind, block_size, block_bytes = known
        width = tensor.shape[-1] if tensor.shape else 1
        size = prod(tensor.shape) // block_size * block_bytes
        if not tensor.shape or width % block_size or not 0 < size <= tensor.room:
            raise BadValue(
                f"{self.path}: {name:.80} is {kind}{list(tensor.shape)}, for which the file has {tensor.room} bytes: "
                "it is damaged or cut off; download it again"
            )
        return kind

    def rows(self, name: str, first: int = 0) -> Rows:
        """Reads rows, counted from `first`, as bytes; of a vector all of it as one."""
        tensor = self.header.tensors[name]
        known = type_named(tensor.kind)
        assert known is not None
        _, block_size, block_bytes = known
        if len(tensor.shape) == 1:  # its elements are the rows
            block_bytes, width = block_bytes // block_size, 1
        else:
            width = tensor.shape[-1] // block_size
        return partial(self._read, tensor.offset, width * block_bytes, first)

    def _read(self, offset: int, row_bytes: int, first: int, start: int, stop: int) -> np.ndarray:
        begin = offset + (first + start) * row_bytes
        return self._bytes[begin : begin + (stop - start) * row_bytes].reshape(stop - start, row_bytes)

    def rows_before_zeros(self, name: str) -> int:
        """Rows of a matrix but for those at its end that are zeros: the converter fills tables up with them."""
        tensor = self.header.tensors.get(name)
        if tensor is None or len(tensor.shape) != 2:
            raise BadValue(f"{self.path} has no matrix {name}: is it a whole Gemma 3n?")
        read, stop = self.rows(name), tensor.shape[0]
        while stop:
            start = max(0, stop - _TAIL_ROWS)
            filled = np.flatnonzero(numbers(tensor.kind, read(start, stop)).any(axis=1))
            if len(filled):
                return start + int(filled[-1]) + 1
            stop = start
        raise BadValue(f"{self.path}: {name} holds zeros alone")


def _text_weights(file: _File, config: ModelConfig) -> Iterator[_Weight]:
    """The language model's tensors, by their published names."""
    for name, tensor in file.header.tensors.items():
        shape = tensor.shape
        if name in STACKED and len(shape) == 3:
            for stream in range(shape[0]):
                read = file.rows(name, first=stream * shape[1])
                yield _weight(f"{STACKED[name]}.{stream}.weight", shape[1:], tensor.kind, read)
            continue
        published = text_name(name)
        if published is None:
            raise BadValue(f"{file.path} has a tensor {name!r:.80}, which Gemma 3n has not: was it made by llama.cpp?")
        if name == PLE:
            shape = (config.text.vocab_size_per_layer_input, *shape[1:])
        yield _weight(published, shape, tensor.kind, file.rows(name))


def _weight(name: str, shape: tuple[int, ...], kind: int, rows: Rows) -> _Weight:
    quantized = len(shape) == 2 and name.endswith(".weight")
    if len(shape) == 1 and kind not in DENSE:
        raise BadValue(f"{name} is a vector of a quantized type, which llama.cpp does not write: the file is damaged")
    return _Weight(f"{TEXT}{name}", shape, kind, stored_as(kind, shape[-1]) if quantized else None, rows)


def _zeros_of_unused(weights: list[_Weight], config: ModelConfig) -> list[_Weight]:
    """The unused keys and values of KV-sharing layers that the file lacks: mlx-lm requires them."""
    present = {weight.name for weight in weights}
    bf16 = next(kind for kind, (name, _) in DENSE.items() if name == "BF16")

    def zeros(row_bytes: int, start: int, stop: int) -> np.ndarray:
        return np.zeros((stop - start, row_bytes), np.uint8)

    return [
        _Weight(name, shape, bf16, None, partial(zeros, prod(shape[1:]) * DTYPES["BF16"].itemsize))
        for name, shape in dead_manifest(config.text).items()
        if name not in present
    ]


def _tell_what_is_rounded(path: Path, file: _File) -> None:
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
