"""What --shed does for the time to the first token under four times the load that a server sustains.

    python tests/server/shed_load.py --model FOLDER --shed e2b [--requests 24] [--factor 4]

Two servers, one after the other: without --shed, of which the sustained rate is measured first, with as many clients as
it has answers in progress; and with it. Both get the same streamed requests at equal distances, whatever has been
answered so far. Not run by CI: it takes minutes, a whole machine, and a model whose slices are faster.
"""

import argparse
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np

WAIT_S = 600.0
PARALLEL = 4


@contextmanager
def server(model: Path, *flags: str):
    """Its URL."""
    command = [sys.executable, "-m", "g3n_mlx.server", "--model", str(model), "--port", "0", "--max-queue", "1000"]
    with subprocess.Popen(
        [*command, "--parallel", str(PARALLEL), *flags], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while not (found := re.search(r"listening at (\S+)", line := process.stderr.readline())):
            assert line, "the server has ended"
        threading.Thread(target=process.stderr.read, daemon=True).start()
        while True:
            try:
                httpx.get(f"{found[1]}/health").raise_for_status()
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        yield found[1]
        process.terminate()


def ask(url: str, number: int, tokens: int) -> tuple[float, str]:
    """Seconds to the first token of a request, and the slice that answered."""
    words = f"Number {number} of many. Tell me about the river, the sea and the mountains, in any order you like."
    body = {"messages": [{"role": "user", "content": words}], "max_tokens": tokens, "stream": True, "temperature": 0}
    body["logit_bias"] = {"1": -100, "106": -100}  # no answer ends early
    begun, first = time.monotonic(), None
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=WAIT_S) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if first is None and line.startswith("data: {"):
                first = time.monotonic() - begun
    assert first is not None
    return first, response.headers["x-g3n-slice"]


def sustained(url: str, tokens: int, rounds: int) -> float:
    """Requests a second that it answers when as many clients ask as it has answers in progress."""
    ask(url, -1, tokens)
    begun = time.monotonic()
    clients = [
        threading.Thread(target=lambda first=first: [ask(url, 1000 + first + n, tokens) for n in range(rounds)])
        for first in range(0, 100 * PARALLEL, 100)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return PARALLEL * rounds / (time.monotonic() - begun)


def under_load(url: str, requests: int, rate: float, tokens: int) -> tuple[list[float], list[str]]:
    """Seconds to the first token of every request, and the slices that answered."""
    found: list[tuple[float, str]] = []
    clients = []
    for number in range(requests):
        clients.append(threading.Thread(target=lambda number=number: found.append(ask(url, number, tokens))))
        clients[-1].start()
        time.sleep(1 / rate)
    for client in clients:
        client.join()
    return [first for first, _ in found], [slice_name for _, slice_name in found]


def main() -> None:
    """Prints the 95th percentiles and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shed", default="e2b")
    parser.add_argument("--shed-after", default="0.5")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1, help="of the measurement of the sustained rate")
    parser.add_argument("--factor", type=float, default=4.0)
    arguments = parser.parse_args()
    percentiles, rate = [], 0.0
    for flags in ([], ["--shed", arguments.shed, "--shed-after", arguments.shed_after]):
        with server(arguments.model, *flags) as url:
            if not percentiles:
                rate = sustained(url, arguments.tokens, arguments.rounds)
                print(f"sustained: {rate:.2f} requests a second", flush=True)
            else:
                ask(url, -1, arguments.tokens)
            seconds, slices = under_load(url, arguments.requests, arguments.factor * rate, arguments.tokens)
        percentiles.append(float(np.percentile(seconds, 95)))
        counts = {name: slices.count(name) for name in sorted(set(slices))}
        print(
            f"{' '.join(flags) or 'without'}: p95 {percentiles[-1]:.2f} s, median {np.median(seconds):.2f} s, {counts}"
        )
    print(f"p95 with / without: {percentiles[1] / percentiles[0]:.2f}")


if __name__ == "__main__":
    main()
