"""Checkpoints as trainers write them: heads, adapters, wrappers' names, MatFormer Lab's slices."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import checkpoint_files as files
import numpy as np
import pytest

from g3n_mlx import load
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.convert import convert
from g3n_mlx.failures import Error
from g3n_mlx.matformer.plan import plan_slice
from g3n_mlx.matformer.view import open_sliced

Published = tuple[dict[str, Any], dict[str, np.ndarray]]
EMBEDDING = "model.language_model.embed_tokens.weight"
LORA = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


def contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: checkpoint.read(name).tobytes() for name in checkpoint.names}


# A head beside the embedding.


@pytest.mark.parametrize("layout", [lambda *published: published, files.resaved, files.text_only, files.mlx_vlm])
@pytest.mark.parametrize("head", ["lm_head", "model.lm_head", "language_model.lm_head", "model.language_model.lm_head"])
def test_a_head_equal_to_the_embedding_is_left_out(published: Published, tmp_path: Path, layout, head) -> None:
    config, tensors = layout(*published)
    plain = Checkpoint.open(files.write_folder(tmp_path / "plain", config, tensors))
    for dtype in (np.float32, published[1][EMBEDDING].dtype):
        beside = {**tensors, f"{head}.weight": published[1][EMBEDDING].astype(dtype)}
        found = Checkpoint.open(files.write_folder(tmp_path / "x", config, beside))
        assert contents(found) == contents(plain)


def test_a_quantized_head_equal_to_the_embedding_is_left_out(quantized_folder: Path, tmp_path: Path) -> None:
    tensors = files.read_folder(quantized_folder)
    parts = ("weight", "scales", "biases")
    heads = {f"lm_head.{part}": tensors[EMBEDDING.replace("weight", part)] for part in parts}
    config = files.read_config(quantized_folder)
    found = Checkpoint.open(files.write_folder(tmp_path / "x", config, {**tensors, **heads}))
    assert contents(found) == contents(Checkpoint.open(quantized_folder))
    heads["lm_head.scales"] = heads["lm_head.scales"] * 2
    with pytest.raises(Error, match="differs from the token embedding"):
        Checkpoint.open(files.write_folder(tmp_path / "y", config, {**tensors, **heads}))


def test_a_head_alone_is_the_embedding(published: Published, tiny: Checkpoint, tmp_path: Path) -> None:
    """As safetensors' `save_model` leaves it of two names for one tensor."""
    config, tensors = published
    renamed = {"lm_head.weight" if name == EMBEDDING else name: array for name, array in tensors.items()}
    assert contents(Checkpoint.open(files.write_folder(tmp_path / "x", config, renamed))) == contents(tiny)


@pytest.mark.parametrize("change", [lambda head: head + 1, lambda head: head[:-1], lambda head: head.astype("f2") * 2])
def test_another_head_is_refused(published: Published, tmp_path: Path, change) -> None:
    config, tensors = published
    folder = files.write_folder(tmp_path / "x", config, {**tensors, "lm_head.weight": change(tensors[EMBEDDING])})
    with pytest.raises(Error, match=r"a head \(lm_head.weight\) that differs from the token embedding"):
        Checkpoint.open(folder)
    with pytest.raises(Error, match="differs from the token embedding"):
        convert(folder, tmp_path / "out", progress=False)


# MatFormer Lab.


def slice_like_the_lab(published: Published, skip: list[int], widths: list[int]) -> Published:
    """As Google's notebook writes it: layer_types keeps its length, the pattern has integers."""
    config = json.loads(json.dumps(published[0]))
    text = config["text_config"]
    layers, owners = text["num_hidden_layers"], text["num_hidden_layers"] - text["num_kv_shared_layers"]
    kept = [index for index in range(layers) if index not in skip]
    pattern = [text["activation_sparsity_pattern"][index] or 0 for index in kept]
    text.update(num_kv_shared_layers=text["num_kv_shared_layers"] - sum(index >= owners for index in skip))
    text.update(activation_sparsity_pattern=pattern, num_hidden_layers=len(kept), intermediate_size=widths)
    tensors = {}
    for name, array in published[1].items():
        parts = name.split(".")
        if parts[:3] == ["model", "language_model", "layers"]:
            if int(parts[3]) in skip:
                continue
            new = kept.index(int(parts[3]))
            name = ".".join([*parts[:3], str(new), *parts[4:]])
            if parts[-2] in ("gate_proj", "up_proj"):
                array = array[: widths[new]]
            elif parts[-2] == "down_proj":
                array = array[:, : widths[new]]
        elif "per_layer_model_projection" in name:
            array = array.reshape(layers, -1, array.shape[1])[kept].reshape(-1, array.shape[1])
        elif "embed_tokens_per_layer" in name:
            array = array.reshape(len(array), layers, -1)[:, kept].reshape(len(array), -1)
        tensors[name] = np.ascontiguousarray(array)
    return config, tensors


@pytest.mark.parametrize(
    ("skip", "widths"), [([], [128] * 5 + [256] * 5), ([5, 6, 7, 8, 9], [128] * 5), ([9], [256] * 9)]
)
def test_what_the_lab_exports_is_our_own_slice(
    published: Published, tiny: Checkpoint, tiny_folder: Path, tmp_path: Path, backends: list[str], skip, widths
) -> None:
    folder = files.write_folder(tmp_path / "lab", *slice_like_the_lab(published, skip, widths))
    shutil.copy(tiny_folder / "tokenizer.json", folder)
    found = Checkpoint.open(folder)
    plan = plan_slice(tiny.config.text, files.slice_of(widths, skip))
    expected = open_sliced(tiny_folder, plan)
    assert contents(found) == contents(expected)
    assert found.config == expected.config
    written = convert(folder, tmp_path / "out", progress=False)
    assert files.read_config(written)["text_config"]["layer_types"] == list(found.config.text.layer_types)
    for backend in backends:
        model = load(folder, backend=backend)
        assert model.generate("Hello", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2
        with pytest.raises(Error, match=r"no preprocessor_config.json.*copy it from the model"):
            model.generate([{"role": "user", "content": [{"type": "image", "image": np.zeros((8, 8, 3), np.uint8)}]}])


# Adapters.


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_model-00001-of-00002.safetensors", "0000100_adapters.safetensors"]
)
def test_an_adapter_beside_merged_weights_is_said_and_not_read(
    published: Published, tiny: Checkpoint, tmp_path: Path, caplog, name
) -> None:
    for shards in (1, 3):
        folder = files.write_folder(tmp_path / str(shards), *published, shards=shards)
        files.write_safetensors(folder / name, {LORA: np.ones((8, 128), np.float32)})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert contents(Checkpoint.open(folder)) == contents(tiny)
        (folder / "adapter_config.json").write_text("{}")  # with which transformers would look for an adapter
        assert not (convert(folder, tmp_path / f"{shards} out", progress=False) / "adapter_config.json").exists()
        assert [record.message for record in caplog.records][:1] == [
            f"{folder}: {name} not read: LoRA adapters are not applied"
        ]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapters.safetensors"])
@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_alone_is_called_one(tiny_folder: Path, tmp_path: Path, name, with_config) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    files.write_safetensors(folder / name, {LORA: np.ones((8, 128), np.float32)})
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "g/e2b"}')
    if with_config:
        shutil.copy(tiny_folder / "config.json", folder)
    called = r"LoRA adapter, .* give its base model 'g/e2b' as the model, and this folder as --adapter"
    with pytest.raises(Error, match=called):
        load(folder)
    with pytest.raises(Error, match=called):
        convert(folder, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "name",
    [
        LORA,
        "base_model.model.model.language_model.norm.weight",
        "model.language_model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.language_model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight",
        "model.language_model.layers.0.mlp.up_proj.lora_a",
    ],
)
def test_names_of_peft_are_said_to_be(published: Published, tmp_path: Path, name) -> None:
    config, tensors = published
    folder = files.write_folder(tmp_path / "x", config, {**tensors, name: np.ones((8, 128), np.float32)})
    with pytest.raises(Error, match=rf"tensors of a PEFT model \({name}\): merge its LoRA adapter"):
        Checkpoint.open(folder)


