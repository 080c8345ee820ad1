"""The search against all candidates, on a checkpoint with planted importance, in both backends."""

import dataclasses
from itertools import product

import numpy as np
import pytest
from planted import LAYERS, WIDTH

from g3n_mlx.prompt.prompt import of_token_ids
from g3n_mlx.slices.goals import for_budgets
from g3n_mlx.slices.pieces import Piece
from g3n_mlx.slices.space import SKIPPED, Candidate, Layer, candidate_of, slice_row
from g3n_mlx.slices.variants import Variants

HALF = WIDTH // 2


def log_softmax(logits):
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def all_candidates():
    """Every width of every layer, and the block of the last two with and without."""
    free = list(product((HALF, WIDTH), repeat=LAYERS))
    skipped = [(*widths, 0, 0) for widths in product((HALF, WIDTH), repeat=LAYERS - 2)]
    return [Candidate(tuple(map(Layer, widths))) for widths in (*free, *skipped)]


def test_the_search_finds_what_enumeration_finds(setting):
    every = all_candidates()
    measured = setting.divergences.of(every, setting.pieces)
    cost = setting.costs.memory
    wide = {1: (1,), 2: (1, 4), 3: (1, 2, 4)}
    for count, layers in wide.items():
        # Room for so many whole layers, and all others at half their width.
        planted = Candidate(tuple(Layer(WIDTH if at in layers else HALF) for at in range(LAYERS)))
        budget = cost(planted)
        best = min((c for c in every if cost(c) <= budget), key=lambda c: (measured[c], cost(c)))
        found = setting.find(f"room for {count}", cost, budget)
        assert found.candidate == best == planted
        assert found.measured == pytest.approx(measured[best])


def test_what_a_table_has_is_a_rival_where_the_search_could_choose_it(setting):
    """A row that the losses rate lowest is run all the same, and found when it is best after all."""
    space, cost = setting.space, setting.costs.memory
    row = slice_row(space.whole.changed({0: Layer(HALF), 3: Layer(HALF), 5: Layer(HALF)}), "By hand")
    losses = {change: 1.0 for change in space.changes()}
    for layer in (0, 3, 5):
        losses[space.whole.changed({layer: Layer(HALF)})] = 9.0
    budget = cost(candidate_of(setting.variants.whole.config.text, row))
    found = []
    for rows in ([row], []):
        searching = dataclasses.replace(setting, rows=rows)
        searching.__dict__["losses"] = losses
        found.append(searching.find("a", cost, budget))
    knowing, blind = found
    assert knowing.candidate.widths == (HALF, WIDTH, WIDTH, HALF, WIDTH, HALF)
    assert knowing.measured < blind.measured
    odd = space.whole.changed({0: Layer(HALF + 1)})
    partly = space.whole.changed({4: SKIPPED})
    assert [space.holds(c) for c in (space.whole, space.cheapest(), odd, partly)] == [True, True, False, False]


def test_what_is_better_by_chance_is_not_clearly_better(setting):
    one, other, third = (setting.space.whole.changed({layer: Layer(HALF)}) for layer in (0, 1, 2))
    pieces = [Piece(of_token_ids([2, token], 1152), 0) for token in range(300, 308)]
    journal = setting.divergences._journal
    for at, piece in enumerate(pieces):
        journal.put(piece.key, repr(one), 1.0 + 0.5 * (at % 2))
        journal.put(piece.key, repr(other), 1.4 + 0.5 * (at % 3))  # more in almost every piece
        journal.put(piece.key, repr(third), 1.6 if at == 0 else 1.0 + 0.5 * (at % 2))  # more in a single one
    assert setting.divergences.is_clearly_less(one, other, pieces)
    assert not setting.divergences.is_clearly_less(other, one, pieces)
    assert not setting.divergences.is_clearly_less(one, third, pieces)
    assert setting.divergences.is_clearly_less(one, third, pieces[:1])


def test_divergence_is_that_of_whole_logits(setting):
    candidate = setting.space.whole.changed({1: Layer(HALF), 4: SKIPPED, 5: SKIPPED})
    found = setting.divergences.of([candidate], setting.pieces)[candidate]
    whole = setting.variants.whole
    total = tokens = 0
    with setting.variants.opened(candidate) as smaller:
        assert smaller.config.text.intermediate_size == (WIDTH, HALF, WIDTH, WIDTH)
        for piece in setting.pieces:
            p, q = (
                logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                for logits in (
                    model.logits(piece.prompt)[piece.start :].astype(np.float64) for model in (whole, smaller)
                )
            )
            total += (np.exp(p) * (p - q)).sum()
            tokens += len(p)
    assert found == pytest.approx(total / tokens, rel=1e-4)


def test_costs_add_up(setting):
    """What the solver takes for granted, against the sizes of whole candidates."""
    cost, space = setting.costs.memory, setting.space
    base = cost(space.whole)
    for candidate in all_candidates():
        layers = {at: layer for at, layer in enumerate(candidate.layers) if layer.width}
        parts = [space.whole.changed({at: layer}) for at, layer in layers.items()]
        parts += [space.whole.changed({4: SKIPPED, 5: SKIPPED})] if len(layers) < LAYERS else []
        assert cost(candidate) == base + sum(cost(part) - base for part in parts)


def test_measurements_are_made_once(setting, monkeypatch):
    setting.divergences.of([setting.space.cheapest()], setting.pieces)
    monkeypatch.setattr(Variants, "opened", None)
    again = setting.divergences.of([setting.space.cheapest()], setting.pieces)
    assert again[setting.space.cheapest()] > 0


def test_a_budget_below_everything_says_what_the_smallest_needs(setting):
    with pytest.raises(ValueError, match=r"nothing fits 1\.0 KB: the smallest that is searched needs 0\.6"):
        for_budgets(setting, [10**9, 1000])
    assert not setting.divergences._journal  # before anything was measured
