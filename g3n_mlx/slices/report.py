"""What a search found: a table for the terminal, rows of a table of slices, recipes of bits, and a picture."""

from collections.abc import Sequence
from pathlib import Path

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.recipe import write_recipe
from g3n_mlx.eval.plot import Point, draw
from g3n_mlx.failures import size_in_words
from g3n_mlx.matformer.table import short_name, write_slices
from g3n_mlx.slices.costs import Costs, has_bits, quantizations
from g3n_mlx.slices.goals import Axis, Entry
from g3n_mlx.slices.search import Found
from g3n_mlx.slices.space import slice_row


def table(entries: Sequence[Entry], costs: Costs, tokens: int) -> list[str]:
    """The lines of a table, smallest first."""
    by_size = sorted(entries, key=lambda entry: (costs.memory(entry.candidate), entry.name))
    width = max(len(entry.name) for entry in entries)
    titles = f"{'layers':>6}  {'weights':>9}  {'memory':>9}  KL divergence, nats ({tokens} tokens held out)"
    header = f"{'':<{width}}  {'':<5}  {titles}"
    rows = [
        f"{entry.name:<{width}}  {entry.group:<5}  {sum(map(bool, entry.candidate.widths)):>6}  "
        f"{size_in_words(costs.read_per_token(entry.candidate)):>9}  "
        f"{size_in_words(costs.memory(entry.candidate)):>9}  {entry.divergence:.4g}"
        for entry in by_size
    ]
    return [header, *rows]


def write(path: Path, found: Sequence[Found], checkpoint: Checkpoint, costs: Costs) -> list[Path]:
    """Writes a row for everything found, and a recipe beside it where bits were searched; returns all files."""
    written = [path]
    for entry in found:
        if has_bits(entry.candidate):
            name = short_name(entry.name)
            recipe = path.with_name(f"{name}.json" if name.startswith(path.stem) else f"{path.stem}-{name}.json")
            write_recipe(recipe, quantizations(checkpoint, entry.candidate))
            written.append(recipe)
    sizes = [costs.sized(entry.candidate).effective_parameters / 1e9 for entry in found]
    rows = [slice_row(entry.candidate, entry.name, size) for entry, size in zip(found, sizes, strict=True)]
    write_slices(path, rows)
    return written


def plot(path: Path, entries: Sequence[Entry], axis: Axis) -> None:
    """Size or time against divergence, with the frontier."""
    at_place: dict[tuple[float, float], list[Entry]] = {}
    for entry in entries:
        at_place.setdefault((axis.size(entry.candidate), entry.divergence), []).append(entry)
    points = [
        Point(same[-1].group, " = ".join(entry.name for entry in same), size, divergence, divergence, divergence)
        for (size, divergence), same in at_place.items()
    ]
    draw(points, axis.label, "KL divergence from the whole model, nats", lower_is_better=True).savefig(path, dpi=150)
