"""The tensors of the folder that a GGUF file becomes, and how each is made of the file's bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from g3n_mlx.checkpoint.finite import all_finite
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.shards import DTYPES
from g3n_mlx.config.manifest import TEXT, dead_manifest
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.convert.gguf.blocks import DENSE, numbers, packed_parts, stored_as
from g3n_mlx.convert.gguf.file import GgufFile, Rows
from g3n_mlx.convert.gguf.names import PLE, STACKED, text_name
from g3n_mlx.convert.quantize import Output, TensorJob, quantized_outputs
from g3n_mlx.failures import BadValue


@dataclass(frozen=True, slots=True)
class Weight:
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


def text_weights(file: GgufFile, config: ModelConfig) -> Iterator[Weight]:
    """The language model's tensors, by their published names."""
    for name, tensor in file.header.tensors.items():
        shape = tensor.shape
        if name in STACKED and len(shape) == 3:
            for stream in range(shape[0]):
                read = file.rows(name, shape[1:], first=stream * shape[1])
                yield _weight(f"{STACKED[name]}.{stream}.weight", shape[1:], tensor.kind, read)
            continue
        published = text_name(name)
        if published is None:
            raise BadValue(f"{file.path} has a tensor {name!r:.80}, which Gemma 3n has not: was it made by llama.cpp?")
        if name == PLE:
            shape = (config.text.vocab_size_per_layer_input, *shape[1:])
        yield _weight(published, shape, tensor.kind, file.rows(name, shape))


def _weight(name: str, shape: tuple[int, ...], kind: int, rows: Rows) -> Weight:
    quantized = len(shape) == 2 and name.endswith(".weight")
    if len(shape) == 1 and kind not in DENSE:
        raise BadValue(f"{name} is a vector of a quantized type, which llama.cpp does not write: the file is damaged")
    return Weight(f"{TEXT}{name}", shape, kind, stored_as(kind, shape[-1]) if quantized else None, rows)


def zeros_of_unused(weights: list[Weight], config: ModelConfig) -> list[Weight]:
    """The unused keys and values of KV-sharing layers that the file lacks: mlx-lm requires them."""
    present = {weight.name for weight in weights}
    bf16 = next(kind for kind, (name, _) in DENSE.items() if name == "BF16")

    def zeros(row_bytes: int, start: int, stop: int) -> np.ndarray:
        return np.zeros((stop - start, row_bytes), np.uint8)

    return [
        Weight(name, shape, bf16, None, partial(zeros, prod(shape[1:]) * DTYPES["BF16"].itemsize))
        for name, shape in dead_manifest(config.text).items()
        if name not in present
    ]
