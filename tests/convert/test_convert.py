"""Conversions: what they write, that they appear whole or not at all, and the command line."""

import collections
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_files as files
import ml_dtypes
import numpy as np
import pytest

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import Quantization, quantize
from g3n_mlx.checkpoint.shards import TensorInfo
from g3n_mlx.config.manifest import dead_manifest
from g3n_mlx.convert import __main__ as command
from g3n_mlx.convert import cached_conversion, convert, plan_for
from g3n_mlx.convert import write as writing
from g3n_mlx.convert.__main__ import main
from g3n_mlx.failures import size_in_words
from g3n_mlx.matformer.sizes import size_slices
from g3n_mlx.matformer.table import read_slices

DENSE_MARKS = ("norm", "altup.", "laurel.", "embed_vision.", "embed_audio.", "_tower.")
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tensors(tiny_folder: Path) -> Tensors:
    return files.read_folder(tiny_folder)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "slices.csv"
    path.write_text(
        "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
        + 'Mixed,8,0.001,40.00%,"[2_5_6, 64 * 3, 128, 256, 192, 128, 64, 192]","[1, 6]"\n'
        + f'Half,10,,,"{[128] * 10}",\n'
        + f'Whole,10,,,"{[256] * 10}",\n'
    )
    return path


def listed(printed: str) -> dict[str, str]:
    """The rows of --list-slices by short name, in their order."""
    rows = printed.partition("\n\n")[0].splitlines()[2:]
    return {row.split()[0]: row for row in rows}


def same_tensors(found: Tensors, expected: Tensors) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def test_plain_copy(tiny_folder: Path, tensors: Tensors, tmp_path: Path) -> None:
    output = convert(tiny_folder, tmp_path / "out", progress=False)
    same_tensors(files.read_folder(output), tensors)
    assert files.read_config(output) == files.read_config(tiny_folder)
    for path in tiny_folder.glob("*.json"):
        if path.name != "config.json":
            assert (output / path.name).read_bytes() == path.read_bytes()
    assert (output / "chat_template.jinja").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_quantized(tiny_folder: Path, tensors: Tensors, tmp_path: Path) -> None:
    output = convert(tiny_folder, tmp_path / "out", q_bits=4, progress=False)
    found = files.read_folder(output)
    for name, weight in tensors.items():
        path = name.removesuffix(".weight")
        dense = weight.ndim == 1 or (any(mark in name for mark in DENSE_MARKS) and "altup_" not in name)
        assert (f"{path}.scales" not in found) == dense, name
        if dense:
            assert found[name].tobytes() == weight.tobytes()
            continue
        bits = 8 if name.endswith("embed_tokens_per_layer.weight") else 4
        for part, array in zip(("weight", "scales", "biases"), quantize(weight, bits, 64), strict=True):
            assert found[f"{path}.{part}"].tobytes() == array.tobytes(), name
    config = files.read_config(output)
    entry = config["quantization"]
    assert config["quantization_config"] == entry
    override = {"group_size": 64, "bits": 8, "mode": "affine"}
    assert entry == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "model.language_model.embed_tokens_per_layer": override,
        "language_model.model.embed_tokens_per_layer": override,
    }
    assert Checkpoint.open(output).quantization("language_model.embed_tokens") == Quantization(4, 64)


@pytest.mark.parametrize("ple_bits", [2, 4])
def test_bits_of_the_ple_table(ple_bits: int, tiny_folder: Path, tmp_path: Path) -> None:
    output = convert(tiny_folder, tmp_path / "out", q_bits=4, q_group_size=32, ple_bits=ple_bits, progress=False)
    checkpoint = Checkpoint.open(output)
    assert checkpoint.quantization("language_model.embed_tokens_per_layer") == Quantization(ple_bits, 32)


