"""`load`: backends and devices, layouts, slices and quantization on the way, and errors in one sentence."""

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import checkpoint_files as files
import numpy as np
import pytest
from devices import device_for

from g3n_mlx import load
from g3n_mlx.convert import convert
from g3n_mlx.failures import Error
from g3n_mlx.installation import install_command
from g3n_mlx.loading import chosen_backend

TABLE_HEAD = "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"


@pytest.fixture
def open_model(backend):
    """open_model(folder, ...): load in float32 on the CPU, by the backend under test."""

    def opened(folder, **options):
        return load(folder, backend=backend, device=device_for(backend), **{"dtype": "float32", **options})

    return opened


@pytest.fixture
def ids(golden_arrays):
    return golden_arrays("text_logits")["input_ids"][0].tolist()


# Slices.


@pytest.fixture(scope="module")
def table(golden_json, tmp_path_factory):
    """The goldens' slices as a table of the user's own."""
    lines = [TABLE_HEAD]
    for name, case in golden_json("matformer").items():
        widths, skipped = case["slice"]["intermediate_size"], case["slice"]["skipped_layers"]
        lines.append(f'Config for {name},{len(widths)},,,"{widths}","{skipped or ""}"\n')
    path = tmp_path_factory.mktemp("slices") / "own.csv"
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("name", ["half_width", "skip_shared", "mixed"])
def test_matformer_goldens_at_load(open_model, tiny_folder, table, golden_arrays, name):
    golden = golden_arrays("matformer")
    model = open_model(tiny_folder, matformer=f"Config for {name}", matformer_config=table)
    assert model.slice_name == f"Config for {name}"
    ids = golden[f"{name}.input_ids"][0].tolist()
    np.testing.assert_allclose(model.logits(ids), golden[f"{name}.logits"][0], rtol=0, atol=1e-4)
    near = np.nonzero(golden[f"{name}.margins"] < 1e-3)[0]
    count = int(near[0]) if len(near) else len(golden[f"{name}.tokens"])
    tokens = model.generate(ids, temperature=0, ignore_eos=True, max_tokens=count).token_ids
    assert list(tokens) == golden[f"{name}.tokens"][:count].tolist()


@pytest.mark.parametrize("q_bits", [None, 4, 8])
def test_a_slice_at_load_is_the_slice_that_a_conversion_writes(open_model, tiny_folder, table, tmp_path, ids, q_bits):
    source = tiny_folder
    if q_bits is not None:
        source = convert(tiny_folder, tmp_path / "whole", q_bits=q_bits, progress=False)
    options = {"matformer": "Config for mixed", "matformer_config": table}
    written = convert(source, tmp_path / "slice", progress=False, **options)
    at_load = open_model(source, **options)
    np.testing.assert_array_equal(at_load.logits(ids), open_model(written).logits(ids))
    assert at_load.config == open_model(written).config


def test_an_unknown_slice_names_the_nearest(open_model, tiny_folder, table):
    with pytest.raises(ValueError, match="Config for mixed"):
        open_model(tiny_folder, matformer="Config for mixd", matformer_config=table)


def test_a_slice_of_another_base_model(open_model, tiny_folder):
    with pytest.raises(ValueError, match="10"):
        open_model(tiny_folder, matformer="e2b")


def test_a_table_without_a_slice(open_model, tiny_folder, table):
    with pytest.raises(ValueError, match="matformer_config was given without matformer"):
        open_model(tiny_folder, matformer_config=table)


# In-situ quantization.


def test_q_bits_converts_once(open_model, tiny_folder, cache_folder, tmp_path, ids):
    model = open_model(tiny_folder, q_bits=4)
    (made,) = (cache_folder / "conversions").glob(f"{tiny_folder.name}-4bit-*")
    written = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    again = open_model(tiny_folder, q_bits=4)
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == written
    assert model.checkpoint.folder == again.checkpoint.folder == made
    assert model.name == tiny_folder.name
    by_hand = convert(tiny_folder, tmp_path / "by_hand", q_bits=4, progress=False)
    expected = open_model(by_hand).logits(ids)
    np.testing.assert_array_equal(model.logits(ids), expected)
    np.testing.assert_array_equal(again.logits(ids), expected)


