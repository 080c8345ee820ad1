"""The tiny checkpoint in both backends, in float32, and the way in and out of their arrays."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import device_for

from g3n_mlx.checkpoint.folder import Checkpoint


@dataclass(frozen=True)
class Framework:
    """One backend's modules and its arrays."""

    name: str
    array: Callable[[np.ndarray], Any]
    numpy: Callable[[Any], np.ndarray]

    def module(self, name: str) -> Any:
        """One of the backend's files."""
        return importlib.import_module(f"g3n_mlx.backends.{self.name}.{name}")

    def weights(self, checkpoint: Checkpoint, dtype: str = "float32", quantized: bool = False, path: str = "") -> Any:
        """A checkpoint's weights below a path, where the tests run."""
        device, weights = self.module("device"), self.module("weights")
        place = device.device_of(device_for(self.name))
        device.claim(place)
        return weights.Weights(checkpoint, weights.Placement(device.dtype_of(dtype, place, quantized), place), path)

    def model(self, checkpoint: Checkpoint, dtype: str = "float32") -> Any:
        """A Gemma3nModel where the tests run."""
        device = self.module("device")
        place = device.device_of(device_for(self.name))
        device.claim(place)
        return self.module("model").Gemma3nModel(checkpoint, device.dtype_of(dtype, place, False), place)


def framework_named(name: str) -> Framework:
    """The arrays of a backend by its name."""
    if name == "mlx":
        import mlx.core as mx

        return Framework("mlx", lambda x: mx.array(x), lambda x: np.array(x.astype(mx.float32)))
    import torch

    return Framework("torch", lambda x: torch.from_numpy(np.ascontiguousarray(x)), lambda x: x.float().numpy())


@pytest.fixture(scope="session")
def framework(backend: str) -> Framework:
    """The backend under test."""
    return framework_named(backend)


@pytest.fixture(scope="session")
def frameworks(backends: list[str]) -> dict[str, Framework]:
    """Every installed backend, for tests that compare them."""
    return {name: framework_named(name) for name in backends}


@pytest.fixture(scope="session")
def network(framework: Framework, tiny_folder: Path) -> Any:
    """The tiny checkpoint's Gemma3nModel in float32."""
    return framework.model(Checkpoint.open(tiny_folder))


@pytest.fixture
def bfloat16_products(framework: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies bfloat16, whatever this one does: on others PyTorch's towers compute in float32."""
    if framework.name == "torch":
        for part in ("audio", "vision"):
            monkeypatch.setattr(framework.module(part), "dense_product_dtype", lambda dtype, device: dtype)
