"""--fits and --speed: the best slice within a memory, or of a speed that is measured here."""

import pytest

from g3n_mlx import load, sizing
from g3n_mlx.chat import __main__ as chat
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.server import __main__ as server


@pytest.fixture(scope="module")
def sizes():
    """Memory of the demo model and its slices, by short name."""
    checkpoint = Checkpoint.open(demo_folder())
    found = {entry.slice.short_name: entry.resident_bytes for entry in sizing.sized(checkpoint, None, None)}
    checkpoint.close()
    return found


@pytest.fixture
def model():
    pytest.importorskip("torch")
    with load("demo", backend="torch", device="cpu") as loaded:
        yield loaded


def test_a_quantized_model_fits_as_it_is_or_as_a_slice(sizes):
    assert sizes["quarter"] < sizes["half"] < sizes["whole"]
    for limit, expected in (("whole", "whole"), ("half", "half"), ("eighth", "eighth")):
        chosen = sizing.fitting("demo", sizes[limit], None, None, None)
        assert (chosen.slice.short_name, chosen.q_bits) == (expected, None)
    with pytest.raises(ValueError, match=r"no slice fits .* start from the unquantized checkpoint"):
        sizing.fitting("demo", 1000, None, None, None)


def test_bits_are_8_where_the_whole_model_has_room_and_else_4(tiny_folder):
    checkpoint = Checkpoint.open(tiny_folder)
    at_8, at_4 = (sizing.sized(checkpoint, None, bits)[0].resident_bytes for bits in (8, 4))
    checkpoint.close()
    assert at_4 < at_8
    for limit, bits in ((at_8, 8), (at_8 - 1, 4), (at_4, 4)):
        assert sizing.fitting(tiny_folder, limit, None, None, None).q_bits == bits
    assert sizing.fitting(tiny_folder, at_8, None, None, 3).q_bits == 3
    with pytest.raises(ValueError, match="--q-bits takes fewer bits"):
        sizing.fitting(tiny_folder, at_4 - 1, None, None, None)


@pytest.mark.parametrize(
    ("wanted", "speeds", "expected", "asked"),
    [
        (5, {}, None, 2),  # the whole is fast enough
        (15, {}, "Half", 3),  # the best score of those that are expected to do
        (15, {"Half": 14.0}, "Quarter", 4),  # it was not: the next one
        (45, {}, "Eighth-Skip", 3),
    ],
)
def test_the_best_slice_that_is_measured_to_be_fast_enough(model, monkeypatch, wanted, speeds, expected, asked):
    known = {
        None: 10.0,
        "Skip": 12.0,
        "Half": 20.0,
        "Quarter": 40.0,
        "Half-Skip": 42.0,
        "Eighth": 44.0,
        "Eighth-Skip": 50.0,
        **speeds,
    }  # by their sizes
    measured = []

    def decode_speed(of):
        measured.append(of.slice_name)
        return known[of.slice_name]

    monkeypatch.setattr(sizing, "decode_speed", decode_speed)
    chosen, speed = sizing.fast_enough(model, wanted)
    assert (chosen.slice_name, speed) == (expected, known[expected])
    assert len(measured) == asked
    assert {None, "Eighth-Skip"} == set(measured[:2])  # the whole and the smallest


def test_a_speed_that_no_slice_reaches_is_an_error(model, monkeypatch):
    monkeypatch.setattr(sizing, "decode_speed", lambda of: 10.0 if of.slice_name is None else 40.0)
    with pytest.raises(ValueError, match=r"no slice of demo decodes 100 .* eighth-skip, makes 40\.0"):
        sizing.fast_enough(model, 100)


def test_the_speed_is_measured(model):
    assert sizing.decode_speed(model) > 0
    assert model.generate("Hi", max_tokens=1).usage.cached_tokens == 0


def test_a_chat_takes_what_fits(sizes, capsys):
    pytest.importorskip("torch")
    flags = ["--model", "demo", "--backend", "torch", "-p", "What is 12 + 34?", "--temp", "0"]
    assert chat.main([*flags, "--fits", f"{sizes['half'] / 1e9}GB"]) == 0
    out, err = capsys.readouterr()
    assert "46" in out
    assert err.startswith("best slice that fits: half, ")
    assert chat.main([*flags, "--speed", "0.001"]) == 0
    assert "best slice that is as fast: demo, " in capsys.readouterr().err


@pytest.mark.parametrize("command", [chat, server])
@pytest.mark.parametrize("more", [["--matformer", "half"], ["--speed", "3"]])
def test_one_way_to_say_which_slice(command, more, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--fits", "4GB", *more])
    assert ended.value.code == 2
    assert "--fits" in capsys.readouterr().err
