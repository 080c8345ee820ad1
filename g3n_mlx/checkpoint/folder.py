"""A checkpoint folder of any layout that users have on disk, seen through one set of names.

Names on disk differ by who wrote the file; here a tensor is called by its module path in our models
(`language_model.layers.0.mlp.gate_proj.weight`, with `.scales` and `.biases` beside it where it is quantized).
Convolution kernels are always given as published: output, input, height, width.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
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
from g3n_mlx.checkpoint.head import without_head
from g3n_mlx.checkpoint.low_rank import LowRank
from g3n_mlx.checkpoint.names import (
    STEM,
    canonical_tensors,
    declared_quantization,
    lacks_stem_bias,
    tower_names,
    without_absent_modalities,
)
from g3n_mlx.checkpoint.quantization import PARTS, Quantization
from g3n_mlx.checkpoint.shards import OpenFiles, StoredTensor, TensorInfo, open_shards
from g3n_mlx.checkpoint.source import RowTable, Source
from g3n_mlx.config.manifest import PLE_TABLE, TEXT, dead_manifest, text_manifest
from g3n_mlx.config.model import ModelConfig, read_config
from g3n_mlx.failures import BadValue, MissingFile

# Of a number that an adapter adds, as a decode step reads it.
_ADAPTER_BYTES = 2


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Changes:
    """What adapters change of a checkpoint (checkpoint/adapter.py); the files stay open as long as this is held."""

    low_ranks: Mapping[str, LowRank]  # by module path
    tensors: Mapping[str, Source]  # by name, whole ones instead of the checkpoint's
    files: Sequence[OpenFiles] = ()  # of these
    _releases: list[weakref.finalize] = field(default_factory=list[weakref.finalize], init=False, repr=False)

    def __post_init__(self) -> None:
        for files in self.files:
            files.hold()
            self._releases.append(weakref.finalize(self, files.release))

    def close(self) -> None:
        """Lets go of the files before this is dropped."""
        for release in self._releases:
            release()

    @property
    def reaches_towers(self) -> bool:
        """Whether they change more than the text model."""
        return any(not name.startswith(TEXT) for name in (*self.low_ranks, *self.tensors))


class Checkpoint:
    """The tensors of an opened folder under their canonical names: all of them, or a view that keeps some."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        raw_config: dict[str, Any],
        sources: Mapping[str, Source],
        quantizations: Mapping[str, Quantization],
        files: OpenFiles,
        low_ranks: Mapping[str, LowRank] | None = None,
    ):
        self.folder = folder
        self.config = config
        self.raw_config = raw_config  # config.json with a nested text_config, without quantization
        self.sources = sources
        self.quantizations = quantizations  # module path -> how its weight is stored, for all that are quantized
        # Module path -> what an adapter adds beside the weight; what is merged into a dense one is in its source.
        self.low_ranks = low_ranks or {}
        self._dead_paths = {name.removesuffix(".weight") for name in dead_manifest(config.text)}
        self._files = files
        files.hold()
        self._release = weakref.finalize(self, files.release)

    @staticmethod
    def open(folder: Path) -> "Checkpoint":
        """Opens a folder and checks its tensors by name and shape against its config.json.

        Raises FileNotFoundError or ValueError, the latter naming the tensors that are missing, unexpected or
        misshapen, and how many there are. Unread tensors below the vision and audio towers are no error.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise MissingFile(f"{folder} is not a folder: expected a model folder with config.json")
        where = str(folder / "config.json")
        raw_config = read_config(folder)
        declared = declared_quantization(raw_config, where)
        config = ModelConfig.from_dict(raw_config, where)
        shards, on_disk = open_shards(folder)
        with ExitStack() as opened:
            for shard in shards:
                opened.callback(shard.close)
            tensors = without_head(canonical_tensors(on_disk, folder), folder)
            config, raw_config = without_absent_modalities(config, raw_config, tensors)
            quantizations = check_manifest(tensors, config, folder)
            check_declared(declared, quantizations, where)
            shapes = tower_shapes(config)
            axes = kernel_axes(tensors, shapes, folder)
            check_towers(tensors, axes, shapes, folder)
            sources = _module_sources(tensors, config, quantizations) | _tower_sources(tensors, axes)
            opened.pop_all()
        return Checkpoint(folder, config, raw_config, sources, quantizations, OpenFiles(shards))

    def view(
        self,
        config: ModelConfig,
        raw_config: dict[str, Any],
        sources: Mapping[str, Source],
        quantizations: Mapping[str, Quantization],
        low_ranks: Mapping[str, LowRank] | None = None,
    ) -> "Checkpoint":
        """Other tensors cut from the same files, which stay open until the last of the views is closed."""
        self._require_open()
        return Checkpoint(self.folder, config, raw_config, sources, quantizations, self._files, low_ranks)

    def changed(self, changes: Changes, *, beside: bool = False) -> "Checkpoint":
        """The same checkpoint with what adapters change.

        A dense weight is merged while it is read, a quantized one keeps what is added beside it. beside: so do the text
        model's dense ones, which are then those of the files still.
        """
        self._require_open()
        sources, quantizations, low_ranks = dict(self.sources), dict(self.quantizations), dict(self.low_ranks)
        for name, source in changes.tensors.items():
            path = name.removesuffix(".weight")
            if quantizations.pop(path, None) is not None:
                for part in PARTS:
                    del sources[f"{path}.{part}"]
            low_ranks.pop(path, None)
            sources[name] = source
        for path, low_rank in changes.low_ranks.items():
            name = f"{path}.weight"
            if path in quantizations or path in low_ranks or (beside and path.startswith(TEXT)):
                before = low_ranks.get(path)
                low_ranks[path] = low_rank if before is None else before.then(low_rank)
            else:
                before = sources[name].low_rank
                low_rank = low_rank if before is None else before.then(low_rank)
                sources[name] = replace(sources[name], low_rank=low_rank)
        files = OpenFiles([], [self._files, *changes.files])
        return Checkpoint(self.folder, self.config, self.raw_config, sources, quantizations, files, low_ranks)

    def again(self) -> "Checkpoint":
        """The same tensors once more, to be closed by whoever asked; without that, when nobody holds it any more."""
        return self.view(self.config, self.raw_config, self.sources, self.quantizations, self.low_ranks)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors that a model reads."""
        return tuple(name for name in self.sources if not self._is_dead(name))

    @property
    def dead_names(self) -> tuple[str, ...]:
        """Tensors on disk that no model reads: keys and values of KV-sharing layers."""
        return tuple(name for name in self.sources if self._is_dead(name))

    def __contains__(self, name: str) -> bool:
        return name in self.sources and not self._is_dead(name)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor."""
        source = self.sources[name]
        return TensorInfo(source.shape, source.dtype_name)

    def quantization(self, path: str) -> Quantization | None:
        """How the weight of a module is stored; None is dense."""
        return self.quantizations.get(path)

    @property
    def nbytes(self) -> int:
        """Stored bytes of every tensor that a model reads."""
        return sum(self.sources[name].num_bytes for name in self.names) + self._num_added * _ADAPTER_BYTES

    @property
    def nbytes_per_token(self) -> int:
        """Stored bytes of every weight that one decode step reads.

        The head reads all of embed_tokens; of the PLE table a token reads one row, of the embedders nothing.
        """
        return sum(self.sources[name].num_bytes for name in self._text_names()) + self._num_added * _ADAPTER_BYTES

    def nbytes_in_memory(self, itemsize: int) -> int:
        """Bytes that the text model's weights take once they are loaded, numbers of the activations being this wide.

        Packed codes stay as they are stored; the PLE table stays on disk.
        """
        sources = [self.sources[name] for name in self._text_names()]
        return sum(
            source.num_bytes if source.stored.dtype == "U32" else prod(source.shape) * itemsize for source in sources
        ) + (self._num_added * itemsize)

    @property
    def _num_added(self) -> int:
        """Numbers that adapters add beside weights."""
        return sum(low_rank.num_elements for low_rank in self.low_ranks.values())

    def _text_names(self) -> Iterator[str]:
        """The text model's tensors but for the PLE table, which is never read as a whole."""
        return (name for name in self.names if name.startswith(TEXT) and not name.startswith(f"{PLE_TABLE}."))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor, in memory of their own; BF16 comes as ml_dtypes.bfloat16."""
        self._require_open()
        return self.sources[name].read(start, stop)

    def mapped(self, name: str) -> np.ndarray | None:
        """A whole tensor as a read-only view of the file; None where it can only be read (`Source.mapped`)."""
        self._require_open()
        return self.sources[name].mapped()

    def rows(self, path: str) -> RowTable:
        """Random access to the rows of an embedding, which stays on disk."""
        self._require_open()
        quantization = self.quantization(path)
        parts = PARTS[:1] if quantization is None else PARTS
        return RowTable([self.sources[f"{path}.{part}"] for part in parts], quantization)

    def release_pages(self) -> None:
        """Takes the pages of mapped tensors out of the process, after some of them were dropped."""
        self._files.release_pages()

    def close(self) -> None:
        """Ends reading here; the files stay open for other views, and tables handed out before stay usable."""
        self._release()

    def _require_open(self) -> None:
        if not self._release.alive:
            raise BadValue(f"{self.folder} was closed: open it again")

    def _is_dead(self, name: str) -> bool:
        return name.rpartition(".")[0] in self._dead_paths


def _module_sources(
    tensors: Mapping[str, StoredTensor], config: ModelConfig, quantizations: Mapping[str, Quantization]
) -> dict[str, Source]:
    """Text and embedder tensors; an unused one may be absent from the files."""
    sources: dict[str, Source] = {}
    for name in text_manifest(config.text) | embedder_manifests(config) | dead_manifest(config.text):
        path = name.removesuffix(".weight")
        parts = [f"{path}.{part}" for part in PARTS] if path in quantizations else [name]
        sources |= {part: Source(tensors[part], tensors[part].shape) for part in parts if part in tensors}
    return sources


def _tower_sources(
    tensors: Mapping[str, StoredTensor], kernel_axes: Mapping[str, tuple[int, ...]]
) -> dict[str, Source]:
    """Vision and audio tensors, kernels turned to the published order of axes."""
    sources: dict[str, Source] = {}
    for name in tower_names(tensors):
        stored, axes = tensors[name], kernel_axes.get(name)
        shape = stored.shape if axes is None else tuple(stored.shape[axis] for axis in axes)
        sources[name] = Source(stored, shape, axes=axes)
    if lacks_stem_bias(tensors):
        stem = tensors[f"{STEM}.weight"]
        sources[f"{STEM}.bias"] = Source(stem, stem.shape[:1], absent=True)
    return sources
