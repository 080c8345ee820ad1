"""README's commands, code, links and file names are true."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text("utf-8")
MODULES = {f"g3n-{name}": f"g3n_mlx.{name}" for name in ("chat", "convert", "bench", "eval")}


def block(name: str) -> str:
    """The code block behind the comment `<!-- test: name -->`."""
    (found,) = re.findall(rf"<!-- test: {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    return found


def commands() -> list[list[str]]:
    """Every g3n-* command of the shell blocks, split into words."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    lines = [line.split("&&")[-1] for line in blocks.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines]
    return [
        [Path(words[0]).name, *words[1:]] for words in found if words and words[0].startswith(("g3n-", ".venv/bin/g3n"))
    ]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=REPOSITORY)


def test_length():
    assert len(README.splitlines()) <= 250
    assert len((REPOSITORY / "CONTRIBUTING.md").read_text("utf-8").splitlines()) <= 80


def test_the_main_command_answers():
    """What stands behind the set-up in the first command: the answer alone on stdout."""
    words = shlex.split(block("main").split("&&")[-1])
    assert words[0] == ".venv/bin/g3n-chat"
    done = run("-m", "g3n_mlx.chat", *words[1:], "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stderr


@pytest.mark.parametrize("name", ["python", "media"])
def test_python_code_runs(name):
    done = run("-c", block(name))
    assert done.returncode == 0, done.stderr
    assert "(" in done.stdout.splitlines()[-1]


def test_ci_installs_what_the_test_command_installs():
    install = block("tests").split("&&")[2].split("-m pip ")[1].strip()
    script = (REPOSITORY / ".ci" / "run").read_text("utf-8").replace("--quiet ", "")
    assert install.removeprefix("install ") in script


@pytest.mark.parametrize("command", sorted(MODULES))
def test_every_flag_exists(command):
    known = run("-m", MODULES[command], "--help").stdout
    used = [words for words in commands() if words[0] == command]
    assert used
    for words in used:
        for flag in (word for word in words if word.startswith("-") and word != "-"):
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", known), f"{command} {flag}"


def test_links_and_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, re.DOTALL)
    assert tree
    package, outside = tree[1].split("\nconvert/", 1)
    for name in re.findall(r"\b\w+\.py\b", package):
        assert (REPOSITORY / "g3n_mlx" / name).exists(), name
    for name in re.findall(r"^(\w+)/", "convert/" + outside, re.MULTILINE):
        assert (REPOSITORY / name).is_dir(), name


def test_every_sampling_keyword_is_an_option():
    from dataclasses import fields

    from g3n_mlx import SamplingParams

    listed = re.search(r"Sampling options are keywords: `(.*?)`", README, re.DOTALL)
    assert listed
    assert set(listed[1].split()) <= {field.name for field in fields(SamplingParams)}


def test_slice_names_of_the_readme_are_known():
    from g3n_mlx.matformer.plan import find_slice
    from g3n_mlx.matformer.table import read_slices

    for words in commands():
        if "--matformer" in words:
            find_slice(words[words.index("--matformer") + 1], read_slices())
