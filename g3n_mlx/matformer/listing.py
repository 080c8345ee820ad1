"""The table of slices that a terminal shows: what each keeps, its published score, and its size at several widths."""

from collections.abc import Mapping, Sequence

from g3n_mlx.failures import size_in_words
from g3n_mlx.matformer.choice import frontier
from g3n_mlx.matformer.sizes import CONTEXT_TOKENS, PROGRAM_BYTES, SizedSlice

# The vision and the audio tower as published, in bfloat16 (294 and 681 million weights; docs/full_size.md).
PUBLISHED_TOWER_BYTES = 1_950_000_000


def table(by_width: Mapping[str, Sequence[SizedSlice]], tower_bytes: int) -> str:
    """The slices as lines of text, smallest first, with notes below.

    by_width: the same slices by what a weight takes, such as `4 bits`; disk space is that of the first.
    tower_bytes: of the vision and the audio tower, 0 where there are none.
    """
    widths, first = list(by_width), next(iter(by_width.values()))
    on_frontier = [entry.slice for entry in frontier(first)]
    order = sorted(range(len(first)), key=lambda row: first[row].resident_bytes)
    above = f"{'':<14} {'':>6} {'':>7} {'':>9} {'':>8} {'disk':>9}" + f" {'memory':>9}" * len(widths)
    header = f"{'slice':<14} {'layers':>6} {'eff. B':>7} {'published':>9} {'MMLU':<8} " + " ".join(
        f"{width:>9}" for width in (widths[0], *widths)
    )
    lines = [above.rstrip(), header + "  name"]
    for row in order:
        entry, chosen = first[row], first[row].slice
        published = "" if chosen.effective_params_b is None else _billions(chosen.effective_params_b, 2)
        mmlu = "" if chosen.mmlu is None else f"{chosen.mmlu:5.1f}%{' *' if chosen in on_frontier else ''}"
        effective = _billions(entry.effective_parameters / 1e9, 3)
        sizes = [entry.disk_bytes, *(sized[row].resident_bytes for sized in by_width.values())]
        lines.append(
            f"{chosen.short_name:<14} {chosen.num_layers:>6} {effective:>7} {published:>9} {mmlu:<8} "
            + " ".join(f"{size_in_words(size):>9}" for size in sizes)
            + f"  {chosen.name}"
        )
    return "\n".join([*lines, "", *_notes(first, bool(on_frontier), tower_bytes)])


def _notes(sized: Sequence[SizedSlice], marked: bool, tower_bytes: int) -> list[str]:
    cache = size_in_words(max(entry.cache_bytes for entry in sized))
    notes = ["* on the frontier: no smaller slice scores as high"]
    memory = [
        "memory: the text model without its PLE table, which stays on disk,",
        f"  {CONTEXT_TOKENS:,} tokens of context ({cache} at most) and {size_in_words(PROGRAM_BYTES)} for the program",
    ]
    if tower_bytes:
        memory[1] += f"; {size_in_words(tower_bytes)} more once images and audio are read"
    return [*notes[: int(marked)], *memory]


def _billions(count: float, places: int) -> str:
    """With some decimal places; numbers that these would round away with three digits that count."""
    return f"{count:.{places}f}" if count >= 0.1 else f"{count:.3g}"
