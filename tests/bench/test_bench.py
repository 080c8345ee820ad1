"""bench: the figures are there, add up, and failures are one line."""

import importlib.util
import json
import multiprocessing
import shutil
import sys
import time

import pytest
from huggingface_hub import constants

from g3n_mlx.bench.__main__ import main
from g3n_mlx.checkpoint.registry import cache_folder
from g3n_mlx.config.fields import read_json
from g3n_mlx.config.model import ModelConfig


def bench(capsys, *flags):
    code = main([*map(str, flags)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


FLOAT32 = ("--dtype", "float32")
SMALL = ("--prompt-tokens", 20, "--generation-tokens", 5, "--num-trials", 2)


def test_figures(backend, tiny_folder, capsys):
    code, out, err = bench(
        capsys, "--model", tiny_folder, "--backend", backend, "--device", "cpu", *FLOAT32, "--json", *SMALL
    )
    assert code == 0, err
    figures = json.loads(out)["engines"]["g3n_mlx"]
    names = ("load_s", "start_to_first_token_s", "time_to_first_token_s", "prompt_tps")
    for spread in (*(figures[name] for name in names), *(entry["tps"] for entry in figures["decode"])):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    # Each prefill rate is its own run's tokens over its own time.
    assert figures["prompt_tps"]["max"] == pytest.approx(20 / figures["time_to_first_token_s"]["min"])
    (decode,) = figures["decode"]
    assert decode["depth"] == 20
    assert decode["bandwidth"] == pytest.approx(decode["tps"]["median"] * decode["bytes_per_token"])
    assert figures["start_to_first_token_s"]["min"] > figures["load_s"]["min"]
    assert figures["together"] == []
    assert figures["drafts"] is figures["row_seconds"] is None
    assert figures["other_cpu_s"] is None or figures["other_cpu_s"] >= 0
    assert f"g3n_mlx, {backend}, " in figures["engine"]
    assert "float32" in figures["engine"]
    assert figures["peak_memory_bytes"] is None or 20e6 < figures["peak_memory_bytes"] < 2e9
    assert figures["read_bandwidth"] > 1e8
    if backend == "mlx":
        assert 0 < figures["graph_kernels"] <= figures["graph_operations"]


def test_kernels_are_counted_as_a_gpu_has_them(tiny_folder, capsys):
    pytest.importorskip("mlx.core")
    code, out, err = bench(capsys, "--model", tiny_folder, "--device", "cpu", "--count-ops")
    assert code == 0, err
    header, ours, *_ = out.splitlines()
    assert header.split() == ["one", "decode", "step", "kernels", "nodes", "of", "the", "graph"]
    name, kernels, nodes = ours.replace(",", "").split()
    assert name == "g3n_mlx"
    # 10 layers: more than 300 kernels, of which norms, RoPE and attention are one each.
    assert 300 < int(kernels) < 450 < int(nodes)


def test_drafts(backend, tiny_folder, capsys):
    """A copy is drafted whatever the weights; times of calls grow with their rows, on a CPU."""
    flags = ("--backend", backend, "--device", "cpu", *FLOAT32, "--draft", "lookup", "--prompt-tokens", 20)
    flags = (*flags, "--generation-tokens", 60, "--num-trials", 2)
    code, out, err = bench(capsys, "--model", tiny_folder, *flags, "--json")
    assert code == 0, err
    figures = json.loads(out)["engines"]["g3n_mlx"]
    tasks = {entry["task"]: entry for entry in figures["drafts"]}
    copy = tasks["a copy of the prompt"]
    assert 20 < copy["accepted_tokens"] <= copy["drafted_tokens"]
    assert copy["tokens_per_call"] > 1.5
    for entry in tasks.values():
        assert entry["plain_tps"]["median"] > 0
        assert entry["ratio"]["min"] <= entry["tps"]["max"] / entry["plain_tps"]["min"]
    if importlib.util.find_spec("llguidance") is not None:
        assert tasks["an object with long keys"]["accepted_tokens"] > 10
    assert [entry["rows"] for entry in figures["row_seconds"]] == [1, 2, 4, 8, 16]
    assert all(entry["seconds"] > 0 for entry in figures["row_seconds"])


def test_depths_sequences_and_a_plot(backend, tiny_folder, tmp_path, capsys):
    """A figure for each depth and count, in rising order; what decode reads grows by the keys and values."""
    flags = ("--backend", backend, "--device", "cpu", *FLOAT32, "--depth", "40,0", "--sequences", "3,1", *SMALL[:-1], 1)
    plot = tmp_path / "plot.svg"
    code, out, err = bench(capsys, "--model", tiny_folder, *flags, "--plot", plot, "--json")
    assert code == 0, err
    figures = json.loads(out)["engines"]["g3n_mlx"]
    assert [entry["depth"] for entry in figures["decode"]] == [0, 40]
    text = ModelConfig.from_file(tiny_folder).text
    seen = sum(16 if kind == "sliding_attention" else 40 for kind in text.layer_types)
    assert text.sliding_window == 16
    kv_bytes = 2 * 4 * text.num_key_value_heads * text.head_dim * seen  # keys and values, float32
    read = [entry["bytes_per_token"] for entry in figures["decode"]]
    assert read == [figures["weight_bytes_per_token"], figures["weight_bytes_per_token"] + kv_bytes]
    assert [entry["sequences"] for entry in figures["together"]] == [1, 3]
    assert all(entry["tps"]["min"] > 0 for entry in figures["together"])
    drawn = plot.read_text()
    assert drawn.startswith("<?xml")
    assert "</svg>" in drawn


def spin(seconds):
    """Works for so many seconds of the processor, however long that takes."""
    while time.process_time() < seconds:
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell what child processes have taken")
def test_work_of_others_is_seen(tiny_folder, capsys):
    """A process works on all the while that a run takes, which is a second at least: torch is imported."""
    other = multiprocessing.get_context("spawn").Process(target=spin, args=(600,))
    other.start()
    try:
        code, out, err = bench(capsys, "--model", tiny_folder, "--backend", "torch", "--json", *SMALL[:-1], 1)
    finally:
        other.kill()
        other.join()
    assert code == 0, err
    assert json.loads(out)["engines"]["g3n_mlx"]["other_cpu_s"] > 0.5


def test_the_table_in_markdown(tiny_folder, capsys):
    code, out, err = bench(capsys, "--model", tiny_folder, "--depth", "0,20", "--markdown", *SMALL[:-1], 1)
    assert code == 0, err
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert rows[0] == ["", "g3n_mlx"]
    assert {len(row) for row in rows} == {2}
    assert [row[0] for row in rows[2:5]] == ["prefill of 20 tokens, tok/s", "decode at 0, tok/s", "decode at 20, tok/s"]
    assert all(float(row[1]) >= 0 for row in rows[2:])


def test_weight_bytes_are_those_of_the_text_model(tiny_folder, capsys):
    """Counted by hand from the config: bf16, no PLE table, no k/v of KV-sharing layers, the head once."""
    text = ModelConfig.from_dict(read_json(tiny_folder / "config.json")).text
    d, ple, altup, rank = text.hidden_size, text.hidden_size_per_layer_input, text.altup_num_inputs, text.laurel_rank
    heads, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    count = text.vocab_size * d + d  # head, final norm
    count += text.num_hidden_layers * ple * d + ple  # per_layer_model_projection and its norm
    count += 2 * (altup - 1) * d * d
    for layer, width in enumerate(text.intermediate_size):
        count += 2 * heads * d + text.head_dim  # q, o, q_norm
        if layer < text.first_kv_shared_layer:
            count += 2 * kv * d + text.head_dim
        count += 3 * width * d + 2 * rank * d + 2 * ple * d
        count += d + altup * d + altup**3 + altup**2 + d  # AltUp: scale, router, coefficients, its norm
        count += 6 * d  # four layer norms, LAuReL's, PLE's
    code, out, err = bench(capsys, "--model", tiny_folder, "--json", *SMALL[:-1], 1)
    assert code == 0, err
    assert json.loads(out)["engines"]["g3n_mlx"]["weight_bytes_per_token"] == 2 * count


def test_a_peer_takes_turns(tiny_folder, capsys):
    if importlib.util.find_spec("mlx_lm") is None:
        pytest.skip("mlx-lm is not installed")
    code, out, err = bench(
        capsys, "--model", tiny_folder, "--backend", "mlx", "--against", "mlx-lm", *SMALL, "--sequences", 2
    )
    assert code == 0, err
    order = [line.split(", ")[1].split()[0] for line in err.splitlines() if line.startswith("run ")]
    assert order == ["g3n_mlx", "mlx-lm"] * 2
    assert "g3n_mlx against mlx-lm, medians" in out
    assert out.count("graph operations") == 2
    assert out.count("not measured") == 1  # mlx-lm's several sequences


@pytest.mark.slow
def test_transformers_as_the_peer(tiny_folder, capsys):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    flags = ("--model", tiny_folder, "--backend", "torch", "--against", "transformers", "--json")
    code, out, err = bench(capsys, *flags, *SMALL, "--depth", "0,20", "--sequences", "1,2")
    assert code == 0, err
    summary = json.loads(out)
    ours, theirs = summary["engines"]["g3n_mlx"], summary["engines"]["transformers"]
    # The same model stored the same way: both count the same weights.
    assert ours["weight_bytes_per_token"] == theirs["weight_bytes_per_token"]
    for index, depth in enumerate(("0", "20")):
        rates = [figures["decode"][index]["tps"]["median"] for figures in (ours, theirs)]
        assert summary["ratios"]["generation_tps"][depth] == pytest.approx(rates[0] / rates[1])
    assert [entry["sequences"] for entry in theirs["together"]] == [1, 2]


def test_a_revision_of_the_hub_that_is_quantized_first(tiny_folder, tmp_path, monkeypatch, capsys):
    """The runs' own processes get both, and load what is in the cache already."""
    for variable in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "hub" / "models--a--b", "0" * 40
    shutil.copytree(tiny_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    flags = ("--model", "a/b", "--revision", "v1", "--backend", "torch", "--device", "cpu", *FLOAT32, "--json")
    read = {}
    for bits in ((), ("--q-bits", 4)):
        code, out, err = bench(capsys, *flags, *bits, *SMALL[:-1], 1)
        assert code == 0, err
        read[bits] = json.loads(out)["engines"]["g3n_mlx"]["weight_bytes_per_token"]
    assert read["--q-bits", 4] < read[()] / 2
    (made,) = cache_folder().glob(f"conversions/{commit}-4bit-*")
    assert made.is_relative_to(tmp_path)
    code, _, err = bench(capsys, "--model", "a/b", "--revision", "v2", *SMALL)
    assert code == 1
    assert "v2" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "no-such-folder"), "no-such-folder"),
        (("--peer-model", "somewhere"), "--peer-model needs --against"),
        (("--generation-tokens", 1), "expected at least 2"),
        (("--matformer", "E9B"), "E9B"),
        (("--device", "mps"), "mps"),
        (("--prompt-tokens", 40000), "32768"),
        (("--depth", "0,40000"), "32768"),
        (("--peer-binary", "llama-bench", "--against", "transformers"), "--peer-binary needs --against llama.cpp"),
        (("--against", "llama.cpp"), "--against llama.cpp needs --peer-model"),
        (("--plot", "plot.jpg"), "expected a name that ends in .png or .svg"),
        (("--plot", "no-such-folder/plot.svg"), "no folder"),
    ],
)
def test_failures_are_one_line(flags, message, tiny_folder, capsys):
    named = () if "--model" in flags else ("--model", tiny_folder)
    code, out, err = bench(capsys, *named, "--num-trials", 1, *flags)
    assert code == 1
    assert out == ""
    complaint = [line for line in err.splitlines() if not line.startswith("run ")]
    assert len(complaint) == 1
    assert complaint[0].startswith("g3n-bench: ")
    assert message in complaint[0]


def test_an_absent_peer_is_said_before_anything_runs(tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = bench(capsys, "--model", tiny_folder, "--against", "mlx-lm")
    assert (code, out, err) == (1, "", "g3n-bench: mlx-lm is not installed: pip install mlx-lm\n")


@pytest.mark.parametrize(
    "flags", [("--num-trials", "0"), ("--prompt-tokens", "x"), ("--against", "ollama"), ("--depth", "1,x")]
)
def test_bad_flags_are_usage_errors(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(list(flags))
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err
