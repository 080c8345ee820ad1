"""The tensors of a checkpoint, checked against its config by name and shape.

Bits and group sizes are read from tensor shapes; config.json must match.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from g3n_mlx.checkpoint.names import STEM, TOWERS, Declared, lacks_stem_bias, tower_names
from g3n_mlx.checkpoint.quantization import BITS, GROUP_SIZES, PARTS, Quantization
from g3n_mlx.checkpoint.shards import StoredTensor, TensorInfo
from g3n_mlx.config.audio import audio_manifest
from g3n_mlx.config.manifest import dead_manifest, embedder_manifest, text_manifest
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.config.vision import vision_manifest
from g3n_mlx.failures import BadValue

logger = logging.getLogger(__name__)

Described = StoredTensor | TensorInfo

_FLOATS = ("BF16", "F16", "F32")
# Tensors of a kind that an error shows.
_SHOWN = 3
# The numbers of the text config that the shapes depend on and the names do not.
_SIZES = (
    "hidden_size",
    "hidden_size_per_layer_input",
    "vocab_size",
    "vocab_size_per_layer_input",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "laurel_rank",
)


def embedder_manifests(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the embedders of the modalities that a checkpoint has."""
    manifests: dict[str, tuple[int, ...]] = {}
    for path, embedder in (("embed_vision", config.vision), ("embed_audio", config.audio)):
        if embedder is not None:
            manifests |= embedder_manifest(path, embedder, config.text.hidden_size)
    return manifests


@dataclass(slots=True)
class _Comparison:
    """What a config asks for, held against what there is."""

    missing: list[str] = field(default_factory=list[str])
    unexpected: list[str] = field(default_factory=list[str])
    misshapen: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])  # name -> expected shape
    quantizations: dict[str, Quantization] = field(default_factory=dict[str, Quantization])

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)


def check_manifest(tensors: Mapping[str, StoredTensor], config: ModelConfig, folder: Path) -> dict[str, Quantization]:
    """The strict check; returns how the quantized modules are stored.

    Raises ValueError with three tensors and the count of each kind, and with the config's key that explains them all
    where there is one.
    """
    found = _compare(tensors, config)
    if not found.fits:
        misshapen = [_misfit(name, shape, tensors) for name, shape in found.misshapen.items()]
        hint = _wrong_key(found, tensors, config)
        _complain(folder, found.missing, found.unexpected, misshapen, hint)
    return found.quantizations


def quantizations_of(tensors: Mapping[str, Described], config: ModelConfig) -> dict[str, Quantization]:
    """How the quantized modules are stored, by the shapes of the tensors that fit the config."""
    return _compare(tensors, config).quantizations


def _compare(tensors: Mapping[str, Described], config: ModelConfig) -> _Comparison:
    found = _Comparison()
    dead = dead_manifest(config.text)  # may be left out
    known: set[str] = set()
    for name, shape in (text_manifest(config.text) | embedder_manifests(config) | dead).items():
        path = name.removesuffix(".weight")
        parts = [name]
        if path != name and len(shape) == 2 and f"{path}.scales" in tensors:
            parts = [f"{path}.{part}" for part in PARTS]
        known.update(parts)
        absent = [part for part in parts if part not in tensors]
        if absent:
            found.missing += [] if name in dead and absent == parts else absent
        elif len(parts) == 1:
            if tensors[name].shape != shape or tensors[name].dtype not in _FLOATS:
                found.misshapen[name] = shape
        else:
            quantization = _quantization_from_shapes(shape, *(tensors[part] for part in parts))
            if quantization is None:
                found.misshapen[name] = shape
            else:
                found.quantizations[path] = quantization
    towers = tuple(tower for modality, tower in TOWERS.items() if getattr(config, modality) is not None)
    found.unexpected = [name for name in tensors if name not in known and not name.startswith(towers)]
    return found


def _wrong_key(found: _Comparison, tensors: Mapping[str, StoredTensor], config: ModelConfig) -> str:
    """The one number of the text config that is wrong, if with another value everything fits."""
    candidates: dict[tuple[str, int], None] = {}
    for name, shape in found.misshapen.items():
        for expected, stored in zip(shape, tensors[name].shape, strict=False):
            for key in _SIZES:
                value, rest = divmod(stored * getattr(config.text, key), expected)
                if stored != expected and value and not rest:
                    candidates[key, value] = None
    for key, value in candidates:
        if _compare(tensors, replace(config, text=replace(config.text, **{key: value}))).fits:
            return f"config.json says that {key} is {getattr(config.text, key)}, the tensors fit {value}"
    return ""


def _misfit(name: str, shape: tuple[int, ...], tensors: Mapping[str, StoredTensor]) -> str:
    path = name.removesuffix(".weight")
    if f"{path}.scales" not in tensors:
        return f"{name} {_found(tensors[name])}, expected {list(shape)}"
    packed, scales, biases = (_found(tensors[f"{path}.{part}"]) for part in PARTS)
    return f"{name} {packed} with scales {scales} and biases {biases}, expected the codes of {list(shape)}"


def _quantization_from_shapes(
    shape: tuple[int, ...], packed: Described, scales: Described, biases: Described
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


def check_declared(declared: Declared | None, actual: Mapping[str, Quantization], where: str) -> None:
    """Raises ValueError when config.json declares another quantization than the tensors have."""
    if declared is None:
        return
    for path, quantization in actual.items():
        expected = declared.modules.get(path, declared.default)
        if quantization != expected:
            raise BadValue(f"{where}: {path} is declared as {expected}, its tensors say {quantization}")


def tower_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> published shape of what the towers read."""
    shapes = vision_manifest(config.vision) if config.vision is not None else {}
    return shapes | (audio_manifest(config.audio) if config.audio is not None else {})


def kernel_axes(
    tensors: Mapping[str, StoredTensor], tower_shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> dict[str, tuple[int, ...]]:
    """Name -> axes, stored to published order, of the towers' kernels that are stored in another one."""
    axes: dict[str, tuple[int, ...]] = {}
    for modality, tower in TOWERS.items():
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
        raise BadValue(f"{folder}: {votes[True]} and {votes[False]} have kernels in different layouts")
    return True in votes


def _published_axes(num_axes: int, channels_last: bool, swapped: bool) -> tuple[int, ...] | None:
    if num_axes == 4:
        height, width, inputs = (1, 2, 3) if channels_last else (2, 3, 1)
        axes = (0, inputs, width, height) if swapped else (0, inputs, height, width)
        return None if axes == (0, 1, 2, 3) else axes
    return (0, 2, 1) if num_axes == 3 and channels_last else None


def check_towers(
    tensors: Mapping[str, StoredTensor],
    kernel_axes: Mapping[str, tuple[int, ...]],
    tower_shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> None:
    """Raises ValueError for tensors that a tower reads and that are missing or misshapen."""
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


def _complain(
    folder: Path, missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str], hint: str = ""
) -> None:
    complaints = [
        f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if complaints:
        reason = hint or "; ".join(complaints)
        examples = f" ({'; '.join(complaints)})" if hint else ""
        raise BadValue(f"{folder} does not hold the tensors that its config.json describes: {reason}{examples}")


def _found(stored: StoredTensor) -> str:
    return f"{stored.dtype}{list(stored.shape)}"
