"""Which modules a conversion quantizes, and at how many bits.

A recipe is a JSON file, {"modules": {PATTERN: {"bits": 4, "group_size": 64}, OTHER_PATTERN: false, ...}}. Patterns are
those of file names, over module paths of the whole checkpoint, before any slice (`language_model.layers.3.mlp.*`). The
first that matches counts; false, or none that matches, leaves the module as it is. Only modules that a conversion
quantizes at all, and LAuReL's, which it leaves alone without a recipe, are looked up. A predicate is a function that
says the same of one path.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.config.fields import is_integer, read_json, shown
from g3n_mlx.config.manifest import PLE_TABLE, TEXT, TOKEN_TABLE
from g3n_mlx.failures import BadValue

logger = logging.getLogger(__name__)

# True: as the conversion's own bits and group size say; a dict has "bits", perhaps "group_size"; False leaves it dense.
Predicate = Callable[[str], bool | Mapping[str, Any]]

# What is quantized. The rest is small and sensitive, or a tower: norms, AltUp's router and coefficients, LAuReL,
# the embedders of images and audio.
_QUANTIZED_PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "per_layer_input_gate",
    "per_layer_projection",
)
_LAUREL_PARTS = ("laurel.linear_left", "laurel.linear_right")
_QUANTIZED_ROOTS = (f"{TEXT}per_layer_model_projection", TOKEN_TABLE, PLE_TABLE)


def is_quantized_module(path: str) -> bool:
    """Whether a conversion quantizes this module's weight."""
    if path.startswith(f"{TEXT}layers."):
        return path.removeprefix(f"{TEXT}layers.").partition(".")[2] in _QUANTIZED_PARTS
    return path in _QUANTIZED_ROOTS or path.startswith((f"{TEXT}altup_projections.", f"{TEXT}altup_unembed_"))


def can_be_quantized(path: str) -> bool:
    """Whether a recipe may quantize this module's weight: LAuReL's too, as mlx-vlm does."""
    parts = path.removeprefix(f"{TEXT}layers.").partition(".")[2]
    return is_quantized_module(path) or (path.startswith(TEXT) and parts in _LAUREL_PARTS)


