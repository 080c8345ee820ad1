"""Second moments of what modules multiply: right, the same in both backends, and resumable."""

import importlib
import json
import shutil
from pathlib import Path

import adapter_files
import checkpoint_files
import numpy as np
import pytest
from PIL import Image

from g3n_mlx import calibration, load
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.recipe import is_quantized_module
from g3n_mlx.convert.__main__ import main
from g3n_mlx.failures import Error

FIRST = "language_model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "some.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    return path


def read(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in folder.iterdir():
        with np.load(path) as stored:
            found[path.stem] = np.concatenate([stored[name].reshape(-1) for name in sorted(stored.files)])
    return found


def test_both_backends_measure_the_same(tiny_folder, text, backends, tmp_path, monkeypatch) -> None:
    measured = []
    for backend in backends:
        monkeypatch.setattr(calibration, "cache_folder", lambda backend=backend: tmp_path / backend)
        model = load(tiny_folder, backend=backend, dtype="float32", device="cpu")
        before = model.logits([2, 3, 4, 5])
        measured.append(read(calibration.measure(model, text, progress=False)))
        assert np.array_equal(model.logits([2, 3, 4, 5]), before)  # the layers are back in their places
        assert type(model.runner.model.language_model.layers[0].self_attn.q_proj).__name__ != "Recorder"
    wanted = {
        name.removesuffix(".weight")
        for name in Checkpoint.open(tiny_folder).names
        if is_quantized_module(name.removesuffix(".weight")) and "embed_tokens" not in name
    }
    assert measured[0].keys() == wanted
    for name, values in measured[0].items():
        for other in measured[1:]:
            np.testing.assert_allclose(other[name], values, atol=1e-3 * np.abs(values).max(), err_msg=name)


def test_moments_are_those_of_the_inputs(tiny_folder, text, backend) -> None:
    """Of the first layer's queries, whose inputs follow from the embeddings alone."""
    model = load(tiny_folder, backend=backend, dtype="float32", device="cpu")
    folder = calibration.measure(model, text, progress=False)
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text.read_text())]
    network = model.runner.model.language_model

    def inputs() -> np.ndarray:
        arrays = importlib.import_module({"torch": "torch", "mlx": "mlx.core"}[backend])
        given = arrays.tensor(ids) if backend == "torch" else arrays.array(ids)
        streams = network.start(network.embed(given), np.arange(len(ids), dtype=np.int32)).streams
        layer = network.layers[0]
        return model.runner.model.numpy(layer.input_layernorm(layer.altup.predict(streams)[:, layer.active_idx]))

    x = model.runner.call(inputs)
    found = read(folder)[FIRST].reshape(x.shape[1], -1)
    np.testing.assert_allclose(found, x.T @ x / len(x), atol=1e-4)


def test_wide_inputs_are_measured_in_blocks_and_calls(tiny_folder, text, backend, tmp_path, monkeypatch) -> None:
    model = load(tiny_folder, backend=backend, dtype="float32", device="cpu")
    whole = calibration.measure(model, text, progress=False)
    monkeypatch.setattr(calibration, "BLOCK_WIDTH", 64)
    monkeypatch.setattr(calibration, "_CALL_TOKENS", 40)
    parts = calibration.measure(model, text, progress=False)
    assert parts != whole
    name = "language_model.layers.1.mlp.down_proj"
    with np.load(whole / f"{name}.npz") as one, np.load(parts / f"{name}.npz") as many:
        assert one["0000"].shape == (256, 256)
        for number, block in enumerate(sorted(many.files)):
            columns = slice(64 * number, 64 * number + 64)
            np.testing.assert_allclose(many[block], one["0000"][columns, columns], rtol=1e-4, atol=1e-5)


def test_a_calibration_goes_on_where_it_stopped(tiny_folder, text, backend, monkeypatch) -> None:
    model = load(tiny_folder, backend=backend, dtype="float32", device="cpu")
    folder = calibration.measure(model, text, progress=False)
    kept = folder / f"{FIRST}.npz"
    removed = folder / "language_model.layers.2.mlp.up_proj.npz"
    before, written = removed.read_bytes(), kept.stat().st_mtime_ns
    removed.unlink()
    assert calibration.measure(model, text, progress=False) == folder
    assert (removed.read_bytes(), kept.stat().st_mtime_ns) == (before, written)
    monkeypatch.setattr(calibration, "_measure", None)  # nothing is left to do
    assert calibration.measure(model, text, progress=False) == folder


