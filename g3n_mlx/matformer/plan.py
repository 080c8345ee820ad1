"""MatFormer slices: the smaller models that lie inside a larger one, as arithmetic on names and shapes.

A slice keeps the first units of each feed-forward block and leaves out whole layers, which then disappear from
everything that is indexed by layer. The published slices are a CSV table (Hugging Face dataset
google/gemma3n-slicing-configs); a user's own table in the same grammar works as well.
Source: arXiv 2310.07707 (MatFormer); Google's MatFormer Lab notebook.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from g3n_mlx.checkpoint.source import Ranges
from g3n_mlx.config.manifest import PLE_TABLE, TEXT
from g3n_mlx.config.text import TextConfig
from g3n_mlx.failures import BadValue
from g3n_mlx.matformer.table import Slice

_LAYER = re.compile(rf"^{re.escape(TEXT)}layers\.(\d+)\.(.*)$")
# The projection of a token's embedding to the PLE inputs of all layers: rows for each.
PROJECTION = f"{TEXT}per_layer_model_projection"
_PER_LAYER_LISTS = ("layer_types", "activation_sparsity_pattern")


@dataclass(frozen=True, slots=True)
class SlicePlan:
    """A slice checked against a config: what to keep of the checkpoint."""

    slice_name: str
    kept_layers: tuple[int, ...]  # indices in the checkpoint, ascending
    intermediate_size: tuple[int, ...]  # one per kept layer

    def sliced_name(self, name: str) -> str | None:
        """The slice's name for a tensor or module of the checkpoint; None when its layer is skipped."""
        match = _LAYER.match(name)
        if match is None:
            return name
        layer = int(match[1])
        return f"{TEXT}layers.{self.kept_layers.index(layer)}.{match[2]}" if layer in self.kept_layers else None

    def base_name(self, name: str) -> str:
        """The checkpoint's name for a tensor or module of the slice."""
        match = _LAYER.match(name)
        return name if match is None else f"{TEXT}layers.{self.kept_layers[int(match[1])]}.{match[2]}"


@dataclass(frozen=True, slots=True)
class Cut:
    """What a slice keeps of one matrix; None is everything. Counted in elements, before any packing."""

    rows: Ranges | None = None
    columns: Ranges | None = None


def find_slice(name: str, slices: Sequence[Slice], config: TextConfig | None = None) -> Slice:
    """The slice of a full or short name, in any case; the error lists all names, and a near one.

    config: the error then lists only those that can be taken from such a checkpoint, if any can.
    """
    if not isinstance(name, str):
        raise BadValue(f"the slice is {name!r}, expected a name")
    wanted = name.strip().casefold()
    names = {known.casefold(): entry for entry in slices for known in (entry.name, entry.short_name)}
    if wanted in names:
        return names[wanted]
    offered = [entry for entry in slices if config is None or fits(config, entry)]
    if slices and not offered:
        raise BadValue(
            f"no slice is called {name!r}, and none of the table can be taken from this model: it is a slice "
            "itself, or needs a table of its own"
        )
    names = {known.casefold(): entry for entry in offered for known in (entry.name, entry.short_name)}
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.6)
    meant = f"; did you mean {names[near[0]].short_name!r}?" if near else "."
    listing = ", ".join(f"{entry.short_name} = {entry.name!r}" for entry in offered)
    raise BadValue(f"no slice is called {name!r}{meant} There are: {listing}")


def plan_slice(config: TextConfig, chosen: Slice) -> SlicePlan:
    """Checks a slice against the checkpoint that it is to be cut from.

    Raises ValueError when it was made for another base model, is wider than the checkpoint, or leaves out a layer
    whose keys and values others read.
    """
    where = f"slice {chosen.name!r}"
    layers = config.num_hidden_layers
    skipped = set(chosen.skipped_layers)
    if len(skipped) != len(chosen.skipped_layers):
        raise BadValue(f"{where}: skips a layer twice: {list(chosen.skipped_layers)}")
    base_layers = chosen.num_layers + len(skipped)
    if base_layers != layers:
        raise BadValue(
            f"{where}: made for a base model of {base_layers} layers, this checkpoint has {layers}; "
            "was it sliced already, or is it another model?"
        )
    outside = sorted(layer for layer in skipped if not 0 <= layer < layers)
    if outside:
        raise BadValue(f"{where}: skips layers {outside}, the checkpoint's are 0 to {layers - 1}")
    if len(chosen.ffn_hidden_dims) != chosen.num_layers:
        raise BadValue(f"{where}: has {len(chosen.ffn_hidden_dims)} FFN widths for {chosen.num_layers} kept layers")
    kept = tuple(layer for layer in range(layers) if layer not in skipped)
    plan = SlicePlan(chosen.name, kept, chosen.ffn_hidden_dims)
    check_plan(config, plan)
    return plan


