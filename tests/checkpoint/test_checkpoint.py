"""Checkpoints of every layout, and what is said about broken ones."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_files as files
import ml_dtypes
import numpy as np
import pytest

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import Quantization, dequantize, quantize, to_float32
from g3n_mlx.matformer.plan import plan_slice
from g3n_mlx.matformer.view import open_sliced

PLE = "language_model.embed_tokens_per_layer"


def test_published_layout(tiny: Checkpoint, published: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    _, tensors = published
    assert {f"model.{name}" for name in (*tiny.names, *tiny.dead_names)} == set(tensors)
    assert {name.rpartition(".self_attn.")[2] for name in tiny.dead_names} == {
        "k_proj.weight",
        "v_proj.weight",
        "k_norm.weight",
    }
    for name in tiny.names:
        array = tiny.read(name)
        assert files.same(array, tensors[f"model.{name}"])
        assert tiny.info(name).shape == array.shape
        assert tiny.info(name).dtype == "BF16"
        assert name in tiny
    assert tiny.dead_names[0] not in tiny
    assert tiny.quantization("language_model.embed_tokens") is None


@pytest.mark.parametrize(
    ("layout", "has_media"),
    [
        (files.resaved, True),
        (files.text_only, False),
        (files.mlx_lm, False),
        (files.mlx_vlm, True),
        (files.old_vision, True),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_other_layouts_read_the_same(
    layout: Callable[..., tuple[dict[str, Any], dict[str, np.ndarray]]],
    has_media: bool,
    shards: int,
    tiny: Checkpoint,
    published: tuple[dict[str, Any], dict[str, np.ndarray]],
    tmp_path: Path,
) -> None:
    checkpoint = Checkpoint.open(files.write_folder(tmp_path / "x", *layout(*published), shards=shards))
    assert (checkpoint.config.vision is not None) == (checkpoint.config.audio is not None) == has_media
    assert checkpoint.config.text == tiny.config.text
    assert checkpoint.config.eos_token_ids == tiny.config.eos_token_ids
    text = checkpoint.raw_config["text_config"]
    assert (text["rope_theta"], text["rope_local_base_freq"]) == (1e6, 1e4)
    assert "rope_parameters" not in text
    assert (checkpoint.raw_config["model_type"], text["model_type"]) == ("gemma3n", "gemma3n_text")
    assert ("vision_config" in checkpoint.raw_config) == has_media
    expected = [name for name in tiny.names if has_media or name.startswith("language_model.")]
    assert set(checkpoint.names) == set(expected)
    for name in expected:
        stem_bias = layout is files.old_vision and name.endswith("conv_stem.conv.bias")
        wanted = np.zeros_like(tiny.read(name)) if stem_bias else tiny.read(name)
        assert files.same(checkpoint.read(name), wanted), name
        assert checkpoint.info(name).shape == wanted.shape
    checkpoint.close()


def test_old_vision_kernels_in_mlx_layout(
    tiny: Checkpoint, published: tuple[dict[str, Any], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    folder = files.write_folder(tmp_path / "x", *files.mlx_vlm(*files.old_vision(*published)))
    checkpoint = Checkpoint.open(folder)
    for name in tiny.names:
        if not name.endswith("conv_stem.conv.bias"):
            assert files.same(checkpoint.read(name), tiny.read(name)), name


def test_rows_of_turned_kernels(
    tiny: Checkpoint, published: tuple[dict[str, Any], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(files.write_folder(tmp_path / "x", *files.mlx_vlm(*published)))
    for name in ("vision_tower.timm_model.conv_stem.conv.weight",):
        assert files.same(checkpoint.read(name, 2, 5), tiny.read(name)[2:5])


@pytest.mark.parametrize("plan", [None, ([128] * 8, [1, 6])])
def test_rows_of_a_table(
    plan: tuple[list[int], list[int]] | None, tiny_folder: Path, quantized_folder: Path, tiny: Checkpoint
) -> None:
    chosen = None if plan is None else plan_slice(tiny.config.text, files.slice_of(*plan))
    ids = np.array([0, 895, 7, 7, 300], np.int32)
    for folder in (tiny_folder, quantized_folder):
        checkpoint = open_sliced(folder, chosen)
        for path in (PLE, "language_model.embed_tokens"):
            quantization = checkpoint.quantization(path)
            weight = checkpoint.read(f"{path}.weight")
            if quantization is None:
                expected = to_float32(weight)
            else:
                scales, biases = checkpoint.read(f"{path}.scales"), checkpoint.read(f"{path}.biases")
                expected = dequantize(weight, scales, biases, quantization.bits, quantization.group_size)
            table = checkpoint.rows(path)
            assert (table.num_rows, table.width) == expected.shape
            checkpoint.close()
            found = table.gather(ids)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, expected[ids])
            assert table.gather(np.array([], np.int64)).shape == (0, table.width)
            with pytest.raises(IndexError, match=f"the table has {table.num_rows} rows"):
                table.gather(np.array([table.num_rows]))
            with pytest.raises(IndexError):
                table.gather(np.array([-1]))
            checkpoint = open_sliced(folder, chosen)


RESIDENT_AFTER_GATHER = """
import sys
from pathlib import Path
import numpy as np
from g3n_mlx.checkpoint.folder import Checkpoint
def peak_bytes():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
table = Checkpoint.open(Path(sys.argv[1])).rows("language_model.embed_tokens_per_layer")
table.gather(np.arange(8))
before = peak_bytes()
ids = np.random.default_rng(0).integers(0, table.num_rows, 20_000)
for start in range(0, len(ids), 100):
    table.gather(ids[start : start + 100])
