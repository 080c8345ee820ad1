"""Adapters of PEFT, mlx-lm and mlx-vlm: what they make of every weight, and what is said of those that don't fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import adapter_files as adapters
import checkpoint_files as files
import numpy as np
import pytest

from g3n_mlx.checkpoint.adapter import changes_of
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.shards import Shard
from g3n_mlx.convert import convert
from g3n_mlx.failures import Error
from g3n_mlx.matformer.adapted import named_adapters, open_adapted, parsed_adapters
from g3n_mlx.matformer.plan import plan_slice
from g3n_mlx.matformer.view import open_sliced

Published = tuple[dict[str, Any], dict[str, np.ndarray]]
LAYERS = adapters.LAYERS
Q_PROJ = f"{LAYERS}.0.self_attn.q_proj"


def contents(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: checkpoint.read(name).astype(np.float32) for name in checkpoint.names}


def assert_equal(found: Checkpoint, expected: Checkpoint) -> None:
    ours, theirs = contents(found), contents(expected)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-6, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("layout", ["peft", "peft in parts", "text only", "mlx-lm", "mlx-vlm", "old mlx-vlm"])
def test_every_layout_makes_the_merged_weights(published: Published, tiny_folder: Path, tmp_path, layout, dora) -> None:
    if layout == "old mlx-vlm" and dora:
        pytest.skip("it had none")
    config, tensors = published
    changes = adapters.low_ranks(tensors)
    expected = files.write_folder(tmp_path / "merged", config, adapters.merged(tensors, changes, dora))
    renamed = changes
    if layout == "text only":
        renamed = {name.replace("model.language_model.", "model."): entry for name, entry in changes.items()}
    elif "mlx-vlm" in layout:
        renamed = {name.replace("model.language_model.", "language_model.model."): e for name, e in changes.items()}
    if "mlx" in layout:
        folder = adapters.write_mlx(tmp_path / "a", renamed, dora, old=layout.startswith("old"))
    else:
        folder = adapters.write_peft(tmp_path / "a", renamed, dora)
    if layout == "peft in parts":
        whole = files.read_folder(folder)
        (folder / "adapter_model.safetensors").unlink()
        for part in range(2):
            some = dict(list(whole.items())[part::2])
            files.write_safetensors(folder / f"adapter_model-{part + 1:05}-of-00002.safetensors", some)
    assert_equal(open_adapted(tiny_folder, None, {str(folder): 1.0}), Checkpoint.open(expected))


def test_scales_are_those_of_peft(published: Published, tiny_folder: Path, tmp_path: Path) -> None:
    config, tensors = published
    targets = (Q_PROJ, f"{LAYERS}.1.mlp.up_proj")
    changes = adapters.low_ranks(tensors, targets)
    settings = {"use_rslora": True, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 3}}
    folder = adapters.write_peft(tmp_path / "a", changes, **settings)
    merged = adapters.merged(tensors, {Q_PROJ: changes[Q_PROJ]}, scale=adapters.ALPHA / adapters.RANK**0.5)
    merged = adapters.merged(merged, {targets[1]: changes[targets[1]]}, scale=3 / adapters.RANK**0.5)
    expected = files.write_folder(tmp_path / "merged", config, merged)
    assert_equal(open_adapted(tiny_folder, None, {str(folder): 1.0}), Checkpoint.open(expected))


def test_kernels_and_linear_layers_of_the_towers(published: Published, tmp_path: Path) -> None:
    """Also where the file has kernels in MLX's layout."""
    config, tensors = published
    kernel = next(n for n, array in tensors.items() if "vision_tower" in n and array.ndim == 4 and array.shape[2] == 3)
    targets = (
        kernel.removesuffix(".weight"),
        "model.audio_tower.conformer.0.attention.attn.q_proj",
        "model.embed_vision.embedding_projection",
    )
    changes = adapters.low_ranks(tensors, targets)
    expected = files.write_folder(tmp_path / "merged", config, adapters.merged(tensors, changes, True))
    kernels = {
        name: (down.reshape(-1, *tensors[f"{name}.weight"].shape[1:]), up.reshape(*up.shape, 1, 1), magnitude)
        if name == targets[0]
        else (down, up, magnitude)
        for name, (down, up, magnitude) in changes.items()
    }
    folder = adapters.write_peft(tmp_path / "a", kernels, True)
    for layout in (lambda *given: given, files.mlx_vlm):
        source = files.write_folder(tmp_path / layout.__name__, *layout(config, tensors))
        assert_equal(open_adapted(source, None, {str(folder): 1.0}), Checkpoint.open(expected))


