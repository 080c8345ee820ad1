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

from g3n_mlx.failures import one_line
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
    """The facts of a backend in this process: its device module's, and the seconds that the demo model answers in."""
    devices = importlib.import_module(f"g3n_mlx.backends.{name}.device")
    facts: dict[str, Any] = devices.describe()
    try:
        model = load("demo", backend=name)
        started = time.perf_counter()
        facts["answer"] = model.generate(_QUESTION, max_tokens=8, temperature=0.0).text
        return facts | {"answer_s": time.perf_counter() - started}
    except Exception as error:  # noqa: BLE001 (whatever it is, it is what the doctor was asked about)
        return facts | {"error": one_line(error)}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = probe(sys.argv[1])
    sys.stdout.write(json.dumps(found))
