"""The recipes of docs/clients.md, as they stand there, and clients put to more use, against a real server.

A client that needs other packages than the tests do has an environment for itself. `G3N_TEST_CLIENTS` names a folder of
them: litellm, llama_index, smolagents and aider, each made by `python3 -m venv` and the `pip install` of the page.
"""

import base64
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from running import WAIT_S, picture

HERE = Path(__file__).resolve().parent
PAGE = (HERE.parents[1] / "docs" / "clients.md").read_text("utf-8")
RECIPES = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
PROGRAMS = {path.stem.removesuffix("_client"): path for path in sorted((HERE / "client_programs").glob("*.py"))}


def python_with(package: str) -> Path:
    """An interpreter that can import a package; skips the test when there is none."""
    apart = Path(os.environ.get("G3N_TEST_CLIENTS", "/nowhere")) / package / "bin" / "python"
    if apart.exists():
        return apart
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed, nor in a folder that G3N_TEST_CLIENTS names")
    return Path(sys.executable)


def output_of(*command: object, **options: Path | Mapping[str, str]) -> str:
    """What a client prints. LiteLLM otherwise asks the internet for prices first."""
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", **options.pop("env", {})}
    done = subprocess.run(
        list(map(str, command)),
        env=environment,
        capture_output=True,
        text=True,
        timeout=2 * WAIT_S,
        check=False,
        stdin=subprocess.DEVNULL,
        **options,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("package", RECIPES)
def test_a_recipe(server, package):
    code = RECIPES[package].replace("http://127.0.0.1:8080", server.url)
    assert output_of(python_with(package), "-c", code).strip()


@pytest.mark.slow
@pytest.mark.parametrize("package", PROGRAMS)
def test_a_client(server, package, tmp_path):
    """Answers whole and streamed, images, tools and schemas."""
    (tmp_path / "picture").write_text(f"data:image/png;base64,{base64.b64encode(picture()).decode()}")
    output_of(python_with(package), PROGRAMS[package], server.url, tmp_path / "picture")


@pytest.mark.slow
def test_aider(server, tmp_path):
    (code,) = re.findall(r"<!-- test: aider -->\n```sh\n(.*?)```", PAGE, re.DOTALL)
    python = python_with("aider")
    (tmp_path / "hello.py").write_text("print(1)\n")
    quiet = "--no-git --no-analytics --no-check-update --no-show-release-notes --no-gitignore --yes-always"
    script = f"{code.strip()} {quiet} --message 'What is 12 + 34?' hello.py".replace(
        "http://127.0.0.1:8080", server.url
    )
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    printed = output_of("sh", "-ec", script, cwd=tmp_path, env={"HOME": str(tmp_path), "PATH": path})
    assert "Model: openai/default" in printed
    assert re.search(r"Tokens: \S+ sent, [1-9]\S* received", printed), printed


def test_what_is_not_run_says_so():
    """Each section but those with a test, here or elsewhere, is marked."""
    tested = {"llm", "lm-eval", "MCP", "Home Assistant", "Open WebUI"}
    for section in PAGE.split("\n## ")[1:]:
        title = section.partition("\n")[0]
        marked = "*Untested.*" in section or "*Tried by hand*" in section
        assert marked != (title in tested or "<!-- test: " in section), title
