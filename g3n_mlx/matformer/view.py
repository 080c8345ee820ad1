"""A checkpoint seen through a MatFormer slice: the same files, with only what the slice keeps listed and read."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from g3n_mlx.checkpoint.folder import Checkpoint
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
    return checkpoint.view(replace(checkpoint.config, text=text), raw_config, sources, quantizations)


def can_slice(checkpoint: Checkpoint, chosen: Slice) -> bool:
    """Whether a slice can be taken from a checkpoint: it fits the config, and parts no group of quantized weights."""
    if not fits(checkpoint.config.text, chosen):
        return False
    plan = plan_slice(checkpoint.config.text, chosen)
    try:
        for path, quantization in checkpoint.quantizations.items():
            if plan.sliced_name(path) is not None:
                columns = cut(plan, checkpoint.config.text, path).columns
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
