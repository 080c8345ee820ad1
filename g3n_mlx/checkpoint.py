"""A checkpoint folder of any layout that users have on disk, seen through one set of names, and through a slice.

Names on disk differ by who wrote the file; here a tensor is called by its module path in our models
(`language_model.layers.0.mlp.gate_proj.weight`, with `.scales` and `.biases` beside it where it is quantized).
Convolution kernels are always given as published: output, input, height, width. What a MatFormer slice leaves out
is neither listed nor read.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from g3n_mlx.config import FULL, SLIDING, ModelConfig, TextConfig, read_json
from g3n_mlx.manifest import TEXT, dead_manifest, embedder_manifest, text_manifest
from g3n_mlx.matformer import Ranges, SlicePlan, cut, slice_config
from g3n_mlx.quantization import BITS, GROUP_SIZES, Quantization, dequantize, to_float32
from g3n_mlx.shards import DTYPES, MappedTensor, Shard, StoredTensor, open_shards

logger = logging.getLogger(__name__)

# Prefix on disk -> canonical prefix, the first that fits: published and mlx-lm, mlx-vlm, text-only Hugging Face.
_PREFIXES = (
    ("model.language_model.", TEXT),
    ("language_model.model.", TEXT),
    *(
        (f"{root}{part}.", f"{part}.")
        for root in ("model.", "")
        for part in ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
    ),
    ("model.", TEXT),
)
_TOWERS = {"vision": "vision_tower.", "audio": "audio_tower."}
_STEM = "vision_tower.timm_model.conv_stem.conv"

# Of a flat config, what stands outside text_config in a nested one.
_OUTER_KEYS = (
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "model_type",
    "torch_dtype",
    "dtype",
    "quantization",
    "quantization_config",
    "transformers_version",
    "initializer_range",
)

_FLOATS = ("BF16", "F16", "F32")
# A gap between kept columns is worth skipping from a page upwards: below, the disk brings it anyway.
_PAGE_BYTES = 4096
# Rows that are read whole and then cut, at a time.
_BLOCK_BYTES = 1 << 20
# Mapped table rows that may stay resident before their pages are given back.
_MAPPED_BYTES = 16 << 20


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


@dataclass(frozen=True, slots=True)
class _Declared:
    """What config.json says about quantization."""

    default: Quantization
    modules: Mapping[str, Quantization | None]  # canonical module paths; None is dense


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

    @staticmethod
    def open(folder: Path, plan: SlicePlan | None = None) -> "Checkpoint":
        """Opens a folder and checks its tensors by name and shape against its config.json.

        Below the vision and audio towers names are only indexed. Raises FileNotFoundError or ValueError, the
        latter naming the tensors that are missing, unexpected or misshapen (ten of each, and the count).
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: expected a model folder with config.json")
        where = str(folder / "config.json")
        raw_config = nested_config(read_json(folder / "config.json"))
        declared = _declared_quantization(raw_config, where)
        config = ModelConfig.from_dict(raw_config, where)
        shards, on_disk = open_shards(folder)
        with ExitStack() as opened:
            for shard in shards:
                opened.callback(shard.close)
            tensors = _canonical_tensors(on_disk, folder)
            config, raw_config = _without_absent_modalities(config, raw_config, tensors)
            quantizations = _check_manifest(tensors, config, folder)
            _check_declared(declared, quantizations, where)
            sources = _tower_sources(tensors, folder)
            if plan is None:
                plan = SlicePlan("", tuple(range(config.text.num_hidden_layers)), config.text.intermediate_size)
            base = config.text
            raw_config = slice_config(raw_config, plan)
            config = replace(config, text=TextConfig.from_dict(raw_config["text_config"], where))
            sources |= _sliced_sources(tensors, config, base, plan, quantizations)
            opened.pop_all()
        sliced = {
            path: quantizations[plan.source_name(path)]
            for path in _module_paths(sources)
            if plan.source_name(path) in quantizations
        }
        return Checkpoint(folder, config, raw_config, plan.slice_name or None, shards, sources, sliced)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors that can be read; the unused keys and values of KV-sharing layers are not among them."""
        return tuple(self._sources)

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor."""
        source = self._sources[name]
        return TensorInfo(source.shape, source.stored.dtype)

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
        # A row touches its own pages, and the kernel maps some around them (16 on Linux, "fault-around").
        self._row_bytes = sum(source.stored.num_bytes // self.num_rows + 16 * _PAGE_BYTES for source in sources)
        self._touched_bytes = 0

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """The rows of ids [n], float32 [n, width]; an id outside the table is an IndexError."""
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_rows:
            raise IndexError(f"ids from {ids.min()} to {ids.max()}, the table has {self.num_rows} rows")
        rows_per_step = max(1, _MAPPED_BYTES // self._row_bytes)
        gathered = np.empty((len(ids), self.width), np.float32)
        for start in range(0, len(ids), rows_per_step):
            step = slice(start, start + rows_per_step)
            gathered[step] = self._gather_some(ids[step])
        return gathered

    def _gather_some(self, ids: np.ndarray) -> np.ndarray:
        parts = []
        for mapped, columns in zip(self._maps, self._columns, strict=True):
            rows = mapped.gather(ids)
            parts.append(rows if columns is None else np.concatenate([rows[:, a:b] for a, b in columns], axis=1))
        self._touched_bytes += len(ids) * self._row_bytes
        if self._touched_bytes >= _MAPPED_BYTES:
            for mapped in self._maps:
                mapped.release()
            self._touched_bytes = 0
        if self._quantization is None:
            return to_float32(parts[0])
        return dequantize(*parts, self._quantization.bits, self._quantization.group_size)


def nested_config(raw: dict[str, Any]) -> dict[str, Any]:
    """A config.json in the published shape: text under `text_config`, both RoPE bases as keys of their own.

    Text-only files (Gemma3nForCausalLM) are flat, transformers 5 writes `rope_parameters`.
    """
    if isinstance(raw.get("text_config"), dict):
        nested = {**raw, "text_config": dict(raw["text_config"])}
    else:
        outer = {key: raw[key] for key in _OUTER_KEYS if key in raw}
        inner = {key: value for key, value in raw.items() if key not in outer and key != "architectures"}
        nested = {**outer, "text_config": inner}
        if raw.get("model_type") == "gemma3n_text":
            nested |= {"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n"}
    text = nested["text_config"]
    parameters = text.get("rope_parameters")
    if isinstance(parameters, dict) and _plain_rope(parameters.get(FULL)) and _plain_rope(parameters.get(SLIDING)):
        del text["rope_parameters"]
        text["rope_theta"] = parameters[FULL]["rope_theta"]
        text["rope_local_base_freq"] = parameters[SLIDING]["rope_theta"]
    return nested


def _plain_rope(entry: Any) -> bool:
    return isinstance(entry, dict) and "rope_theta" in entry and entry.get("rope_type", "default") == "default"


def _canonical_name(name: str) -> str:
    for on_disk, canonical in _PREFIXES:
        if name.startswith(on_disk):
            return canonical + name.removeprefix(on_disk)
    return name


def _canonical_tensors(on_disk: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    names: dict[str, str] = {}
    for name in on_disk:
        canonical = _canonical_name(name)
        if canonical in names:
            raise ValueError(f"{folder} holds both {names[canonical]} and {name}: two checkpoints in one folder?")
        names[canonical] = name
    return {canonical: on_disk[name] for canonical, name in names.items()}


def _without_absent_modalities(
    config: ModelConfig, raw_config: dict[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Text-only conversions keep the whole config.json: a modality without any tensor is none."""
    for modality, tower in _TOWERS.items():
        key = f"{modality}_config"
        if key in raw_config and not any(name.startswith((tower, f"embed_{modality}.")) for name in tensors):
            logger.info("no %s tensors: the checkpoint is used without %s", modality, modality)
            raw_config = {name: value for name, value in raw_config.items() if name != key}
            config = replace(config, vision=None) if modality == "vision" else replace(config, audio=None)
    return config, raw_config


def _check_manifest(tensors: Mapping[str, StoredTensor], config: ModelConfig, folder: Path) -> dict[str, Quantization]:
    """The strict check; returns how the quantized modules are stored."""
    expected = text_manifest(config.text) | _embedder_manifests(config)
    missing: list[str] = []
    misshapen: list[str] = []
    known = set(expected)
    quantizations: dict[str, Quantization] = {}
    for name, shape in expected.items():
        path = name.removesuffix(".weight")
        group_parts = [f"{path}.scales", f"{path}.biases"]
        if path != name and len(shape) == 2 and group_parts[0] in tensors:
            known.update(group_parts)
            absent = [part for part in (name, *group_parts) if part not in tensors]
            missing += absent
            if not absent:
                stored = [tensors[part] for part in (name, *group_parts)]
                quantization = _quantization_from_shapes(shape, *stored)
                if quantization is None:
                    misshapen.append(
                        f"{name} {_found(stored[0])} with scales {_found(stored[1])} and biases "
                        f"{_found(stored[2])} for {list(shape)}"
                    )
                else:
                    quantizations[path] = quantization
        elif name not in tensors:
            missing.append(name)
        elif tensors[name].shape != shape or tensors[name].dtype not in _FLOATS:
            misshapen.append(f"{name} {_found(tensors[name])}, expected {list(shape)}")
    known.update(_dead_names(config.text))
    towers = tuple(tower for modality, tower in _TOWERS.items() if getattr(config, modality) is not None)
    unexpected = [name for name in tensors if name not in known and not name.startswith(towers)]
    complaints = [
        f"{len(names)} {kind}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if complaints:
        raise ValueError(f"{folder} does not hold the tensors that its config.json describes: {'; '.join(complaints)}")
    return quantizations


def _dead_names(config: TextConfig) -> Iterator[str]:
    """Names that may be there and are not read, in quantized files too."""
    for name in dead_manifest(config):
        path = name.removesuffix(".weight")
        yield from (name, f"{path}.scales", f"{path}.biases")


def _embedder_manifests(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    manifests: dict[str, tuple[int, ...]] = {}
    for path, embedder in (("embed_vision", config.vision), ("embed_audio", config.audio)):
        if embedder is not None:
            manifests |= embedder_manifest(path, embedder, config.text.hidden_size)
    return manifests


def _found(stored: StoredTensor) -> str:
    return f"{stored.dtype}{list(stored.shape)}"


def _quantization_from_shapes(
    shape: tuple[int, ...], packed: StoredTensor, scales: StoredTensor, biases: StoredTensor
) -> Quantization | None:
    """Bits and group size that fit all three shapes, or None."""
    rows, width = shape
    if (
        packed.dtype != "U32"
        or scales.dtype not in _FLOATS
        or (scales.dtype, scales.shape) != (biases.dtype, biases.shape)
        or [len(part.shape) for part in (packed, scales)] != [2, 2]
        or packed.shape[0] != rows
        or scales.shape[0] != rows
    ):
        return None
    for bits in BITS:
        for group_size in GROUP_SIZES:
            if packed.shape[1] * 32 == width * bits and scales.shape[1] * group_size == width:
                return Quantization(bits, group_size)
    return None


def _declared_quantization(raw_config: dict[str, Any], where: str) -> _Declared | None:
    """Takes the quantization keys out of a config: what holds is in the shapes, and is checked against them."""
    repeated = raw_config.pop("quantization_config", None)
    raw = raw_config.pop("quantization", repeated)
    if raw is None:
        return None
    if not isinstance(raw, dict) or "bits" not in raw or "group_size" not in raw or "quant_method" in raw:
        method = raw.get("quant_method") if isinstance(raw, dict) else raw
        raise ValueError(
            f"{where}: quantized by {method!r}; only MLX's affine quantization is read: "
            "start from the unquantized checkpoint"
        )
    modules = {
        _canonical_name(path): None if value is False else _declared_module(value, f"{where}, quantization of {path}")
        for path, value in raw.items()
        if "." in path and value is not True
    }
    return _Declared(_declared_module(raw, f"{where}, quantization"), modules)


def _declared_module(raw: Any, where: str) -> Quantization:
    if not isinstance(raw, dict) or "bits" not in raw or "group_size" not in raw:
        raise ValueError(f"{where}: is {raw!r}, expected false or an object with bits and group_size")
    if raw.get("mode", "affine") != "affine":
        raise ValueError(f"{where}: mode is {raw['mode']!r}, only 'affine' is read")
    return Quantization(raw["bits"], raw["group_size"])


def _check_declared(declared: _Declared | None, actual: Mapping[str, Quantization], where: str) -> None:
    if declared is None:
        return
    for path, quantization in actual.items():
        expected = declared.modules.get(path, declared.default)
        if quantization != expected:
            raise ValueError(f"{where}: {path} is declared as {expected}, its tensors say {quantization}")


def _sliced_sources(
    tensors: Mapping[str, StoredTensor],
    config: ModelConfig,
    base: TextConfig,
    plan: SlicePlan,
    quantizations: Mapping[str, Quantization],
) -> dict[str, _Source]:
    """Text and embedder tensors under the names of the slice; config is the slice's, base the checkpoint's."""
    sources: dict[str, _Source] = {}
    for name in text_manifest(config.text) | _embedder_manifests(config):
        source_name = plan.source_name(name)
        path, source_path = name.removesuffix(".weight"), source_name.removesuffix(".weight")
        kept = cut(plan, base, source_path)
        quantization = quantizations.get(source_path)
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


def _tower_sources(tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, _Source]:
    """Vision and audio tensors, kernels turned to the published order of axes.

    Vision kernels written before July 2025 have height and width swapped; such files lack the stem's bias.
    """
    swapped = f"{_STEM}.weight" in tensors and f"{_STEM}.bias" not in tensors
    sources: dict[str, _Source] = {}
    for modality, tower in _TOWERS.items():
        stored_here = {name: stored for name, stored in tensors.items() if name.startswith(tower)}
        channels_last = _channels_last(stored_here, folder)
        for name, stored in stored_here.items():
            axes = _published_axes(len(stored.shape), channels_last, swapped and modality == "vision")
            shape = stored.shape if axes is None else tuple(stored.shape[axis] for axis in axes)
            sources[name] = _Source(stored, shape, axes=axes)
    if swapped:
        stem = tensors[f"{_STEM}.weight"]
        sources[f"{_STEM}.bias"] = _Source(stem, stem.shape[:1], absent=True)
    return sources


def _channels_last(tensors: Mapping[str, StoredTensor], folder: Path) -> bool:
    """Whether kernels are stored as MLX has them (O, kH, kW, I; depthwise C, k, 1), decided for a whole tower.

    Every kernel whose shape allows one reading only has a vote: square ones and depthwise ones.
    """
    votes: dict[bool, str] = {}
    for name, stored in tensors.items():
        shape = stored.shape
        if len(shape) == 4 and (shape[1] == shape[2]) != (shape[2] == shape[3]):
            votes[shape[1] == shape[2]] = name
        elif len(shape) == 3 and (shape[1] == 1) != (shape[2] == 1):
            votes[shape[2] == 1] = name
    if len(votes) > 1:
        raise ValueError(f"{folder}: {votes[True]} and {votes[False]} have kernels in different layouts")
    return True in votes


def _published_axes(num_axes: int, channels_last: bool, swapped: bool) -> tuple[int, ...] | None:
    if num_axes == 4:
        height, width, inputs = (1, 2, 3) if channels_last else (2, 3, 1)
        axes = (0, inputs, width, height) if swapped else (0, inputs, height, width)
        return None if axes == (0, 1, 2, 3) else axes
    return (0, 2, 1) if num_axes == 3 and channels_last else None


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
            stored.shard.read_into(offset, memoryview(target.reshape(-1)))
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
                shard.read_into(offset + row * row_bytes + first, memoryview(out[row, filled : filled + last - first]))
                filled += last - first
        return
    step = max(1, _BLOCK_BYTES // row_bytes)
    for row in range(0, len(out), step):
        whole = np.empty((min(step, len(out) - row), row_bytes), np.uint8)
        shard.read_into(offset + row * row_bytes, memoryview(whole.reshape(-1)))
        np.concatenate([whole[:, first:last] for first, last in spans], axis=1, out=out[row : row + len(whole)])