def choose_uniformly(shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> dict[str, Quantization]:
    """As `choose_quantizations`, of everything that a recipe may quantize, the PLE table and LAuReL included."""
    names = {name.removesuffix(".weight"): shape for name, shape in shapes.items()}
    return {
        path: Quantization(bits, group_size)
        for path, shape in names.items()
        if can_be_quantized(path) and shape[-1] % group_size == 0
    }


def choose_quantizations(
    shapes: Mapping[str, tuple[int, ...]], q_bits: int, q_group_size: int, ple_bits: int
) -> dict[str, Quantization]:
    """Module path -> how its weight will be stored, for those that are quantized; shapes are by tensor name.

    Rows that do not divide into groups stay dense, as in mlx-lm (utils.py, `quantize_model`).
    """
    chosen: dict[str, Quantization] = {}
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if not is_quantized_module(path):
            continue
        if shape[-1] % q_group_size:
            logger.info("%s stays dense: its rows of %d are no multiple of %d", path, shape[-1], q_group_size)
            continue
        chosen[path] = Quantization(ple_bits if path == PLE_TABLE else q_bits, q_group_size)
    return chosen


@dataclass(frozen=True, slots=True)
class Recipe:
    """How modules are stored, by patterns of their paths."""

    patterns: tuple[tuple[str, Quantization | None], ...]  # in order; None stays as it is

    def quantization(self, path: str) -> Quantization | None:
        """How a module of the whole checkpoint is stored."""
        return next((how for pattern, how in self.patterns if fnmatchcase(path, pattern)), None)

    def choose(self, shapes: Mapping[str, tuple[int, ...]], base_name: Callable[[str], str]) -> dict[str, Quantization]:
        """As `choose_quantizations`, by this recipe. base_name: the whole checkpoint's path of a module."""
        chosen = _chosen(self.quantization, shapes, base_name)
        if not chosen:
            raise BadValue("the recipe quantizes no module of this checkpoint: are its patterns those of another one?")
        return chosen


def choose_by_predicate(
    shapes: Mapping[str, tuple[int, ...]],
    base_name: Callable[[str], str],
    predicate: Predicate,
    q_bits: int | None,
    q_group_size: int,
    ple_bits: int,
) -> dict[str, Quantization]:
    """As `choose_quantizations`, by a function of the whole checkpoint's paths; raises ValueError for other answers."""

    def quantization(path: str) -> Quantization | None:
        how = predicate(path)
        if how is False:
            return None
        if how is True:
            if q_bits is None:
                raise BadValue(
                    f"the predicate says True of {path}: give q_bits, which True stands for, or say the bits"
                )
            return Quantization(ple_bits if path == PLE_TABLE else q_bits, q_group_size)
        entry: dict[str, Any] = {"group_size": q_group_size, "mode": "affine"}
        entry |= how if isinstance(how, Mapping) else {}
        known = entry.keys() == {"bits", "group_size", "mode"} and entry["mode"] == "affine"
        if not known or not is_integer(entry["bits"]) or not is_integer(entry["group_size"]):
            raise BadValue(
                f"the predicate says {shown(how)} of {path}, expected True, False, or a dict of bits and group_size"
            )
        try:
            return Quantization(entry["bits"], entry["group_size"])
        except ValueError as error:
            raise BadValue(f"the predicate, of {path}: {error}") from None

    chosen = _chosen(quantization, shapes, base_name)
    if not chosen:
        raise BadValue("the predicate quantizes no module of this checkpoint")
    return chosen


def _chosen(
    quantization: Callable[[str], Quantization | None],
    shapes: Mapping[str, tuple[int, ...]],
    base_name: Callable[[str], str],
) -> dict[str, Quantization]:
    """What a function of the whole checkpoint's paths says of the modules that may be quantized and divide."""
    chosen: dict[str, Quantization] = {}
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        how = quantization(base_name(path)) if can_be_quantized(path) else None
        if how is not None and shape[-1] % how.group_size == 0:
            chosen[path] = how
    return chosen


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe; raises OSError, or ValueError naming the pattern that can't be used."""
    entries = read_json(path)
    modules = entries.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise BadValue(f"{path}: modules is {shown(modules)}, expected an object of bits and group sizes by pattern")
    patterns: list[tuple[str, Quantization | None]] = []
    for pattern, how in modules.items():
        if how is False:
            patterns.append((pattern, None))
            continue
        if not isinstance(how, dict) or set(how) != {"bits", "group_size"} or not all(map(is_integer, how.values())):
            raise BadValue(f"{path}: {pattern} is {shown(how)}, expected bits and group_size, or false")
        try:
            patterns.append((pattern, Quantization(how["bits"], how["group_size"])))
        except ValueError as error:
            raise BadValue(f"{path}: {pattern}: {error}") from None
    return Recipe(tuple(patterns))


def write_recipe(path: Path, quantizations: Mapping[str, Quantization]) -> None:
    """Writes how modules are stored; the parts of a layer's attention or FFN that are stored alike are one pattern."""
    by_parent: dict[str, list[str]] = {}
    for module in quantizations:
        parent, _, _ = module.rpartition(".")
        key = f"{parent}.*" if parent.endswith((".self_attn", ".mlp")) else module
        by_parent.setdefault(key, []).append(module)
    entries: dict[str, dict[str, int]] = {}
    for key, modules in by_parent.items():
        alike = len({quantizations[module] for module in modules}) == 1
        for pattern in [key] if alike else modules:
            how = quantizations[modules[0] if alike else pattern]
            entries[pattern] = {"bits": how.bits, "group_size": how.group_size}
    path.write_text(json.dumps({"modules": entries}, indent=1) + "\n", encoding="utf-8")
