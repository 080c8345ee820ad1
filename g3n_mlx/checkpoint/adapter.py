"""Adapters as trainers write them, PEFT's and those of mlx-lm and mlx-vlm, as changes of a checkpoint.

PEFT writes adapter_config.json and adapter_model.safetensors: A [r, K] as `lora_A`, B [N, r] as `lora_B`, scaled by
alpha / r or, with rsLoRA, alpha / sqrt(r). mlx-lm and mlx-vlm write adapters.safetensors: `lora_a` [K, r] and `lora_b`
[r, N], in mlx-vlm's older files `A` and `B`, with the scale in adapter_config.json. Tensors without such an ending
replace the model's own: PEFT's modules_to_save, mlx-lm's full fine-tuning.
Sources: peft, tuners/lora/layer.py and dora.py; mlx-lm, tuner/lora.py and dora.py; mlx-vlm, trainer/peft.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from g3n_mlx.checkpoint.folder import Changes, Checkpoint
from g3n_mlx.checkpoint.low_rank import LowRank
from g3n_mlx.checkpoint.names import canonical_name
from g3n_mlx.checkpoint.quantization import PARTS, dequantize, to_float32
from g3n_mlx.checkpoint.shards import OpenFiles, Shard, StoredTensor, read_header
from g3n_mlx.checkpoint.source import Source
from g3n_mlx.config.adapter import SETTINGS, whole_adapter
from g3n_mlx.config.fields import is_number, read_json, shown
from g3n_mlx.config.manifest import PLE_TABLE, TOKEN_TABLE, dead_manifest
from g3n_mlx.failures import BadValue, MissingFile

# What ends the name of a tensor, as LowRank has it. PEFT's may have the adapter's name in them.
_PEFT_PART = re.compile(
    r"\.(?:lora_(?P<kind>A|B|magnitude_vector|embedding_A|embedding_B))(?:\.default)?(?:\.weight)?$"
)
_PEFT_KINDS = {"A": "down", "B": "up", "magnitude_vector": "magnitude", "embedding_A": "table", "embedding_B": "table"}
_MLX_PART = re.compile(r"\.(?P<kind>lora_a|lora_b|m|A|B)$")
_MLX_KINDS = {"lora_a": "down", "A": "down", "lora_b": "up", "B": "up", "m": "magnitude"}
# PEFT's wrappers within a path.
_PEFT_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.|$)")
# Settings of PEFT whose arithmetic is another one.
_OTHER_ARITHMETIC = (
    "fan_in_fan_out",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
# Ways to begin a training that leave the base model's weights alone; others (PiSSA, OLoRA, CorDA, ...) change them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_TABLES = (TOKEN_TABLE, PLE_TABLE, "embed_vision.embedding", "embed_audio.embedding")
# Of a weight whose rows are measured, at once.
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor of an adapter."""

    on_disk: str
    path: str  # of its module, canonical; of a whole tensor its name
    kind: str  # down, up, magnitude, table or whole
    stored: StoredTensor


def changes_of(folder: Path, checkpoint: Checkpoint, weight: float = 1.0) -> Changes:
    """What the adapter in a folder, or in one file of it, changes of a checkpoint, itself perhaps changed before.

    weight: how much of it. Raises FileNotFoundError or ValueError; the latter also where a tensor belongs to no module
    of the checkpoint, and where the adapter has no effect.
    """
    files, settings = _files(folder)
    if not math.isfinite(weight) or weight == 0:
        raise BadValue(f"{folder}: the adapter's weight is {weight}, expected a number other than 0")
    is_peft = "peft_type" in settings
    if is_peft:
        _check_peft(settings, folder)
    shards: list[Shard] = []
    with ExitStack() as opened:
        parts: list[_Part] = []
        for file in files:
            shard = Shard(file)
            opened.callback(shard.close)
            shards.append(shard)
            parts += [_part(name, stored, is_peft) for name, stored in read_header(shard)]
        low_ranks, tensors = _matched(parts, settings, checkpoint, folder, weight)
        if not tensors and not any(low_rank.up.any() and low_rank.down.any() for low_rank in low_ranks.values()):
            raise BadValue(f"{folder}: the adapter changes nothing, its products are all 0: was it saved untrained?")
        opened.pop_all()
    return Changes(low_ranks, tensors, [OpenFiles(shards)])


def _files(folder: Path) -> tuple[list[Path], dict[str, Any]]:
    """The files to read, and the settings beside them."""
    files = whole_adapter(folder)
    settings = files[0].parent / SETTINGS
    if not settings.is_file():
        raise MissingFile(f"{files[0]} has no {SETTINGS} beside it, which says how the adapter is scaled")
    return files, read_json(settings)


