"""The commands, code, links and file names of README and docs are true."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text("utf-8")
PAGES = {path.name: path.read_text("utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md"))}
COMMANDS = ("chat", "convert", "bench", "eval", "slices", "serve", "transcribe", "batch", "mcp")
G3N = [sys.executable, "-m", "g3n_mlx"]


def blocks(text: str, language: str, name: str = r"\w+") -> list[str]:
    """The code blocks after comments `<!-- test: name -->`."""
    return re.findall(rf"<!-- test: {name} -->\n```{language}\n(.*?)```", text, re.DOTALL)


def block(name: str) -> str:
    (found,) = blocks(README, "sh", name)
    return found


def samples() -> list[tuple[str, str]]:
    """(command, output) pairs of README's console blocks, in order."""
    text = "".join(blocks(README, "console", "output")).replace("\\\n", " ")
    return re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Every call of g3n and g3n-* in the shell and console blocks of a page: the command's name, then the rest."""
    code = "\n".join(re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    found = []
    for line in code.splitlines():
        for part in line.removeprefix("$ ").split("&&"):
            words = [word for word in shlex.split(part, comments=True) if not re.match(r"[A-Z_]+=", word)]
            if words[:1] == ["g3n"]:
                found.append(words[1:])
            elif words and words[0].startswith("g3n-"):
                found.append([words[0].removeprefix("g3n-").replace("server", "serve"), *words[1:]])
    return found


def run(*words: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment())


def environment() -> dict[str, str]:
    """For a process that runs this copy of the package from another folder."""
    one_thread = {"OMP_NUM_THREADS": "1"}  # the demo model is too small for more
    return {**os.environ, **one_thread, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """What each command's help lists."""
    told = {name: run(*G3N, name, "--help").stdout for name in COMMANDS}
    return {name: set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)) for name, text in told.items()}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where README's commands run: what they write goes nowhere else."""
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    return tmp_path


def test_length():
    assert len(README.splitlines()) <= 170
    assert all(len(line) <= 120 for line in README.splitlines())
    assert len((REPOSITORY / "CONTRIBUTING.md").read_text("utf-8").splitlines()) <= 80


def test_the_main_command_answers():
    """What stands after the set-up in the first command: the answer alone on stdout."""
    words = shlex.split(block("main").split("&&")[-1])
    assert words[0] == "g3n"
    done = run(*G3N, *words[1:])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "12 + 34 = 46\n"


@pytest.mark.skipif(os.name != "posix", reason="for a POSIX shell")
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_sample_commands_print_what_readme_says(folder, served):
    """In their order: what one writes, the next one reads."""
    assert len(samples()) == 5
    for command, output in samples():
        words = [word.replace("http://127.0.0.1:8080", served) for word in shlex.split(command)]
        assert words[0] in ("g3n", "curl")
        words[:1] = ["curl", "--silent", "--show-error"] if words[0] == "curl" else G3N
        done = run(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
        told = re.split(r"[\r\n]+", done.stdout + done.stderr)  # \r: a progress bar, which a terminal overwrites
        assert [line for line in told if line in output.splitlines()] == output.splitlines(), (command, told)


@pytest.fixture
def served(folder):
    """The address of the server that README starts before it is asked."""
    (words,) = (shlex.split(found) for found in re.findall(r"`g3n (serve .*?)`", README))
    command = [*G3N, *words, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment()) as server:
        assert server.stderr
        told = [""]
        while not (found := re.search(r"listening at (http://\S+)", told[-1])):
            told.append(server.stderr.readline())
            assert told[-1], "".join(told)
        yield found[1]
        server.terminate()
        server.communicate(timeout=60)


@pytest.mark.parametrize(("page", "count"), [("README.md", 1), ("python.md", 10)])
def test_python_code_runs(page, count):
    """A page's blocks go on from one another."""
    code = blocks(PAGES.get(page, README), "python")
    assert len(code) == count
    done = run(sys.executable, "-c", "\n".join(code))
    assert done.returncode == 0, done.stderr
    assert "12 + 34 = 46" in done.stdout


def test_ci_installs_what_the_test_command_installs():
    (install,) = (line for line in block("tests").splitlines() if "--group dev" in line)
    script = (REPOSITORY / ".ci" / "run").read_text("utf-8").replace("--quiet ", "")
    assert install.removesuffix(" &&").removeprefix("pip install ") in script


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_every_flag_exists(page, flags):
    for command, *words in commands(PAGES.get(page, README)):
        for flag in (word for word in words if word.startswith("-") and word != "-"):
            assert flag in flags[command], f"{command} {flag}"


def test_readme_shows_every_command():
    shown = {words[0] for words in commands(README)} | set(re.findall(r"`g3n (\w+) ", README))
    assert set(COMMANDS) <= shown


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_links_exist(page):
    folder = REPOSITORY / ("docs" if page in PAGES else "")
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES.get(page, README)):
        name, _, heading = target.partition("#")
        assert (folder / name).exists(), target
        if heading:
            text = (folder / (name or page)).read_text("utf-8")
            titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_the_index_has_every_page():
    assert set(re.findall(r"\]\((\w+\.md)\)", PAGES["index.md"])) == set(PAGES) - {"index.md"}


def test_the_file_tree_is_complete():
    """Every module and folder of the package, and nothing that is not there."""
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, re.DOTALL)
    assert tree
    inside, outside = tree[1].split("\nconvert/", 1)
    listed = set(re.findall(r"(?<!\S)(\w+(?:/|\.py))", "\n".join(inside.splitlines()[1:])))
    package = REPOSITORY / "g3n_mlx"
    modules = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    packages = {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert listed == (modules | packages) - {"convert/", "matformer_configs/"}  # links
    for name in re.findall(r"(?<!\S)(\w+)/", "convert/" + outside):
        assert (REPOSITORY / name).is_dir(), name


def test_every_sampling_keyword_is_an_option():
    from dataclasses import fields

    from g3n_mlx import SamplingParams

    listed = re.search(r"Sampling options are keywords: `(.*?)`", PAGES["python.md"], re.DOTALL)
    assert listed
    assert set(listed[1].split()) <= {field.name for field in fields(SamplingParams)}


def test_slice_names_of_the_commands_are_known():
    from g3n_mlx.matformer.plan import find_slice
    from g3n_mlx.matformer.table import read_slices

    published, demo = read_slices(), read_slices(REPOSITORY / "g3n_mlx" / "demo" / "matformer.csv")
    for page in (README, *PAGES.values()):
        for words in commands(page):
            for flag, name in pairwise(words):
                if flag == "--matformer" and name != "all" and "--matformer-config" not in words:
                    find_slice(name, demo if "demo" in words else published)