def test_whole_tensors_are_replaced(published: Published, quantized_folder: Path, tmp_path: Path) -> None:
    """PEFT's modules_to_save; of a quantized checkpoint the module is dense from then on."""
    config, tensors = published
    rng = np.random.default_rng(0)
    names = [f"{LAYERS}.0.self_attn.o_proj.weight", f"{LAYERS}.2.input_layernorm.weight"]
    new = {name: rng.normal(size=tensors[name].shape).astype(np.float32) for name in names}
    folder = adapters.write_peft(tmp_path / "a", {})
    saved = {f"base_model.model.{name}": array for name, array in new.items()}
    files.write_safetensors(folder / "adapter_model.safetensors", saved)
    dense = files.write_folder(tmp_path / "dense", config, {**tensors, **new})
    source = files.write_folder(tmp_path / "source", config, tensors)
    assert_equal(open_adapted(source, None, {str(folder): 1.0}), Checkpoint.open(dense))
    found = open_adapted(quantized_folder, None, {str(folder): 1.0})
    path = names[0].removeprefix("model.").removesuffix(".weight")
    assert found.quantization(path) is None
    assert path in Checkpoint.open(quantized_folder).quantizations
    for name, array in new.items():
        assert np.array_equal(found.read(name.removeprefix("model.")), array)


def test_several_go_one_over_the_other_with_their_weights(published: Published, tiny_folder, tmp_path) -> None:
    config, tensors = published
    first, second = (adapters.low_ranks(tensors, seed=seed) for seed in (1, 2))
    folders = [
        adapters.write_peft(tmp_path / "first", first, dora=True),
        adapters.write_mlx(tmp_path / "second", second),
    ]
    merged = adapters.merged(adapters.merged(tensors, first, True), second, scale=-0.5 * adapters.SCALE)
    expected = files.write_folder(tmp_path / "merged", config, merged)
    given = {str(folders[0]): 1.0, str(folders[1]): -0.5}
    assert_equal(open_adapted(tiny_folder, None, given), Checkpoint.open(expected))


@pytest.mark.parametrize("dora", [False, True])
def test_a_slice_cuts_the_adapter_as_its_weights(published: Published, tiny: Checkpoint, tmp_path, dora) -> None:
    config, tensors = published
    changes = adapters.low_ranks(tensors)
    folder = adapters.write_peft(tmp_path / "a", changes, dora)
    source = files.write_folder(tmp_path / "source", config, tensors)
    merged = files.write_folder(tmp_path / "merged", config, adapters.merged(tensors, changes, dora))
    plan = plan_slice(tiny.config.text, files.slice_of([192, 128, 256, 64, 256, 256, 128, 256], [2, 7]))
    assert_equal(open_adapted(source, plan, {str(folder): 1.0}), open_sliced(merged, plan))
    only_skipped = adapters.low_ranks(tensors, (f"{LAYERS}.2.mlp.up_proj",))
    folder = adapters.write_peft(tmp_path / "b", only_skipped)
    with pytest.raises(Error, match="changes only layers that slice 'test' skips"):
        open_adapted(source, plan, {str(folder): 1.0})


def test_a_conversion_merges_before_it_quantizes(published: Published, tiny_folder, quantized_folder, tmp_path) -> None:
    config, tensors = published
    changes = adapters.low_ranks(tensors)
    folder = adapters.write_peft(tmp_path / "a", changes)
    merged = files.write_folder(tmp_path / "merged", config, adapters.merged(tensors, changes))
    for options in ({}, {"q_bits": 4}, {"dtype": "float32"}):
        name = "-".join(options) or "plain"
        ours = convert(tiny_folder, tmp_path / f"{name} ours", adapter=folder, progress=False, **options)
        theirs = convert(merged, tmp_path / f"{name} theirs", progress=False, **options)
        found, expected = files.read_folder(ours), files.read_folder(theirs)
        assert found.keys() == expected.keys()
        for name, array in expected.items():  # products of other shapes round a few numbers to their neighbours
            if ".layers.8.self_attn.k_proj" in name:  # nothing reads it: it is left as it is
                continue
            assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
            assert np.mean(found[name] != array) < (1e-2 if array.dtype != np.float32 else 1), name
            if array.dtype != np.uint32:
                np.testing.assert_allclose(found[name].astype("f4"), array.astype("f4"), atol=1e-5, rtol=2**-7)
        assert files.read_config(ours) == files.read_config(theirs)
    with pytest.raises(Error, match=r"is quantized, so nothing can be merged into it: start from the unquantized"):
        convert(quantized_folder, tmp_path / "out", adapter=folder, progress=False)


