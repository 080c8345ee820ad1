"""A server with the embedded model, for every test; these tests need the extra `server` and the official client.

What they ask for holds whatever the model says.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from devices import served_backend

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder

if TYPE_CHECKING:
    from running import Server

SERVER = ("fastapi", "uvicorn", "multipart", "llguidance", "prometheus_client")
NEEDED = (*SERVER, "openai", "httpx", "jsonschema", "hypothesis", "schemathesis", "torch")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def demo() -> Path:
    """The embedded model's folder."""
    return demo_folder()


@pytest.fixture(scope="session")
def model(demo: Path) -> Any:
    """The served model once more, to compare answers with."""
    return load(demo, backend=served_backend(), dtype="float32")


@pytest.fixture
def serve(demo: Path) -> Iterator[Callable[..., Any]]:
    """serve(parallel=1): a server with options of its own, ended with the test."""
    from running import started, stopped

    servers: list[Any] = []

    def start(**options: Any) -> Any:
        servers.append(started(demo, **options))
        return servers[-1]

    yield start
    for server in servers:
        stopped(server)


@pytest.fixture(scope="session")
def server(demo: Path) -> Iterator["Server"]:
    """A server for every test that needs no options."""
    from running import started, stopped

    server = started(demo)
    yield server
    stopped(server)


@pytest.fixture(scope="session")
def client(server: "Server") -> Any:
    """The official client of the shared server."""
    return server.openai()
