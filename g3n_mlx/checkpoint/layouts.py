"""The layouts in which Gemma 3n lies on disk, brought to one set of names and checked against the config.

Names differ by who wrote the file: Google and mlx-lm, mlx-vlm, text-only Hugging Face, transformers 5. Canonical
names are the module paths of our models. Truth about quantization is in the tensors' shapes; config.json must agree.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from g3n_mlx.checkpoint.quantization import BITS, GROUP_SIZES, Quantization
from g3n_mlx.checkpoint.shards import Shard, StoredTensor, open_shards
from g3n_mlx.config.audio import audio_manifest
from g3n_mlx.config.fields import read_json
from g3n_mlx.config.manifest import TEXT, dead_manifest, embedder_manifest, text_manifest
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.config.text import FULL, SLIDING
from g3n_mlx.config.vision import vision_manifest

logger = logging.getLogger(__name__)

_TOWERS = {"vision": "vision_tower.", "audio": "audio_tower."}
STEM = "vision_tower.timm_model.conv_stem.conv"
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
# What mx.quantize takes where nothing is said (mlx, ops.cpp, `quantize`, mode "affine").
_MLX_DEFAULT = Quantization(bits=4, group_size=64)


@dataclass(frozen=True, slots=True)
class Layout:
    """An opened folder: its whole content under canonical names."""

    config: ModelConfig
    raw_config: dict[str, Any]  # nested, without quantization
    shards: list[Shard]
    tensors: dict[str, StoredTensor]
    quantizations: dict[str, Quantization]  # of the modules that are quantized
    kernel_axes: dict[str, tuple[int, ...]]  # tower tensors that lie in another order of axes: stored -> published


@dataclass(frozen=True, slots=True)
class _Declared:
    """What config.json says about quantization."""

    default: Quantization
    modules: Mapping[str, Quantization | None]  # canonical module paths; None is dense


def open_layout(folder: Path) -> Layout:
    """Opens a checkpoint folder and checks its tensors by name and shape against its config.json.

    Raises FileNotFoundError or ValueError, the latter naming the tensors that are missing, unexpected or misshapen
    (ten of each, and the count). Below the vision and audio towers what nobody reads is no error.
    """
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
        tower_shapes = _tower_shapes(config)
        kernel_axes = _kernel_axes(tensors, tower_shapes, folder)
        _check_towers(tensors, kernel_axes, tower_shapes, folder)
        opened.pop_all()
    return Layout(config, raw_config, shards, tensors, quantizations, kernel_axes)


def embedder_manifests(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the embedders of the modalities that a checkpoint has."""
    manifests: dict[str, tuple[int, ...]] = {}
    for path, embedder in (("embed_vision", config.vision), ("embed_audio", config.audio)):
        if embedder is not None:
            manifests |= embedder_manifest(path, embedder, config.text.hidden_size)
    return manifests