print(peak_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_gathered_rows_do_not_stay_resident(
    tmp_path: Path, published: tuple[dict[str, Any], dict[str, np.ndarray]]
) -> None:
    config, tensors = published
    text = {**config["text_config"], "vocab_size_per_layer_input": 100_000}
    name = f"model.{PLE}.weight"
    rng = np.random.default_rng(0)
    table = rng.standard_normal((100_000, 640), np.float32).astype(ml_dtypes.bfloat16)  # 128 MB
    folder = files.write_folder(tmp_path / "x", {**config, "text_config": text}, {**tensors, name: table})
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT_AFTER_GATHER, str(folder)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 48 << 20
    ids = rng.integers(0, 100_000, 1000)
    found = Checkpoint.open(folder).rows(PLE).gather(ids)
    np.testing.assert_array_equal(found, to_float32(table[ids]))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_any_module_may_be_quantized(
    bits: int, group_size: int, published: tuple[dict[str, Any], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    """mlx-vlm quantizes LAuReL, AltUp's router and the embedders as well; overrides are by either peer's path."""
    config, tensors = published
    paths = {
        "language_model.layers.0.laurel.linear_left": Quantization(bits, group_size),
        "language_model.layers.3.altup.modality_router": Quantization(bits, group_size),
        "embed_audio.embedding_projection": Quantization(8, 32),
        "language_model.layers.9.self_attn.v_proj": Quantization(6, 32),  # dead
        "language_model.layers.1.mlp.gate_proj": Quantization(6, 64),
    }
    stored = dict(tensors)
    quantized = {}
    for path, how in paths.items():
        name = f"model.{path}"
        quantized[path] = quantize(stored.pop(f"{name}.weight"), how.bits, how.group_size)
        for part, array in zip(("weight", "scales", "biases"), quantized[path], strict=True):
            stored[f"{name}.{part}"] = array
    entry = {
        "bits": bits,
        "group_size": group_size,
        "embed_audio.embedding_projection": {"bits": 8, "group_size": 32},
        "language_model.model.layers.9.self_attn.v_proj": {"bits": 6, "group_size": 32, "mode": "affine"},
        "model.language_model.layers.1.mlp.gate_proj": {"bits": 6, "group_size": None},  # mlx-lm's mixed recipes
        "model.language_model.layers.0.mlp.up_proj": False,
    }
    checkpoint = Checkpoint.open(files.write_folder(tmp_path / "x", {**config, "quantization": entry}, stored))
    for path, how in paths.items():
        assert checkpoint.quantization(path) == how
        for part, expected in zip(("weight", "scales", "biases"), quantized[path], strict=True):
            assert files.same(checkpoint.read(f"{path}.{part}"), expected)
    assert checkpoint.quantization("language_model.embed_tokens") is None
    assert "quantization" not in checkpoint.raw_config


# What is said about broken folders.


def broken(folder: Path, tiny_folder: Path) -> Path:
    shutil.copytree(tiny_folder, folder)
    return folder


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        Checkpoint.open(tmp_path)


def test_pickles_only(tmp_path: Path, tiny_folder: Path) -> None:
    folder = broken(tmp_path / "x", tiny_folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        Checkpoint.open(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors files"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("size", "message"),
    [(0, "too short"), (7, "too short"), (1000, "truncated"), (-1, "truncated"), (+1, "longer than its header")],
)
def test_file_of_a_wrong_size(size: int, message: str, tmp_path: Path, tiny_folder: Path) -> None:
    path = broken(tmp_path / "x", tiny_folder) / "model.safetensors"
    raw = path.read_bytes() + b"\0"
    path.write_bytes(raw[: size if size >= 7 or size == 0 else len(raw) - 1 + size])
    with pytest.raises(ValueError, match=rf"model\.safetensors.* {message}"):
        Checkpoint.open(path.parent)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"not json", "damaged header"),
        (b"[" * 100_000, "damaged header .*nested too deeply"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', "a given twice"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "has shape"),
        (b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}', "dtype 'F8_E4M3'"),
        (b'{"a":{"dtype":"F32","shape":"x","data_offsets":[0,4]}}', "entry for a is damaged"),
        (b'{"a":{"dtype":"F32"}}', "entry for a is damaged"),
        (b'{"a":7}', "entry for a is damaged"),
        (b"[1]", "expected an object"),
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}', "overlap or leave gaps"),
    ],
)
def test_damaged_header(header: bytes, message: str, tmp_path: Path, tiny_folder: Path) -> None:
    path = broken(tmp_path / "x", tiny_folder) / "model.safetensors"
    pointer = header.startswith(b"version")
    path.write_bytes(header if pointer else len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match=message) as raised:
        Checkpoint.open(path.parent)
    assert "model.safetensors" in str(raised.value)


def test_missing_shard(tmp_path: Path, published: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    folder = files.write_folder(tmp_path / "x", *published, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 3 weight files .*model-00002-of-00003"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "index", ["no json", "[]", "{}", "[" * 100_000, '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 3}}']
)
def test_damaged_index(index: str, tmp_path: Path, published: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    folder = files.write_folder(tmp_path / "x", *published, shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json (is not a|names)"):
        Checkpoint.open(folder)


def test_one_tensor_in_two_files(tmp_path: Path, published: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    folder = files.write_folder(tmp_path / "x", *published)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    shutil.copy(folder / "weights.safetensors", folder / "copy.safetensors")
    with pytest.raises(ValueError, match=r"is in both copy\.safetensors and weights\.safetensors"):
        Checkpoint.open(folder)
    (folder / "copy.safetensors").unlink()
    files.write_safetensors(folder / "mlx.safetensors", files.mlx_vlm(*published)[1])
    with pytest.raises(ValueError, match="two checkpoints in one folder"):
        Checkpoint.open(folder)


def test_manifest_names_all_that_is_wrong(
    tmp_path: Path, published: tuple[dict[str, Any], dict[str, np.ndarray]]
) -> None:
    config, tensors = published
    wrong = dict(tensors)
    for layer in range(10):
        del wrong[f"model.language_model.layers.{layer}.input_layernorm.weight"]
        del wrong[f"model.language_model.layers.{layer}.mlp.up_proj.weight"]
    wrong["lm_tail.weight"] = wrong["model.language_model.embed_tokens.weight"]
    wrong["model.language_model.norm.weight"] = wrong["model.language_model.norm.weight"][:-1]
    wrong["model.embed_vision.embedding.weight"] = np.zeros((128, 2048), np.uint32)
    with pytest.raises(ValueError, match="20 missing") as raised:
        Checkpoint.open(files.write_folder(tmp_path / "x", config, wrong))
    message = str(raised.value)
    assert message.count("input_layernorm") + message.count("up_proj") == 3
    assert "1 unexpected: lm_tail.weight" in message
    assert "2 misshapen" in message
    assert "language_model.norm.weight BF16[127], expected [128]" in message
    assert "embed_vision.embedding.weight U32[128, 2048]" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 256), ("head_dim", 16), ("num_attention_heads", 8), ("vocab_size", 9000), ("laurel_rank", 3)],
)
def test_one_wrong_number_is_named(
    key: str,
    value: int,
    published: tuple[dict[str, Any], dict[str, np.ndarray]],
    quantized_folder: Path,
    tmp_path: Path,
) -> None:
    config, tensors = published
    right = config["text_config"][key]
    assert right != value
    wrong = {**config, "text_config": {**config["text_config"], key: value}}
    stored = {"dense": tensors, "quantized": files.read_folder(quantized_folder)}
    for name, held in stored.items():
        with pytest.raises(ValueError, match=f"{key} is {value}, the tensors fit {right}") as raised:
            Checkpoint.open(files.write_folder(tmp_path / name, wrong, held))
        assert len(str(raised.value)) < 700


def test_two_wrong_numbers_are_not_explained_by_one(
    published: tuple[dict[str, Any], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    config, tensors = published
    wrong = {**config, "text_config": {**config["text_config"], "hidden_size": 256, "laurel_rank": 3}}
    with pytest.raises(ValueError, match="misshapen: language_model") as raised:
        Checkpoint.open(files.write_folder(tmp_path / "x", wrong, tensors))
    assert "the tensors fit" not in str(raised.value)


def test_tower_without_its_embedder(tmp_path: Path, published: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    config, tensors = published
    left = {name: array for name, array in tensors.items() if "embed_audio" not in name}
    with pytest.raises(ValueError, match=r"4 missing: embed_audio\.embedding\.weight"):
        Checkpoint.open(files.write_folder(tmp_path / "x", config, left))
    config = {key: value for key, value in config.items() if key != "audio_config"}
    with pytest.raises(ValueError, match=r"unexpected: audio_tower"):
        Checkpoint.open(files.write_folder(tmp_path / "y", config, left))


def test_quantized_tensors_that_do_not_fit(quantized_folder: Path, tmp_path: Path) -> None:
    config, tensors = files.read_config(quantized_folder), files.read_folder(quantized_folder)
    path = "model.language_model.layers.0.mlp.up_proj"
    missing = {name: array for name, array in tensors.items() if name != f"{path}.biases"}
    with pytest.raises(ValueError, match=r"1 missing: language_model\.layers\.0\.mlp\.up_proj\.biases"):
        Checkpoint.open(files.write_folder(tmp_path / "a", config, missing))
    odd = tensors | {f"{path}.weight": tensors[f"{path}.weight"][:, :-1]}
    with pytest.raises(ValueError, match=r"1 misshapen: .*up_proj\.weight U32\[256, 15\] with scales BF16\[256, 2\]"):
        Checkpoint.open(files.write_folder(tmp_path / "b", config, odd))
    lying = json.loads(json.dumps(config))
    lying["quantization"]["bits"] = 5
    with pytest.raises(ValueError, match=r"declared as Quantization\(bits=5.*tensors say Quantization\(bits=4"):
        Checkpoint.open(files.write_folder(tmp_path / "c", lying, tensors))
    silent = {key: value for key, value in config.items() if not key.startswith("quantization")}
    assert Checkpoint.open(files.write_folder(tmp_path / "d", silent, tensors)).quantizations


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized by 'bitsandbytes'"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "mode is 'mxfp4'"),
        ({"bits": 7, "group_size": 64}, "7 bits"),
    ],
)
def test_other_quantizations_are_refused(
    entry: dict[str, Any], message: str, tmp_path: Path, published: tuple[dict[str, Any], dict[str, np.ndarray]]
) -> None:
    config, tensors = published
    folder = files.write_folder(tmp_path / "x", {**config, "quantization_config": entry}, tensors)
    with pytest.raises(ValueError, match=message):
        Checkpoint.open(folder)


def test_kernels_of_two_layouts(tmp_path: Path, published: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    config, tensors = published
    mixed = dict(tensors)
    name = "model.vision_tower.timm_model.blocks.0.0.conv_exp.weight"
    mixed[name] = np.ascontiguousarray(mixed[name].transpose(0, 2, 3, 1))
    with pytest.raises(ValueError, match="kernels in different layouts"):
        Checkpoint.open(files.write_folder(tmp_path / "x", config, mixed))


def test_towers_are_checked_too(tmp_path: Path, published: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    """Missing and misshapen is refused; what nobody reads is not, since later files may carry more."""
    config, tensors = published
    kernel = "model.vision_tower.timm_model.blocks.0.0.conv_exp.weight"
    linear = "model.audio_tower.conformer.0.attention.post.weight"
    broken = {name: array for name, array in tensors.items() if name != linear}
    broken[kernel] = broken[kernel][:-1]
    with pytest.raises(ValueError, match="does not hold the tensors") as raised:
        Checkpoint.open(files.write_folder(tmp_path / "broken", config, broken))
    assert f"1 missing: {linear.removeprefix('model.')}; 1 misshapen: {kernel.removeprefix('model.')}" in str(
        raised.value
    )
    more = {**tensors, "model.audio_tower.conformer.0.attention.attn.softcap": np.ones(1, np.float32)}
    checkpoint = Checkpoint.open(files.write_folder(tmp_path / "more", config, more))
    assert linear.removeprefix("model.") in checkpoint