def check_plan(config: TextConfig, plan: SlicePlan) -> None:
    """Raises ValueError unless a plan fits a checkpoint of this config, as `plan_slice` does."""
    where, layers, kept = f"slice {plan.slice_name!r}", config.num_hidden_layers, plan.kept_layers
    if list(kept) != sorted({layer for layer in kept if 0 <= layer < layers}):
        raise BadValue(f"{where}: keeps layers {list(kept)}, expected some of 0 to {layers - 1}, ascending")
    if len(plan.intermediate_size) != len(kept):
        raise BadValue(f"{where}: has {len(plan.intermediate_size)} FFN widths for {len(kept)} kept layers")
    lacking = set(config.kv_owners[config.first_kv_shared_layer :]) - set(kept)
    if lacking:
        raise BadValue(
            f"{where}: skips layers {sorted(lacking)}, whose keys and values the last "
            f"{config.num_kv_shared_layers} layers read"
        )
    for layer, units in zip(kept, plan.intermediate_size, strict=True):
        if not 1 <= units <= config.intermediate_size[layer]:
            raise BadValue(
                f"{where}: wants {units} FFN units in layer {layer}, the checkpoint has "
                f"{config.intermediate_size[layer]} there"
            )


def fits(config: TextConfig, chosen: Slice) -> bool:
    """Whether a slice can be taken from a checkpoint of this config; `plan_slice` says why not."""
    try:
        plan_slice(config, chosen)
    except ValueError:
        return False
    return True


def is_whole(config: TextConfig, chosen: Slice) -> bool:
    """Whether a slice keeps everything of a checkpoint of this config."""
    return not chosen.skipped_layers and chosen.ffn_hidden_dims == config.intermediate_size


def whole_model(config: TextConfig) -> Slice:
    """The checkpoint itself as a row beside its slices."""
    return Slice("Whole model", "whole", config.num_hidden_layers, None, None, config.intermediate_size, ())


def whole_plan(config: TextConfig) -> SlicePlan:
    """A plan that keeps everything."""
    return SlicePlan("whole", tuple(range(config.num_hidden_layers)), config.intermediate_size)


def slice_config(raw_config: dict[str, Any], plan: SlicePlan) -> dict[str, Any]:
    """The config.json of a slice; every value follows from the checkpoint's own.

    raw_config: with a nested text_config or flat. The argument is left as it is.
    """
    text = dict(raw_config.get("text_config", raw_config))
    layers = text["num_hidden_layers"]
    first_shared = layers - text["num_kv_shared_layers"]
    for key in _PER_LAYER_LISTS:
        if isinstance(text.get(key), list):  # a scalar holds for all layers, so for all kept ones
            text[key] = [text[key][layer] for layer in plan.kept_layers]
    text["intermediate_size"] = list(plan.intermediate_size)
    text["num_kv_shared_layers"] = sum(layer >= first_shared for layer in plan.kept_layers)
    text["num_hidden_layers"] = len(plan.kept_layers)
    return {**raw_config, "text_config": text} if "text_config" in raw_config else text


def cut(plan: SlicePlan, config: TextConfig, path: str) -> Cut:
    """What the plan keeps of a module's weight; path and config (the unsliced one) are the checkpoint's."""
    ple = config.hidden_size_per_layer_input
    match = _LAYER.match(path)
    if match is not None:
        layer = int(match[1])
        units = plan.intermediate_size[plan.kept_layers.index(layer)]
        if units == config.intermediate_size[layer]:
            return Cut()
        if match[2] in ("mlp.gate_proj", "mlp.up_proj"):
            return Cut(rows=((0, units),))
        if match[2] == "mlp.down_proj":
            return Cut(columns=((0, units),))
    elif len(plan.kept_layers) < config.num_hidden_layers:
        kept = _merged((layer * ple, (layer + 1) * ple) for layer in plan.kept_layers)
        if path == PLE_TABLE:
            return Cut(columns=kept)
        if path == PROJECTION:
            return Cut(rows=kept)
    return Cut()


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Neighbours that touch become one range."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)
