"""A batch that is killed at any moment goes on, and in the end every request has one whole line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither fork nor SIGKILL")


def written(path, count, body):
    lines = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def ids(path):
    return [json.loads(line)["custom_id"] for line in path.read_text("utf-8").splitlines()]


def test_a_hundred_kills_of_the_writer(tmp_path):
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    written(requests, 1500, {"prompt": "x"})
    script = Path(__file__).with_name("killed_writer.py")
    done = subprocess.run(
        [sys.executable, str(script), str(requests), str(results), "100"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    survived, left = map(int, done.stdout.split())
    assert survived < 50  # or hardly anything was killed
    assert left < 1500
    assert sorted(ids(results)) == sorted(f"r{i}" for i in range(1500))


@pytest.mark.slow
def test_ten_kills_of_the_command(tmp_path):
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    written(requests, 400, {"prompt": "1 + 2 =", "max_tokens": 12, "temperature": 0})
    command = [sys.executable, "-m", "g3n_mlx", "batch", str(requests), "-o", str(results), "--model", "demo"]
    random.seed(0)
    for _ in range(10):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
            before = len(ids(results)) if results.exists() else 0
            limit = time.monotonic() + 60
            while running.poll() is None and time.monotonic() < limit:  # until it has written, then at a random moment
                if results.exists() and results.read_bytes().count(b"\n") > before:
                    break
                time.sleep(0.01)
            time.sleep(random.random() / 3)
            os.kill(running.pid, signal.SIGKILL)
        if results.exists():
            whole = results.read_bytes().rpartition(b"\n")[0].decode()
            assert all(json.loads(line)["error"] is None for line in whole.splitlines())
    assert subprocess.run(command, check=False, capture_output=True, timeout=300).returncode == 0
    assert sorted(ids(results)) == sorted(f"r{i}" for i in range(400))
    assert len({json.loads(line)["response"]["body"]["choices"][0]["text"] for line in results.open()}) == 1
