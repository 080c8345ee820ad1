"""What MLX reads from the environment: set before it is imported, and never against the user."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("mlx.core")

from g3n_mlx.backends import mlx as backend
from g3n_mlx.backends.mlx import device

NAMES = ("MLX_CONV_WINOGRAD", "MLX_ENABLE_TF32", "MLX_MAX_OPS_PER_BUFFER")


@pytest.fixture
def seen_by_mlx(tmp_path):
    """What the environment holds at the moment in which MLX is imported, with other variables set before."""
    (tmp_path / "mlx").mkdir()
    recorder = "import json, os, sys\nprint(json.dumps(dict(os.environ)))\nsys.stdout.flush()\nos._exit(0)\n"
    (tmp_path / "mlx" / "core.py").write_text(recorder)
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}

    def seen(**variables):
        code = "import sys\nsys.path.insert(0, sys.argv[1])\nimport g3n_mlx.backends.mlx.device"
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean | variables)
        return json.loads(done.stdout)

    return seen


def test_settings_are_made_before_mlx_is_imported(seen_by_mlx):
    found = seen_by_mlx()
    assert (found["MLX_CONV_WINOGRAD"], found["MLX_ENABLE_TF32"]) == ("0", "0")


def test_the_users_settings_stay(seen_by_mlx):
    theirs = {"MLX_CONV_WINOGRAD": "1", "MLX_ENABLE_TF32": "1", "MLX_MAX_OPS_PER_BUFFER": "7"}
    found = seen_by_mlx(**theirs)
    assert {name: found[name] for name in NAMES} == theirs


@pytest.mark.parametrize(
    ("chip", "count"),
    [
        ("Apple M1", 200),
        ("Apple M2\n", 200),
        ("Apple M1 Max", 1000),
        ("Apple M2 Ultra", 1000),
        ("Apple M3", 1000),
        ("Apple M4 Pro", 1000),
        ("Apple M5", None),
        ("Apple M5 Max", None),
        ("Apple M12", None),
        ("Apple A18 Pro", None),
        ("Apple processor", None),  # of a virtual machine
        ("Intel(R) Core(TM) i7", None),
        ("", None),
    ],
)
def test_kernels_at_a_time_by_chip(chip, count):
    assert backend.ops_per_buffer(chip) == count


def test_the_chip_decides_what_is_set(monkeypatch):
    monkeypatch.setattr(backend, "chip_name", lambda: "Apple M1 Ultra")
    monkeypatch.delenv("MLX_MAX_OPS_PER_BUFFER", raising=False)
    backend.configure()
    assert os.environ["MLX_MAX_OPS_PER_BUFFER"] == "1000"
    del os.environ["MLX_MAX_OPS_PER_BUFFER"]


def test_settings_that_came_too_late_are_told(monkeypatch, caplog):
    monkeypatch.setattr(backend, "IMPORTED_LATE", True)
    with caplog.at_level("INFO", "g3n_mlx"):
        device.claim(device.device_of("cpu"))
    assert "MLX was imported before" in caplog.text
    assert "MLX was imported before" in device.describe()["products"]
