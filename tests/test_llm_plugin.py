"""The plugin for simonw's llm, by llm's own command in a process of its own, as the package's metadata names it."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder

pytest.importorskip("llm")

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ROOT / "examples" / "media" / "shapes.png"
DIGITS = ROOT / "examples" / "media" / "digits.ogg"
SUM = "What is 12 + 34?"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return load(demo_folder())


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One in which the plugin is installed, as its entry point stands in pyproject.toml, and nothing else of ours."""
    folder = tmp_path_factory.mktemp("llm")
    (named,) = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]["llm"].items()
    record = folder / "g3n_plugin-0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: g3n-plugin\nVersion: 0\n", "utf-8")
    (record / "entry_points.txt").write_text(f"[llm]\n{named[0]} = {named[1]}\n", "utf-8")
    return {**os.environ, "LLM_USER_PATH": str(folder), "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def said(environment, *words):
    done = subprocess.run(
        [sys.executable, "-m", "llm", *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr


def test_answers(environment, model):
    asked = ("-m", "g3n-demo", "-o", "temperature", "0")
    assert said(environment, *asked, SUM) == model.generate(SUM, temperature=0.0).text
    for kind, path, question in (("image", SHAPES, "How many circles are there?"), ("audio", DIGITS, "Transcribe.")):
        content = [{"type": "text", "text": question}, {"type": kind, kind: path}]
        alone = model.generate([{"role": "user", "content": content}], temperature=0.0).text
        assert said(environment, *asked, question, "-a", str(path)) == alone
    assert set(json.loads(said(environment, *asked, SUM, "--schema", "total int"))) == {"total"}
    assert "temperature is -1" in said(environment, "-m", "g3n-demo", "-o", "temperature", "-1", SUM)
    turns = [{"role": "user", "content": SUM}, {"role": "assistant", "content": said(environment, *asked, SUM)}]
    again = model.generate([*turns, {"role": "user", "content": "And 1 + 2?"}], temperature=0.0).text
    assert said(environment, "-c", "And 1 + 2?", "-o", "temperature", "0") == again


def test_llm_starts_without_the_models_packages(environment):
    """It loads its plugins whatever it is asked for."""
    code = "import sys, llm; print([model.model.model_id for model in llm.get_models_with_aliases() if 'g3n' in "
    code += "model.model.model_id], [name for name in ('torch', 'mlx', 'tokenizers', 'av') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['g3n-demo', 'g3n'] []"
