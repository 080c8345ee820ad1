"""A server on a free port with the tiny checkpoint, in a thread of this process, and clients that talk to it."""

import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from g3n_mlx import load
from g3n_mlx.fetch import FetchPolicy
from g3n_mlx.server.app import create_app
from g3n_mlx.server.engine import Engine, Limits
from g3n_mlx.server.gate import GatePolicy
from g3n_mlx.server.metrics import Metrics
from g3n_mlx.server.models import ModelTable
from g3n_mlx.server.scheduler import Scheduler

STRICT = {"paths": None, "private_hosts": False, "max_bytes": 8 << 20, "timeout_s": 5.0}


@dataclass
class Server:
    """A running server and ways to call it."""

    port: int
    engine: Any
    runner: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, **options: Any) -> Any:
        """The official client."""
        given = {"api_key": "foobar", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)

    def http(self, **options: Any) -> Any:
        """A plain client."""
        return httpx.Client(base_url=self.url, timeout=60, **options)


def started(folder: Path, **options: Any) -> Server:
    """Starts a server in a thread; options: fields of Limits, GatePolicy and FetchPolicy, and the scheduler's."""

    def given(names: dict[str, Any]) -> dict[str, Any]:
        return {name: options.pop(name, default) for name, default in names.items()}

    parallel = options.pop("parallel", 4)
    scheduling = given({"cache_bytes": 64 << 20})
    limits = given({"max_queue": 64, "request_timeout_s": 60.0})
    gate = given({"api_key": None, "hosts": frozenset(), "cors_origins": frozenset(), "max_body_bytes": 4 << 20})
    names = given({"name": "tiny", "slice_name": None})
    metrics = Metrics()
    backend = options.pop("backend", "torch")
    scheduler = Scheduler(lambda: load(folder, backend=backend), parallel=parallel, metrics=metrics, **scheduling)
    policy = FetchPolicy(**{**STRICT, **options})
    engine = Engine(scheduler.start(), scheduler, Limits(parallel=parallel, policy=policy, **limits), metrics)
    app = create_app(engine, ModelTable(**names), GatePolicy(**gate))
    listener = socket.create_server(("127.0.0.1", 0))
    runner = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    runner.thread = thread
    return Server(listener.getsockname()[1], engine, runner)


def stopped(server: Server) -> None:
    """Ends a server as SIGTERM does."""
    server.runner.should_exit = True
    server.runner.thread.join()
