"""Every example is short and runs on the embedded model."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path, tiny_folder, tmp_path):
    assert len(path.read_text("utf-8").splitlines()) <= 60
    done = subprocess.run(
        [sys.executable, str(path), str(tiny_folder)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
