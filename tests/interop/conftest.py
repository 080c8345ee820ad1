"""The peers from PyPI, each run in a process of its own, and an independent way back from their quantized files."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

# transformers, which the peers import, needs torchvision for pictures only; one that was built for another
# torch than the installed one would stop the import.
HIDE_TORCHVISION = "import sys\nsys.modules['torchvision'] = None\n"


@pytest.fixture(scope="session")
def run_peer() -> Callable[..., str]:
    """run_peer(code, *arguments): runs Python code in a process of its own and returns what it printed."""

    def run(code: str, *arguments: object) -> str:
        command = [sys.executable, "-c", HIDE_TORCHVISION + code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def prompt_ids(golden_arrays) -> list[int]:
    """The 90 ids of the whole-prompt golden: several windows long."""
    return golden_arrays("text_logits")["input_ids"][0].tolist()


@pytest.fixture(scope="session")
def media_ids(golden_arrays) -> list[int]:
    """A prompt that names ids of the image and audio ranges."""
    return golden_arrays("text_logits")["media_token_input_ids"][0].tolist()


@pytest.fixture(scope="session")
def our_logits() -> Callable[..., np.ndarray]:
    """our_logits(folder, ids, backend): float32 [T, V], activations in float32."""
    from g3n_mlx import load

    def logits(folder: Path, ids: list[int], backend: str) -> np.ndarray:
        return load(folder, backend=backend, dtype="float32", device="cpu").logits(ids)

    return logits


@pytest.fixture(scope="session")
def write_dequantized() -> Callable[[Path, Path], Path]:
    """write_dequantized(source, target): a peer's quantized checkpoint, made dense float32 by MLX itself.

    Names, other files and config.json stay, but for the quantization. So loading it tests our reading of the
    quantized one against a dequantization that is not ours.
    """
    mx = pytest.importorskip("mlx.core")

    def write(source: Path, target: Path) -> Path:
        config = json.loads((source / "config.json").read_text("utf-8"))
        config.pop("quantization_config")
        quantization = config.pop("quantization")
        stored: dict = {}
        for shard in source.glob("*.safetensors"):
            stored.update(mx.load(str(shard)))
        dense = {}
        for name, array in stored.items():
            path, _, kind = name.rpartition(".")
            if kind in ("scales", "biases") and f"{path}.weight" in stored:
                continue
            if f"{path}.scales" in stored and kind == "weight":
                own = quantization.get(path) or quantization
                array = mx.dequantize(
                    array,
                    stored[f"{path}.scales"].astype(mx.float32),
                    stored[f"{path}.biases"].astype(mx.float32),
                    group_size=own["group_size"],  # null is MLX's default, in a recipe's overrides
                    bits=own["bits"],
                )
            dense[name] = array
        target.mkdir()
        for path in source.iterdir():
            if path.suffix in (".json", ".jinja") and path.name not in ("config.json", "model.safetensors.index.json"):
                (target / path.name).write_bytes(path.read_bytes())
        (target / "config.json").write_text(json.dumps(config))
        mx.save_safetensors(str(target / "model.safetensors"), dense, metadata={"format": "mlx"})
        return target

    return write
