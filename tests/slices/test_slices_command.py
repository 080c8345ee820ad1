"""`g3n slices search` as a user calls it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from planted import LAYERS, WIDTH

from g3n_mlx import load
from g3n_mlx.__main__ import main
from g3n_mlx.matformer.table import read_slices
from g3n_mlx.slices.journal import Journal

TEXT = "".join(f"Cat {number} sat on the mat. Katze {number} saß auf der Matte.\n" for number in range(60))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def search(capsys, *flags):
    code = main(["slices", "search", *map(str, flags)])
    return (code, *capsys.readouterr())


def test_a_found_slice_is_taken_back(planted_folder, text, tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    widths = [WIDTH // 2] * LAYERS
    rows.write_text(
        "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
        f'By hand,{LAYERS},,,"{[WIDTH, *widths[1:]]}",\n'
    )
    output = tmp_path / "found.csv"
    flags = [
        "--model",
        planted_folder,
        "--text",
        text,
        "--tokens",
        "255",
        "--widths",
        "0.5",
        "--matformer-config",
        rows,
    ]
    code, out, err = search(capsys, *flags, "--budget", "by-hand", "-o", output)
    assert code == 0, err
    table = {line[:14].strip(): line.split() for line in out.splitlines()[1:]}
    assert set(table) == {"whole", "by-hand", "Found at by-ha"}
    # The same memory as the layer that was chosen by hand, better spent.
    found, by_hand = table["Found at by-ha"], table["by-hand"]
    assert found[-5:-1] == by_hand[-5:-1]
    assert float(found[-1]) < 0.5 * float(by_hand[-1])
    assert float(table["whole"][-1]) == 0

    (row,) = read_slices(output)
    assert row.short_name == "found-at-by-hand"
    assert row.ffn_hidden_dims == (WIDTH // 2, WIDTH, *[WIDTH // 2] * (LAYERS - 2))
    with load(planted_folder, matformer=row.short_name, matformer_config=output) as model:
        assert model.config.text.intermediate_size == row.ffn_hidden_dims
    if importlib.util.find_spec("matplotlib") is not None:
        assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    # Everything is known by now: another budget is read off the journal.
    measured = output.with_suffix(".journal").read_text().count("\n")
    output.unlink()
    code, _, err = search(capsys, *flags, "--budget", "by-hand", "-o", output)
    assert code == 0, err
    assert f"going on from {measured - 1} measurements" in err
    assert output.with_suffix(".journal").read_text().count("\n") == measured
    assert read_slices(output) == [row]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_search_goes_on(planted_folder, text, tmp_path, capsys):
    output = tmp_path / "found.csv"
    flags = ["--model", planted_folder, "--text", text, "--widths", "0.5", "--budget", "10GB", "-o", output]
    command = [sys.executable, "-m", "g3n_mlx", "slices", "search", *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = output.with_suffix(".journal")
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    before = [line for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]
    with journal.open("a") as file:
        file.write('["half a li')
    code, _, err = search(capsys, *flags)
    assert code == 0, err
    assert f"going on from {len(before) - 1} measurements" in err
    lines = journal.read_text().splitlines(keepends=True)
    assert lines[: len(before)] == before
    assert all(isinstance(json.loads(line), list) for line in lines[1:])
    keys = [tuple(json.loads(line)[:2]) for line in lines[1:]]
    assert len(set(keys)) == len(keys)
    assert read_slices(output)[0].ffn_hidden_dims == (WIDTH,) * LAYERS  # there was room for all of it


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--budget", "1KB"), "nothing fits 1.0 KB: the smallest that is searched needs 0.62 GB"),
        (("--budget", "e9b"), "no slice is called 'e9b'"),
        (("--budget", "1GB", "--widths", "0.1"), "--widths has 0.1, which leaves no group of 64"),
        (("--budget", "1GB", "-o", "found.txt"), "expected a name that ends in .csv"),
        (("--budget", "1GB", "-o", "no/such/found.csv"), "no/such"),
    ],
)
def test_failures_are_one_line(flags, message, planted_folder, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = search(
        capsys, "--model", planted_folder, "--text", text, "--tokens", "255", "--widths", "0.5", *flags
    )
    assert (code, out) == (1, "")
    complaint = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("g3n slices: ")]
    assert len(complaint) == 1
    assert message in complaint[0]


def test_a_result_is_not_written_over(planted_folder, text, tmp_path, capsys):
    output = tmp_path / "found.csv"
    output.write_text("mine")
    code, _, err = search(capsys, "--model", planted_folder, "--text", text, "--budget", "1GB", "-o", output)
    assert code == 1
    assert "found.csv exists already" in err
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--text", "a"),
        ("--budget", "1GB"),
        ("--text", "a", "--budget", "1GB", "--speed", "3"),
        ("--text", "a", "--budget", "1"),
        ("--text", "a", "--budget", "1GB", "--widths", "2"),
        ("--text", "a", "--budget", "1GB", "--bits", "7"),
        ("--text", "a", "--budget", "1GB", "--bits", "4", "--q-bits", "4"),
    ],
)
def test_wrong_usage(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        search(capsys, *flags)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_journal_of_another_search_is_refused(tmp_path):
    path = tmp_path / "a.journal"
    with Journal(path, {"model": "one"}) as journal:
        journal.put("p", "c", 0.5)
    with Journal(path, {"model": "one"}) as journal:
        assert journal.get("p", "c") == 0.5
    with pytest.raises(ValueError, match=r"a\.journal is of another search, or no journal: delete it"):
        Journal(path, {"model": "two"})
    path.write_text('{"model": "one"}\n["p"]\n')
    with pytest.raises(ValueError, match="is damaged"):
        Journal(path, {"model": "one"})
    path.write_bytes(os.urandom(100) + b"\n")
    with pytest.raises(ValueError, match="no journal"):
        Journal(path, {"model": "one"})
