"""A checkpoint folder of any layout that users have on disk, seen through one set of names, and through a slice.

Names on disk differ by who wrote the file; here a tensor is called by its module path in our models
(`language_model.layers.0.mlp.gate_proj.weight`, with `.scales` and `.biases` beside it where it is quantized).
Convolution kernels are always given as published: output, input, height, width. What a MatFormer slice leaves out
is neither listed nor read.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from g3n_mlx.checkpoint.layouts import STEM, Layout, embedder_manifests, lacks_stem_bias, open_layout, tower_names
from g3n_mlx.checkpoint.quantization import Quantization, dequantize, to_float32
from g3n_mlx.checkpoint.shards import DTYPES, MappedTensor, Shard, StoredTensor
from g3n_mlx.config.manifest import PLE_TABLE, TEXT, dead_manifest, text_manifest
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.config.text import TextConfig
from g3n_mlx.matformer.plan import Ranges, SlicePlan, cut, slice_config

# A gap between kept columns is worth skipping from a page upwards: below, the disk brings it anyway.
_PAGE_BYTES = 4096
# Rows that are read whole and then cut, at a time.
_BLOCK_BYTES = 1 << 20
# Mapped pages that may stay resident before they are given back, ...
_MAPPED_BYTES = 32 << 20
# ... and what one touched row can map: Linux keeps large files in pieces of up to this size and maps a piece whole
# (512 rows of E4B's table at 8 bits: 300 MB resident where 64 KiB a row were reckoned with).
_TOUCH_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a read of the whole tensor returns."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: "BF16", "F32", "U32", ...


@dataclass(frozen=True, slots=True)
class _Source:
    """A readable tensor: where it is stored, what is kept of it, and how its axes lie on disk."""

    stored: StoredTensor
    shape: tuple[int, ...]  # as read
    rows: Ranges | None = None  # kept rows
    columns: Ranges | None = None  # kept columns in stored units: words of packed codes, or one scale a group
    axes: tuple[int, ...] | None = None  # the transposition from the stored to the published order
    absent: bool = False  # not on disk: reads as zeros


class Checkpoint:
    """An opened checkpoint. `config` and `raw_config` are those of the slice, where one was asked for."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        raw_config: dict[str, Any],
        slice_name: str | None,
        shards: list[Shard],
        sources: dict[str, _Source],
        quantizations: dict[str, Quantization],
    ):
        self.folder = folder
        self.config = config
        self.raw_config = raw_config
        self.slice_name = slice_name
        self._shards = shards
        self._sources = sources
        self._quantizations = quantizations
        self._dead_paths = {name.removesuffix(".weight") for name in dead_manifest(config.text)}

    @staticmethod
    def open(folder: Path, plan: SlicePlan | None = None) -> "Checkpoint":
        """Opens a folder and checks its tensors by name and shape against its config.json.

        Raises FileNotFoundError or ValueError, the latter naming the tensors that are missing, unexpected or
        misshapen (ten of each, and the count).
        """
        folder = Path(folder)
        layout = open_layout(folder)
        base = layout.config.text
        if plan is None:
            plan = SlicePlan("", tuple(range(base.num_hidden_layers)), base.intermediate_size)
        raw_config = slice_config(layout.raw_config, plan)
        text = TextConfig.from_dict(raw_config["text_config"], str(folder / "config.json"))
        config = replace(layout.config, text=text)
        with ExitStack() as opened:
            for shard in layout.shards:
                opened.callback(shard.close)
            sources = _cut_sources(layout, config, plan) | _tower_sources(layout)
            opened.pop_all()
        quantizations = {
            path: layout.quantizations[plan.source_name(path)]
            for path in _module_paths(sources)
            if plan.source_name(path) in layout.quantizations
        }
        return Checkpoint(folder, config, raw_config, plan.slice_name or None, layout.shards, sources, quantizations)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors that a model reads."""
        return tuple(name for name in self._sources if not self._is_dead(name))

    @property
    def dead_names(self) -> tuple[str, ...]:
        """Tensors on disk that no model reads: keys and values of KV-sharing layers."""
        return tuple(name for name in self._sources if self._is_dead(name))

    def __contains__(self, name: str) -> bool:
        return name in self._sources and not self._is_dead(name)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor."""
        source = self._sources[name]
        return TensorInfo(source.shape, source.stored.dtype)

    @property
    def quantizations(self) -> Mapping[str, Quantization]:
        """Module path -> how its weight is stored, for all that are quantized."""
        return self._quantizations

    @property
    def nbytes(self) -> int:
        """Stored bytes of every tensor that a model reads."""
        return sum(map(self._stored_bytes, self.names))

    @property
    def nbytes_per_token(self) -> int:
        """Stored bytes of every weight that one decode step reads.

        The head reads all of embed_tokens; of the PLE table a token reads one row, of the embedders nothing.
        """
        read = (name for name in self.names if name.startswith(TEXT) and not name.startswith(f"{PLE_TABLE}."))
        return sum(map(self._stored_bytes, read))

    def _stored_bytes(self, name: str) -> int:
        source = self._sources[name]
        return prod(source.shape) * DTYPES[source.stored.dtype].itemsize

    def quantization(self, path: str) -> Quantization | None:
        """How the weight of a module is stored; None is dense."""
        return self._quantizations.get(path)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor, in memory of their own; BF16 comes as ml_dtypes.bfloat16."""
        source = self._sources[name]
        length = source.shape[0] if source.shape else 1
        stop = length if stop is None else stop
        assert 0 <= start <= stop <= length, (name, start, stop)
        if source.absent:
            return np.zeros((stop - start, *source.shape[1:]), DTYPES[source.stored.dtype])
        array = _read_rows(source, start, stop)
        return array if source.axes is None else np.ascontiguousarray(array.transpose(source.axes))

    def rows(self, path: str) -> "RowTable":
        """Random access to the rows of an embedding, which stays on disk."""
        quantization = self.quantization(path)
        parts = ("weight",) if quantization is None else ("weight", "scales", "biases")
        return RowTable([self._sources[f"{path}.{part}"] for part in parts], quantization)

    def close(self) -> None:
        """Closes the files; tables handed out before stay usable."""
        for shard in self._shards:
            shard.close()

    def _is_dead(self, name: str) -> bool:
        return name.rpartition(".")[0] in self._dead_paths


class RowTable:
    """Rows of a table on disk, gathered from a memory map and dequantized after the gather.

    The pages that were touched are given back from time to time, so a long run does not make the table resident.
    """

    def __init__(self, sources: list[_Source], quantization: Quantization | None):
        self.num_rows, columns = sources[0].shape
        self.width = columns if quantization is None else columns * 32 // quantization.bits
        self._quantization = quantization
        self._columns = [source.columns for source in sources]
        self._maps = [MappedTensor(source.stored) for source in sources]
        self._rows_per_step = max(1, _MAPPED_BYTES // (_TOUCH_BYTES * len(sources)))
        self._touched_rows = 0

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """The rows of ids [n], float32 [n, width]; an id outside the table is an IndexError."""
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_rows:
            raise IndexError(f"ids from {ids.min()} to {ids.max()}, the table has {self.num_rows} rows")
        gathered = np.empty((len(ids), self.width), np.float32)
        for start in range(0, len(ids), self._rows_per_step):
            step = slice(start, start + self._rows_per_step)
            gathered[step] = self._gather_some(ids[step])
        return gathered

    def _gather_some(self, ids: np.ndarray) -> np.ndarray:
        parts = []
        for mapped, columns in zip(self._maps, self._columns, strict=True):
            rows = mapped.gather(ids)
            parts.append(rows if columns is None else np.concatenate([rows[:, a:b] for a, b in columns], axis=1))
        self._touched_rows += len(ids)
        if self._touched_rows >= self._rows_per_step:
            for mapped in self._maps:
                mapped.release()
            self._touched_rows = 0
        if self._quantization is None:
            return to_float32(parts[0])
        packed, scales, biases = parts
        return dequantize(packed, scales, biases, self._quantization.bits, self._quantization.group_size)


def _cut_sources(layout: Layout, config: ModelConfig, plan: SlicePlan) -> dict[str, _Source]:
    """Text and embedder tensors under the names of the slice, whose config is given."""
    tensors = layout.tensors
    sources: dict[str, _Source] = {}
    for name in text_manifest(config.text) | embedder_manifests(config) | dead_manifest(config.text):
        source_name = plan.source_name(name)
        if source_name not in tensors:  # dead, and left out by whoever wrote the file
            continue
        path, source_path = name.removesuffix(".weight"), source_name.removesuffix(".weight")
        kept = cut(plan, layout.config.text, source_path)
        quantization = layout.quantizations.get(source_path)
        if quantization is None:
            sources[name] = _cut_source(tensors[source_name], kept.rows, kept.columns)
            continue
        bits, group_size = quantization.bits, quantization.group_size
        for part, numerator, denominator in (
            ("weight", bits, 32),
            ("scales", 1, group_size),
            ("biases", 1, group_size),
        ):
            columns = None
            if kept.columns is not None:
                if any(border % group_size for span in kept.columns for border in span):
                    raise ValueError(
                        f"slice {plan.slice_name!r}: the columns kept of {source_path} ({_listed(kept.columns)}) are "
                        f"not whole groups of {group_size}, in which the checkpoint is quantized; choose widths that "
                        f"are multiples of {group_size}, or slice the unquantized checkpoint"
                    )
                columns = tuple(
                    (start * numerator // denominator, stop * numerator // denominator) for start, stop in kept.columns
                )
            sources[f"{path}.{part}"] = _cut_source(tensors[f"{source_path}.{part}"], kept.rows, columns)
    return sources


def _listed(ranges: Ranges) -> str:
    return ", ".join(f"{start} to {stop}" for start, stop in ranges)


def _cut_source(stored: StoredTensor, rows: Ranges | None, columns: Ranges | None) -> _Source:
    shape = list(stored.shape)
    for axis, kept in enumerate((rows, columns)):
        if kept is not None:
            shape[axis] = sum(stop - start for start, stop in kept)
    return _Source(stored, tuple(shape), rows, columns)


def _tower_sources(layout: Layout) -> dict[str, _Source]:
    """Vision and audio tensors, kernels turned to the published order of axes."""
    sources: dict[str, _Source] = {}
    for name in tower_names(layout.tensors):
        stored, axes = layout.tensors[name], layout.kernel_axes.get(name)
        shape = stored.shape if axes is None else tuple(stored.shape[axis] for axis in axes)
        sources[name] = _Source(stored, shape, axes=axes)
    if lacks_stem_bias(layout.tensors):
        stem = layout.tensors[f"{STEM}.weight"]
        sources[f"{STEM}.bias"] = _Source(stem, stem.shape[:1], absent=True)
    return sources


def _module_paths(names: Iterable[str]) -> Iterator[str]:
    return (name.removesuffix(".weight") for name in names if name.endswith(".weight"))


def _read_rows(source: _Source, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of what is kept, axes as stored."""
    stored = source.stored
    dtype = DTYPES[stored.dtype]
    row_bytes = prod(stored.shape[1:]) * dtype.itemsize
    spans = None
    if source.columns is not None:
        spans = [(first * dtype.itemsize, last * dtype.itemsize) for first, last in source.columns]
    kept_bytes = row_bytes if spans is None else sum(last - first for first, last in spans)
    out = np.empty((stop - start, kept_bytes), np.uint8)
    filled = 0
    for first, last in _runs(source.rows, start, stop):
        offset = stored.offset + first * row_bytes
        target = out[filled : filled + last - first]
        if spans is None:
            stored.shard.read_into(offset, target.reshape(-1).data)
        else:
            _read_spans(stored.shard, offset, row_bytes, spans, target)
        filled += last - first
    columns = stored.shape[1:] if source.columns is None else (kept_bytes // dtype.itemsize,)
    return out.reshape(-1).view(dtype).reshape((stop - start, *columns) if stored.shape else ())


def _runs(rows: Ranges | None, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) of the kept ones as ranges of stored rows."""
    if rows is None:
        yield start, stop
        return
    passed = 0
    for first, last in rows:
        begin, end = max(start - passed, 0), min(stop - passed, last - first)
        if begin < end:
            yield first + begin, first + end
        passed += last - first


def _read_spans(shard: Shard, offset: int, row_bytes: int, spans: list[tuple[int, int]], out: np.ndarray) -> None:
    """Fills out [n, kept bytes] with some byte ranges of n rows."""
    edges = [0, *(edge for span in spans for edge in span), row_bytes]
    widest_gap = max(last - first for first, last in zip(edges[::2], edges[1::2], strict=True))
    if widest_gap >= _PAGE_BYTES:
        for row in range(len(out)):
            filled = 0
            for first, last in spans:
                shard.read_into(offset + row * row_bytes + first, out[row, filled : filled + last - first].data)
                filled += last - first
        return
    step = max(1, _BLOCK_BYTES // row_bytes)
    for row in range(0, len(out), step):
        whole = np.empty((min(step, len(out) - row), row_bytes), np.uint8)
        shard.read_into(offset + row * row_bytes, whole.reshape(-1).data)
        np.concatenate([whole[:, first:last] for first, last in spans], axis=1, out=out[row : row + len(whole)])
