"""The knapsack against all combinations."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from g3n_mlx.slices import solve as solver
from g3n_mlx.slices.solve import Option, solve, undominated

GROUPS = st.lists(
    st.lists(st.tuples(st.integers(-5, 20), st.integers(0, 9)), min_size=1, max_size=4), min_size=1, max_size=5
)


def options(drawn: list[list[tuple[int, int]]]) -> list[list[Option]]:
    return [
        [Option(cost, float(loss), ((group, at),)) for at, (cost, loss) in enumerate(entries)]
        for group, entries in enumerate(drawn)
    ]


@given(GROUPS, st.integers(-30, 100))
def test_the_least_loss_within_the_budget(drawn: list[list[tuple[int, int]]], budget: int) -> None:
    groups = options(drawn)
    sums = [(sum(o.loss for o in picked), sum(o.cost for o in picked)) for picked in product(*groups)]
    within = [(loss, cost) for loss, cost in sums if cost <= budget]
    found = solve(groups, budget)
    if not within:
        assert found is None
        return
    assert found is not None
    assert (found.loss, found.cost) == min(within)
    picked = [groups[group][at] for group, at in found.values]  # pyright: ignore[reportGeneralTypeIssues]
    assert [group for group, _ in found.values] == list(range(len(groups)))  # pyright: ignore[reportGeneralTypeIssues]
    assert (sum(o.cost for o in picked), sum(o.loss for o in picked)) == (found.cost, found.loss)


@given(GROUPS)
def test_what_is_left_is_what_no_other_sum_equals(drawn: list[list[tuple[int, int]]]) -> None:
    groups = options(drawn)
    sums = {(sum(o.cost for o in picked), sum(o.loss for o in picked)) for picked in product(*groups)}
    best = {s for s in sums if not any(o != s and o[0] <= s[0] and o[1] <= s[1] for o in sums)}
    found = undominated(groups)
    assert [(option.cost, option.loss) for option in found] == sorted(best)


def test_too_many_sums_are_thinned_and_the_budget_still_holds(monkeypatch) -> None:
    monkeypatch.setattr(solver, "MAX_SUMS", 20)
    groups = [[Option(0, 1.0, (0,)), Option(2**at, 0.0, (1,))] for at in range(8)]
    assert len(undominated(groups)) <= 20
    found = solve(groups, 100)
    assert found is not None
    assert found.cost <= 100
    assert found.loss <= 3.0  # at best six of eight: 1 + 2 + 4 + 8 + 16 + 32