def _check_peft(settings: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError where the numbers would not be those of PEFT."""
    if settings["peft_type"] != "LORA":
        raise BadValue(f"{folder}: peft_type is {shown(settings['peft_type'])}; only LORA is read, with its DoRA")
    for name in _OTHER_ARITHMETIC:
        if settings.get(name):
            raise BadValue(f"{folder}: {name} is {shown(settings[name])}, which is not supported: merge it with PEFT")
    start = settings.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise BadValue(
            f"{folder}: init_lora_weights is {shown(start)}, which changes the base model as well: save it with "
            "path_initial_model_for_weight_conversion, or merge it with PEFT"
        )


def _part(name: str, stored: StoredTensor, is_peft: bool) -> _Part:
    bare = name.removeprefix("base_model.model.") if is_peft else name
    found = (_PEFT_PART if is_peft else _MLX_PART).search(bare)
    if found is None:
        return _Part(name, canonical_name(_PEFT_WRAPPER.sub("", bare) if is_peft else bare), "whole", stored)
    kinds = _PEFT_KINDS if is_peft else _MLX_KINDS
    return _Part(name, canonical_name(bare[: found.start()]), kinds[found["kind"]], stored)


def _matched(
    parts: Sequence[_Part], settings: Mapping[str, Any], checkpoint: Checkpoint, folder: Path, weight: float
) -> tuple[dict[str, LowRank], dict[str, Source]]:
    """By module what is added to it, and by name the tensors that are replaced."""
    dead = {name.removesuffix(".weight") for name in dead_manifest(checkpoint.config.text)}
    tensors: dict[str, Source] = {}
    modules: dict[str, dict[str, _Part]] = {}
    for part in parts:
        if part.kind == "table" or (part.kind != "whole" and part.path in _TABLES):
            raise BadValue(
                f"{folder}: {part.on_disk} adapts an embedding table, which is not supported: train without "
                "embed_tokens, or merge the adapter with the program that trained it"
            )
        if part.kind != "whole":
            _check_known(part, f"{part.path}.weight", checkpoint, folder, dead)
            modules.setdefault(part.path, {})[part.kind] = part
        elif part.path.removesuffix(".weight") not in dead:
            _check_known(part, part.path, checkpoint, folder, dead)
            tensors[part.path] = _whole(part, checkpoint, folder, weight)
    low_ranks = {
        path: _low_rank(path, found, settings, checkpoint, folder, weight)
        for path, found in modules.items()
        if path not in dead
    }
    if not (low_ranks or tensors):
        what = "holds no tensors" if not parts else "adapts only keys and values of layers that share those of others"
        raise BadValue(f"{folder}: the adapter {what}, so it would have no effect")
    return low_ranks, tensors


def _check_known(part: _Part, name: str, checkpoint: Checkpoint, folder: Path, dead: set[str]) -> None:
    path = name.removesuffix(".weight")
    if name in checkpoint or path in dead:
        return
    tower = next((kind for kind in ("vision", "audio") if f"{kind}_" in path or path == f"embed_{kind}"), None)
    if path.endswith("lm_head"):
        reason = "Gemma 3n has no head of its own: it is the token embedding"
    elif tower is not None and getattr(checkpoint.config, tower) is None:
        reason = f"{checkpoint.folder} has no {tower} tower"
    else:
        reason = "was it made for another model, or for a slice of this one?"
    raise BadValue(f"{folder}: {part.on_disk} belongs to no module of {checkpoint.folder}: {reason}")


def _shape(path: str, checkpoint: Checkpoint) -> tuple[int, ...]:
    """The shape of a module's weight, whether it is quantized or not."""
    shape = checkpoint.info(f"{path}.weight").shape
    quantization = checkpoint.quantization(path)
    return shape if quantization is None else (shape[0], shape[1] * 32 // quantization.bits)


def _whole(part: _Part, checkpoint: Checkpoint, folder: Path, weight: float) -> Source:
    expected = checkpoint.info(part.path).shape
    if part.path.endswith(".weight"):
        expected = _shape(part.path.removesuffix(".weight"), checkpoint)
    if part.stored.shape != expected or part.stored.dtype not in ("BF16", "F16", "F32"):
        raise _misfit(part, folder, f"{list(expected)}")
    if weight != 1:
        raise BadValue(f"{folder}: {part.on_disk} replaces a tensor, so the adapter can't be weighted by {weight}")
    return Source(part.stored, part.stored.shape)


def _low_rank(
    path: str,
    parts: Mapping[str, _Part],
    settings: Mapping[str, Any],
    checkpoint: Checkpoint,
    folder: Path,
    weight: float,
) -> LowRank:
    missing = {"down", "up"} - parts.keys()
    if settings.get("use_dora") or settings.get("fine_tune_type") == "dora":
        missing |= {"magnitude"} - parts.keys()
    if missing:
        one = next(iter(parts.values()))
        raise BadValue(f"{folder}: {one.on_disk} is there without the other parts of its module: is the file complete?")
    is_peft = "peft_type" in settings
    shape = _shape(path, checkpoint)
    down, up = (_read(parts[kind]) for kind in ("down", "up"))
    if not is_peft:
        down, up = down.T, up.T
    if not (down.ndim and up.ndim and down.shape[0]):
        raise _misfit(parts["up" if down.ndim and down.shape[0] else "down"], folder, "a matrix with at least one rank")
    rank = down.shape[0]
    if down.shape[1:] != shape[1:]:
        raise _misfit(parts["down"], folder, f"{list(shape[1:])} inputs of a weight {list(shape)}")
    if up.shape[:2] != (shape[0], rank) or prod(up.shape[2:]) != 1:
        raise _misfit(parts["up"], folder, f"{shape[0]} outputs of a weight {list(shape)} and {rank} ranks")
    down, up = down.reshape(rank, -1), up.reshape(shape[0], rank)
    scale = _peft_scale(settings, parts["down"], rank, folder) if is_peft else _mlx_scale(settings, folder)
    low_rank = LowRank(np.ascontiguousarray(down), np.ascontiguousarray(up * np.float32(scale * weight)))
    if "magnitude" not in parts:
        return low_rank
    magnitude = _read(parts["magnitude"]).reshape(-1)
    if len(magnitude) != shape[0]:
        raise _misfit(parts["magnitude"], folder, f"{shape[0]} magnitudes")
    if weight != 1:
        raise BadValue(f"{folder}: DoRA's magnitudes are of the whole adapter: it can't be weighted by {weight}")
    norms = _row_norms(path, low_rank, checkpoint)
    # A row of zeros has no direction and stays one, whatever its magnitude; 0 / 0 would make it NaN.
    factor = np.divide(magnitude, norms, out=np.ones_like(norms), where=norms > 0)
    return LowRank(low_rank.down, low_rank.up, factor)


def _read(part: _Part) -> np.ndarray:
    """float32; raises ValueError where it holds NaN or infinity."""
    array = to_float32(Source(part.stored, part.stored.shape).read())
    if not np.isfinite(array).all():
        raise BadValue(f"{part.stored.shard.path}: {part.on_disk} holds NaN or infinity")
    return array


def _peft_scale(settings: Mapping[str, Any], part: _Part, rank: int, folder: Path) -> float:
    """alpha / r, or alpha / sqrt(r), with the alpha of the pattern that fits the module's path."""
    bare = part.on_disk.removeprefix("base_model.model.").partition(".lora_")[0]
    alpha = settings.get("lora_alpha")
    for pattern, own in _alpha_patterns(settings, folder).items():
        if re.match(rf"(.*\.)?({pattern})$", bare):  # peft, utils/other.py, `get_pattern_key`
            alpha = own
            break
    if not is_number(alpha):
        raise BadValue(f"{folder / SETTINGS}: lora_alpha is {shown(alpha)}, expected a number")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _alpha_patterns(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    where, patterns = folder / SETTINGS, settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise BadValue(f"{where}: alpha_pattern is {shown(patterns)}, expected an object of numbers by pattern")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise BadValue(f"{where}: alpha_pattern has {shown(pattern)}, no regular expression: {error}") from None
    return patterns


def _mlx_scale(settings: Mapping[str, Any], folder: Path) -> float:
    parameters = settings.get("lora_parameters", settings)
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if scale is None and isinstance(parameters, dict) and {"alpha", "rank"} <= parameters.keys():
        alpha, rank = parameters["alpha"], parameters["rank"]  # of mlx-vlm's older files
        if not is_number(alpha) or not is_number(rank) or rank <= 0:
            raise BadValue(
                f"{folder / SETTINGS}: alpha and rank are {shown(alpha)} and {shown(rank)}, expected a number and one "
                "above 0"
            )
        scale = alpha / rank
    if not is_number(scale):
        raise BadValue(f"{folder / SETTINGS}: the scale of lora_parameters is {shown(scale)}, expected a number")
    return scale


def _row_norms(path: str, low_rank: LowRank, checkpoint: Checkpoint) -> np.ndarray:
    """The norms [N] of the rows of a weight with what is added to it, float32."""
    name, quantization = f"{path}.weight", checkpoint.quantization(path)
    rows = checkpoint.info(name).shape[0]
    parts, before = PARTS if quantization else PARTS[:1], checkpoint.low_ranks.get(path)
    norms = np.empty(rows, np.float32)
    step = max(1, _BLOCK_BYTES // (4 * low_rank.down.shape[1]))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        stored = [checkpoint.read(f"{path}.{part}", block.start, block.stop) for part in parts]
        weight = stored[0]
        if quantization is not None:
            weight = dequantize(stored[0], stored[1], stored[2], quantization.bits, quantization.group_size)
        if before is not None:
            weight = before.merged(weight, start)
        norms[block] = np.linalg.norm(low_rank.merged(weight, start).reshape(len(weight), -1), axis=1)
    return norms


def _misfit(part: _Part, folder: Path, expected: str) -> BadValue:
    return BadValue(
        f"{folder}: {part.on_disk} is {part.stored.dtype}{list(part.stored.shape)}, expected {expected}: was the "
        "adapter made for another model, or for a slice of this one?"
    )
