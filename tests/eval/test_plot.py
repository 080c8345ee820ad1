"""The picture of quality over size: intervals, the frontier, and what is drawn."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g3n_mlx.eval.plot import Point, answers_of_a_mean, draw, frontier, points, wilson


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(0.8, 10, 0.490, 0.943), (0.5, 100, 0.404, 0.596), (1.0, 20, 0.839, 1.0), (0.0, 20, 0.0, 0.161)],
)
def test_wilson(share, count, low, high):
    """Against R's binom.confint(..., methods = "wilson")."""
    assert wilson(share, count) == pytest.approx((low, high), abs=1e-3)


def test_a_mean_of_shares_varies_as_one_share_of_that_many_answers():
    assert answers_of_a_mean([50]) == 50
    assert answers_of_a_mean([20, 20, 20]) == pytest.approx(60)
    share, counts = 0.7, [10, 40, 200]
    variance = sum(share * (1 - share) / count for count in counts) / len(counts) ** 2
    assert share * (1 - share) / answers_of_a_mean(counts) == pytest.approx(variance)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8),
    st.booleans(),
)
def test_the_frontier_is_what_no_other_point_equals_or_beats(places, lower_is_better):
    found = [Point("", str(row), size, quality, quality, quality) for row, (size, quality) in enumerate(places)]
    sign = -1 if lower_is_better else 1

    def beaten(point):
        return any(
            other.size <= point.size
            and sign * other.quality >= sign * point.quality
            and (other.size, other.quality) != (point.size, point.quality)
            for other in found
        )

    best = frontier(found, lower_is_better)
    assert {(point.size, point.quality) for point in best} == {
        (point.size, point.quality) for point in found if not beaten(point)
    }
    assert [point.size for point in best] == sorted({point.size for point in best})


def test_points_of_examples_and_of_a_text():
    variants = [
        {"matformer": None, "weight_bytes": 2e6, "mean_score": 0.8, "kl_mean": None, "kl_error": None},
        {"matformer": "half", "weight_bytes": 1e6, "mean_score": 0.5, "kl_mean": 0.3, "kl_error": 0.01},
    ]
    names = [("torch", "whole"), ("torch", "half")]
    summary = {"variants": variants, "skills": [{"count": 5}, {"count": 5}]}
    whole, half = points(summary, names, "mean_score")
    assert (whole.family, whole.name, whole.size, whole.quality) == ("torch", "whole", 2.0, 0.8)
    assert (whole.low, whole.high) == pytest.approx((0.490, 0.943), abs=1e-3)
    reference, half = points({"text": "a.txt", "variants": variants}, names, "kl_mean")
    assert (reference.quality, reference.low, reference.high) == (0, 0, 0)
    assert (half.low, half.high) == pytest.approx((0.2804, 0.3196))


def test_no_line_joins_the_points_but_the_frontiers_steps():
    pytest.importorskip("matplotlib")
    found = [
        Point("a", "small", 1.0, 0.5, 0.4, 0.6),
        Point("a", "beaten", 2.0, 0.4, 0.3, 0.5),
        Point("b", "large", 3.0, 0.9, 0.8, 0.95),
    ]
    (axes,) = draw(found, "MB", "score", lower_is_better=False).axes
    joined = [line for line in axes.lines if line.get_linestyle() not in ("None", "none", "")]
    assert [list(line.get_xdata()) for line in joined] == [[1.0, 3.0]]
    assert joined[0].get_drawstyle() == "steps-post"
    bars = [segment for container in axes.containers for segment in container.lines[2][0].get_segments()]
    assert [[list(end) for end in bar] for bar in bars] == [
        [[1.0, pytest.approx(0.4)], [1.0, pytest.approx(0.6)]],
        [[2.0, pytest.approx(0.3)], [2.0, pytest.approx(0.5)]],
        [[3.0, pytest.approx(0.8)], [3.0, pytest.approx(0.95)]],
    ]
    assert {text.get_text() for text in axes.texts} == {"small", "beaten", "large"}