def test_rows_that_do_not_divide_stay_dense(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        output = convert(tiny_folder, tmp_path / "out", q_bits=4, q_group_size=128, progress=False)
    checkpoint = Checkpoint.open(output)
    assert checkpoint.quantization("language_model.layers.0.per_layer_projection") is None  # rows of 64
    assert checkpoint.quantization("language_model.layers.0.mlp.down_proj") == Quantization(4, 128)
    assert "layers.0.per_layer_projection stays dense" in caplog.text


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(dtype: str, tiny_folder: Path, tensors: Tensors, tmp_path: Path) -> None:
    output = convert(tiny_folder, tmp_path / "out", dtype=dtype, progress=False)
    same_tensors(files.read_folder(output), {name: array.astype(dtype) for name, array in tensors.items()})
    config = files.read_config(output)
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == dtype
    quantized = convert(output, tmp_path / "q", q_bits=4, dtype=dtype, progress=False)
    weight = tensors["model.language_model.embed_tokens.weight"].astype(dtype)
    scales = quantize(weight, 4, 64)[1]
    assert files.read_folder(quantized)["model.language_model.embed_tokens.scales"].tobytes() == scales.tobytes()


@pytest.mark.parametrize("layout", [files.resaved, files.text_only, files.mlx_vlm, files.old_vision])
def test_every_layout_becomes_the_published_one(
    layout: Callable[..., Any], tiny_folder: Path, tensors: Tensors, tmp_path: Path
) -> None:
    config = files.read_config(tiny_folder)
    source = files.write_folder(tmp_path / "in", *layout(config, tensors), shards=2)
    output = convert(source, tmp_path / "out", progress=False)
    expected = dict(tensors)
    if layout is files.text_only:
        expected = {name: array for name, array in tensors.items() if name.startswith("model.language_model.")}
    if layout is files.resaved:
        for name in dead_manifest(Checkpoint.open(tiny_folder).config.text):
            expected[f"model.{name}"] = np.zeros_like(tensors[f"model.{name}"])
    if layout is files.old_vision:
        name = "model.vision_tower.timm_model.conv_stem.conv.bias"
        expected[name] = np.zeros_like(tensors[name])
    same_tensors(files.read_folder(output), expected)
    text = files.read_config(output)["text_config"]
    assert (text["rope_theta"], text["rope_local_base_freq"]) == (1e6, 1e4)
    again = convert(output, tmp_path / "again", progress=False)
    same_tensors(files.read_folder(again), expected)


def test_absent_dead_weights_are_quantized_zeros(tiny_folder: Path, tensors: Tensors, tmp_path: Path) -> None:
    source = files.write_folder(tmp_path / "in", *files.resaved(files.read_config(tiny_folder), tensors))
    found = files.read_folder(convert(source, tmp_path / "out", q_bits=4, progress=False))
    path = "model.language_model.layers.9.self_attn.k_proj"
    for part, array in zip(
        ("weight", "scales", "biases"), quantize(np.zeros((64, 128), ml_dtypes.bfloat16), 4, 64), strict=True
    ):
        assert found[f"{path}.{part}"].tobytes() == array.tobytes()


def test_golden_slices(tiny_folder: Path, tmp_path: Path, golden_json: Callable[[str], Any], table: Path) -> None:
    case = golden_json("matformer")["mixed"]
    output = convert(tiny_folder, tmp_path / "out", matformer="mixed", matformer_config=table, progress=False)
    found = files.read_folder(output)
    assert set(found) == set(case["tensors"])
    for name, expected in case["tensors"].items():
        assert hashlib.sha256(found[name].tobytes()).hexdigest() == expected["sha256"], name
    assert files.read_config(output)["text_config"] == case["text_config"]


def test_shards_and_their_index(
    tiny_folder: Path, tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing.write_shards, "__defaults__", (1_000_000,))
    output = convert(tiny_folder, tmp_path / "out", progress=False)
    shards = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(shards) > 5
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    for shard in shards:
        here = files.read_safetensors(output / shard)
        assert {index["weight_map"][name] for name in here} == {shard}
    same_tensors(files.read_folder(output), tensors)


@pytest.mark.parametrize("q_bits", [None, 4])
@pytest.mark.parametrize("part", ["mlp.down_proj.weight", "input_layernorm.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_numbers_are_named(
    q_bits: int | None, part: str, value: float, tiny_folder: Path, tensors: Tensors, tmp_path: Path
) -> None:
    name = f"model.language_model.layers.7.{part}"
    damaged = tensors[name].copy()
    damaged[(1,) * damaged.ndim] = value
    source = files.write_folder(tmp_path / "in", files.read_config(tiny_folder), tensors | {name: damaged})
    with pytest.raises(ValueError, match=rf"{name} holds NaN or infinity"):
        convert(source, tmp_path / "out", q_bits=q_bits, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_values_too_large_for_float16(tiny_folder: Path, tensors: Tensors, tmp_path: Path) -> None:
    name = "model.language_model.norm.weight"
    source = files.write_folder(
        tmp_path / "in", files.read_config(tiny_folder), tensors | {name: tensors[name] * ml_dtypes.bfloat16(1e6)}
    )
    with pytest.raises(ValueError, match=rf"{name} holds NaN or infinity in float16"):
        convert(source, tmp_path / "out", dtype="float16", progress=False)


def test_quantized_sources(tiny_folder: Path, tmp_path: Path, table: Path) -> None:
    source = convert(tiny_folder, tmp_path / "in", q_bits=4, dtype="float16", progress=False)
    for flags in ({"q_bits": 4}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match=r"is quantized already \(4 bits in groups of 64\)"):
            convert(source, tmp_path / "out", **flags, progress=False)
    same_tensors(files.read_folder(convert(source, tmp_path / "copy", progress=False)), files.read_folder(source))
    assert files.read_config(tmp_path / "copy") == files.read_config(source)


def test_slice_errors(tiny_folder: Path, tmp_path: Path, table: Path) -> None:
    with pytest.raises(ValueError, match="made for a base model of 35 layers, this checkpoint has 10"):
        convert(tiny_folder, tmp_path / "out", matformer="e2b", progress=False)
    with pytest.raises(ValueError, match="did you mean 'half'"):
        convert(tiny_folder, tmp_path / "out", matformer="hlaf", matformer_config=table, progress=False)
    with pytest.raises(ValueError, match="matformer_config was given without matformer"):
        convert(tiny_folder, tmp_path / "out", matformer_config=table, progress=False)
    assert not (tmp_path / "out").exists()


def test_taken_output(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert Checkpoint.open(convert(tiny_folder, tmp_path / "empty", progress=False))
    for taken in (tmp_path / "empty", tmp_path / "empty" / "config.json"):
        with pytest.raises(FileExistsError, match="exists already"):
            convert(tiny_folder, taken, progress=False)


def test_full_disk_is_seen_before_anything_is_written(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")(10, 10, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"out needs \d+\.\d\d MB, .* has 1\.0 KB free"):
        convert(tiny_folder, tmp_path / "new" / "out", progress=False)
    assert list((tmp_path / "new").iterdir()) == []


SLOW_CONVERSION = """
import sys, time
from pathlib import Path
from g3n_mlx.convert import convert, quantize
copy = quantize._copy
def slow(*arguments):
    if any(Path(sys.argv[2]).parent.glob(".out.partial/*.safetensors")):
        time.sleep(1)
    return copy(*arguments)
quantize._copy = slow
convert(sys.argv[1], sys.argv[2], q_bits=4, progress=False)
"""


def test_killed_conversion_leaves_nothing_that_loads(tiny_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW_CONVERSION, str(tiny_folder), str(output)])
    partial = tmp_path / ".out.partial"
    deadline = time.monotonic() + 300
    while not list(partial.glob("*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(FileExistsError, match="another process is writing"):
        convert(tiny_folder, output, q_bits=4, progress=False)
    process.kill()
    process.wait()
    assert not output.exists()
    with pytest.raises(FileNotFoundError):
        Checkpoint.open(partial)
    convert(tiny_folder, output, q_bits=4, progress=False)  # clears up first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert Checkpoint.open(output).quantizations


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for a single process")
@pytest.mark.parametrize(("sent", "code_of_exit"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_conversion_cleans_up(
    tiny_folder: Path, tmp_path: Path, sent: signal.Signals, code_of_exit: int
) -> None:
    code = SLOW_CONVERSION.replace("convert(sys.argv[1], sys.argv[2], q_bits=4, progress=False)", "").replace(
        "import sys, time", "import sys, time\nfrom g3n_mlx.convert.__main__ import main"
    )
    code += "sys.exit(main(['--hf-path', sys.argv[1], '-o', sys.argv[2]]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_folder), str(tmp_path / "out")], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not list((tmp_path / ".out.partial").glob("*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code_of_exit
    assert errors.rstrip().endswith("stopped; nothing was written")
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


# In-situ quantization.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr("g3n_mlx.convert.cache_folder", lambda: folder)
    return folder


def test_cached_conversion_is_made_once(tiny_folder: Path, tmp_path: Path, cache: Path, table: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_folder, source)
    first = cached_conversion(source, q_bits=4, progress=False)
    assert first.is_relative_to(cache)
    same_tensors(
        files.read_folder(first), files.read_folder(convert(source, tmp_path / "direct", q_bits=4, progress=False))
    )
    stamp = (first / "config.json").stat().st_mtime_ns
    assert cached_conversion(source, q_bits=4, progress=False) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    plan = plan_for(source, "half", table)
    others = {
        cached_conversion(source, q_bits=3, progress=False),
        cached_conversion(source, q_bits=4, ple_bits=4, progress=False),
        cached_conversion(source, q_bits=4, plan=plan, progress=False),
    }
    assert len(others | {first}) == 4
    assert Checkpoint.open(cached_conversion(source, q_bits=4, plan=plan)).config.text.intermediate_size == (128,) * 10
    os.utime(source / "model.safetensors", ns=(1, 1))
    assert cached_conversion(source, q_bits=4, progress=False) not in others | {first}


def test_cached_conversion_of_a_quantized_source(tiny_folder: Path, tmp_path: Path, cache: Path) -> None:
    source = convert(tiny_folder, tmp_path / "in", q_bits=4, progress=False)
    with pytest.raises(ValueError, match="is quantized already"):
        cached_conversion(source, q_bits=4, progress=False)


def _cached(source: Path, folder: Path) -> str:
    import g3n_mlx.convert

    g3n_mlx.convert.cache_folder = lambda: folder
    return str(cached_conversion(source, q_bits=4, progress=False))


def test_two_processes_make_one_cached_conversion(tiny_folder: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.starmap(_cached, [(tiny_folder, tmp_path / "cache")] * 3)
    assert len(set(found)) == 1
    assert Checkpoint.open(Path(found[0])).quantizations
    assert [path.name for path in (tmp_path / "cache" / "conversions").iterdir()] == [Path(found[0]).name]


# Sizes and the command line.


def test_sizes_are_what_a_conversion_writes(tiny_folder: Path, tensors: Tensors, tmp_path: Path, table: Path) -> None:
    source = files.write_folder(tmp_path / "in", *files.text_only(files.read_config(tiny_folder), tensors))
    raw = Checkpoint.open(source).raw_config["text_config"]
    for entry in size_slices(raw, read_slices(table), 4, 64, 8, "BF16", {}):
        output = tmp_path / entry.slice.short_name
        convert(source, output, q_bits=4, matformer=entry.slice.name, matformer_config=table, progress=False)
        stored = files.read_folder(output)
        assert entry.disk_bytes == sum(array.nbytes for array in stored.values())


def test_a_quantized_source_is_sized_as_it_is(
    tiny_folder: Path, tensors: Tensors, tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = files.write_folder(tmp_path / "in", *files.text_only(files.read_config(tiny_folder), tensors))
    source = convert(dense, tmp_path / "quantized", q_bits=3, q_group_size=32, progress=False)
    assert main(["--list-slices", "--hf-path", str(source), "--matformer-config", str(table)]) == 0
    rows = listed(capsys.readouterr().out)
    raw = Checkpoint.open(dense).raw_config["text_config"]
    for entry in size_slices(raw, read_slices(table), 3, 32, 8, "BF16", {}):
        assert f" {size_in_words(entry.disk_bytes)}" in rows[entry.slice.short_name]
        output = convert(source, tmp_path / entry.slice.short_name, matformer=entry.slice.name, matformer_config=table)
        sized = size_slices(raw, [entry.slice], None, 64, 8, "BF16", Checkpoint.open(source).quantizations)
        assert sized[0].disk_bytes == sum(array.nbytes for array in files.read_folder(output).values())


def test_a_checkpoints_own_slices(
    tiny_folder: Path, tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Looked up before the published ones, listed, and kept by a conversion of the whole model alone."""
    source = tmp_path / "source"
    shutil.copytree(tiny_folder, source)
    shutil.copyfile(table, source / "matformer.csv")
    half = convert(source, tmp_path / "half", matformer="half", progress=False)
    assert Checkpoint.open(half).config.text.intermediate_size == (128,) * 10
    assert not (half / "matformer.csv").exists()
    assert (convert(source, tmp_path / "whole", q_bits=4, progress=False) / "matformer.csv").exists()
    with pytest.raises(ValueError, match="made for a base model of 35 layers"):  # a published one
        convert(source, tmp_path / "e2b", matformer="e2.49b-block", progress=False)
    assert main(["--list-slices", "--hf-path", str(source)]) == 0
    assert list(listed(capsys.readouterr().out)) == ["mixed", "half", "whole"]


def test_a_source_without_a_tokenizer_is_said(
    tiny_folder: Path, tensors: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = files.write_folder(tmp_path / "in", files.read_config(tiny_folder), tensors)
    convert(source, tmp_path / "out", progress=False)
    assert "has no tokenizer.json: put one into" in caplog.text


def test_small_numbers_are_listed_with_their_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-slices", "--model", "demo/"]) == 0
    rows = {name: line.split() for name, line in listed(capsys.readouterr().out).items()}
    assert float(rows.pop("whole")[2]) == 0.00241  # it is not in the table
    assert [row[3] for row in rows.values()] == ["0.0008", "0.00103", "0.00124", "0.00123", "0.00162", "0.00183"]
    assert all(abs(float(row[2]) - float(row[3])) < 1e-5 for row in rows.values())


def test_a_quantized_hub_id_is_listed_by_its_headers(
    tiny_folder: Path, tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config is in the cache, the weights are not; the same figures as those of the whole folder."""
    quantized = convert(tiny_folder, tmp_path / "q", q_bits=3, q_group_size=32, progress=False)
    flags = ["--list-slices", "--matformer-config", str(table), "--model"]
    assert main([*flags, str(quantized)]) == 0
    whole = capsys.readouterr().out
    cached = tmp_path / "cached"
    cached.mkdir()
    shutil.copyfile(quantized / "config.json", cached / "config.json")
    stored = {name: TensorInfo(array.shape, "BF16") for name, array in files.read_folder(quantized).items()}
    for name, array in files.read_folder(quantized).items():
        if array.dtype == np.uint32:
            stored[name] = TensorInfo(array.shape, "U32")
    monkeypatch.setattr(command, "resolve", lambda *_, **__: cached)
    monkeypatch.setattr(command, "tensor_headers", lambda *_: stored)
    assert main([*flags, "owner/model"]) == 0
    assert capsys.readouterr().out == whole


def test_list_slices(capsys: pytest.CaptureFixture[str], tiny_folder: Path, table: Path) -> None:
    assert main(["--list-slices"]) == 0
    published = capsys.readouterr().out
    rows = listed(published)
    assert len(rows) == 16
    assert "Config for E2.49B (block-level)" in rows["e2.49b-block"]
    beaten = {name for name, line in rows.items() if " * " not in line}
    smaller_is_better = {"e2.73b-block", "e3.24b-block", "e3.49b-block", "e3.79b-block", "main-model"}
    assert beaten == {*smaller_is_better, "e3.79b-layer"}  # the last one's score is that of a smaller one
    sizes = [[float(size) for size in re.findall(r"([\d.]+) GB", line)] for line in rows.values()]
    assert all(disk > at_4 for disk, at_4, *_ in sizes)
    assert all(at_4 < at_8 < dense for _, at_4, at_8, dense in sizes)
    assert sizes == sorted(sizes, key=lambda row: row[1])
    assert "4,096 tokens of context" in published
    assert "1.95 GB more once images and audio are read" in published
    assert main(["--list-slices", "--hf-path", str(tiny_folder), "--matformer-config", str(table)]) == 0
    assert list(listed(capsys.readouterr().out)) == ["mixed", "half", "whole"]


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        (["--fits", "3.1GiB", "--q-bits", "8"], "e1.96b-layer"),
        (["--fits", "3.1GiB", "--q-bits", "3"], "e3.59b-layer"),
        (["--fits", "3.3GB"], r"e3.59b-layer \(.*\) at 4 bits, 2.98 GB"),  # and not main, 3.21 GB
        (["--fits", "5.4GB"], r"e3.59b-layer \(.*\) at 4 bits"),  # itself, but not main, fits at 8
        (["--fits", "5.5GB"], r"e3.59b-layer \(.*\) at 8 bits, 5.02 GB"),
    ],
)
def test_the_best_that_fits_is_chosen_by_score(
    flags: list[str], chosen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--list-slices", *flags]) == 0
    assert re.search(f"best slice that fits: {chosen}", capsys.readouterr().out)


def test_command(tiny_folder: Path, tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    flags = ["--hf-path", str(tiny_folder), "-o", str(output), "-q", "--q-bits", "3", "--q-group-size", "32"]
    flags += ["--ple-bits", "6", "--matformer", "HALF", "--matformer-config", str(table), "--dtype", "float16"]
    assert main(flags) == 0
    assert f"wrote {output}" in capsys.readouterr().err
    checkpoint = Checkpoint.open(output)
    assert checkpoint.quantization("language_model.layers.0.mlp.up_proj") == Quantization(3, 32)
    assert checkpoint.quantization("language_model.embed_tokens_per_layer") == Quantization(6, 32)
    assert checkpoint.config.text.intermediate_size == (128,) * 10
    assert checkpoint.info("language_model.norm.weight").dtype == "F16"


def test_command_picks_what_fits(
    tiny_folder: Path, tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--hf-path", str(tiny_folder), "--matformer-config", str(table)]
    assert main([*flags, "-o", str(tmp_path / "dense"), "--fits", "8GB"]) == 0
    told = capsys.readouterr().err
    assert "sizes are those of the unquantized model; -q makes it smaller" in told
    assert "best slice that fits: whole (Whole), 0.6" in told
    assert main([*flags, "-q", "-o", str(tmp_path / "8bit"), "--fits", "8GB"]) == 0
    assert "best slice that fits: whole (Whole) at 8 bits" in capsys.readouterr().err
    assert {how.bits for how in Checkpoint.open(tmp_path / "8bit").quantizations.values()} == {8}
    raw = files.read_config(tiny_folder)["text_config"]
    sizes = {
        entry.slice.short_name: entry.resident_bytes
        for entry in size_slices(raw, read_slices(table), 4, 64, 8, "BF16", {})
    }
    assert main([*flags, "-q", "-o", str(tmp_path / "mixed"), "--fits", f"{sizes['whole'] - 1}"[:-3] + "KB"]) == 0
    assert "best slice that fits: mixed (Mixed) at 4 bits" in capsys.readouterr().err
    assert Checkpoint.open(tmp_path / "mixed").config.text.num_hidden_layers == 8
    assert main([*flags, "-q", "-o", str(tmp_path / "none"), "--fits", "1KB"]) == 1
    told = capsys.readouterr().err
    assert re.search(r"no slice fits 1\.0 KB: the smallest, mixed, needs 0\.\d\d GB; try fewer bits", told)
    flags = ["--hf-path", str(tmp_path / "8bit"), "--matformer-config", str(table), "-o", str(tmp_path / "none")]
    assert main([*flags, "--fits", "1KB"]) == 1
    assert "start from the unquantized checkpoint for fewer bits" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--hf-path", "x"],
        ["-o", "x"],
        ["--list-slices", "-o", "x"],
        ["--hf-path", "x", "-o", "y", "--q-bits", "4"],
        ["--hf-path", "x", "-o", "y", "-q", "--q-bits", "7"],
        ["--hf-path", "x", "-o", "y", "--fits", "much"],
        ["--hf-path", "x", "-o", "y", "--fits", "4"],
        ["--hf-path", "x", "-o", "y", "--matformer-config", "z.csv"],
        ["--hf-path", "x", "-o", "y", "--fits", "4GB", "--matformer", "e2b"],
    ],
)
def test_wrong_usage(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(flags)
    assert raised.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_failures_are_one_line(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\x00" * 50)
    for flags in (
        ["--hf-path", str(tmp_path / "nowhere" / "at" / "all")],
        ["--hf-path", str(tiny_folder), "--matformer", "e9b"],
        ["--hf-path", str(tiny_folder), "--matformer", "e2b"],
        ["--hf-path", str(tiny_folder), "--matformer", "e2b", "--matformer-config", str(tmp_path / "none.csv")],
        ["--hf-path", str(tiny_folder), "--matformer", "e2b", "--matformer-config", str(tmp_path)],
        ["--hf-path", str(tiny_folder), "--matformer", "e2b", "--matformer-config", str(binary)],
    ):
        assert main([*flags, "-o", str(tmp_path / "out")]) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("g3n-convert: ")
        assert errors.count("\n") == 1


def test_an_unknown_slice_is_answered_with_those_that_fit(tiny_folder: Path, tmp_path: Path, table: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_folder, source)
    shutil.copyfile(table, source / "matformer.csv")
    with pytest.raises(ValueError, match=r"There are: mixed = 'Mixed', half = 'Half', whole = 'Whole'$"):
        convert(source, tmp_path / "out", matformer="zzz", progress=False)


def test_listing_the_slices_of_a_model_that_has_none(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-slices", "--hf-path", str(tiny_folder)]) == 1
    assert f"none of the published slices fits {tiny_folder}, which has 10 layers" in capsys.readouterr().err


def test_places_that_can_not_be_written_to(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match=r"file can't be written to \(it is no folder\): choose another place"):
        convert(tiny_folder, tmp_path / "file" / "out", progress=False)
    if Path("/proc/self").is_dir():  # where even the superuser makes no files
        with pytest.raises(PermissionError, match="/proc can't be written to"):
            convert(tiny_folder, "/proc/out", progress=False)
        with pytest.raises(PermissionError, match=r"/proc/a can't be written to \(no such file or directory\): choose"):
            convert(tiny_folder, "/proc/a/out", progress=False)


def test_a_cache_folder_that_can_not_be_written_to(tiny_folder: Path, cache: Path) -> None:
    cache.touch()
    with pytest.raises(
        PermissionError, match=r"conversions can't be written to \(it is no folder\): that is your cache"
    ):
        cached_conversion(tiny_folder, q_bits=4, progress=False)


def test_a_dense_model_is_listed_by_its_config_alone(
    tiny_folder: Path, tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--list-slices", "--matformer-config", str(table), "--hf-path"]
    assert main([*flags, str(tiny_folder)]) == 0
    whole = capsys.readouterr().out
    shutil.copyfile(tiny_folder / "config.json", tmp_path / "config.json")
    assert main([*flags, str(tmp_path)]) == 0
    assert capsys.readouterr().out == whole


def test_module_runs_without_an_array_framework(tiny_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['mlx'] = sys.modules['torch'] = None\n"
        "from g3n_mlx.convert.__main__ import main\n"
        f"sys.exit(main(['--hf-path', {str(tiny_folder)!r}, '-o', {str(tmp_path / 'out')!r}, '-q']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr
