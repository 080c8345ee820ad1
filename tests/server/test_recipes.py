"""The recipes of docs/clients.md, as they stand there, against a real server."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from running import WAIT_S

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "clients.md").read_text("utf-8")
RECIPES = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.mark.slow
@pytest.mark.parametrize("package", RECIPES)
def test_a_recipe(server, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    code = RECIPES[package].replace("http://127.0.0.1:8080", server.url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=2 * WAIT_S, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_what_is_not_run_says_so():
    """Each section but those with a test, or a test elsewhere, is marked."""
    tested = {"llm", "lm-eval", "MCP"}
    for section in PAGE.split("\n## ")[1:]:
        title = section.partition("\n")[0]
        assert ("*Untested.*" in section) != (title in tested or "<!-- test: " in section), title
