"""The model card that a conversion gets."""

import json

import pytest

from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.convert import cached_conversion, convert
from g3n_mlx.convert.card import Origin

_BITS_4, _BITS_8 = {"bits": 4, "group_size": 32}, {"bits": 8, "group_size": 32}


def test_it_says_what_the_model_is_made_of(tiny_folder, tmp_path):
    output = convert(tiny_folder, tmp_path / "out", q_bits=4, q_group_size=32, progress=False)
    card = (output / "README.md").read_text("utf-8")
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert front.splitlines()[:3] == ["license: gemma", "library_name: mlx", "pipeline_tag: image-text-to-text"]
    assert "base_model" not in front  # a folder has no id
    assert "- matformer" not in front.splitlines()
    assert f"g3n convert --hf-path {tiny_folder.name} -q --q-bits 4 --q-group-size 32 -o FOLDER" in body
    assert str(tiny_folder.parent) not in card
    assert "4 bits in groups of 32" in body
    assert "8 bits in groups of 32 (1 modules)" in body  # the PLE table


def test_slices_and_recipes_are_told(tiny_folder, tmp_path):
    sliced = convert(demo_folder(), tmp_path / "half", matformer="half", progress=False)
    card = (sliced / "README.md").read_text("utf-8")
    assert "| slice | Half |" in card
    assert "- matformer" in card
    recipe = tmp_path / "mine.json"
    recipe.write_text(json.dumps({"modules": {"*.mlp.*": _BITS_4, "*.self_attn.*": _BITS_8}}))
    mixed = convert(tiny_folder, tmp_path / "mixed", recipe=recipe, progress=False)
    card = (mixed / "README.md").read_text("utf-8")
    assert "--recipe mine.json" in card
    assert "4 bits in groups of 32" in card
    assert "8 bits in groups of 32" in card


def test_the_licence_is_the_sources(tiny_folder, tmp_path):
    source = convert(tiny_folder, tmp_path / "source", progress=False)
    (source / "README.md").write_text("---\nlicense: mit\n---\nlicense: none\n")
    output = convert(source, tmp_path / "out", q_bits=8, q_group_size=32, progress=False)
    assert "\nlicense: mit\n" in (output / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("source", "folder", "hub_id", "name"),
    [
        ("a/b", "/cache/models--a--b/snapshots/1", "a/b", "a/b"),
        ("/cache/models--a--b/snapshots/1", "/cache/models--a--b/snapshots/1", "a/b", "a/b"),
        ("/home/me/secret/mine", "/home/me/secret/mine", None, "mine"),
    ],
)
def test_the_source_is_called_by_its_id_or_its_name(source, folder, hub_id, name, tmp_path):
    origin = Origin(source, tmp_path / folder.removeprefix("/"), [])
    assert (origin.hub_id, origin.name) == (hub_id, name)


def test_what_the_cache_keeps_has_none(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("g3n_mlx.convert.cache_folder", lambda: tmp_path)
    assert not (cached_conversion(tiny_folder, q_bits=8, progress=False) / "README.md").exists()
