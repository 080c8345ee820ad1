"""A checkpoint seen through a MatFormer slice: the same files, with only what the slice keeps listed and read."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from g3n_mlx.checkpoint.folder import Changes, Checkpoint
from g3n_mlx.checkpoint.low_rank import LowRank
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.source import Ranges, Source
from g3n_mlx.config.text import TextConfig
from g3n_mlx.failures import BadValue
from g3n_mlx.matformer.plan import Cut, SlicePlan, cut, fits, plan_slice, slice_config
from g3n_mlx.matformer.table import Slice


def open_sliced(folder: Path, plan: SlicePlan | None) -> Checkpoint:
    """The checkpoint in a folder, or the slice of it; raises as `Checkpoint.open` and `sliced` do."""
    whole = Checkpoint.open(folder)
    if plan is None:
        return whole
    with closing(whole):
        return sliced(whole, plan)


def sliced(checkpoint: Checkpoint, plan: SlicePlan) -> Checkpoint:
    """A view of a checkpoint, itself perhaps a slice, through a plan that was made for its config.

    Nothing is read or copied; any number of views may be open at once, and each is closed by itself. Raises ValueError
    when the plan parts a group of quantized weights.
    """
    raw_config = slice_config(checkpoint.raw_config, plan)
    text = TextConfig.from_dict(raw_config["text_config"], str(checkpoint.folder / "config.json"))
    sources: dict[str, Source] = {}
    for source_name, source in checkpoint.sources.items():
        name = plan.sliced_name(source_name)
        if name is not None:
            path, _, part = source_name.rpartition(".")
            kept = cut(plan, checkpoint.config.text, path)
            columns, quantization = kept.columns, checkpoint.quantization(path)
            if columns is not None and quantization is not None:
                _check_groups(plan, path, columns, quantization)
                columns = _in_stored_units(columns, part, quantization)
            sources[name] = source if kept == Cut() else source.narrowed(kept.rows, columns)
    names = ((plan.sliced_name(path), quantization) for path, quantization in checkpoint.quantizations.items())
    quantizations = {name: quantization for name, quantization in names if name is not None}
    low_ranks = _cut_low_ranks(checkpoint.low_ranks, plan, checkpoint.config.text)
    return checkpoint.view(replace(checkpoint.config, text=text), raw_config, sources, quantizations, low_ranks)


def cut_changes(changes: Changes, plan: SlicePlan, config: TextConfig) -> Changes:
    """What adapters change of a slice. changes, config: of the whole checkpoint.

    Raises ValueError when they change nothing that the slice keeps.
    """
    tensors: dict[str, Source] = {}
    for source_name, source in changes.tensors.items():
        name = plan.sliced_name(source_name)
        if name is not None:
            kept = cut(plan, config, source_name.rpartition(".")[0])
            tensors[name] = source if kept == Cut() else source.narrowed(kept.rows, kept.columns)
    low_ranks = _cut_low_ranks(changes.low_ranks, plan, config)
    if not (tensors or low_ranks):
        raise BadValue(f"the adapter changes only layers that slice {plan.slice_name!r} skips")
    return Changes(low_ranks, tensors, changes.files)


def _cut_low_ranks(low_ranks: Mapping[str, LowRank], plan: SlicePlan, config: TextConfig) -> dict[str, LowRank]:
    found: dict[str, LowRank] = {}
    for path, low_rank in low_ranks.items():
        name = plan.sliced_name(path)
        if name is not None:
            kept = cut(plan, config, path)
            found[name] = low_rank if kept == Cut() else low_rank.narrowed(kept.rows, kept.columns)
    return found


def can_slice(text: TextConfig, quantizations: Mapping[str, Quantization], chosen: Slice) -> bool:
    """Whether a slice can be taken from a checkpoint: it fits the config, and parts no group of quantized weights."""
    if not fits(text, chosen):
        return False
    plan = plan_slice(text, chosen)
    try:
        for path, quantization in quantizations.items():
            if plan.sliced_name(path) is not None:
                columns = cut(plan, text, path).columns
                _check_groups(plan, path, columns or (), quantization)
    except ValueError:
        return False
    return True


def _check_groups(plan: SlicePlan, path: str, columns: Ranges, quantization: Quantization) -> None:
    group_size = quantization.group_size
    if any(border % group_size for span in columns for border in span):
        listed = ", ".join(f"{start} to {stop}" for start, stop in columns)
        raise BadValue(
            f"slice {plan.slice_name!r}: the columns kept of {path} ({listed}) are not whole groups of {group_size}, "
            f"in which the checkpoint is quantized; choose widths that are multiples of {group_size}, or slice the "
            "unquantized checkpoint"
        )


def _in_stored_units(columns: Ranges, part: str, quantization: Quantization) -> Ranges:
    """Ranges of weights as ranges of the words that hold their codes, or of their groups."""
    if part == "weight":
        return tuple((quantization.packed_width(start), quantization.packed_width(stop)) for start, stop in columns)
    return tuple((start // quantization.group_size, stop // quantization.group_size) for start, stop in columns)
