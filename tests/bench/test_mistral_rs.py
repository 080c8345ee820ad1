"""mistral.rs as the peer, by a package that stands in for it."""

import json
import shutil
from pathlib import Path

import pytest

from g3n_mlx.bench.__main__ import main
from g3n_mlx.config.fields import read_json

SMALL = ("--prompt-tokens", "20", "--generation-tokens", "5", "--num-trials", "1", "--device", "cpu")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """On the path of this process and of those that it starts."""
    shutil.copyfile(Path(__file__).with_name("mistralrs_stub.py"), tmp_path / "mistralrs.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")


@pytest.mark.usefixtures("package")
def test_it_takes_turns(tiny_folder, capsys):
    flags = ("--against", "mistralrs", "--peer-model", str(tiny_folder), "--depth", "0,40", "--sequences", "1,2")
    code = main(["--model", str(tiny_folder), *flags, "--json", *SMALL])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    theirs = json.loads(printed.out)["engines"]["mistralrs"]
    assert theirs["engine"] == "mistralrs, as stored"
    assert [entry["depth"] for entry in theirs["decode"]] == [0, 40]
    assert theirs["weight_bytes_per_token"] is None
    assert theirs["decode"][0]["bandwidth"] is None
    assert theirs["together"] is None


@pytest.mark.usefixtures("package")
def test_a_text_model_is_refused_before_anything_runs(tiny_folder, tmp_path, capsys):
    raw = read_json(tiny_folder / "config.json")
    folder = tmp_path / "text"
    folder.mkdir()
    del raw["vision_config"], raw["audio_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    code = main(["--model", str(tiny_folder), "--against", "mistralrs", "--peer-model", str(folder), *SMALL])
    printed = capsys.readouterr()
    assert (code, printed.out) == (1, "")
    assert "has text alone" in printed.err
    assert len(printed.err.splitlines()) == 1
