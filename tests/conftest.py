"""The tiny checkpoint, the goldens, and the two backends, for every test."""

import importlib
import importlib.util
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_files
import devices
import numpy as np
import platformdirs
import pytest
from hypothesis import HealthCheck, settings

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.convert import convert
from g3n_mlx.kernels import library

# Threads wait for each other longer than the tiny products take, many times longer on a busy machine. Set before torch
# is imported, and for the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Other programs' caches may be read: those of the hub and of Playwright, who would look for them where ours then is.
_caches = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
os.environ.setdefault("HF_HOME", str(_caches / "huggingface"))
if sys.platform == "linux":
    os.environ.setdefault("PLAYWRIGHT_BROWSERS_PATH", str(_caches / "ms-playwright"))

# What the chat keeps of its user, and our cache, for the commands that tests start too: on Unix, and on Windows.
_kept = tempfile.TemporaryDirectory(prefix="g3n-kept-", ignore_cleanup_errors=True)
for _name in ("XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "WIN_PD_OVERRIDE_LOCAL_APPDATA"):
    os.environ[_name] = _kept.name

# Sets what MLX reads from the environment, before a test imports MLX by itself.
importlib.import_module("g3n_mlx.backends.mlx")

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"
BACKEND_PACKAGES = {"mlx": "mlx.core", "torch": "torch"}

# A busy machine takes any time, for an example as well as for making it up.
settings.register_profile("any-machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mlx-device", choices=("cpu", "gpu"), default="cpu", help="where MLX's tests run")


def pytest_configure(config: pytest.Config) -> None:
    chosen = config.getoption("--mlx-device")
    if chosen == "gpu":
        mx = importlib.import_module("mlx.core")
        if mx.default_device() != mx.Device(mx.gpu, 0):
            raise pytest.UsageError("--mlx-device gpu: MLX finds no GPU here")
    devices.choose(chosen)


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent package is absent
        return False


@pytest.fixture(autouse=True)
def nothing_piped_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that reads stdin finds its end there; pytest's own stand-in raises an error."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program's cache folder, for this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: folder)
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root folder."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """The tiny reference checkpoint in Google's layout, bf16, of random weights. Read only."""
    return REPOSITORY / "tests" / "tiny-gemma3n"


@pytest.fixture(scope="session")
def published(tiny_folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and tensors of the tiny checkpoint, read without the package. Not to be changed."""
    return checkpoint_files.read_config(tiny_folder), checkpoint_files.read_folder(tiny_folder)


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Checkpoint:
    """The tiny checkpoint as the package opens it."""
    return Checkpoint.open(tiny_folder)


@pytest.fixture(scope="session")
def quantized_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in 4 bits. Read only."""
    return convert(tiny_folder, tmp_path_factory.mktemp("q") / "4bit", q_bits=4, progress=False)


@pytest.fixture(scope="session")
def golden_arrays() -> Callable[[str], dict[str, np.ndarray]]:
    """golden_arrays("text_logits"): all arrays of one golden .npz."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as stored:
            return dict(stored)

    return read


@pytest.fixture(scope="session")
def golden_json() -> Callable[[str], Any]:
    """golden_json("chat_template"): one golden .json."""

    def read(name: str) -> Any:
        return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))

    return read


@pytest.fixture(params=["mlx", "torch"], scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Each installed backend's name in turn; the other one's tests are skipped with the reason."""
    name = request.param
    if not installed(BACKEND_PACKAGES[name]):
        pytest.skip(f"{BACKEND_PACKAGES[name]} is not installed")
    return name


@pytest.fixture(scope="session")
def backends() -> list[str]:
    """The names of the installed backends, for tests that compare them."""
    return [name for name, package in BACKEND_PACKAGES.items() if installed(package)]


INSTRUCTIONS = ("avx512bf16", "avx512", "avx2", "neon", "plain")


@pytest.fixture(params=INSTRUCTIONS)
def kernels(request: pytest.FixtureRequest) -> Any:
    """The kernels in C with every set of instructions that this processor has, one after the other."""
    calls = library.library()
    if calls is None:
        pytest.skip("the kernels are not built, or switched off")
    usual = calls.g3n_instructions()
    if not calls.g3n_use(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    calls.g3n_threads(2)
    yield calls
    calls.g3n_use(usual)