def test_files_stay_open_as_long_as_they_are_read(published: Published, tiny_folder, tmp_path) -> None:
    folder = adapters.write_peft(tmp_path / "a", {})
    norm = "model.language_model.norm.weight"
    files.write_safetensors(folder / "adapter_model.safetensors", {norm: published[1][norm] * 2})
    whole = Checkpoint.open(tiny_folder)
    changed = whole.changed(changes_of(folder, whole))
    whole.close()
    again = changed.again()
    changed.close()
    assert np.array_equal(again.read("language_model.norm.weight"), published[1][norm] * 2)


# What can't be used.


def broken(folder: Path, change: Any) -> Path:
    """Changes the tensors of an adapter on disk."""
    path = folder / "adapter_model.safetensors"
    tensors = files.read_safetensors(path)
    change(tensors)
    files.write_safetensors(path, tensors)
    return folder


A, B = (f"base_model.model.{Q_PROJ}.lora_{part}.weight" for part in "AB")


TABLE = "base_model.model.model.language_model.embed_tokens.lora_embedding_A"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({A.replace("q_proj", "query"): t.pop(A)}), r"query.lora_A.weight belongs to no module"),
        (lambda t: t.update({A.replace("layers.0", "layers.77"): t.pop(A)}), r"layers.77.\S+ belongs to no module"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[A]}), r"no head of its own"),
        (
            lambda t: t.update({"base_model.model.model.language_model.embed_tokens.lora_embedding_A": t[A]}),
            "embedding",
        ),
        (lambda t: t.update({A.replace("lora_A.weight", "lora_B.bias"): t[B][:, 0]}), r"lora_B.bias belongs to no"),
        (lambda t: t.pop(B), r"lora_A.weight is there without the other parts"),
        (lambda t: t.update({A: t[A][:, :-1]}), r"lora_A.weight is F32\[4, 127\], expected \[128\] inputs"),
        (lambda t: t.update({B: t[B][:-1]}), r"lora_B.weight is F32\[\d+, 4\], expected \d+ outputs .* and 4 ranks"),
        (lambda t: t.update({A: t[A] * np.nan}), r"lora_A.weight holds NaN or infinity"),
        (lambda t: t.update({B: t[B] * 0}), r"the adapter changes nothing"),
        (lambda t: t.update({A: np.float32(1), B: np.float32(1)}), r"lora_A.weight is F32\[\], expected a matrix"),
        (lambda t: t.update({B: np.float32(1)}), r"lora_B.weight is F32\[\], expected a matrix"),
        (lambda t: t.update({A: t[A][:0], B: t[B][:, :0]}), r"lora_A.weight is F32\[0, 128\], expected .* one rank"),
        (lambda t: (t.pop(A), t.pop(B)), r"the adapter holds no tensors"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(published: Published, tiny_folder, tmp_path, change, message) -> None:
    folder = broken(adapters.write_peft(tmp_path / "a", adapters.low_ranks(published[1], (Q_PROJ,))), change)
    with pytest.raises(Error, match=message):
        open_adapted(tiny_folder, None, {str(folder): 1.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True, which is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base model"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', expected a number"),
        ({"use_dora": True}, "without the other parts"),
    ],
)
def test_settings_of_other_arithmetic_are_refused(published: Published, tiny_folder, tmp_path, settings, message):
    changes = adapters.low_ranks(published[1], (Q_PROJ,))
    folder = adapters.write_peft(tmp_path / "a", changes)
    raw = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(Error, match=message):
        open_adapted(tiny_folder, None, {str(folder): 1.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000.*, expected a number"),
        ({"alpha_pattern": [3]}, r"alpha_pattern is \[3\], expected an object of numbers by pattern"),
        ({"alpha_pattern": {"q_proj(": 3}}, r"alpha_pattern has 'q_proj\(', no regular expression: "),
        ({"alpha_pattern": {"q_proj": "3"}}, "lora_alpha is '3', expected a number"),
    ],
)
def test_malformed_settings_of_peft_are_one_error(published: Published, tiny_folder, tmp_path, settings, message):
    folder = adapters.write_peft(tmp_path / "a", adapters.low_ranks(published[1], (Q_PROJ,)), **settings)
    with pytest.raises(Error, match=message):
        open_adapted(tiny_folder, None, {str(folder): 1.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0, "alpha": 8}, "alpha and rank are 8 and 0, expected a number and one above 0"),
        ({"rank": "8", "alpha": 8}, "alpha and rank are 8 and '8', expected a number and one above 0"),
        ({"rank": 8, "alpha": None}, "alpha and rank are None and 8"),
        ({"lora_parameters": {"scale": float("nan")}}, "the scale of lora_parameters is nan, expected a number"),
        ({"lora_parameters": [1]}, "the scale of lora_parameters is None, expected a number"),
    ],
)
def test_malformed_settings_of_mlx_are_one_error(published: Published, tiny_folder, tmp_path, settings, message):
    folder = adapters.write_mlx(tmp_path / "a", adapters.low_ranks(published[1], (Q_PROJ,)))
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(Error, match=message):
        open_adapted(tiny_folder, None, {str(folder): 1.0})