def tower_names(tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """The names below the vision and audio towers."""
    return (name for name in tensors if name.startswith(tuple(_TOWERS.values())))


def lacks_stem_bias(tensors: Mapping[str, StoredTensor]) -> bool:
    """Vision weights of before July 2025: kernels have height and width swapped, and the stem has no bias."""
    return f"{STEM}.weight" in tensors and f"{STEM}.bias" not in tensors


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
            inner["model_type"] = "gemma3n_text"
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
    dead = dead_manifest(config.text)  # may be left out
    missing: list[str] = []
    misshapen: list[str] = []
    known: set[str] = set()
    quantizations: dict[str, Quantization] = {}
    for name, shape in (text_manifest(config.text) | embedder_manifests(config) | dead).items():
        path = name.removesuffix(".weight")
        parts = [name]
        if path != name and len(shape) == 2 and f"{path}.scales" in tensors:
            parts += [f"{path}.scales", f"{path}.biases"]
        known.update(parts)
        absent = [part for part in parts if part not in tensors]
        if absent:
            missing += [] if name in dead and absent == parts else absent
        elif len(parts) == 1:
            if tensors[name].shape != shape or tensors[name].dtype not in _FLOATS:
                misshapen.append(f"{name} {_found(tensors[name])}, expected {list(shape)}")
        else:
            stored = [tensors[part] for part in parts]
            quantization = _quantization_from_shapes(shape, *stored)
            if quantization is None:
                misshapen.append(
                    f"{name} {_found(stored[0])} with scales {_found(stored[1])} and biases {_found(stored[2])}, "
                    f"expected the codes of {list(shape)}"
                )
            else:
                quantizations[path] = quantization
    towers = tuple(tower for modality, tower in _TOWERS.items() if getattr(config, modality) is not None)
    unexpected = [name for name in tensors if name not in known and not name.startswith(towers)]
    _complain(folder, missing, unexpected, misshapen)
    return quantizations


def _tower_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> published shape of what the towers read."""
    shapes = vision_manifest(config.vision) if config.vision is not None else {}
    return shapes | (audio_manifest(config.audio) if config.audio is not None else {})


def _check_towers(
    tensors: Mapping[str, StoredTensor],
    kernel_axes: Mapping[str, tuple[int, ...]],
    tower_shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> None:
    shapes = dict(tower_shapes)
    if lacks_stem_bias(tensors):
        shapes.pop(f"{STEM}.bias", None)
    misshapen: list[str] = []
    for name, shape in shapes.items():
        if (stored := tensors.get(name)) is not None:
            axes = kernel_axes.get(name, tuple(range(len(stored.shape))))
            if tuple(stored.shape[axis] for axis in axes) != shape or stored.dtype not in _FLOATS:
                misshapen.append(f"{name} {_found(stored)}, expected {list(shape)}")
    _complain(folder, [name for name in shapes if name not in tensors], [], misshapen)
    unread = [name for name in tower_names(tensors) if name not in shapes]
    if unread:
        logger.info("%d tensors of the towers are not read: %s", len(unread), ", ".join(unread[:10]))


def _complain(folder: Path, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
    complaints = [
        f"{len(names)} {kind}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if complaints:
        raise ValueError(f"{folder} does not hold the tensors that its config.json describes: {'; '.join(complaints)}")


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
    # mlx-lm's mixed recipes write null for what they leave to mx.quantize.
    bits = _MLX_DEFAULT.bits if raw["bits"] is None else raw["bits"]
    group_size = _MLX_DEFAULT.group_size if raw["group_size"] is None else raw["group_size"]
    return Quantization(bits, group_size)


def _check_declared(declared: _Declared | None, actual: Mapping[str, Quantization], where: str) -> None:
    if declared is None:
        return
    for path, quantization in actual.items():
        expected = declared.modules.get(path, declared.default)
        if quantization != expected:
            raise ValueError(f"{where}: {path} is declared as {expected}, its tensors say {quantization}")


def _kernel_axes(
    tensors: Mapping[str, StoredTensor], tower_shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> dict[str, tuple[int, ...]]:
    axes: dict[str, tuple[int, ...]] = {}
    for modality, tower in _TOWERS.items():
        stored_here = {name: stored for name, stored in tensors.items() if name.startswith(tower)}
        channels_last = _channels_last(stored_here, tower_shapes, folder)
        swapped = modality == "vision" and lacks_stem_bias(tensors)
        for name, stored in stored_here.items():
            turned = _published_axes(len(stored.shape), channels_last, swapped)
            if turned is not None:
                axes[name] = turned
    return axes


def _channels_last(
    tensors: Mapping[str, StoredTensor], tower_shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> bool:
    """Whether kernels are stored as MLX has them (O, kH, kW, I; depthwise C, k, 1), decided for a whole tower.

    Every kernel that has its published shape in one of the two orders has a vote.
    """
    votes: dict[bool, str] = {}
    for name, stored in tensors.items():
        published = tower_shapes.get(name, ())
        turned = (*published[:1], *published[2:], *published[1:2])
        if turned != published and tuple(stored.shape) in (turned, published):
            votes[tuple(stored.shape) == turned] = name
    if len(votes) > 1:
        raise ValueError(f"{folder}: {votes[True]} and {votes[False]} have kernels in different layouts")
    return True in votes


def _published_axes(num_axes: int, channels_last: bool, swapped: bool) -> tuple[int, ...] | None:
    if num_axes == 4:
        height, width, inputs = (1, 2, 3) if channels_last else (2, 3, 1)
        axes = (0, inputs, width, height) if swapped else (0, inputs, height, width)
        return None if axes == (0, 1, 2, 3) else axes
    return (0, 2, 1) if num_axes == 3 and channels_last else None
