"""The engines that can be measured, a file each: ours and its peers."""

from importlib import import_module
from typing import Any, Protocol

from g3n_mlx.bench.measure import Request, Run

OURS = "g3n_mlx"
MODULES = {
    OURS: "ours",
    "mlx-lm": "mlx_lm",
    "transformers": "transformers",
    "llama.cpp": "llama_cpp",
    "mistralrs": "mistral_rs",
}
PEERS = [name for name in MODULES if name != OURS]


class Engine(Protocol):
    """What each of the files has; they import their frameworks when they measure, not before."""

    def check(self, request: Request) -> None:
        """Raises an error that says what is missing or wrong, before anything is measured."""
        ...

    def measure(self, request: Request) -> Run:
        """Measures in this process, or in children of it."""
        ...


def engine(name: str) -> Engine:
    """The engine of a name in MODULES."""
    module: Any = import_module(f"{__name__}.{MODULES[name]}")
    return module
