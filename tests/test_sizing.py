"""--fits and --speed: the best slice within a memory, or of a speed that is measured here."""

import re

import pytest

from g3n_mlx import load, sizing
from g3n_mlx.batch import __main__ as batch
from g3n_mlx.bench import __main__ as bench
from g3n_mlx.chat import __main__ as chat
from g3n_mlx.commands import load_from
from g3n_mlx.convert import convert
from g3n_mlx.eval import __main__ as evaluation
from g3n_mlx.matformer.table import Slice, write_slices
from g3n_mlx.server import __main__ as server
from g3n_mlx.transcribe import __main__ as transcribe


@pytest.fixture(scope="module")
def sizes():
    """Memory of the demo model and its slices, by short name."""
    outline = sizing.outline_of("demo", None)
    return {entry.slice.short_name: entry.resident_bytes for entry in sizing.sized(outline, None, None)}


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
    outline = sizing.outline_of(tiny_folder, None)
    at_8, at_4 = (sizing.sized(outline, None, bits)[0].resident_bytes for bits in (8, 4))
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


def test_a_command_takes_what_is_fast_enough(capsys):
    pytest.importorskip("torch")
    arguments = server.command_line().parse_args(["--model", "demo", "--backend", "torch", "--speed", "0.001"])
    with load_from(arguments) as loaded:
        assert loaded.slice_name is None
    assert "best slice that is as fast: demo, " in capsys.readouterr().err


@pytest.fixture
def tiny_is_large(tiny_folder, monkeypatch):
    """What must be free for the tiny checkpoint at 8 and at 4 bits, as if it were no small model; and its config."""
    monkeypatch.setattr(sizing, "SMALL_BYTES", 0)
    outline = sizing.outline_of(tiny_folder, None)
    whole = [entry for bits in (8, 4) for entry in sizing.sized(outline, None, bits) if entry.is_whole]
    assert outline.tower_bytes > 0
    return {entry.q_bits: int((entry.resident_bytes + outline.tower_bytes) / 0.9) + 2 for entry in whole}, outline.text


def test_a_model_that_nobody_chose_bits_for_gets_those_that_fit(tiny_folder, tiny_is_large):
    free, _ = tiny_is_large
    for room, bits in ((free[8], 8), (free[8] - 100, 4), (free[4], 4)):
        chosen = sizing.unasked(tiny_folder, room, None, None, None, None)
        assert (chosen.matformer, chosen.q_bits) == (None, bits)
        assert re.search(rf"chosen for 0\.\d+ GB of free memory: .* at {bits} bits, .*--fits off", chosen.told)


def test_asked_bits_and_slices_stay_and_are_refused_where_they_do_not_fit(tiny_folder, tiny_is_large, tmp_path):
    free, config = tiny_is_large
    kept = sizing.unasked(tiny_folder, free[8], None, None, None, 4)
    assert (kept.matformer, kept.q_bits, kept.told) == (None, 4, None)
    with pytest.raises(ValueError, match=r"at 8 bits needs .* free.*: .* at 4 bits would fit; --fits off"):
        sizing.unasked(tiny_folder, free[8] - 100, None, None, None, 8)
    with pytest.raises(ValueError, match=r"at 4 bits needs .*: close other programs, or take a smaller model"):
        sizing.unasked(tiny_folder, 1000, None, None, None, None)
    table = tmp_path / "table.csv"
    half = tuple(width // 2 for width in config.intermediate_size)
    write_slices(table, [Slice("Half", "half", config.num_hidden_layers, None, None, half, ())])
    sliced = sizing.unasked(tiny_folder, free[8], None, table, "half", None)
    assert (sliced.matformer, sliced.q_bits) == ("half", 8)  # the bits are chosen all the same
    smaller = sizing.unasked(tiny_folder, free[4] - 100, None, table, None, None)
    assert (smaller.matformer, smaller.q_bits) == ("Half", 4)


def test_a_quantized_model_stays_whole_where_it_fits(tiny_folder, tiny_is_large, tmp_path):
    free, _ = tiny_is_large
    convert(tiny_folder, tmp_path / "q8", q_bits=8, progress=False)
    assert sizing.unasked(tmp_path / "q8", free[8] + 100_000, None, None, None, None) == sizing.Chosen(None, None, None)
    with pytest.raises(ValueError, match="needs"):
        sizing.unasked(tmp_path / "q8", 1000, None, None, None, None)


def test_small_models_and_the_demo_are_loaded_as_they_are(tiny_folder, monkeypatch):
    assert sizing.unasked(tiny_folder, 1000, None, None, None, None) == sizing.Chosen(None, None, None)
    monkeypatch.setattr(sizing, "SMALL_BYTES", 0)
    assert sizing.unasked("demo", 1000, None, None, "half", None) == sizing.Chosen("half", None, None)


def test_a_chat_chooses_by_itself_unless_told(tiny_folder, tiny_is_large, monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch")
    monkeypatch.setattr("g3n_mlx.convert.cache_folder", lambda: tmp_path)
    free, _ = tiny_is_large
    monkeypatch.setattr("g3n_mlx.loading.available_bytes", lambda: free[4])
    flags = ["--model", str(tiny_folder), "--backend", "torch", "--device", "cpu", "-p", "Hi", "--max-tokens", "1"]
    assert chat.main(flags) == 0
    assert "at 4 bits" in capsys.readouterr().err
    assert len(list(tmp_path.glob("conversions/*-4bit-*"))) == 1
    assert chat.main([*flags, "--fits", "off"]) == 0
    assert "at 4 bits" not in capsys.readouterr().err
    monkeypatch.setattr("g3n_mlx.loading.available_bytes", lambda: 1000)
    assert chat.main(flags) == 1
    assert "--fits off loads it all the same" in capsys.readouterr().err


def test_what_is_measured_is_never_chosen_unasked():
    for command in (bench, evaluation):
        assert "fits" not in vars(command.command_line().parse_args(["--model", "demo"]))
    for command in (chat, server, transcribe, batch):
        assert command.command_line().get_default("fits") == "auto"


@pytest.mark.parametrize(
    ("command", "more"),
    [(chat, ["--matformer", "half"]), (server, ["--matformer", "half"]), (server, ["--speed", "3"])],
)
def test_one_way_to_say_which_slice(command, more, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--fits", "4GB", *more])
    assert ended.value.code == 2
    assert "--fits" in capsys.readouterr().err
