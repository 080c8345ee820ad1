"""Views of a checkpoint through slices: what they list and read, and that several of them live side by side."""

import gc
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_files as files
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import dequantize, to_float32
from g3n_mlx.convert import convert
from g3n_mlx.matformer.plan import SlicePlan, plan_slice
from g3n_mlx.matformer.table import Slice, read_slices
from g3n_mlx.matformer.view import open_sliced, sliced

PLE = "language_model.embed_tokens_per_layer"
OWNERS = [3, 4]  # of the tiny checkpoint's keys and values: no slice skips them


@pytest.fixture(scope="module")
def whole_weights(tiny: Checkpoint) -> dict[str, np.ndarray]:
    return {name: tiny.read(name) for name in (*tiny.names, *tiny.dead_names)}


@st.composite
def slices(draw: st.DrawFn, layers: int = 10, width: int = 256, multiple: int = 1) -> Slice:
    skipped = draw(st.sets(st.sampled_from([i for i in range(10) if i not in OWNERS]), max_size=6))
    count = layers - len(skipped)
    widths = draw(st.lists(st.integers(1, width // multiple), min_size=count, max_size=count))
    return files.slice_of([multiple * units for units in widths], sorted(skipped))


def cut_with_numpy(weights: dict[str, np.ndarray], plan: SlicePlan, layers: int, ple: int) -> dict[str, np.ndarray]:
    """What a slice keeps, by numpy's own indexing of dense weights."""
    kept = list(plan.kept_layers)
    found = {}
    for name, weight in weights.items():
        parts = name.split(".")
        if parts[:2] == ["language_model", "layers"]:
            if int(parts[2]) not in kept:
                continue
            layer = kept.index(int(parts[2]))
            units = plan.intermediate_size[layer]
            name = ".".join([*parts[:2], str(layer), *parts[3:]])
            if parts[-2] in ("gate_proj", "up_proj"):
                weight = weight[:units]
            elif parts[-2] == "down_proj":
                weight = weight[:, :units]
        elif name == f"{PLE}.weight":
            weight = weight.reshape(len(weight), layers, ple)[:, kept].reshape(len(weight), -1)
        elif name == "language_model.per_layer_model_projection.weight":
            weight = weight.reshape(layers, ple, -1)[kept].reshape(len(kept) * ple, -1)
        found[name] = weight
    return found


def dense(checkpoint: Checkpoint, path: str) -> np.ndarray:
    quantization = checkpoint.quantization(path)
    weight = checkpoint.read(f"{path}.weight")
    if quantization is None:
        return weight
    scales, biases = checkpoint.read(f"{path}.scales"), checkpoint.read(f"{path}.biases")
    return dequantize(weight, scales, biases, quantization.bits, quantization.group_size)


@settings(max_examples=25)
@given(chosen=slices(), ids=st.lists(st.integers(0, 895), max_size=6))
def test_a_view_is_what_numpy_cuts_from_the_whole(
    tiny: Checkpoint, whole_weights: dict[str, np.ndarray], chosen: Slice, ids: list[int]
) -> None:
    text = tiny.config.text
    plan = plan_slice(text, chosen)
    view = sliced(tiny, plan)
    expected = cut_with_numpy(whole_weights, plan, text.num_hidden_layers, text.hidden_size_per_layer_input)
    assert {*view.names, *view.dead_names} == set(expected)
    for name, weight in expected.items():
        assert view.info(name).shape == weight.shape, name
        assert files.same(view.read(name), np.ascontiguousarray(weight)), name
    assert view.nbytes == sum(expected[name].nbytes for name in view.names)
    table = to_float32(expected[f"{PLE}.weight"])
    np.testing.assert_array_equal(view.rows(PLE).gather(np.array(ids, np.int64)), table[ids])
    view.close()


@settings(max_examples=15)
@given(chosen=slices(multiple=64, width=256))
def test_a_view_of_quantized_weights_has_the_values_that_numpy_cuts(quantized_folder: Path, chosen: Slice) -> None:
    whole = Checkpoint.open(quantized_folder)
    text = whole.config.text
    plan = plan_slice(text, chosen)
    view = sliced(whole, plan)
    values = {f"{path}.weight": dense(whole, path) for path in whole.quantizations}
    expected = cut_with_numpy(values, plan, text.num_hidden_layers, text.hidden_size_per_layer_input)
    assert {f"{path}.weight" for path in view.quantizations} == set(expected)
    for name, weight in expected.items():
        np.testing.assert_array_equal(dense(view, name.removesuffix(".weight")), weight)
    view.close()
    whole.close()


@settings(max_examples=25)
@given(data=st.data(), outer=slices())
def test_a_view_of_a_view_is_the_slice_of_the_slice(tiny: Checkpoint, data: st.DataObject, outer: Slice) -> None:
    first = plan_slice(tiny.config.text, outer)
    free = [layer for layer, kept in enumerate(first.kept_layers) if kept not in OWNERS]
    skipped = data.draw(st.sets(st.sampled_from(free), max_size=3)) if free else set()
    kept = [layer for layer in range(len(first.kept_layers)) if layer not in skipped]
    widths = [data.draw(st.integers(1, first.intermediate_size[layer])) for layer in kept]
    once = sliced(tiny, first)
    twice = sliced(once, plan_slice(once.config.text, files.slice_of(widths, sorted(skipped))))
    left_out = [layer for layer in range(10) if layer not in [first.kept_layers[layer] for layer in kept]]
    direct = sliced(tiny, plan_slice(tiny.config.text, files.slice_of(widths, left_out)))
    assert twice.config == direct.config
    assert twice.raw_config == direct.raw_config
    assert twice.names == direct.names
    for name in direct.names:
        assert files.same(twice.read(name), direct.read(name)), name
    for view in (once, twice, direct):
        view.close()


def test_views_live_side_by_side_and_end_alone(tiny_folder: Path) -> None:
    name = "language_model.layers.0.mlp.up_proj.weight"
    whole = Checkpoint.open(tiny_folder)
    narrow, wide = (
        sliced(whole, plan_slice(whole.config.text, files.slice_of([units] * 10, []))) for units in (64, 128)
    )
    expected = whole.read(name)
    narrow.close()
    narrow.close()  # a second time changes nothing
    with pytest.raises(ValueError, match="was closed"):
        narrow.read(name)
    with pytest.raises(ValueError, match="was closed"):
        narrow.rows(PLE)
    assert files.same(wide.read(name), expected[:128])
    assert files.same(whole.read(name), expected)
    whole.close()
    with pytest.raises(ValueError, match="was closed"):
        sliced(whole, plan_slice(whole.config.text, files.slice_of([64] * 10, [])))
    assert files.same(wide.read(name), expected[:128])
    shard = wide.sources[name].stored.shard
    wide.close()
    with pytest.raises(ValueError, match="closed file"):
        shard.read_into(0, memoryview(bytearray(1)))


def test_a_view_keeps_the_files_of_a_forgotten_whole(tiny_folder: Path, tiny: Checkpoint) -> None:
    plan = plan_slice(tiny.config.text, files.slice_of([64] * 10, []))
    view = sliced(Checkpoint.open(tiny_folder), plan)
    gc.collect()
    name = "language_model.layers.0.mlp.up_proj.weight"
    assert files.same(view.read(name), tiny.read(name)[:64])
    shard = view.sources[name].stored.shard
    del view
    gc.collect()
    with pytest.raises(ValueError, match="closed file"):
        shard.read_into(0, memoryview(bytearray(1)))


def test_sliced_goldens(tiny_folder: Path, tiny: Checkpoint, golden_json: Callable[[str], Any]) -> None:
    for case in golden_json("matformer").values():
        chosen = files.slice_of(case["slice"]["intermediate_size"], case["slice"]["skipped_layers"])
        view = sliced(tiny, plan_slice(tiny.config.text, chosen))
        assert view.raw_config["text_config"] == case["text_config"]
        assert {f"model.{name}" for name in (*view.names, *view.dead_names)} == set(case["tensors"])
        for name, expected in case["tensors"].items():
            array = view.read(name.removeprefix("model."))
            assert list(array.shape) == expected["shape"]
            assert hashlib.sha256(array.tobytes()).hexdigest() == expected["sha256"], name


@settings(max_examples=60)
@given(data=st.data())
def test_row_ranges_of_slices(tiny_folder: Path, data: st.DataObject) -> None:
    whole = Checkpoint.open(tiny_folder)
    skipped = data.draw(st.sets(st.sampled_from([0, 1, 2, 5, 6, 7, 8, 9]), max_size=6))
    widths = data.draw(st.lists(st.integers(1, 256), min_size=10 - len(skipped), max_size=10 - len(skipped)))
    view = sliced(whole, plan_slice(whole.config.text, files.slice_of(widths, sorted(skipped))))
    name = data.draw(st.sampled_from([name for name in view.names if name.startswith("language_model.")]))
    complete = view.read(name)
    start = data.draw(st.integers(0, len(complete)))
    stop = data.draw(st.integers(start, len(complete)))
    assert files.same(view.read(name, start, stop), complete[start:stop])
    whole.close()
    view.close()


def test_slice_of_a_slice(tiny_folder: Path, tiny: Checkpoint, tmp_path: Path) -> None:
    first = write_table(tmp_path, [256] * 5 + [192] * 4, [6])
    once = convert(tiny_folder, tmp_path / "once", matformer="test", matformer_config=first, progress=False)
    checkpoint = Checkpoint.open(once)
    twice = open_sliced(once, plan_slice(checkpoint.config.text, files.slice_of([64] * 8, [7])))  # 8 of the original
    direct = open_sliced(tiny_folder, plan_slice(tiny.config.text, files.slice_of([64] * 8, [6, 8])))
    assert twice.config == direct.config
    assert set(twice.names) == set(direct.names)
    for name in direct.names:
        assert files.same(twice.read(name), direct.read(name)), name


def write_table(folder: Path, widths: list[int], skipped: list[int]) -> Path:
    path = folder / f"slices-{len(list(folder.iterdir()))}.csv"
    path.write_text(
        "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
        f'test,{len(widths)},,,"{widths}","{skipped}"\n'
    )
    return path


def test_wide_gaps_are_not_read(tmp_path: Path, published: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    """Columns far apart are read one by one, near ones with what lies between: both give the same."""
    config, tensors = published
    text = config["text_config"]
    layers, units = text["num_hidden_layers"], 5000
    wide = dict(tensors)
    rng = np.random.default_rng(0)
    for layer in range(layers):
        prefix = f"model.language_model.layers.{layer}.mlp"
        for part, shape in (("gate", (units, 128)), ("up", (units, 128)), ("down", (128, units))):
            wide[f"{prefix}.{part}_proj.weight"] = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
    config = {**config, "text_config": {**text, "intermediate_size": [units] * layers}}
    folder = files.write_folder(tmp_path / "wide", config, wide)
    base = Checkpoint.open(folder).config.text
    for kept in (2000, 4900):  # gaps of 6000 and 200 bytes
        view = open_sliced(folder, plan_slice(base, files.slice_of([kept] * layers, [])))
        name = "language_model.layers.1.mlp.down_proj.weight"
        assert files.same(view.read(name), wide[f"model.{name}"][:, :kept])
        assert files.same(view.read(name, 3, 9), wide[f"model.{name}"][3:9, :kept])


def test_slice_of_quantized_is_quantized_slice(tiny_folder: Path, tmp_path: Path) -> None:
    for bits, group_size in ((2, 32), (3, 64), (4, 64), (5, 32), (6, 64), (8, 32)):
        folder = tmp_path / f"{bits}-{group_size}"
        folder.mkdir()
        table = write_table(folder, [256, 192, 128, 256, 192, 128, 64, 192], [1, 6])
        how = {"q_bits": bits, "q_group_size": group_size, "ple_bits": 8 if bits > 3 else 3, "progress": False}
        cut = {"matformer": "test", "matformer_config": table}
        whole = convert(tiny_folder, folder / "whole", **how)
        expected = convert(tiny_folder, folder / "quantized-slice", **how, **cut)
        found = convert(whole, folder / "slice-of-quantized", **cut, progress=False)
        a, b = files.read_folder(found), files.read_folder(expected)
        assert set(a) == set(b)
        for name in a:
            assert files.same(a[name], b[name]), name
        assert files.read_config(found) == files.read_config(expected)
        in_place = open_sliced(whole, plan_slice(Checkpoint.open(whole).config.text, read_slices(table)[0]))
        assert {f"model.{name}" for name in (*in_place.names, *in_place.dead_names)} == set(a)
        for name in in_place.names:
            assert files.same(in_place.read(name), a[f"model.{name}"])


def test_slices_that_part_a_group(tiny: Checkpoint, quantized_folder: Path) -> None:
    plan = plan_slice(tiny.config.text, files.slice_of([100] * 10, []))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj \(0 to 100\) are not whole groups of 64"):
        open_sliced(quantized_folder, plan)
