"""Slice tables, plans, and sliced configs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.config.fields import read_json
from g3n_mlx.config.manifest import dead_manifest, effective_parameters, text_manifest
from g3n_mlx.config.text import TextConfig
from g3n_mlx.matformer.plan import cut, find_slice, plan_slice, slice_config
from g3n_mlx.matformer.table import PUBLISHED, Slice, read_slices

E4B = {key: value for key, value in read_json(PUBLISHED.with_name("gemma3n-e4b.json")).items() if key != "_source"}
HEADER = "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"


def make_slice(widths: list[int], skipped: list[int], name: str = "test") -> Slice:
    return Slice(name, name, len(widths), None, None, tuple(widths), tuple(skipped))


@pytest.fixture(scope="module")
def tiny_text(tiny_folder: Path) -> TextConfig:
    checkpoint = Checkpoint.open(tiny_folder)
    checkpoint.close()
    return checkpoint.config.text


def test_published_table() -> None:
    slices = read_slices()
    assert len(slices) == 16
    assert slices[0] == Slice("Main model", "main-model", 35, 3.98, 62.3, (16384,) * 35, ())
    assert slices[1] == Slice(
        "Config for official E2B Model", "e2b", 30, 1.91, 50.9, (8192,) * 30, (20, 21, 22, 23, 24)
    )
    block = find_slice("e2.49b-block", slices)
    assert block.name == "Config for E2.49B (block-level)"
    assert [layer for layer, width in enumerate(block.ffn_hidden_dims) if width == 16384] == [20, 21, 22, 23, 24]


def test_effective_parameters_are_the_published_ones() -> None:
    base = TextConfig.from_dict(E4B)
    for entry in read_slices():
        sliced = TextConfig.from_dict(slice_config(E4B, plan_slice(base, entry)))
        computed = effective_parameters(sliced) / 1e9
        assert entry.effective_params_b is not None
        # Exact for the released models; the table's own figures are up to 0.02 higher for the others.
        exact = entry.short_name in ("main-model", "e2b", "e1.96b-layer")
        assert round(computed, 2) == entry.effective_params_b if exact else computed <= entry.effective_params_b + 0.005
        assert computed > entry.effective_params_b - 0.025


def test_parameter_counts_of_the_released_models() -> None:
    """Against the sizes of google/gemma-3n-E4B and E2B, text model."""
    base = TextConfig.from_dict(E4B)
    e2b = TextConfig.from_dict(slice_config(E4B, plan_slice(base, find_slice("e2b", read_slices()))))
    for config, expected in ((base, 6_866_696_688), (e2b, 4_456_156_768)):
        total = 0
        for shape in (text_manifest(config) | dead_manifest(config)).values():
            size = 1
            for extent in shape:
                size *= extent
            total += size
        assert total == expected


def test_goldens(tiny_folder: Path, golden_json: Callable[[str], Any], tiny_text: TextConfig) -> None:
    raw = read_json(tiny_folder / "config.json")
    for name, case in golden_json("matformer").items():
        plan = plan_slice(tiny_text, make_slice(case["slice"]["intermediate_size"], case["slice"]["skipped_layers"]))
        assert slice_config(raw, plan)["text_config"] == case["text_config"], name
        assert slice_config(raw["text_config"], plan) == case["text_config"], name


@pytest.mark.parametrize("name", ["Config for E2.49B (block-level)", "e2.49b-block", "E2.49B-Block", " e2.49b-BLOCK "])
def test_slices_are_found_by_either_name_in_any_case(name: str) -> None:
    assert find_slice(name, read_slices()).short_name == "e2.49b-block"


def test_unknown_slice_lists_all_names_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'e2\.49b-block'") as raised:
        find_slice("e2.49-block", read_slices())
    for entry in read_slices():
        assert entry.name in str(raised.value)
        assert entry.short_name in str(raised.value)


@pytest.mark.parametrize("name", ["e9", "large", "quarter"])
def test_a_name_like_no_other_suggests_none(name: str) -> None:
    with pytest.raises(ValueError, match=rf"no slice is called '{name}'\. There are: ") as raised:
        find_slice(name, read_slices())
    assert "did you mean" not in str(raised.value)


def test_a_model_that_is_a_slice_has_no_published_one() -> None:
    base = TextConfig.from_dict(E4B)
    sliced = TextConfig.from_dict(slice_config(E4B, plan_slice(base, find_slice("e1.96b-layer", read_slices()))))
    with pytest.raises(ValueError, match="none of the table can be taken from this model: it is a slice itself"):
        find_slice("half", read_slices(), sliced)


def test_own_table(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(HEADER + 'My slice,3,,,"[1_0 * 2, 3 ,4_0*2 * 1]","[ 1,2 ]"\n\n"Other, one",1,0.5,50.00%,[7],\n')
    first, second = read_slices(path)
    assert first == Slice("My slice", "my-slice", 3, None, None, (20, 3, 80), (1, 2))
    assert second == Slice("Other, one", "other-one", 1, 0.5, 50.0, (7,), ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,layers\n", "the columns are"),
        ("", "the columns are"),
        (HEADER, "holds no slices"),
        (HEADER + "a,1,,\n", "line 2: has 4 fields"),
        (HEADER + "a,1,,,2048,\n", "expected a list in brackets"),
        (HEADER + "a,1,,,[2 + 3],\n", "'2 \\+ 3' is not an integer"),
        (HEADER + "a,1,,,[__import__('os')],\n", "is not an integer"),
        (HEADER + "a,1,,,[-2],\n", "'-2' is not an integer"),
        (HEADER + "a,one,,,[2],\n", "line 2, # Layers: 'one'"),
        (HEADER + "a,1,much,,[2],\n", "'much' is not a number"),
        (HEADER + "a,1,,,[2],\nA,1,,,[3],\n", "both go by the name 'a'"),
        (HEADER + ",1,,,[2],\n", "has no name"),
    ],
)
def test_broken_tables_say_where(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "broken.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_slices(path)


def test_missing_table(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        read_slices(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("widths", "skipped", "message"),
    [
        ([128] * 9, [], "made for a base model of 9 layers, this checkpoint has 10"),
        ([128] * 30, [20, 21, 22, 23, 24], "base model of 35 layers"),
        ([128] * 9 + [257], [], "wants 257 FFN units in layer 9, the checkpoint has 256"),
        ([128] * 9 + [0], [], "wants 0 FFN units"),
        ([128] * 9, [10], r"skips layers \[10\], the checkpoint's are 0 to 9"),
        ([128] * 9, [3], r"skips layers \[3\], whose keys and values"),  # last sliding owner
        ([128] * 9, [4], r"skips layers \[4\], whose keys and values"),  # last full owner
        ([128] * 8, [6, 6], "skips a layer twice"),
    ],
)
def test_plans_that_do_not_fit(tiny_text: TextConfig, widths: list[int], skipped: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_slice(tiny_text, make_slice(widths, skipped))


def test_widths_must_be_as_many_as_kept_layers(tiny_text: TextConfig) -> None:
    broken = dataclasses.replace(make_slice([128] * 8, [6, 7]), ffn_hidden_dims=(128,) * 7)
    with pytest.raises(ValueError, match="7 FFN widths for 8 kept layers"):
        plan_slice(tiny_text, broken)


def tiny_like(layers: int, shared: int, kinds: list[str], widths: list[int], sparsity: list[float]) -> dict[str, Any]:
    return E4B | {
        "hidden_size": 64,
        "hidden_size_per_layer_input": 32,
        "num_hidden_layers": layers,
        "num_kv_shared_layers": shared,
        "layer_types": kinds,
        "intermediate_size": widths,
        "activation_sparsity_pattern": sparsity,
    }


@st.composite
def configs_and_slices(draw: st.DrawFn) -> tuple[dict[str, Any], Slice]:
    """Any config, and any slice that it allows."""
    layers = draw(st.integers(2, 12))
    shared = draw(st.integers(0, layers - 1))
    kinds = draw(
        st.lists(st.sampled_from(["sliding_attention", "full_attention"]), min_size=layers, max_size=layers).filter(
            lambda kinds: set(kinds) <= set(kinds[: layers - shared])
        )
    )
    widths = draw(st.lists(st.integers(1, 40), min_size=layers, max_size=layers))
    sparsity = draw(st.lists(st.sampled_from([0.0, 0.5, 0.95]), min_size=layers, max_size=layers))
    raw = tiny_like(layers, shared, kinds, widths, sparsity)
    config = TextConfig.from_dict(raw)
    donors = set(config.kv_owners[config.first_kv_shared_layer :])
    free = sorted(set(range(layers)) - donors)
    skipped = draw(st.sets(st.sampled_from(free), max_size=layers - 1) if free else st.just(set()))
    if len(skipped) == layers:
        skipped.pop()
    kept = [layer for layer in range(layers) if layer not in skipped]
    # At least one owner of each type stays, or what is left is no model.
    owners_left = {kinds[layer] for layer in kept if layer < layers - shared}
    if not {kinds[layer] for layer in kept} <= owners_left or not owners_left:
        skipped, kept = set(), list(range(layers))
    return raw, make_slice([draw(st.integers(1, widths[layer])) for layer in kept], sorted(skipped))


@given(configs_and_slices())
def test_kept_layers_read_the_keys_and_values_that_they_read_before(case: tuple[dict[str, Any], Slice]) -> None:
    raw, chosen = case
    base = TextConfig.from_dict(raw)
    plan = plan_slice(base, chosen)
    sliced = TextConfig.from_dict(slice_config(raw, plan))
    for layer, original in enumerate(plan.kept_layers):
        assert sliced.layer_types[layer] == base.layer_types[original]
        assert sliced.activation_sparsity_pattern[layer] == base.activation_sparsity_pattern[original]
        assert plan.kept_layers[sliced.kv_owners[layer]] == base.kv_owners[original]


@given(configs_and_slices())
def test_cuts_give_the_shapes_that_the_sliced_config_asks_for(case: tuple[dict[str, Any], Slice]) -> None:
    raw, chosen = case
    base = TextConfig.from_dict(raw)
    plan = plan_slice(base, chosen)
    shapes = text_manifest(base) | dead_manifest(base)
    sliced = TextConfig.from_dict(slice_config(raw, plan))
    sources = {plan.sliced_name(name): name for name in shapes}
    wanted = text_manifest(sliced) | dead_manifest(sliced)
    assert set(sources) - {None} == set(wanted)
    for name, expected in wanted.items():
        source = sources[name]
        kept = cut(plan, base, source.removesuffix(".weight"))
        found = list(shapes[source])
        for axis, ranges in enumerate((kept.rows, kept.columns)):
            if ranges is not None:
                assert all(0 <= start < stop <= found[axis] for start, stop in ranges)
                found[axis] = sum(stop - start for start, stop in ranges)
        assert tuple(found) == expected
