"""When a draft is made and how long it is: by what calls cost and by how often lookups are right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g3n_mlx.engine import drafts
from g3n_mlx.engine.drafts import LEAST_TIMES, MAX_ROWS, REMEMBERED_CALLS, CallCosts, Drafter

# Rows to seconds: the kernels in C on two cores of a Zen 4, PyTorch's own before them, a device where rows are free.
KERNELS = {1: 0.039, 2: 0.042, 4: 0.056, 8: 0.129, 16: 0.249}
STEEP = {1: 0.03, 2: 0.055, 4: 0.098, 8: 0.184, 16: 0.36}
FREE = {1: 0.03, 16: 0.03}
TEXT = list(range(100, 160))


def costs_of(times):
    costs = CallCosts()
    for rows, seconds in times.items():
        for _ in range(LEAST_TIMES):
            costs.note(rows, seconds)
    return costs


def copying(costs, tokens, mode="auto"):
    """A drafter whose answer has repeated so many tokens of its prompt."""
    drafter = Drafter(mode, costs, TEXT)
    for token_id in TEXT[:tokens]:
        drafter.push(token_id)
    return drafter


def test_a_copied_text_is_drafted_on():
    assert copying(costs_of(KERNELS), 20).draft(15, 1) == TEXT[20:23]  # three: the kernels' cheapest
    assert copying(costs_of(FREE), 20).draft(15, 1) == TEXT[20:35]
    assert copying(costs_of(FREE), 20).draft(4, 1) == TEXT[20:24]
    assert copying(costs_of(FREE), 20).draft(0, 1) == []


def test_a_text_without_repetition_is_not_drafted():
    drafter = Drafter("auto", costs_of(KERNELS), TEXT)
    for token_id in range(200):
        assert drafter.draft(15, 1) == []
        drafter.push(1000 + token_id)


def test_drafts_end_where_they_are_wrong_and_begin_again_where_they_are_right():
    """Every lookup fails: the drafts stop after some tokens; then a long copy brings them back. None is needed to
    know: what a lookup would have said is compared with every token."""
    drafter, drafted = Drafter("auto", costs_of(STEEP), []), []
    for number in range(60):
        for token_id in (1, 2, 10 + number):  # after the pair 1, 2 always another token
            drafted.append(bool(drafter.draft(15, 1)))
            drafter.push(token_id)
    assert not any(drafted[-60:])
    for token_id in [*TEXT, *TEXT[:20]]:
        drafter.push(token_id)
    assert drafter.draft(15, 1)


def test_a_machine_whose_rows_cost_calls_is_left_alone():
    """M1's one-row kernel takes nearly as long for two rows as two calls do (mlx issue 4265)."""
    slow = costs_of({1: 1.0, 2: 1.97, 4: 3.9, 8: 7.8, 16: 15.6})
    assert copying(slow, 30).draft(15, 1) == []
    assert copying(slow, 30, "lookup").draft(15, 1), "asked for, it is drafted whatever it costs"


def test_in_a_batch_drafts_end_where_rows_become_dear():
    assert copying(costs_of(KERNELS), 30).draft(15, 2)
    assert copying(costs_of(KERNELS), 30).draft(15, 4) == []
    assert copying(costs_of(FREE), 30).draft(15, 4) == TEXT[30:33]  # 16 rows in all
    assert copying(costs_of(FREE), 30).draft(15, 9) == []


def test_forced_tokens_are_worth_their_rows_unless_others_wait():
    drafter = Drafter("auto", costs_of(KERNELS), [])
    assert drafter.pays(15, 1)
    assert drafter.pays(3, 1)
    assert not drafter.pays(7, 4)
    assert not drafter.pays(3, 4)


@given(rows=st.integers(1, MAX_ROWS))
def test_costs_between_and_beyond_what_is_known_lie_on_lines(rows):
    costs = costs_of({1: 2.0, 4: 3.0, 8: 7.0})
    expected = 1 + (rows - 1) / 6 if rows <= 4 else 1.5 + (rows - 4) / 2 if rows <= 8 else 3.5 + (rows - 8) * 2.5 / 7
    assert costs.ratio(rows) == pytest.approx(expected)
    assert CallCosts().ratio(rows) == 1 + drafts.PRIOR_ROW_COST * (rows - 1)


def test_one_slow_call_is_no_cost_and_old_ones_are_forgotten():
    costs = costs_of({1: 1.0})
    costs.note(4, 50.0)  # it compiles, say
    assert costs.ratio(4) == 1 + drafts.PRIOR_ROW_COST * 3
    costs.note(4, 1.2)
    assert costs.ratio(4) == 1.2
    for _ in range(REMEMBERED_CALLS + 1):
        costs.note(1, 1.0)
    assert costs.ratio(4) == 1 + drafts.PRIOR_ROW_COST * 3
