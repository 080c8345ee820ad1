"""Recipes: bits by patterns of module paths."""

import json
import re
from pathlib import Path

import pytest

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.recipe import read_recipe, write_recipe
from g3n_mlx.convert import convert
from g3n_mlx.convert.__main__ import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "eval.md").read_text("utf-8")


def test_recipes_are_read_and_written(tmp_path):
    path = tmp_path / "recipe.json"
    stored = {f"language_model.layers.0.mlp.{part}_proj": Quantization(3, 64) for part in ("gate", "up", "down")}
    stored |= {"language_model.layers.0.self_attn.q_proj": Quantization(4, 64)}
    stored |= {"language_model.layers.0.self_attn.o_proj": Quantization(8, 32)}
    stored |= {"language_model.embed_tokens": Quantization(6, 64)}
    write_recipe(path, stored)
    patterns = json.loads(path.read_text())["modules"]
    assert patterns["language_model.layers.0.mlp.*"] == {"bits": 3, "group_size": 64}
    recipe = read_recipe(path)
    assert {module: recipe.quantization(module) for module in stored} == stored
    assert recipe.quantization("language_model.layers.1.mlp.up_proj") is None


def test_the_first_pattern_that_matches_counts(tiny_folder, tmp_path):
    path = tmp_path / "recipe.json"
    rules = {
        "*.layers.2.*": False,
        "*.mlp.*": {"bits": 2, "group_size": 32},
        "language_model.*": {"bits": 6, "group_size": 64},
    }
    path.write_text(json.dumps({"modules": rules}))
    stored = Checkpoint.open(convert(tiny_folder, tmp_path / "out", recipe=path, progress=False)).quantizations
    assert not any(".layers.2." in module for module in stored)
    assert stored["language_model.layers.1.mlp.gate_proj"] == Quantization(2, 32)
    assert stored["language_model.embed_tokens"] == Quantization(6, 64)
    assert not any("norm" in module or "router" in module for module in stored)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "modules is None, expected an object"),
        ('{"modules": {}}', "modules is {}"),
        ('{"modules": {"*": 4}}', r"\* is 4, expected bits and group_size, or false"),
        ('{"modules": {"*": {"bits": 4}}}', "expected bits and group_size"),
        ('{"modules": {"*": {"bits": true, "group_size": 64}}}', "expected bits and group_size"),
        ('{"modules": {"*": {"bits": 7, "group_size": 64}}}', r"recipe.json: \*: 7 bits in groups of 64 cannot"),
        ('{"modules": {"vision*": {"bits": 4, "group_size": 64}}}', "quantizes no module of this checkpoint"),
        ("[", "not valid JSON"),
    ],
)
def test_a_recipe_that_can_not_be_used(content, message, tiny_folder, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        convert(tiny_folder, tmp_path / "out", recipe=path, progress=False)
    assert not (tmp_path / "out").exists()


def test_patterns_are_of_the_layers_before_a_slice(tiny_folder, tmp_path):
    rows, path = tmp_path / "rows.csv", tmp_path / "recipe.json"
    rows.write_text(
        "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
        f'Cut,8,,,"{[128] * 8}","[1, 6]"\n'
    )
    rules = {f"*.layers.{at}.mlp.*": {"bits": bits, "group_size": 64} for at, bits in ((0, 2), (2, 3), (7, 8))}
    path.write_text(json.dumps({"modules": rules}))
    flags = ["--model", tiny_folder, "-o", tmp_path / "out", "--recipe", path]
    flags += ["--matformer", "cut", "--matformer-config", rows]
    assert main(list(map(str, flags))) == 0
    stored = Checkpoint.open(tmp_path / "out").quantizations
    bits = {module.split(".")[2]: how.bits for module, how in stored.items()}
    assert bits == {"0": 2, "1": 3, "5": 8}


@pytest.mark.parametrize("flags", [["-q"], ["--fits", "4GB"], ["--list-slices"]])
def test_a_recipe_beside_other_choices_is_wrong_usage(flags, tiny_folder, tmp_path, capsys):
    output = [] if flags == ["--list-slices"] else ["-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(tiny_folder), "--recipe", "a.json", *flags, *output])
    assert stopped.value.code == 2
    assert "--recipe says how every module is stored" in capsys.readouterr().err


def test_a_predicate_says_it_by_module(tiny_folder, tmp_path):
    asked = []

    def predicate(path):
        asked.append(path)
        if path.endswith("down_proj"):
            return {"bits": 6}
        if path.endswith("o_proj"):
            return {"bits": 8, "group_size": 32, "mode": "affine"}  # as mlx_lm's own predicates spell it
        return "laurel" not in path

    out = convert(tiny_folder, tmp_path / "out", q_bits=3, quant_predicate=predicate, progress=False)
    stored = Checkpoint.open(out).quantizations
    assert stored["language_model.layers.1.mlp.down_proj"] == Quantization(6, 64)
    assert stored["language_model.layers.1.self_attn.o_proj"] == Quantization(8, 32)
    assert stored["language_model.layers.1.mlp.up_proj"] == Quantization(3, 64)
    assert stored["language_model.embed_tokens_per_layer"] == Quantization(8, 64)  # as -q has it
    assert "language_model.layers.1.laurel.linear_left" in asked
    assert not any("laurel" in module for module in stored)
    assert not any("norm" in module or "router" in module or "tower" in module for module in asked)
    assert "-q --q-bits 3 -o FOLDER  # with quant_predicate" in (out / "README.md").read_text("utf-8")


def test_a_predicate_is_asked_of_the_layers_before_a_slice(tiny_folder, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text(
        "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
        f'Cut,8,,,"{[128] * 8}","[1, 6]"\n'
    )
    taken = {"matformer": "cut", "matformer_config": rows, "progress": False}
    rule = {"quant_predicate": lambda path: ".layers.7.mlp." in path and {"bits": 4}}
    stored = Checkpoint.open(convert(tiny_folder, tmp_path / "out", **rule, **taken)).quantizations
    assert {module.split(".")[2] for module in stored} == {"5"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (True, "the predicate says True of language_model.*: give q_bits"),
        (4, "the predicate says 4 of language_model.*, expected True, False, or a dict of bits and group_size"),
        (None, "the predicate says None of"),
        ({"group_size": 64}, "expected True, False, or a dict"),
        ({"bits": 4, "mode": "mxfp4"}, "expected True, False, or a dict"),
        ({"bits": 4, "group": 64}, "expected True, False, or a dict"),
        ({"bits": 7}, "the predicate, of language_model.*: 7 bits in groups of 64 cannot be stored"),
        (False, "the predicate quantizes no module"),
    ],
)
def test_a_predicate_that_can_not_be_used(answer, message, tiny_folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(tiny_folder, tmp_path / "out", quant_predicate=lambda _: answer, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_predicate_and_a_recipe_are_one_too_many(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="recipe and quant_predicate were both given"):
        convert(tiny_folder, tmp_path / "out", recipe="recipe.json", quant_predicate=lambda _: True)


def test_what_the_page_says(tiny_folder, tmp_path, monkeypatch):
    (recipe,) = re.findall(r'```json\n({"modules".*)\n```', PAGE)
    (tmp_path / "recipe.json").write_text(recipe)
    out = convert(tiny_folder, tmp_path / "out", recipe=tmp_path / "recipe.json", progress=False)
    assert set(Checkpoint.open(out).quantizations.values()) == {Quantization(4, 64), Quantization(6, 64)}
    (code,) = re.findall(r"<!-- test: predicate -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("SOURCE", str(tiny_folder)), {})
    bits = {how.bits for how in Checkpoint.open(tmp_path / "mixed").quantizations.values()}
    assert bits == {4, 6, 8}