def test_q_bits_of_a_slice(open_model, tiny_folder, cache_folder, table, tmp_path, ids):
    options = {"matformer": "Config for mixed", "matformer_config": table}
    model = open_model(tiny_folder, q_bits=8, **options)
    assert model.slice_name == "Config for mixed"
    whole = convert(tiny_folder, tmp_path / "whole", q_bits=8, progress=False)
    np.testing.assert_array_equal(model.logits(ids), open_model(whole, **options).logits(ids))


def test_q_bits_of_a_quantized_checkpoint(open_model, tiny_folder, cache_folder, tmp_path):
    quantized = convert(tiny_folder, tmp_path / "quantized", q_bits=4, progress=False)
    with pytest.raises(ValueError, match="quantized already"):
        open_model(quantized, q_bits=3)
    assert not list(cache_folder.glob("conversions/*/config.json"))


def test_bits_that_do_not_exist(open_model, tiny_folder, cache_folder):
    with pytest.raises(ValueError, match="7 bits"):
        open_model(tiny_folder, q_bits=7)


# Layouts.


@pytest.fixture(scope="module")
def published(tiny_folder):
    return files.read_config(tiny_folder), files.read_folder(tiny_folder)


@pytest.mark.parametrize("layout", ["text_only", "resaved", "mlx_lm", "mlx_vlm", "old_vision"])
def test_every_layout_gives_the_goldens(open_model, tiny_folder, published, tmp_path, golden_arrays, layout):
    golden = golden_arrays("text_logits")
    config, tensors = getattr(files, layout)(*published)
    folder = files.write_folder(tmp_path / layout, config, tensors, shards=2)
    files.copy_sidecars(tiny_folder, folder)
    model = open_model(folder)
    ids = golden["input_ids"][0].tolist()
    np.testing.assert_allclose(model.logits(ids), golden["logits"][0], rtol=0, atol=1e-4)
    media = golden["media_token_input_ids"][0].tolist()
    logits = model.logits(media)
    if layout in ("text_only", "mlx_lm"):
        # No embedders: ids of images and sounds are rows of the token table, as in Gemma3nForCausalLM.
        assert model.config.vision is None
        assert np.abs(logits - golden["media_token_logits"][0]).max() > 0.1
        rows = tensors[
            "model.embed_tokens.weight" if layout == "text_only" else "model.language_model.embed_tokens.weight"
        ]
        media_id = next(token for token in media if token >= 896)
        embedded = model.runner.model.embed(np.array([media_id]))
        expected = rows[media_id].astype(np.float32) * np.sqrt(np.float32(rows.shape[1]))
        np.testing.assert_allclose(np.asarray(embedded)[0], expected, rtol=1e-6)
    else:
        np.testing.assert_allclose(logits, golden["media_token_logits"][0], rtol=0, atol=1e-4)
    assert len(model.generate("Hello", max_tokens=3, ignore_eos=True).token_ids) == 3


def test_a_folder_without_a_generation_config(open_model, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    model = open_model(folder)
    assert model.sampling_defaults == {}
    assert model.eos_token_ids == {1, 106}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": "x"}, "eos_token_id is 'x', expected token ids from 0 to 1151"),
        ({"eos_token_id": [1, 10**9]}, r"eos_token_id is \[1, 1000000000\], expected token ids"),
        ({"temperature": "warm"}, "temperature is 'warm', expected a number"),
        ({"top_p": 10**400}, "top_p is 1000"),
    ],
)
def test_a_generation_config_with_a_wrong_value(open_model, tiny_folder, tmp_path, changes, message):
    folder = shutil.copytree(tiny_folder, tmp_path / "x")
    (folder / "generation_config.json").write_text(json.dumps(changes))
    with pytest.raises(Error, match=f"generation_config.json: {message}"):
        open_model(folder)


