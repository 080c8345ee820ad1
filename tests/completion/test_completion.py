"""Completion by Tab, in real shells, by the scripts that `g3n completion` prints."""

import os
import shutil
import subprocess
import sys
import tomllib

import pytest

from g3n_mlx.__main__ import ALIASES, COMMANDS, main
from g3n_mlx.completion import SCRIPTS, SHELLS, whole_command_line

BASH = """
source "$SCRIPT"
COMP_TYPE=9 COMP_POINT=${#COMP_LINE}
read -r -a COMP_WORDS <<< "$COMP_LINE"
[[ $COMP_LINE == *' ' ]] && COMP_WORDS+=('')
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_python_argcomplete "${COMP_WORDS[0]}" "${COMP_WORDS[COMP_CWORD]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="these shells are those of other systems")


@pytest.fixture
def shell(tmp_path, capsys):
    """shell(name, line): what the shell offers at the end of a line, in an empty folder of its own."""
    programs, folder = tmp_path / "bin", tmp_path / "folder"
    programs.mkdir()
    folder.mkdir()
    for name, function in (("g3n", "main"), ("g3n-chat", "chat")):
        script = programs / name
        script.write_text(
            f"#!{sys.executable}\nimport sys\nfrom g3n_mlx.__main__ import {function}\nsys.exit({function}())\n"
        )
        script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HF_HOME": str(tmp_path / "hf")}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "TERM": "dumb"}

    def offered(name: str, line: str, **more: str) -> list[str]:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
        assert main(["completion", name]) == 0
        script = tmp_path / f"completion.{name}"
        script.write_text(capsys.readouterr().out)
        code = BASH if name == "bash" else 'source $SCRIPT; complete -C "$COMP_LINE"'
        done = subprocess.run(
            [name, "-c", code],
            env={**environment, **more, "SCRIPT": str(script), "COMP_LINE": line},
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
        return [text.split("\t")[0].strip() for text in done.stdout.splitlines() if text.strip()]

    offered.folder = folder
    return offered


def test_commands_flags_and_choices(shell):
    assert set(shell("bash", "g3n ")) >= {*COMMANDS, *ALIASES}
    assert shell("bash", "g3n ben") == ["bench"]
    assert shell("bash", "g3n bench --gen") == ["--generation-tokens"]
    assert shell("bash", "g3n serve --log-level ") == ["debug", "info", "warning", "error"]
    assert set(shell("bash", "g3n completion ")) >= {*SHELLS}
    assert shell("bash", "g3n-chat --backend t") == ["torch"]


def test_values_that_a_machine_or_table_has(shell):
    (shell.folder / "photo.png").touch()
    (shell.folder / "models").mkdir()
    assert shell("bash", "g3n chat --image ph") == ["photo.png"]
    assert shell("bash", "g3n chat --model ") == ["demo", "models/"]
    assert "e2.49b-block" in shell("bash", "g3n chat --matformer ")
    assert shell("bash", "g3n chat --temperature ") == []


def test_fish(shell):
    assert shell("fish", "g3n ben") == ["bench"]
    assert shell("fish", "g3n bench --gen") == ["--generation-tokens"]


def test_zsh(tmp_path, capsys):
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    assert main(["completion", "zsh"]) == 0
    script = tmp_path / "completion.zsh"
    script.write_text(capsys.readouterr().out)
    code = f"autoload -U compinit; compinit -D; source {script}; for name in {' '.join(SCRIPTS)}; echo $_comps[$name]"
    done = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["_python_argcomplete"] * len(SCRIPTS)


@pytest.mark.parametrize("line", ["g3n ", *(f"g3n {name} --" for name in COMMANDS), "g3n chat --model "])
def test_no_array_framework_is_imported_and_no_time_lost(shell, tmp_path, repository, line):
    """Frameworks that leave a mark when they are imported stand before the real ones."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for name in ("mlx", "torch", "transformers"):
        (fakes / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    before = os.times()
    assert shell("bash", line, PYTHONPATH=f"{fakes}{os.pathsep}{repository}")
    after = os.times()
    assert not (tmp_path / "imported").exists()
    assert after.children_user - before.children_user + after.children_system - before.children_system < 1.0


def test_only_the_named_command_is_imported(monkeypatch):
    monkeypatch.setenv("COMP_LINE", "g3n chat --")
    parser = whole_command_line({"chat": COMMANDS["chat"], "other": ("no.such.package", "")}, {})
    assert parser.parse_args(["chat", "--seed", "7"]).seed == 7
    monkeypatch.setenv("COMP_LINE", "g3n other ")
    with pytest.raises(ModuleNotFoundError, match="no"):
        whole_command_line({"other": ("no.such.package", "")}, {})


def test_every_script_is_completed(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(SCRIPTS) == set(project["scripts"])
