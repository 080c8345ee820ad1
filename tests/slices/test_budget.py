"""Bits for every part within a budget of bytes on disk: `g3n convert --budget`."""

import json
from pathlib import Path

import pytest
from planted import LAYERS

import g3n_mlx
from g3n_mlx import load
from g3n_mlx.__main__ import main
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import BITS
from g3n_mlx.checkpoint.recipe import can_be_quantized, read_recipe
from g3n_mlx.convert import convert, written_bytes
from g3n_mlx.convert.card import CARD_BYTES
from g3n_mlx.eval.quality import measure_examples, read_examples
from g3n_mlx.slices import bits
from g3n_mlx.slices.space import Layer, Outside, bits_space

DEMO = Path(g3n_mlx.__file__).parent / "demo"
TEXT = "".join(f"Cat {number} sat on the mat.\n" for number in range(40))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("g3n_mlx.convert.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(bits, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def folder_bytes(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def command(*flags):
    return main(["convert", *map(str, flags)])


def test_the_folder_fits(planted_folder, text, tmp_path, monkeypatch, capsys):
    """As large as 3 bits throughout; a second budget is read off what was measured."""
    monkeypatch.setattr(bits, "BITS", (2, 8))
    even = convert(planted_folder, tmp_path / "even", q_bits=3, progress=False)
    budget, made = folder_bytes(even) / 1000, tmp_path / "made"
    flags = ["--model", planted_folder, "--calibration", text]
    assert command(*flags, "--budget", f"{budget:.3f}KB", "-o", made) == 0
    assert "tokens held out" in capsys.readouterr().err
    assert 0.9 * folder_bytes(even) < folder_bytes(made) <= folder_bytes(even)
    stored = Checkpoint.open(made).quantizations
    assert len({how.bits for how in stored.values()}) > 1

    (journal,) = (tmp_path / "cache" / "sensitivities").iterdir()
    lines = len(journal.read_text().splitlines())
    assert command(*flags, "--budget", f"{1.5 * budget:.3f}KB", "-o", tmp_path / "larger") == 0
    assert folder_bytes(made) < folder_bytes(tmp_path / "larger") <= 1500 * budget
    assert len(journal.read_text().splitlines()) < 1.5 * lines

    # The recipe beside it makes the same again.
    again = convert(planted_folder, tmp_path / "again", recipe=tmp_path / "made.json", progress=False)
    assert Checkpoint.open(again).quantizations == stored


def test_what_a_recipe_writes_is_known_to_the_byte(planted_folder, tmp_path):
    recipe = tmp_path / "r.json"
    modules = {"language_model.layers.0.*": {"bits": 5, "group_size": 32}, "*": {"bits": 3, "group_size": 64}}
    recipe.write_text(json.dumps({"modules": modules}))
    checkpoint = Checkpoint.open(planted_folder)
    for dtype in ("bfloat16", "float32"):
        made = convert(planted_folder, tmp_path / dtype, recipe=recipe, dtype=dtype, progress=False)
        card = (made / "README.md").stat().st_size
        assert written_bytes(checkpoint, read_recipe(recipe), dtype) - CARD_BYTES == folder_bytes(made) - card
        assert card <= CARD_BYTES


def test_laurel_is_quantized_by_a_recipe_alone(planted_folder, backend, tmp_path):
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps({"modules": {"*": {"bits": 8, "group_size": 64}}}))
    made = convert(planted_folder, tmp_path / "made", recipe=recipe, progress=False)
    stored = Checkpoint.open(made).quantizations
    assert "language_model.layers.0.laurel.linear_left" in stored
    assert all(map(can_be_quantized, stored))
    usual = Checkpoint.open(convert(planted_folder, tmp_path / "usual", q_bits=8, progress=False)).quantizations
    assert not any("laurel" in path for path in usual)
    options = {"backend": backend, "dtype": "float32", "device": "cpu"}
    ids = [2, *range(200, 230)]
    with load(made, **options) as ours, load(planted_folder, **options) as dense:
        assert abs(ours.logits(ids) - dense.logits(ids)).max() < 1


def test_every_part_may_stay_as_it_is(planted_folder):
    """The PLE table, the embeddings, LAuReL, AltUp and the gates are chosen like the rest."""
    space = bits_space(Checkpoint.open(planted_folder).config.text, BITS)
    assert len(space.changes()) == (2 * LAYERS + len(Outside._fields)) * len(BITS)
    losses = dict.fromkeys(space.changes(), 1.0)
    best = space.best(losses, lambda _: 0, 0)
    assert best == space.whole
    assert best.outside == Outside()
    assert set(best.layers) == {Layer(128)}
    assert space.cheapest().outside == Outside(2, 2, 2, 2, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "1GB"], "--budget measures what bits cost on your own data: give --calibration FILE"),
        (["--budget", "1GB", "--calibration", "x", "-q"], "leave out --quantize"),
        (["--budget", "1GB", "--calibration", "x", "--matformer", "e2b"], "leave out --matformer, or convert with it"),
    ],
)
def test_flags_that_do_not_go_together(planted_folder, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        command("--model", planted_folder, "-o", tmp_path / "out", *flags)
    assert message in capsys.readouterr().err


def test_budgets_that_can_not_be_met(planted_folder, text, tmp_path, capsys):
    flags = ["--calibration", text, "-o", tmp_path / "out", "--budget"]
    assert command("--model", planted_folder, *flags, "10KB") == 1
    assert "nothing fits 10.0 KB: with everything at 2 bits model takes" in capsys.readouterr().err
    quantized = convert(planted_folder, tmp_path / "q", q_bits=4, progress=False)
    assert command("--model", quantized, *flags, "1GB") == 1
    assert "is quantized already: --budget chooses bits of the unquantized checkpoint" in capsys.readouterr().err
    (tmp_path / "out.json").write_text("{}")
    assert command("--model", planted_folder, *flags, "1GB") == 1
    assert "out.json exists already, where the recipe goes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_demo_model_is_closer_than_with_equal_bits(tmp_path, monkeypatch):
    """At the bytes of 3 bits throughout, on examples that the search has not seen."""
    monkeypatch.setattr(bits, "BITS", (2, 3, 4))
    lines = (DEMO / "sample.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    spoken = [line for line in lines if len(line) < 600]  # without media
    (tmp_path / "calibration.jsonl").write_text("".join(spoken[::8]), encoding="utf-8")
    (tmp_path / "held_out.jsonl").write_text("".join(spoken[4::8]), encoding="utf-8")
    dense = convert("demo", tmp_path / "dense", dequantize=True, dtype="float32", progress=False)
    even = convert(dense, tmp_path / "even", q_bits=3, dtype="float32", progress=False)
    flags = ["--calibration", tmp_path / "calibration.jsonl", "--dtype", "float32"]
    flags += ["--budget", f"{folder_bytes(even) / 1000:.3f}KB", "-o", tmp_path / "made"]
    assert command("--model", dense, *flags) == 0
    assert folder_bytes(tmp_path / "made") <= folder_bytes(even)
    examples = read_examples(tmp_path / "held_out.jsonl")
    found = []
    with load(dense, dtype="float32", device="cpu") as whole:
        for folder in (tmp_path / "made", even):
            with load(folder, dtype="float32", device="cpu") as model:
                found.append(measure_examples(model, whole, examples, lambda _: None).kl_mean)
    assert found[0] < 0.8 * found[1]
