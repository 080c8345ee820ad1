"""The published vision network at 768 x 768 with seeded random weights: both backends against timm, in float32.

Prints the largest difference relative to the largest value, the time of one image (after a small one, which warms the
weights up) and peak memory; each network runs in a process of its own, so that its peak is its own. The second command
measures one network alone, in either dtype, on a checkpoint that `write_random_vision` wrote.

    python -m pytest -m slow -s tests/full_size/test_vision_full_size.py
    PYTHONPATH=tests python tests/full_size/test_vision_full_size.py mlx bfloat16 CHECKPOINT OUTPUT.npy
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from random_vision import tower_tensors, write_random_vision

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.memory import peak_process_bytes

TESTS = Path(__file__).resolve().parent.parent
SIZE = 768
TOLERANCE = 1e-4  # of the largest value

Network = Callable[[np.ndarray], np.ndarray]  # [1, 3, h, w] -> [1, C, h', w'], float32


@pytest.mark.slow
def test_features_are_timms(tmp_path):
    for package in ("torch", "timm", "torchvision", "mlx"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = write_random_vision(tmp_path / "checkpoint", TESTS / "tiny-gemma3n", None)
    features = {}
    every_core = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for network in ("timm", "torch", "mlx"):
        output = tmp_path / f"{network}.npy"
        command = [sys.executable, __file__, network, "float32", str(folder), str(output)]
        subprocess.run(command, check=True, env={**every_core, "PYTHONPATH": str(TESTS)})
        features[network] = np.load(output)
    expected = features["timm"]
    assert expected.shape == (1, 2048, 16, 16)
    for network in ("torch", "mlx"):
        difference = np.abs(features[network] - expected).max() / np.abs(expected).max()
        print(f"{network}: differs from timm by {difference:.2e} of the largest value")
        assert difference < TOLERANCE


def main(argv: list[str]) -> int:
    network, dtype, folder, output = argv
    open_network = {"timm": open_timm, "torch": open_torch, "mlx": open_mlx}[network]
    started = time.perf_counter()
    run = open_network(Path(folder), dtype)
    pixels = np.random.default_rng(1).random((1, 3, SIZE, SIZE), np.float32)
    run(pixels[:, :, :96, :96])
    opened, before = time.perf_counter(), time.process_time()
    features = run(pixels)
    done, after = time.perf_counter(), time.process_time()
    np.save(output, features)
    print(
        f"{network} {dtype}: opened in {opened - started:.1f} s, one image in {done - opened:.1f} s "
        f"({after - before:.1f} s of CPU), peak memory {peak_process_bytes() / 1e9:.2f} GB",
        flush=True,
    )
    return 0


def open_timm(folder: Path, dtype: str) -> Network:
    import torch

    importlib.import_module("golden.reference_builder.torchvision_stubs").declare_missing_operators()
    network = importlib.import_module("timm").create_model("mobilenetv5_300m_enc").eval()
    network.load_state_dict({name: torch.from_numpy(array) for name, array in tower_tensors(folder).items()})
    network = network.to(getattr(torch, dtype))

    @torch.no_grad()
    def run(pixels: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(pixels).to(getattr(torch, dtype))).float().numpy()

    return run


def open_torch(folder: Path, dtype: str) -> Network:
    import torch

    from g3n_mlx.backends.torch.vision import VisionTower
    from g3n_mlx.backends.torch.weights import Placement, Weights

    checkpoint = Checkpoint.open(folder)
    weights = Weights(checkpoint, Placement(getattr(torch, dtype), torch.device("cpu")), "vision_tower")
    tower = VisionTower(checkpoint.config.vision, weights)

    @torch.no_grad()
    def run(pixels: np.ndarray) -> np.ndarray:
        return tower(torch.from_numpy(pixels)).float().numpy()

    return run


def open_mlx(folder: Path, dtype: str) -> Network:
    import mlx.core as mx

    from g3n_mlx.backends.mlx.vision import VisionTower
    from g3n_mlx.backends.mlx.weights import Placement, Weights

    checkpoint = Checkpoint.open(folder)
    weights = Weights(checkpoint, Placement(getattr(mx, dtype), mx.default_device()), "vision_tower")
    tower = VisionTower(checkpoint.config.vision, weights)

    def run(pixels: np.ndarray) -> np.ndarray:
        features = tower(mx.array(pixels.transpose(0, 2, 3, 1)))
        return np.array(features.astype(mx.float32)).transpose(0, 3, 1, 2)

    return run


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
