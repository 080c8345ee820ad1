"""What each backend finds here, and whether it answers: asked in a process of its own.

A framework that is built for another processor or driver ends its process or hangs; the doctor goes on without it.
"""

import contextlib
import importlib
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from g3n_mlx.doctor import parity
from g3n_mlx.failures import WorkerFailed, one_line
from g3n_mlx.loading import PACKAGES, chosen_backend, load

_TIMEOUT_S = 120.0  # the first import of a framework from a slow disk takes most of a minute
_QUESTION = "What is 3 + 4?"


def backends() -> list[dict[str, Any]]:
    """The facts of every backend, with "error" where it is not installed or does not work."""
    with ThreadPoolExecutor() as threads:
        return list(threads.map(_asked, PACKAGES))


def _asked(name: str) -> dict[str, Any]:
    try:
        chosen_backend(name)
    except ImportError as error:
        return {"name": name, "installed": False, "error": one_line(error)}
    facts: dict[str, Any] = {"name": name, "installed": True}
    try:
        child = subprocess.run(
            [sys.executable, "-m", "g3n_mlx.doctor.backends", name],
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return {**facts, "error": f"it does not answer within {_TIMEOUT_S:.0f} s"}
    with contextlib.suppress(ValueError):
        return facts | json.loads(child.stdout)
    last_line = child.stderr.strip().rpartition("\n")[2]
    return {**facts, "error": last_line or _ending(child.returncode)}


def _ending(code: int) -> str:
    if code >= 0:
        return f"its process ended with code {code}"
    return f"its process was ended by {signal.Signals(-code).name}"


def probe(name: str) -> dict[str, Any]:
    """The facts of a backend in this process: its device module's, how fast the demo model answers, and how exactly."""
    devices = importlib.import_module(f"g3n_mlx.backends.{name}.device")
    facts: dict[str, Any] = devices.describe()
    try:
        model = load("demo", backend=name)
        started = time.perf_counter()
        facts["answer"] = model.generate(_QUESTION, max_tokens=8, temperature=0.0).text
        facts["answer_s"] = time.perf_counter() - started
        exact = model if model.dtype == "float32" else load("demo", backend=name, dtype="float32")
        facts["parity"] = [parity.compared(one) for one in dict.fromkeys((exact, model))]
        off = next((figures for figures in facts["parity"] if not figures["good"]), None)
        return facts if off is None else facts | {"error": _deviation(off)}
    except Exception as error:  # noqa: BLE001 (whatever it is, it is what the doctor was asked about)
        return facts | {"error": one_line(error)}


def benchmarked(name: str) -> Any:
    """What `g3n bench` measures of the demo model with a backend."""
    command = [
        sys.executable,
        "-m",
        "g3n_mlx.bench",
        "--model",
        "demo",
        "--backend",
        name,
        "--num-trials",
        "1",
        "--json",
    ]
    lengths = ["--prompt-tokens", "128", "--generation-tokens", "64"]
    done = subprocess.run([*command, *lengths], capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    if done.returncode:
        raise WorkerFailed(done.stderr.strip().rpartition("\n")[2])
    return json.loads(done.stdout)


def _deviation(figures: dict[str, Any]) -> str:
    kind, value = max(figures["differences"].items(), key=lambda item: item[1])
    return (
        f"wrong numbers: in {figures['dtype']} the {kind} of the demo model are {value:.2g} of their largest value "
        f"off, expected {figures['limit']:g} at most"
    )


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = probe(sys.argv[1])
    sys.stdout.write(json.dumps(found))
