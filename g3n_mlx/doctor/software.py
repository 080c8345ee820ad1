"""Python, the packages that the program uses, and the extras with what each is for."""

import platform
import sys
from importlib import metadata
from typing import Any

from g3n_mlx.installation import install_command, version

REQUIRED = ("numpy", "tokenizers", "huggingface_hub", "pillow", "soundfile", "soxr", "av", "prompt_toolkit")
# The extras but for the backends': what each is for, and the packages it brings.
EXTRAS = {
    "heif": ("HEIC images", ("pillow-heif",)),
    "pdf": ("PDF files in messages", ("pypdf",)),
    "pictures": ("images shown in the terminal", ("textual-image",)),
    "mic": ("recording in the chat", ("sounddevice",)),
    "plot": ("g3n eval --plot", ("matplotlib",)),
    "gguf": ("GGUF files with Q6_K and the like", ("gguf",)),
    "mcp": ("g3n mcp", ("mcp",)),
    "parquet": ("g3n batch -o FILE.parquet", ("pyarrow",)),
    "ray": ("g3n batch --ray", ("ray",)),
    "server": (
        "g3n serve, and answers after a schema or grammar",
        ("fastapi", "uvicorn", "python-multipart", "llguidance", "prometheus-client", "httpx"),
    ),
}


def python() -> dict[str, str]:
    """The interpreter and the system."""
    return {"version": platform.python_version(), "executable": sys.executable, "system": platform.platform()}


def packages() -> dict[str, str | None]:
    """Versions by name, this package's first; None for one that is missing."""
    return {"g3n-mlx": version(), **{name: _version(name) for name in REQUIRED}}


def extras() -> list[dict[str, Any]]:
    """Every extra: what it is for, the versions of its packages, and how to install it where one is missing."""
    found: list[dict[str, Any]] = []
    for name, (purpose, distributions) in EXTRAS.items():
        versions = {distribution: _version(distribution) for distribution in distributions}
        install = install_command(name) if None in versions.values() else None
        found.append({"name": name, "purpose": purpose, "packages": versions, "install": install})
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
