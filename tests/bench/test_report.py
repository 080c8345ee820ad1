"""What runs add up to: medians, ratios, one table and one plot of several peers."""

import json
from dataclasses import replace

import pytest

from g3n_mlx.bench import report
from g3n_mlx.bench.measure import Request, Run
from g3n_mlx.config.model import ModelConfig


def run(speed, *, together=True, weights=1000):
    return Run(
        load_s=2.0,
        start_to_first_token_s=3.0,
        time_to_first_token_s=20 / speed,
        prompt_tps=speed,
        generation_tps=[speed / 2, speed / 4],
        sequences_tps=[speed, 2 * speed] if together else None,
        peak_memory_bytes=int(4e9),
        peak_device_bytes=None,
        weight_bytes_per_token=weights,
        read_bandwidth=1e6,
        description="an engine",
    )


@pytest.fixture(scope="module")
def config(tiny_folder):
    return ModelConfig.from_file(tiny_folder)


def summary(config, peer, theirs):
    ours = Request("g3n_mlx", "folder", (), 20, 5, (0, 40), (1, 4))
    requests = [ours, Request(peer, "folder", (), 20, 5, (0, 40), (1, 4))]
    return report.summary(requests, {"g3n_mlx": [run(60), run(20), run(30)], peer: theirs}, config)


def rows(markdown):
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    return {row[0]: row[1:] for row in cells}


def test_medians_ratios_and_shares(config):
    found = summary(config, "llama.cpp", [run(40), run(10), run(20)])
    ours = found["engines"]["g3n_mlx"]
    assert ours["prompt_tps"] == {"median": 30, "min": 20, "max": 60}
    assert [entry["tps"]["median"] for entry in ours["decode"]] == [15, 7.5]
    assert ours["decode"][0]["bandwidth"] == 15 * 1000
    assert ours["decode"][1]["bandwidth"] == 7.5 * (1000 + report.kv_bytes(config, 40, 2))
    assert found["ratios"]["generation_tps"] == {"0": 1.5, "40": 1.5}
    assert found["ratios"]["together_tps"] == {"1": 1.5, "4": 1.5}
    assert found["ratios"]["peak_memory_bytes"] == 1
    assert "decode at 40 1.50 x" in report.table(found)


def test_one_table_and_one_plot_of_two_peers(config, tmp_path, capsys):
    """Each peer beside ours of its own runs; what one of them did not measure is a dash."""
    peers = {"llama.cpp": [run(60)], "mistralrs": [run(15, together=False, weights=None)]}
    paths = []
    for peer, runs in peers.items():
        paths.append(str(tmp_path / f"{peer}.json"))
        (tmp_path / f"{peer}.json").write_text(json.dumps(summary(config, peer, runs)))
    assert report.main([*paths, "--plot", str(tmp_path / "plot.png")]) == 0
    table = rows(capsys.readouterr().out)
    assert table[""] == ["g3n_mlx", "llama.cpp", "ratio", "g3n_mlx", "mistralrs", "ratio"]
    assert table["prefill of 20 tokens, tok/s"] == ["30", "60", "0.50", "30", "15", "2.00"]
    assert table["4 sequences together, tok/s"] == ["60", "120", "0.50", "60", "-", "-"]
    assert table["weights read per token, GB"][3:] == ["1e-06", "-", "-"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_no_summary_is_one_line(tmp_path, capsys):
    (tmp_path / "x.json").write_text("not JSON")
    assert report.main([str(tmp_path / "x.json")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_drafts_in_the_table(config):
    entry = {"task": "a copy", "drafted_tokens": 40, "accepted_tokens": 30, "tokens_per_call": 3.0}
    drafted = [{**entry, "plain_tps": 10.0, "tps": 20.0}, {**entry, "plain_tps": 10.0, "tps": 30.0}]
    runs = [
        replace(run(60), drafted=[one], row_seconds=[(1, 0.04), (4, seconds)])
        for one, seconds in zip(drafted, (0.06, 0.05), strict=True)
    ]
    found = report.summary([Request("g3n_mlx", "folder", (), 20, 5, (0, 40))], {"g3n_mlx": runs}, config)
    (copy,) = found["engines"]["g3n_mlx"]["drafts"]
    assert copy["ratio"] == {"median": 2.5, "min": 2.0, "max": 3.0}
    table = report.table(found)
    assert "25 tok/s  (min 20, max 30)  2.50 x, 30 of 40 drafted tokens accepted, 3.00 a call" in table
    assert "1 40 ms, 4 50 ms" in table
