"""A server with the tiny checkpoint, for every test; these tests need the extra `server` and the official client."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from running import Server

NEEDED = ("fastapi", "uvicorn", "multipart", "llguidance", "prometheus_client", "openai", "httpx", "torch")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def serve(tiny_folder: Path) -> Iterator[Callable[..., Any]]:
    """serve(parallel=1): a server with options of its own, ended with the test."""
    from running import started, stopped

    servers: list[Any] = []

    def start(**options: Any) -> Any:
        servers.append(started(tiny_folder, **options))
        return servers[-1]

    yield start
    for server in servers:
        stopped(server)


@pytest.fixture(scope="session")
def server(tiny_folder: Path) -> Iterator["Server"]:
    """A server for every test that needs no options."""
    import torch
    from running import started, stopped

    torch.set_num_threads(1)  # threads wait for each other longer than the tiny products take
    server = started(tiny_folder)
    yield server
    stopped(server)


@pytest.fixture(scope="session")
def client(server: "Server") -> Any:
    """The official client of the shared server."""
    return server.openai()
