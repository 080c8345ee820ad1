"""Every script of examples/server is short and runs against a server with the embedded model."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples" / "server").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_server_example(path, server, tmp_path):
    assert len(path.read_text("utf-8").splitlines()) <= 60
    done = subprocess.run(
        [sys.executable, str(path), f"{server.url}/v1"],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= {
        "chat",
        "image",
        "image_and_audio",
        "transcription",
        "structured_output",
        "tools",
    }