def test_a_row_of_zeros_stays_one_under_dora(published: Published, tmp_path: Path) -> None:
    """Its norm is 0, and its magnitude was that norm before training."""
    config, tensors = published
    weight = tensors[f"{Q_PROJ}.weight"].copy()
    weight[3] = 0
    source = files.write_folder(tmp_path / "source", config, tensors | {f"{Q_PROJ}.weight": weight})
    down, up, magnitude = adapters.low_ranks(tensors, (Q_PROJ,))[Q_PROJ]
    up[3], magnitude[3] = 0, 0
    folder = adapters.write_peft(tmp_path / "a", {Q_PROJ: (down, up, magnitude)}, dora=True)
    found = open_adapted(source, None, {str(folder): 1.0}).read(f"{Q_PROJ.removeprefix('model.')}.weight")
    assert np.isfinite(found).all()
    assert not found[3].any()
    assert found[2].any()


def test_an_adapter_over_rows_that_dora_made_zero(published: Published, quantized_folder: Path, tmp_path) -> None:
    """Beside quantized weights W stays, and what is added is divided by the factor before it."""
    down, up, magnitude = adapters.low_ranks(published[1], (Q_PROJ,))[Q_PROJ]
    magnitude[5] = 0
    first = adapters.write_peft(tmp_path / "first", {Q_PROJ: (down, up, magnitude)}, dora=True)
    second = adapters.write_peft(tmp_path / "second", {Q_PROJ: (down, up, None)})
    with pytest.raises(Error, match="DoRA magnitudes are 0 where the next adapter adds something"):
        open_adapted(quantized_folder, None, {str(first): 1.0, str(second): 1.0})
    up[5] = 0
    third = adapters.write_peft(tmp_path / "third", {Q_PROJ: (down, up, None)})
    found = open_adapted(quantized_folder, None, {str(first): 1.0, str(third): 1.0})
    low_rank = found.low_ranks[Q_PROJ.removeprefix("model.")]
    assert np.isfinite(low_rank.up).all()


def test_files_are_closed_when_a_later_adapter_is_wrong(
    published: Published, tiny_folder, tmp_path, monkeypatch
) -> None:
    """Also while the error is still held, with all that its frames hold."""
    opened, closed = [], []
    before, after = Shard.__init__, Shard.close
    monkeypatch.setattr(Shard, "__init__", lambda self, path: (before(self, path), opened.append(path.name))[0])
    monkeypatch.setattr(Shard, "close", lambda self: (after(self), closed.append(self.path.name))[0])
    good = adapters.write_peft(tmp_path / "good", {})
    norm = "model.language_model.norm.weight"
    files.write_safetensors(good / "adapter_model.safetensors", {norm: published[1][norm] * 2})
    wrong = broken(adapters.write_peft(tmp_path / "b", adapters.low_ranks(published[1], (Q_PROJ,))), lambda t: t.pop(B))
    for plan in (None, plan_slice(Checkpoint.open(tiny_folder).config.text, files.slice_of([256] * 9, [9]))):
        with pytest.raises(Error, match="without the other parts") as error:
            open_adapted(tiny_folder, plan, {str(good): 1.0, str(wrong): 1.0})
        assert sorted(opened) == sorted(closed), error
        opened.clear()
        closed.clear()


