"""Quality over size as a picture: a point a variant with its uncertainty, and the frontier, which nothing beats.

Intervals hold 95 %. Of a share of right answers they are Wilson's; of a mean over skills, his for as many answers as
give a mean of that variance. Of a mean divergence they are 1.96 standard errors, tokens taken as independent.
Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference (1927).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Z = 1.96  # standard deviations that hold 95 % of a normal distribution


@dataclass(frozen=True, slots=True)
class Point:
    """One model: where it stands, and between which values its quality lies."""

    family: str  # what shares a colour
    name: str
    size: float
    quality: float
    low: float
    high: float


def plot(path: Path, summary: dict[str, Any], names: Sequence[tuple[str, ...]]) -> None:
    """Draws what an evaluation found. names: of the variants, in parts, the slice last where slices differ."""
    score, label, lower_is_better = _measure(summary)
    found = points(summary, names, score)
    draw(found, "weights, MB", label, lower_is_better).savefig(path, dpi=150)


def _measure(summary: dict[str, Any]) -> tuple[str, str, bool]:
    """Key, label, and whether less of it is better."""
    if any(entry["kl_mean"] is not None for entry in summary["variants"]):
        return "kl_mean", "KL divergence from the reference, nats, with 95 % intervals", True
    if "text" not in summary:
        return "mean_score", "mean score, with 95 % intervals", False
    return "perplexity", "perplexity per token", True


def points(summary: dict[str, Any], names: Sequence[tuple[str, ...]], score: str) -> list[Point]:
    """A point a variant; the reference diverges from itself by 0."""
    sliced = len({entry["matformer"] for entry in summary["variants"]}) > 1
    found: list[Point] = []
    for entry, parts in zip(summary["variants"], names, strict=True):
        quality = entry[score] or 0.0
        low = high = quality
        if score == "mean_score":
            low, high = wilson(quality, answers_of_a_mean([skill["count"] for skill in summary["skills"]]))
        elif score == "kl_mean":
            low, high = quality - Z * (entry["kl_error"] or 0.0), quality + Z * (entry["kl_error"] or 0.0)
        family, name = (parts[:-1], parts[-1]) if sliced else (parts, "")
        found.append(Point(" ".join(family), name, entry["weight_bytes"] / 1e6, quality, low, high))
    return found


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share that was seen in so many trials; it never leaves 0 to 1."""
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * sqrt(max(0.0, share * (1 - share)) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def answers_of_a_mean(counts: Sequence[int]) -> float:
    """How many answers to one question vary as much as a mean of shares of these many: all, if all are equal."""
    return len(counts) ** 2 / sum(1 / count for count in counts)


def frontier(found: Sequence[Point], lower_is_better: bool) -> list[Point]:
    """The points that no point of at most their size equals or beats, smallest first."""
    sign = -1 if lower_is_better else 1
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (point.size, -sign * point.quality)):
        if not best or sign * point.quality > sign * best[-1].quality:
            best.append(point)
    return best


def draw(found: Sequence[Point], size_label: str, quality_label: str, lower_is_better: bool) -> "Figure":
    """A scatter: families in colours, names beside the points, the frontier as steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for family in dict.fromkeys(point.family for point in found):
        members = [point for point in found if point.family == family]
        axes.errorbar(
            [point.size for point in members],
            [point.quality for point in members],
            yerr=[[p.quality - p.low for p in members], [p.high - p.quality for p in members]],
            fmt="o",
            capsize=2,
            elinewidth=0.8,
            label=family,
        )
    for point in found:
        axes.annotate(
            point.name, (point.size, point.quality), xytext=(4, 4), textcoords="offset points", fontsize="small"
        )
    best = frontier(found, lower_is_better)
    axes.plot(
        [point.size for point in best],
        [point.quality for point in best],
        drawstyle="steps-post",
        color="gray",
        linewidth=0.8,
        zorder=0,
        label="frontier",
    )
    axes.set_xlabel(size_label)
    axes.set_ylabel(quality_label)
    axes.margins(x=0.15, y=0.15)  # room for the names
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
