"""A server on a free port with the embedded model, in a thread of this process, and what talks to it.

Also a file server, which stands for the hosts that media come from, and media for it to serve.
"""

import functools
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import soundfile
import uvicorn
from devices import served_backend
from PIL import Image

from g3n_mlx import load
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.server.app import create_app
from g3n_mlx.server.engine import Engine, ServerLimits
from g3n_mlx.server.gate import GatePolicy
from g3n_mlx.server.metrics import Metrics
from g3n_mlx.server.models import ModelTable
from g3n_mlx.server.offer import offered, with_adapters
from g3n_mlx.server.scheduler import Scheduler

STRICT = {"paths": None, "private_hosts": False, "max_bytes": 8 << 20, "timeout_s": 20.0}
WAIT_S = 120.0  # how long a busy machine may take for what is awaited


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
        given = {"api_key": "foobar", "max_retries": 0, "timeout": WAIT_S, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)

    def http(self, **options: Any) -> Any:
        """A plain client."""
        return httpx.Client(base_url=self.url, timeout=WAIT_S, **options)

    def figure(self, name: str) -> float:
        """A sample of /metrics."""
        value = self.engine.metrics.registry.get_sample_value(f"g3n_{name}")
        assert value is not None, name
        return value


def started(folder: Path, **options: Any) -> Server:
    """Starts a server in a thread; options: fields of ServerLimits, GatePolicy and MediaPolicy, and the scheduler's."""

    def given(names: dict[str, Any]) -> dict[str, Any]:
        return {name: options.pop(name, default) for name, default in names.items()}

    parallel = options.pop("parallel", 4)
    scheduling = given({"cache_bytes": 64 << 20, "draft": "auto"})
    limits = given({"max_queue": 64, "request_timeout_s": 300.0})
    gate = given({"api_key": None, "hosts": frozenset(), "cors_origins": frozenset(), "max_body_bytes": 4 << 20})
    names = given({"name": "tiny", "slice_name": None, "other_names": (), "any_name": False})
    offer, shedding = options.pop("slices", ["none"]), options.pop("shedding", None)
    adapters = options.pop("adapters", ())
    metrics = Metrics()
    backend = options.pop("backend", served_backend())
    # In float32 an answer is the same whether its prompt was cached or not: what differs, no draw sees.
    model = load(folder, backend=backend, dtype="float32")
    slices = offered(model, offer, ())
    adapted = with_adapters(model, adapters, ModelTable(**names, slices=list(slices)).ids)
    scheduler = Scheduler(
        model, parallel=parallel, metrics=metrics, slices=slices, shedding=shedding, adapted=adapted, **scheduling
    )
    policy = MediaPolicy(**{**STRICT, **options})
    engine = Engine(model, scheduler, ServerLimits(parallel=parallel, policy=policy, **limits), metrics)
    app = create_app(engine, ModelTable(**names, slices=list(slices), adapters=list(adapted)), GatePolicy(**gate))
    listener = socket.create_server(("127.0.0.1", 0))
    runner = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=120))
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


def wait_until(holds: Callable[[], bool]) -> None:
    """Waits for something that other threads bring about; fails when they never do."""
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


@contextmanager
def file_server(folder: Path, redirects: dict[str, str] | None = None) -> Iterator[str]:
    """Serves a folder; yields its "127.0.0.1:PORT". redirects: from a path to a URL."""

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path in (redirects or {}):
                self.send_response(302)
                self.send_header("Location", (redirects or {})[self.path])
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def picture(file_format: str = "PNG", colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    """A picture of one colour with a white square in it."""
    pixels = np.full((40, 60, 3), colour, dtype=np.uint8)
    pixels[10:20, 10:20] = 255
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, file_format)
    return written.getvalue()


def sound(seconds: float = 0.5, file_format: str = "WAV", pitch_hz: float = 440.0) -> bytes:
    """A tone that is interrupted every half second."""
    time_s = np.arange(int(seconds * 16000)) / 16000
    tone = 0.3 * np.sin(2 * np.pi * pitch_hz * time_s) * (time_s % 0.5 < 0.4)
    written = io.BytesIO()
    soundfile.write(written, tone.astype(np.float32), 16000, format=file_format)
    return written.getvalue()


def video(seconds: int = 2) -> bytes:
    """Pictures that become lighter, four a second, without sound."""
    import av

    written = io.BytesIO()
    with av.open(written, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(seconds * 4):
            pixels = np.full((48, 64, 3), 20 + 20 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return written.getvalue()


def pdf(text: str, pages: int = 1) -> bytes:
    """A PDF with the text on every page."""
    content = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
    kids = " ".join(f"{4 + page} 0 R" for page in range(pages))
    page = b"<< /Type /Page /Parent 2 0 R /Contents 3 0 R /MediaBox [0 0 300 200] /Resources << /Font << /F1 "
    page += b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {pages} >>".encode(),
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        *[page] * pages,
    ]
    written, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(written))
        written += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n"
    return written + end % (len(places) + 1, table, len(places) + 1, len(written))
