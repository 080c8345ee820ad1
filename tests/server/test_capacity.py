"""How many answers are in progress by default, from the memory that their caches take."""

import pytest

from g3n_mlx.server import capacity
from g3n_mlx.server.scheduler import measured_cache


@pytest.mark.parametrize("tokens", [512, 4096])
def test_it_counts_what_a_cache_takes(model, tokens):
    window = model.config.text.sliding_window
    measured = measured_cache(model).nbytes_at(tokens, window)
    counted = capacity.answer_bytes(model, tokens)
    assert counted == pytest.approx(measured, rel=0.2)  # caches are allocated in steps


def test_what_fits_is_the_default(model, monkeypatch):
    one = capacity.answer_bytes(model, capacity.USUAL_TOKENS)
    assert [capacity.default_parallel(model, budget) for budget in (0, one, 5 * one, 1000 * one)] == [1, 1, 5, 8]
    monkeypatch.setattr(capacity, "available_bytes", lambda: 6 * one)
    assert capacity.default_parallel(model, 1000 * one) == 3