def test_a_generation_config_without_an_end(open_model, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": None}))
    model = open_model(folder)
    assert model.sampling_defaults == {"temperature": 0.0}
    assert model.eos_token_ids == {1, 106}


def test_one_end_as_a_number(open_model, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert open_model(folder).eos_token_ids == {7}


def test_ends_that_no_file_names_are_those_of_the_tokenizer(open_model, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = files.read_config(folder)
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_model(folder).eos_token_ids == {1, 106}  # <eos> and <end_of_turn>


# What was loaded, and where.


def test_what_a_model_says_of_itself(open_model, backend, tiny_folder):
    model = open_model(tiny_folder)
    assert (model.backend, model.device, model.name, model.slice_name) == (backend, "cpu", tiny_folder.name, None)


def test_bfloat16_by_default_and_by_name(open_model, tiny_folder, golden_arrays, golden_json):
    golden, allowed = golden_arrays("text_logits"), golden_json("noise")["text_logits.logits"]["bfloat16"]
    ids = golden["input_ids"][0].tolist()
    default, named = (open_model(tiny_folder, dtype=dtype).logits(ids) for dtype in (None, "bfloat16"))
    np.testing.assert_array_equal(default, named)
    error = np.abs(default - golden["logits"][0]).max()
    assert 1e-3 < error <= 1.5 * allowed


@pytest.mark.parametrize("device", ["mps", "gpu", "tpu", "cuda:one", "cpu:0", ""])
def test_devices_that_are_not_supported(backend, tiny_folder, device):
    with pytest.raises(
        ValueError, match=f"device {device!r} is not supported by the {backend} backend: expected 'cpu'"
    ):
        load(tiny_folder, backend=backend, device=device)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:77"])
def test_a_cuda_device_that_is_not_there(backend, tiny_folder, device, monkeypatch):
    if backend == "torch":
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    else:
        import mlx.core as mx

        monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device {device!r}: .* sees 0 CUDA devices here; use device 'cpu'"):
        load(tiny_folder, backend=backend, device=device)


@pytest.mark.parametrize("dtype", ["float16", "int8", "bf16"])
def test_dtypes_that_are_not_supported(open_model, tiny_folder, dtype):
    with pytest.raises(ValueError, match=f"dtype {dtype!r} is not supported: expected one of"):
        open_model(tiny_folder, dtype=dtype)


def test_a_backend_that_does_not_exist(tiny_folder):
    with pytest.raises(ValueError, match="backend 'jax' does not exist: expected 'auto', 'mlx' or 'torch'"):
        load(tiny_folder, backend="jax")


@pytest.fixture
def installed(monkeypatch):
    """installed("torch"): as if these backends were installed, and no others."""

    def only(*names):
        for name, modules in (("mlx", ("mlx", "mlx.core")), ("torch", ("torch",))):
            for module in modules:
                present = SimpleNamespace(__spec__=SimpleNamespace(name=module), __path__=[])
                monkeypatch.setitem(sys.modules, module, present if name in names else None)

    return only


def test_auto_takes_what_is_there(installed, monkeypatch):
    installed("mlx")
    assert chosen_backend("auto") == "mlx"
    installed("torch")
    assert chosen_backend("auto") == "torch"
    installed("mlx", "torch")
    for system, machine, expected in (
        ("darwin", "arm64", "mlx"),
        ("darwin", "x86_64", "torch"),
        ("linux", "arm64", "torch"),
    ):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert chosen_backend("auto") == expected


def test_a_backend_that_is_not_installed(installed):
    installed("mlx")
    with pytest.raises(ImportError, match=re.escape(f"the torch backend is not installed: {install_command('torch')}")):
        chosen_backend("torch")


def test_no_backend_at_all(tiny_folder):
    code = (
        "import sys\nsys.modules['torch'] = sys.modules['mlx'] = None\nfrom g3n_mlx import load\n"
        "try:\n    load(sys.argv[1])\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, os.fspath(tiny_folder)], capture_output=True, text=True, timeout=300, check=True
    )
    preferred = "mlx" if (sys.platform, platform.machine()) == ("darwin", "arm64") else "torch"
    assert done.stdout == f"neither MLX nor PyTorch is installed: {install_command(preferred)}\n"


def test_a_folder_that_is_no_model(open_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        open_model(tmp_path)


def test_devices_and_dtypes_have_the_names_that_users_write(backend):
    device = importlib.import_module(f"g3n_mlx.backends.{backend}.device")
    assert device.name(device.device_of("cpu")) == "cpu"
    if backend == "torch":
        torch = importlib.import_module("torch")
        assert [device.name(torch.device(name)) for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    else:
        mx = importlib.import_module("mlx.core")
        assert device.name(mx.Device(mx.gpu, 0)) == "gpu"
    for name in ("bfloat16", "float32"):
        assert device.dtype_name(device.dtype_of(name, device.device_of("cpu"), False)) == name


# What only a Mac runs, with the questions about the device answered by the test.


def test_claim_on_metal(monkeypatch):
    mx = pytest.importorskip("mlx.core")
    from g3n_mlx.backends.mlx import device

    calls = []
    monkeypatch.setattr(mx, "set_default_device", lambda device: calls.append(("default", device)))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda *device: {"max_recommended_working_set_size": 8 << 30})
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: calls.append(("wired", limit)))
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: calls.append(("cache", limit)))
    gpu = mx.Device(mx.gpu, 0)
    device.claim(gpu)
    assert calls == [("default", gpu), ("wired", 8 << 30), ("cache", 1 << 30)]
    calls.clear()
    device.claim(mx.Device(mx.cpu, 0))
    assert [name for name, _ in calls] == ["default"]


def test_a_model_that_nearly_fills_the_gpus_memory_is_a_warning(monkeypatch, caplog):
    mx = pytest.importorskip("mlx.core")
    from g3n_mlx.backends.mlx import device

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda *device: {"max_recommended_working_set_size": 10 << 30})
    monkeypatch.setattr(mx, "get_active_memory", lambda: 1 << 30)
    for name in ("set_default_device", "set_wired_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda value: None)
    device.claim(mx.Device(mx.gpu, 0), 8 << 30)
    assert caplog.text == ""
    device.claim(mx.Device(mx.gpu, 0), (8 << 30) + 1)
    assert "the weights take 9.66 GB of the 10.7 GB" in caplog.text


def test_one_models_device_is_not_the_next_ones_default(monkeypatch, tiny_folder):
    mx = pytest.importorskip("mlx.core")
    from g3n_mlx.backends.mlx import device

    found = []
    monkeypatch.setattr(mx, "set_default_device", found.append)
    model = load(tiny_folder, backend="mlx", device="cpu")
    loading = len(found)
    model.logits([2, 5, 7])
    assert len(found) > loading  # asked for anew at each call: a model on another device may have run before
    monkeypatch.setattr(mx, "default_device", lambda: "what that load has set")
    assert device.device_of(None) == device.DEFAULT
    assert found == [mx.Device(mx.cpu, 0)] * len(found) != []


def test_defaults_on_metal(monkeypatch):
    mx = pytest.importorskip("mlx.core")
    from g3n_mlx.backends.mlx import device

    gpu = mx.Device(mx.gpu, 0)
    monkeypatch.setattr(device, "DEFAULT", gpu)
    assert device.device_of(None) == gpu
    assert device.dtype_of(None, gpu, True) == device.dtype_of(None, gpu, False) == mx.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path_or_id": 5}, "the model is 5, expected a folder or a hub id"),
        ({"path_or_id": ""}, "the model is '', expected a folder or a hub id"),
        ({"device": 3}, "device is 3, expected a string"),
        ({"matformer": 2}, "matformer is 2, expected a string"),
    ],
)
def test_arguments_of_a_wrong_kind_are_named(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load(**{"path_or_id": "demo", **options})


@pytest.mark.parametrize("special", [False, True])
def test_a_token_beyond_the_embeddings(open_model, tiny_folder, tmp_path, special):
    """A user's text becomes an ordinary token, and never a control token."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "tokenizer.json"
    stored, vocab_size = json.loads(path.read_text()), files.read_config(folder)["text_config"]["vocab_size"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    stored["added_tokens"].append({"id": vocab_size, "content": "<extra>", "special": special, **flags})
    path.write_text(json.dumps(stored))
    if special:
        assert open_model(folder).generate("a <extra> b", max_tokens=1).usage.completion_tokens == 1
        return
    with pytest.raises(Error, match=rf"the token '<extra>' has the id {vocab_size}, but the model's vocab_size is"):
        open_model(folder)
