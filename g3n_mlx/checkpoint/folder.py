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

from g3n_mlx.checkpoint.check import (
    check_declared,
    check_manifest,
    check_towers,
    embedder_manifests,
    kernel_axes,
    tower_shapes,
)
from g3n_mlx.checkpoint.names import (
    STEM,
    canonical_tensors,
    declared_quantization,
    lacks_stem_bias,
    nested_config,
    tower_names,
    without_absent_modalities,
)
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.shards import DTYPES, Shard, StoredTensor, open_shards
from g3n_mlx.checkpoint.source import RowTable, Source, read_rows
from g3n_mlx.config.fields import read_json
from g3n_mlx.config.manifest import PLE_TABLE, TEXT, dead_manifest, text_manifest
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.config.text import TextConfig
from g3n_mlx.matformer.plan import Ranges, SlicePlan, cut, slice_config


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a read of the whole tensor returns."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: "BF16", "F32", "U32", ...


@dataclass(frozen=True, slots=True)
class Layout:
    """An opened folder: its whole content under canonical names."""

    config: ModelConfig
    raw_config: dict[str, Any]  # nested, without quantization
    shards: list[Shard]
    tensors: dict[str, StoredTensor]
    quantizations: dict[str, Quantization]  # of the modules that are quantized
    kernel_axes: dict[str, tuple[int, ...]]  # tower tensors that lie in another order of axes: stored -> published


class Checkpoint:
    """An opened checkpoint. `config` and `raw_config` are those of the slice, where one was asked for."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        raw_config: dict[str, Any],
        slice_name: str | None,
        shards: list[Shard],
        sources: dict[str, Source],
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
        array = read_rows(source, start, stop)
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


def open_layout(folder: Path) -> Layout:
    """Opens a checkpoint folder and checks its tensors by name and shape against its config.json.

    Raises FileNotFoundError or ValueError, the latter naming the tensors that are missing, unexpected or misshapen
    (ten of each, and the count). Below the vision and audio towers what nobody reads is no error.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: expected a model folder with config.json")
    where = str(folder / "config.json")
    raw_config = nested_config(read_json(folder / "config.json"))
    declared = declared_quantization(raw_config, where)
    config = ModelConfig.from_dict(raw_config, where)
    shards, on_disk = open_shards(folder)
    with ExitStack() as opened:
        for shard in shards:
            opened.callback(shard.close)
        tensors = canonical_tensors(on_disk, folder)
        config, raw_config = without_absent_modalities(config, raw_config, tensors)
        quantizations = check_manifest(tensors, config, folder)
        check_declared(declared, quantizations, where)
        shapes = tower_shapes(config)
        axes = kernel_axes(tensors, shapes, folder)
        check_towers(tensors, axes, shapes, folder)
        opened.pop_all()
    return Layout(config, raw_config, shards, tensors, quantizations, axes)


def _cut_sources(layout: Layout, config: ModelConfig, plan: SlicePlan) -> dict[str, Source]:
    """Text and embedder tensors under the names of the slice, whose config is given."""
    tensors = layout.tensors
    sources: dict[str, Source] = {}
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


def _cut_source(stored: StoredTensor, rows: Ranges | None, columns: Ranges | None) -> Source:
    shape = list(stored.shape)
    for axis, kept in enumerate((rows, columns)):
        if kept is not None:
            shape[axis] = sum(stop - start for start, stop in kept)
    return Source(stored, tuple(shape), rows, columns)


def _tower_sources(layout: Layout) -> dict[str, Source]:
    """Vision and audio tensors, kernels turned to the published order of axes."""
    sources: dict[str, Source] = {}
    for name in tower_names(layout.tensors):
        stored, axes = layout.tensors[name], layout.kernel_axes.get(name)
        shape = stored.shape if axes is None else tuple(stored.shape[axis] for axis in axes)
        sources[name] = Source(stored, shape, axes=axes)
    if lacks_stem_bias(layout.tensors):
        stem = layout.tensors[f"{STEM}.weight"]
        sources[f"{STEM}.bias"] = Source(stem, stem.shape[:1], absent=True)
    return sources


def _module_paths(names: Iterable[str]) -> Iterator[str]:
    return (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