def test_a_calibration_stopped_within_a_call_counts_nothing_twice(tiny_folder, text, backend, monkeypatch) -> None:
    monkeypatch.setattr(calibration, "_CALL_TOKENS", 40)
    model = load(tiny_folder, backend=backend, dtype="float32", device="cpu")
    folder = calibration.measure(model, text, progress=False)
    whole = read(folder)
    shutil.rmtree(folder)
    add, added = calibration._Sums.add, []

    def stopping(sums: calibration._Sums, *arguments) -> None:
        if len(added) == len(whole) * 3 // 2:  # in the middle of the second call, which goes on with a prompt
            raise KeyboardInterrupt
        added.append(add(sums, *arguments))

    monkeypatch.setattr(calibration._Sums, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        calibration.measure(model, text, progress=False)
    assert {path.suffix for path in folder.iterdir()} == {".sums"}
    monkeypatch.setattr(calibration._Sums, "add", add)
    assert calibration.measure(model, text, progress=False) == folder
    resumed = read(folder)
    assert resumed.keys() == whole.keys()
    for name, values in whole.items():
        np.testing.assert_allclose(resumed[name], values, rtol=1e-5, atol=1e-6 * np.abs(values).max(), err_msg=name)


def test_an_adapter_counts_by_what_it_holds(tiny_folder, published, text, backend, tmp_path) -> None:
    """At the same place another adapter is measured anew; the same one somewhere else is not."""
    target = ("model.language_model.layers.0.self_attn.q_proj",)
    norm = "model.language_model.norm.weight"
    folders = []
    for place, seed, scale in (("a", 1, 2), ("a", 2, 2), ("a", 1, 3), ("b", 1, 2)):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        adapter = adapter_files.write_peft(tmp_path / place, adapter_files.low_ranks(published[1], target, seed))
        file = adapter / "adapter_model.safetensors"
        whole = {f"base_model.model.{norm}": published[1][norm] * scale}
        checkpoint_files.write_safetensors(file, checkpoint_files.read_safetensors(file) | whole)
        model = load(tiny_folder, backend=backend, dtype="float32", device="cpu", adapter=adapter)
        folders.append(calibration.measure(model, text, only=lambda path: path == FIRST, progress=False))
        model.close()
    assert folders[0] == folders[3]
    assert len(set(folders)) == 3


def test_media_count_by_what_they_hold(tiny_folder, backend, tmp_path) -> None:
    model = load(tiny_folder, backend=backend, dtype="float32", device="cpu")
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    data = tmp_path / "some.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    folders = []
    for color in ("red", "blue"):
        Image.new("RGB", (32, 32), color).save(tmp_path / "a.png")
        folders.append(calibration.measure(model, data, only=lambda path: path == FIRST, progress=False))
        assert [path.stem for path in folders[-1].iterdir()] == [FIRST]
    assert folders[0] != folders[1]


def test_the_command_calibrates_with_examples(tiny_folder, tmp_path, capsys) -> None:
    lines = [{"messages": [{"role": "user", "content": "What is this?"}], "answer": "A test."}] * 2
    data = tmp_path / "some.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    flags = ["-q", "--q-bits", "3", "--method", "gptq", "--calibration", str(data)]
    assert main(["--hf-path", str(tiny_folder), "-o", str(tmp_path / "out"), *flags]) == 0
    assert {how.bits for how in Checkpoint.open(tmp_path / "out").quantizations.values()} == {3, 8}
    data.write_text('{"messages": 3}')
    assert main(["--hf-path", str(tiny_folder), "-o", str(tmp_path / "out2"), *flags]) == 1
    assert "line 1: expected an object with messages" in capsys.readouterr().err


@pytest.mark.parametrize(("contents", "message"), [(b"", "is empty"), (b"\xff\xfe", "is not UTF-8 text")])
def test_data_that_can_not_be_read(tiny_folder, tmp_path, contents, message) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(contents)
    model = load(tiny_folder, device="cpu")
    with pytest.raises(Error, match=message):
        calibration.measure(model, path, progress=False)
