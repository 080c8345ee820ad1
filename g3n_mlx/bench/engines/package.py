"""What the peers that are Python packages share."""

import importlib.util

from g3n_mlx.failures import MissingPackage


def check_package(module: str, package: str) -> None:
    """Raises MissingPackage when a peer is not installed here."""
    if importlib.util.find_spec(module) is None:
        raise MissingPackage(f"{package} is not installed: pip install {package}")