def test_an_adapter_without_effect_is_an_error(published: Published, tiny: Checkpoint, tiny_folder, tmp_path) -> None:
    """Keys and values of KV-sharing layers are in trainers' files, and nothing reads them."""
    dead = f"{LAYERS}.{tiny.config.text.num_hidden_layers - 1}.self_attn.k_proj"
    folder = adapters.write_peft(tmp_path / "a", adapters.low_ranks(published[1], (dead,)))
    with pytest.raises(Error, match="adapts only keys and values of layers that share those of others"):
        open_adapted(tiny_folder, None, {str(folder): 1.0})
    folder = adapters.write_peft(tmp_path / "b", adapters.low_ranks(published[1], (dead, Q_PROJ)))
    changes = changes_of(folder, tiny)
    assert list(changes.low_ranks) == [Q_PROJ.removeprefix("model.")]


def test_a_tower_that_is_not_there_is_named(published: Published, tmp_path: Path) -> None:
    config, tensors = published
    target = "model.audio_tower.conformer.0.attention.attn.q_proj"
    folder = adapters.write_peft(tmp_path / "a", adapters.low_ranks(tensors, (target,)))
    source = files.write_folder(tmp_path / "text", *files.mlx_lm(config, tensors))
    with pytest.raises(Error, match=r"audio_tower\S+ belongs to no module of \S+: \S+ has no audio tower"):
        open_adapted(source, None, {str(folder): 1.0})


def test_weights_that_mean_nothing_are_refused(published: Published, tiny_folder, tmp_path) -> None:
    changes = adapters.low_ranks(published[1], (Q_PROJ,))
    plain = adapters.write_peft(tmp_path / "a", changes)
    dora = adapters.write_peft(tmp_path / "b", changes, dora=True)
    for weight in (0.0, float("nan")):
        with pytest.raises(Error, match="expected a number other than 0"):
            open_adapted(tiny_folder, None, {str(plain): weight})
    with pytest.raises(Error, match=r"DoRA's magnitudes are of the whole adapter: it can't be weighted by 0.5"):
        open_adapted(tiny_folder, None, {str(dora): 0.5})


def test_folders_without_an_adapter(tiny_folder: Path, published: Published, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(Error, match=r"holds no adapter: expected adapter_model.safetensors or adapters.safetensors"):
        open_adapted(tiny_folder, None, {str(empty): 1.0})
    (empty / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(Error, match="holds a pickled adapter"):
        open_adapted(tiny_folder, None, {str(empty): 1.0})
    folder = adapters.write_peft(tmp_path / "a", adapters.low_ranks(published[1], (Q_PROJ,)))
    one_file = shutil.copytree(folder, tmp_path / "b") / "adapter_model.safetensors"
    assert open_adapted(tiny_folder, None, {str(one_file): 1.0}).names
    (folder / "adapter_config.json").unlink()
    with pytest.raises(Error, match=r"has no adapter_config.json beside it"):
        open_adapted(tiny_folder, None, {str(folder): 1.0})
    with pytest.raises(Error, match=r"no adapter at './nowhere', nor is it a hub id"):
        open_adapted(tiny_folder, None, {"./nowhere": 1.0})


def test_adapters_as_they_are_given(tmp_path: Path) -> None:
    assert named_adapters(None) == {}
    assert named_adapters("a/b") == named_adapters(["a/b"]) == {"a/b": 1.0}
    assert named_adapters({"a": 0.5, "b": 2}) == {"a": 0.5, "b": 2.0}
    assert named_adapters(tmp_path) == {str(tmp_path): 1.0}
    for wrong in (3, [3], {"a": "x"}, {"a": True}):
        with pytest.raises(Error, match="adapter"):
            named_adapters(wrong)  # type: ignore[arg-type]
    (tmp_path / "a=2").mkdir()
    assert parsed_adapters([f"{tmp_path}/a=2", "b=0.5", "c/d"]) == {f"{tmp_path}/a=2": 1.0, "b": 0.5, "c/d": 1.0}
    with pytest.raises(Error, match="'much' is no weight"):
        parsed_adapters(["b=much"])
