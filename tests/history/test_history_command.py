"""`g3n history`, as its users run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from g3n_mlx.__main__ import main
from g3n_mlx.chat.saved import saved_messages
from g3n_mlx.history.record import Record
from g3n_mlx.history.store import History

SKY = [
    {"role": "user", "content": [{"type": "image", "image": "/tmp/sky.png"}, "Why is the sky blue?"]},
    {"role": "assistant", "content": "Because of Rayleigh."},
    {"role": "user", "content": "And red?"},
    {"role": "assistant", "content": "At dusk."},
]
SEA = [{"role": "user", "content": "Why is the sea blue? ÄÖ\x1b[2J"}, {"role": "assistant", "content": "The sky."}]


@pytest.fixture
def history(tmp_path, monkeypatch) -> History:
    for name in ("XDG_DATA_HOME", "WIN_PD_OVERRIDE_LOCAL_APPDATA"):
        monkeypatch.setenv(name, str(tmp_path))
    history = History()
    assert history.path.is_relative_to(tmp_path)
    return history


@pytest.fixture
def two(history) -> History:
    Record(history).update("Be brief.", SKY, "gemma-3n-e2b")
    Record(history).update(None, SEA, "gemma-3n-e4b")
    return history


def test_list(two, capsys):
    assert main(["history"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == ["2", "1"]
    assert listed[1].endswith("  2  [image: /tmp/sky.png] Why is the sky blue?")
    assert main(["history", "list", "-n", "1", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["id"], entry["questions"], entry["model"]) == (2, 1, "gemma-3n-e4b")


def test_nothing_is_kept(history, capsys):
    assert main(["history"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"no conversations are kept in {history.path}\n")
    assert main(["history", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["history", "rm", "--all"]) == 0
    assert main(["history", "path"]) == 0
    assert capsys.readouterr().out == f"{history.path}\n"


def test_show(two, capsys):
    assert main(["history", "show", "the SKY"]) == 0
    shown = capsys.readouterr().out
    for words in ("system prompt: Be brief.", "> [image: /tmp/sky.png]", "Why is the sky blue?", "At dusk.", "e2b"):
        assert words in shown
    assert main(["history", "show", "blue"]) == 1
    assert "take the id, of 2, 1" in capsys.readouterr().err
    for name in ("3", "moon", "99999999999999999999", "-"):
        assert main(["history", "show", name]) == 1
        assert f"there is no conversation {name!r}" in capsys.readouterr().err


def test_show_as_json_is_what_the_chat_loads(two, tmp_path, capsys):
    assert main(["history", "show", "1", "--json"]) == 0
    path = tmp_path / "sky.json"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert saved_messages(path) == [{"role": "system", "content": "Be brief."}, *SKY]


def test_search(two, capsys):
    assert main(["history", "search", "rayleigh", "SKY", "--json"]) == 0
    assert [entry["id"] for entry in json.loads(capsys.readouterr().out)] == [1]
    assert main(["history", "search", "blue äö"]) == 0
    assert capsys.readouterr().out.startswith("2 ")
    assert main(["history", "search", "sky", "dusk"]) == 1  # of two turns


def test_remove(two, capsys):
    assert main(["history", "rm", "1", "moon"]) == 1
    assert len(two.entries()) == 2
    assert main(["history", "rm", "1"]) == 0
    assert "removed 1  [image: /tmp/sky.png] Why is" in capsys.readouterr().err
    assert main(["history", "rm", "--all"]) == 0
    assert two.entries() == []
    for wrong in (["rm"], ["rm", "1", "--all"]):
        with pytest.raises(SystemExit, match="2"):
            main(["history", *wrong])


def test_a_damaged_file_is_one_clear_line(two, capsys):
    two.path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    for command in (["list"], ["show", "1"], ["search", "a"], ["rm", "1"], ["rm", "--all"]):
        assert main(["history", *command]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "history.db is damaged" in line
        assert "move it away" in line


def test_it_answers_at_once_and_obeys_nobody(two, repository: Path):
    code = (
        "import sys; from g3n_mlx.__main__ import main; main(['history', 'show', '2']);"
        "assert not {'numpy', 'mlx', 'torch', 'tokenizers'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, check=True)
    assert "ÄÖ".encode() in done.stdout
