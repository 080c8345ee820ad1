"""Speed as a budget of bytes; what decodes how fast is made up here."""

import pytest

from g3n_mlx.slices import goals
from g3n_mlx.slices.goals import for_speed
from g3n_mlx.slices.speed import Line, decode_speed

FIXED_S, S_PER_BYTE = 1e-3, 1e-8


def test_a_line_through_two_models():
    line = Line.through((100, 1 / 0.002), (300, 1 / 0.004))
    assert line.fixed_s == pytest.approx(0.001)
    assert line.s_per_byte == pytest.approx(1e-5)
    assert line.seconds(200) == pytest.approx(0.003)
    assert line.budget(1 / 0.003) == pytest.approx(200, abs=1)
    assert line.budget(1 / 0.0005) == 0
    with pytest.raises(ValueError, match="size makes no difference to the speed here"):
        Line.through((100, 50.0), (300, 50.0))


def speed(num_bytes):
    return 1 / (FIXED_S + S_PER_BYTE * num_bytes)


def test_what_is_found_is_as_fast_as_asked_and_no_smaller_than_needed(setting, monkeypatch):
    monkeypatch.setattr(goals, "decode_speed", lambda model: speed(model.checkpoint.nbytes_per_token))
    read, whole, least = setting.costs.read_per_token, setting.space.whole, setting.space.cheapest()
    wanted = speed((read(whole) + read(least)) / 2)
    (found,), axis = for_speed(setting, wanted)
    assert speed(read(found.candidate)) >= wanted
    larger = [c for c in setting.space.neighbours(found.candidate) if read(c) > read(found.candidate)]
    assert all(
        speed(read(c)) < wanted or setting.divergences.of([c], setting.pieces)[c] >= found.measured for c in larger
    )
    assert axis.size(found.candidate) == pytest.approx(1e3 / speed(read(found.candidate)))


def test_a_candidate_slower_than_its_line_is_made_smaller(setting, monkeypatch):
    """In between, models are slower than a line through the smallest and the whole."""
    read, whole, least = setting.costs.read_per_token, setting.space.whole, setting.space.cheapest()

    def slower(model):
        num_bytes = model.checkpoint.nbytes_per_token
        return speed(num_bytes) * (0.9 if read(least) < num_bytes < read(whole) else 1)

    monkeypatch.setattr(goals, "decode_speed", slower)
    wanted = speed((read(whole) + read(least)) / 2)
    (found,), _ = for_speed(setting, wanted)
    assert speed(read(found.candidate)) * 0.9 >= wanted or found.candidate == least


def test_a_speed_that_nothing_reaches(setting, monkeypatch):
    monkeypatch.setattr(goals, "decode_speed", lambda model: speed(model.checkpoint.nbytes_per_token))
    with pytest.raises(ValueError, match=r"nothing is as fast as 10000 tokens/s: the smallest candidate decodes"):
        for_speed(setting, 10_000)


def test_a_speed_is_measured(setting):
    assert decode_speed(setting.variants.whole) > 0