# Other files and names.


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
        lambda name: name.replace(".layers.", "._fsdp_wrapped_module.layers."),
    ],
)
def test_names_of_wrappers_are_left_out(published: Published, tiny: Checkpoint, tmp_path: Path, wrapped) -> None:
    config, tensors = published
    renamed = {wrapped(name): array for name, array in tensors.items()}
    assert contents(Checkpoint.open(files.write_folder(tmp_path / "x", config, renamed))) == contents(tiny)


def test_buffers_are_left_out(published: Published, tiny: Checkpoint, tmp_path: Path) -> None:
    config, tensors = published
    buffers = ("rotary_emb.inv_freq", "rotary_emb_local.original_inv_freq", "embed_tokens.embed_scale")
    more = {f"model.language_model.{name}": np.ones(4, np.float32) for name in buffers}
    assert contents(Checkpoint.open(files.write_folder(tmp_path / "x", config, {**tensors, **more}))) == contents(tiny)


def test_a_whole_file_goes_before_what_is_left_of_parts(
    published: Published, tiny: Checkpoint, tmp_path: Path, caplog
) -> None:
    config, tensors = published
    folder = files.write_folder(tmp_path / "x", config, tensors)
    stale = {name: array * 0 for name, array in tensors.items()}
    files.write_safetensors(folder / "model-00001-of-00001.safetensors", stale)
    assert contents(Checkpoint.open(folder)) == contents(tiny)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    assert contents(Checkpoint.open(folder)) == contents(tiny)
    assert "both model.safetensors and model.safetensors.index.json are there" in caplog.text
    (folder / "model-00001-of-00001.safetensors").unlink()  # an index without its parts
    assert contents(Checkpoint.open(folder)) == contents(tiny)


def test_other_files_than_the_models_are_said(published: Published, tiny: Checkpoint, tmp_path: Path, caplog) -> None:
    folder = files.write_folder(tmp_path / "x", *published, shards=2)
    files.write_safetensors(folder / "optimizer.safetensors", {"step": np.ones(1, np.float32)})
    (folder / "model.safetensors.index.json").unlink()
    assert contents(Checkpoint.open(folder)) == contents(tiny)
    assert "optimizer.safetensors not read: not the model's" in caplog.text


def test_a_folder_of_checkpoints_names_them(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("checkpoint-100", "checkpoint-200"):
        shutil.copytree(tiny_folder, tmp_path / name)
    with pytest.raises(Error, match=r"its folders checkpoint-100, checkpoint-200 have one"):
        Checkpoint.open(tmp_path)


def test_an_enlarged_vocabulary(published: Published, tiny_folder: Path, tmp_path: Path, backend: str) -> None:
    """Rows behind the audio range are text; clips are filled up with the range's last id, as before."""
    config, tensors = published
    text = {**config["text_config"], "vocab_size": 1160}
    rows = np.concatenate([tensors[EMBEDDING], tensors[EMBEDDING][:8]])
    folder = files.write_folder(tmp_path / "x", {**config, "text_config": text}, {**tensors, EMBEDDING: rows})
    files.copy_sidecars(tiny_folder, folder)
    found, plain = (load(place, backend=backend, dtype="float32") for place in (folder, tiny_folder))
    assert found.config.embedder_of(1151) == "embed_audio"
    assert found.config.embedder_of(1152) is None
    assert np.isfinite(found.logits([2, 1155, 5])).all()
    np.testing.assert_array_equal(found.logits([2, 5])[:, :1152], plain.logits([2, 5]))
    sound = np.zeros(1600, np.float32)
    np.testing.assert_array_equal(found.encode_audio(sound, 16_000), plain.encode_audio(sound, 16_000))
