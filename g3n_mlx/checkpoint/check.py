"""The tensors of a checkpoint, checked against its config by name and shape.

Bits and group sizes are read from tensor shapes; config.json must match.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from g3n_mlx.checkpoint.names import STEM, TOWERS, Declared, lacks_stem_bias, tower_names
from g3n_mlx.checkpoint.quantization import BITS, GROUP_SIZES, Quantization
from g3n_mlx.checkpoint.shards import StoredTensor
from g3n_mlx.config.audio import audio_manifest
from g3n_mlx.config.manifest import dead_manifest, embedder_manifest, text_manifest
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.config.vision import vision_manifest

logger = logging.getLogger(__name__)

_FLOATS = ("BF16", "F16", "F32")


def embedder_manifests(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the embedders of the modalities that a checkpoint has."""
    manifests: dict[str, tuple[int, ...]] = {}
    for path, embedder in (("embed_vision", config.vision), ("embed_audio", config.audio)):
        if embedder is not None:
            manifests |= embedder_manifest(path, embedder, config.text.hidden_size)
    return manifests


def check_manifest(tensors: Mapping[str, StoredTensor], config: ModelConfig, folder: Path) -> dict[str, Quantization]:
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
    towers = tuple(tower for modality, tower in TOWERS.items() if getattr(config, modality) is not None)
    unexpected = [name for name in tensors if name not in known and not name.startswith(towers)]
    _complain(folder, missing, unexpected, misshapen)
    return quantizations


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


def check_declared(declared: Declared | None, actual: Mapping[str, Quantization], where: str) -> None:
    """Raises ValueError when config.json declares another quantization than the tensors have."""
    if declared is None:
        return
    for path, quantization in actual.items():
        expected = declared.modules.get(path, declared.default)
        if quantization != expected:
            raise ValueError(f"{where}: {path} is declared as {expected}, its tensors say {quantization}")


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
        raise ValueError(f"{folder}: {votes[True]} and {votes[False]} have kernels in different layouts")
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
