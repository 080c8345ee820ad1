"""Which slice is taken of those that meet a limit."""

from hypothesis import given
from hypothesis import strategies as st

from g3n_mlx.matformer.choice import best, frontier
from g3n_mlx.matformer.sizes import SizedSlice
from g3n_mlx.matformer.table import Slice


def sized(name: str, score: float | None, memory: int, q_bits: int | None = None, whole: bool = False) -> SizedSlice:
    return SizedSlice(Slice(name, name, 1, None, score, (1,), ()), q_bits, whole, memory, memory, memory, 0)


CANDIDATES = st.lists(st.tuples(st.sampled_from([50.0, 55.0, 60.0, None]), st.integers(1, 9)), min_size=1, max_size=8)


@given(CANDIDATES, st.integers(0, 10))
def test_nothing_that_fits_has_a_higher_score_or_the_same_in_less_memory(
    rows: list[tuple[float | None, int]], limit: int
) -> None:
    candidates = [sized(str(row), score, memory) for row, (score, memory) in enumerate(rows)]
    chosen = best(candidates, lambda entry: entry.resident_bytes <= limit)
    fitting = [entry for entry in candidates if entry.resident_bytes <= limit]
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        scores = [entry.slice.mmlu or 0.0 for entry in fitting]
        assert (chosen.slice.mmlu or 0.0) == max(scores)
        equals = [entry.resident_bytes for entry in fitting if entry.slice.mmlu == chosen.slice.mmlu]
        assert chosen.resident_bytes == (min(equals) if chosen.slice.mmlu else max(equals))


@given(CANDIDATES)
def test_the_frontier_is_what_no_other_beats(rows: list[tuple[float | None, int]]) -> None:
    candidates = [sized(str(row), score, memory) for row, (score, memory) in enumerate(rows)]

    def beaten(entry: SizedSlice) -> bool:
        mine = entry.slice.mmlu or 0.0
        return any(
            other.slice.mmlu is not None
            and (
                (other.resident_bytes < entry.resident_bytes and other.slice.mmlu >= mine)
                or (other.resident_bytes == entry.resident_bytes and other.slice.mmlu > mine)
            )
            for other in candidates
        )

    names = {entry.slice.name for entry in frontier(candidates)}
    assert names == {entry.slice.name for entry in candidates if entry.slice.mmlu is not None and not beaten(entry)}


def test_bits_are_the_most_at_which_the_whole_model_fits_and_else_the_fewest() -> None:
    candidates = [
        sized("whole", 62.0, 80, 8, whole=True),
        sized("small", 50.0, 40, 8),
        sized("whole", 62.0, 40, 4, whole=True),
        sized("small", 50.0, 20, 4),
    ]

    def chosen(limit: int) -> tuple[str, int | None] | None:
        found = best(candidates, lambda entry: entry.resident_bytes <= limit)
        return found and (found.slice.name, found.q_bits)

    assert [chosen(limit) for limit in (80, 79, 40, 39, 19)] == [
        ("whole", 8),
        ("whole", 4),
        ("whole", 4),
        ("small", 4),
        None,
    ]


def test_a_whole_model_without_a_score_is_better_than_its_slices() -> None:
    candidates = [sized("half", 95.0, 5), sized("whole", None, 9, whole=True), sized("own", None, 7)]
    for limit, name in ((9, "whole"), (8, "half"), (5, "half")):
        found = best(candidates, lambda entry, limit=limit: entry.resident_bytes <= limit)
        assert found is not None
        assert found.slice.name == name
    unscored = best([sized("a", None, 3), sized("b", None, 4)], lambda _: True)
    assert unscored is not None
    assert unscored.slice.name == "b"


def test_a_limit_may_be_a_measured_speed() -> None:
    speeds = {"e2b": 30.0, "e3b": 21.0, "whole": 12.0}
    candidates = [sized("e2b", 50.9, 2), sized("e3b", 63.4, 3), sized("whole", 62.3, 4, whole=True)]
    chosen = best(candidates, lambda entry: speeds[entry.slice.name] >= 20)
    assert chosen is not None
    assert chosen.slice.name == "e3b"
