"""What an evaluation found, as a table for the terminal or in Markdown."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NO_TERMINAL = (120, 24)  # columns and lines, where stdout goes elsewhere

GAP = "  "  # between columns


def names(entries: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A column's name in parts: the backend, and whatever differs between the columns."""
    short = {entry["model"]: Path(entry["model"]).name for entry in entries}
    if len(set(short.values())) < len(short):
        short = {model: model for model in short}
    parts = {
        "model": [short[entry["model"]] for entry in entries],
        "backend": [entry["backend"] for entry in entries],
        "dtype": [entry["dtype"] or "own dtype" for entry in entries],
        "q_bits": [f"{entry['q_bits']} bits" if entry["q_bits"] else "as stored" for entry in entries],
        "matformer": [entry["matformer"] or "whole" for entry in entries],
        "adapter": [entry["adapter"] or "no adapter" for entry in entries],
    }
    shown = [values for part, values in parts.items() if part == "backend" or len(set(values)) > 1]
    return list(zip(*shown, strict=True))


def title(summary: dict[str, Any]) -> str:
    if "text" in summary:
        return (
            f"{summary['text']}: {summary['tokens']} tokens, {summary['bytes']} bytes; windows of "
            f"{summary['window_tokens']} tokens move on by {summary['stride_tokens']}; the reference comes first"
        )
    return f"{summary['examples']}: {sum(skill['count'] for skill in summary['skills'])} examples"


def _figures(summary: dict[str, Any]) -> list[list[str]]:
    """The rows of the table: what was measured, then one cell a variant."""
    entries = summary["variants"]
    if "text" in summary:
        figures = {
            "perplexity per token": [f"{entry['perplexity']:.4f}" for entry in entries],
            "perplexity per byte": [f"{entry['perplexity_per_byte']:.4f}" for entry in entries],
            **_divergences(entries),
        }
    else:
        from g3n_mlx.eval.quality import METRICS

        figures = {
            f"{skill['skill']}, {METRICS[skill['metric']]} of {skill['count']}": [
                f"{entry['rates'][skill['skill']]:.1%}" for entry in entries
            ]
            for skill in summary["skills"]
        }
        figures["mean of accuracies, 1 - error rates"] = [f"{entry['mean_score']:.1%}" for entry in entries]
        if any(entry["same_answers"] is not None for entry in entries):
            first = entries[0]["backend"]
            figures[f"same answers as {first}"] = [_cell(entry["same_answers"], ".1%") for entry in entries]
        if any(entry["kl_mean"] is not None for entry in entries):
            figures |= _divergences(entries)
    figures["weights, MB"] = [f"{entry['weight_bytes'] / 1e6:.1f}" for entry in entries]
    figures["weights read per token, MB"] = [f"{entry['weight_bytes_per_token'] / 1e6:.1f}" for entry in entries]
    return [[name, *cells] for name, cells in figures.items()]


def _divergences(entries: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {
        "KL divergence, mean": [_cell(entry["kl_mean"], ".3g") for entry in entries],
        "KL divergence, 99th percentile": [_cell(entry["kl_p99"], ".3g") for entry in entries],
        "same most likely token": [_cell(entry["same_top1"], ".2%") for entry in entries],
    }


def _cell(value: float | None, spelled: str) -> str:
    return "-" if value is None else format(value, spelled)


def aligned(summary: dict[str, Any], names: list[tuple[str, ...]]) -> Iterator[str]:
    """The table's lines; columns that do not fit the terminal's width stand below the others."""
    rows = [["", *parts] for parts in zip(*names, strict=True)] + _figures(summary)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = shutil.get_terminal_size(NO_TERMINAL).columns
    start = 1
    while start < len(widths):
        stop = start + 1
        while stop < len(widths) and widths[0] + sum(len(GAP) + width for width in widths[start : stop + 1]) <= room:
            stop += 1
        for row in rows:
            cells = (cell.rjust(width) for cell, width in zip(row[start:stop], widths[start:stop], strict=True))
            yield GAP.join([row[0].ljust(widths[0]), *cells])
        if stop < len(widths):
            yield ""
        start = stop


def markdown(summary: dict[str, Any], names: list[tuple[str, ...]]) -> Iterator[str]:
    header = ["", *map(", ".join, names)]
    for row in (header, ["---", *["---:"] * len(names)], *_figures(summary)):
        yield f"| {' | '.join(row)} |"
