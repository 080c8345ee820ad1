"""Every example is short and runs on the embedded model."""

import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
SERVER_EXAMPLES = sorted((FOLDER / "server").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path, tiny_folder, tmp_path):
    assert len(path.read_text("utf-8").splitlines()) <= 60
    done = subprocess.run(
        [sys.executable, str(path), str(tiny_folder)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.fixture(scope="module")
def server_url(tiny_folder, tmp_path_factory):
    """The address of a server in a process of its own."""
    for package in ("fastapi", "uvicorn", "multipart", "llguidance", "prometheus_client", "openai"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, "-m", "g3n_mlx.server", "--model", str(tiny_folder), "--port", "0"]
    with (tmp_path_factory.mktemp("server") / "log").open("w+") as log:
        running = subprocess.Popen(command, stderr=log, cwd=log.name.removesuffix("/log"))
        try:
            yield f"{_address(running, Path(log.name))}/v1"
        finally:
            running.terminate()
            running.wait(60)


def _address(running, log):
    end = time.monotonic() + 300
    while time.monotonic() < end and running.poll() is None:
        if found := re.search(r"listening at (\S+)[\s\S]*startup complete", log.read_text("utf-8")):
            return found[1]
        time.sleep(0.05)
    pytest.fail(log.read_text("utf-8"))


@pytest.mark.parametrize("path", SERVER_EXAMPLES, ids=lambda path: path.name)
def test_server_example(path, server_url, tmp_path):
    assert len(path.read_text("utf-8").splitlines()) <= 60
    done = subprocess.run(
        [sys.executable, str(path), server_url], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
