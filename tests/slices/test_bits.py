"""Bits by module: what the search measures is what a conversion by its recipe gives."""

import re
from fractions import Fraction

import adapter_files
import checkpoint_files
import numpy as np
import pytest
from planted import LAYERS

from g3n_mlx import load
from g3n_mlx.__main__ import main
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.recipe import read_recipe
from g3n_mlx.convert import convert
from g3n_mlx.eval.quality import measure_text, windows
from g3n_mlx.matformer.table import read_slices
from g3n_mlx.slices.costs import Costs
from g3n_mlx.slices.space import space_of
from g3n_mlx.slices.variants import Variants

TEXT = "".join(f"Cat {number} sat on the mat.\n" for number in range(12))  # less than a window


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("g3n_mlx.convert.cache_folder", lambda: tmp_path / "cache")


def test_a_recipe_gives_what_the_search_measured(planted_folder, backend, tmp_path, capsys):
    text, output = tmp_path / "text.txt", tmp_path / "found.csv"
    text.write_text(TEXT)
    flags = ["--model", planted_folder, "--text", text, "--backend", backend, "--dtype", "float32", "--device", "cpu"]
    # Halfway between everything at 3 bits and half as wide, and everything at 8 bits.
    checkpoint = Checkpoint.open(planted_folder)
    space, costs = space_of(checkpoint, [Fraction(1, 2)], [3, 8]), Costs(checkpoint)
    budget = (costs.memory(space.cheapest()) + costs.memory(space.whole.at(8))) // 2
    flags += ["--widths", "0.5", "--bits", "3,8", "--budget", f"{budget / 1000:.3f}KB", "-o", output]
    assert main(["slices", "search", *map(str, flags)]) == 0
    printed = capsys.readouterr().out
    (measured,) = re.findall(r"^Found .* (\S+)$", printed, re.MULTILINE)
    assert "whole, 3 bits" in printed
    assert "whole, 8 bits" in printed

    (row,) = read_slices(output)
    recipe = tmp_path / f"{row.short_name}.json"
    how = read_recipe(recipe)
    bits = {how.quantization(f"language_model.layers.{at}.mlp.up_proj") for at in range(LAYERS)}
    assert bits == {Quantization(3, 64), Quantization(8, 64)}  # some layers are worth more than others
    made = tmp_path / "made"
    command = ["convert", "--model", planted_folder, "-o", made, "--recipe", recipe, "--dtype", "float32"]
    command += ["--matformer-config", output, "--matformer", row.short_name]
    assert main(list(map(str, command))) == 0
    stored = Checkpoint.open(made).quantizations
    kept = [at for at in range(LAYERS) if at not in row.skipped_layers]
    for index, at in enumerate(kept):
        for part in ("mlp.down_proj", "self_attn.q_proj"):
            same = how.quantization(f"language_model.layers.{at}.{part}")
            assert stored[f"language_model.layers.{index}.{part}"] == same

    options = {"backend": backend, "dtype": "float32", "device": "cpu"}
    with load(planted_folder, **options) as whole, load(made, **options) as smaller:
        ids = whole.tokenizer.encode(TEXT)
        spans = list(windows(len(ids), 255, 128))
        assert len(spans) == 1
        again = measure_text(smaller, whole, ids, len(TEXT), spans, lambda _: None)
    # The search counts the token behind the text as well.
    assert again.kl_mean == pytest.approx(float(measured), rel=0.1)
    assert again.kl_mean > 1e-4


def test_bits_leave_an_adapter_in_place(planted_folder, backend, tmp_path):
    """The conversions are without it: what it adds goes beside them, what it replaces stays."""
    tensors = checkpoint_files.read_folder(planted_folder)
    layer = "model.layers.0"
    changes = adapter_files.low_ranks(tensors, (f"{layer}.mlp.up_proj",))
    adapter = adapter_files.write_peft(tmp_path / "adapter", changes)
    file, name = adapter / "adapter_model.safetensors", f"{layer}.self_attn.o_proj.weight"
    replaced = {f"base_model.model.{name}": tensors[name].astype(np.float32) * -2}
    checkpoint_files.write_safetensors(file, checkpoint_files.read_safetensors(file) | replaced)
    options = {"backend": backend, "dtype": "float32", "device": "cpu", "adapter": adapter}
    ids = [2, *range(200, 240)]
    with load(planted_folder, **options) as whole, load(planted_folder, q_bits=8, **options) as expected:
        candidate = space_of(whole.checkpoint, [Fraction(1, 2)], [3, 8]).whole.at(8)
        variants = Variants(whole, "cpu")
        with variants.opened(candidate) as found:
            # What is not quantized is bfloat16 in the conversion alone.
            distance = np.abs(found.logits(ids) - expected.logits(ids)).max()
        with load(planted_folder, backend=backend, dtype="float32", device="cpu") as plain:
            assert distance < np.abs(plain.logits(ids) - expected.logits(ids)).max() / 20
        variants.close()


def test_bits_of_a_quantized_model_can_not_be_searched(planted_folder, tmp_path, capsys):
    quantized = convert(planted_folder, tmp_path / "q", q_bits=4, progress=False)
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--text", tmp_path / "text.txt", "--bits", "3,4", "--budget", "1GB", "-o", tmp_path / "a.csv"]
    assert main(["slices", "search", "--model", str(quantized), *map(str, flags)]) == 1
    assert "--bits needs an unquantized model" in capsys.readouterr().err
