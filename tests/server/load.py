"""Load on a server: clients in parallel, some of which go away, and what that leaves behind.

python tests/server/load.py [--clients 50] [--seconds 120] [--model FOLDER] [--backend torch|mlx]

Starts a server of its own, warms it up until its resident memory grows no more, then lets the clients ask for texts,
streams, pictures, sounds, schemas and scores; a third of the requests are broken off at a random moment. At the end the
server must answer, nothing may run or wait any more, every request must have got an answer (a 429 is one), and the
memory must be within 5 % of what it was. Not run by CI: it takes minutes and most of a machine.
"""

import argparse
import base64
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from running import picture, sound

from g3n_mlx.checkpoint.hub import demo_folder

MAX_GROWTH = 0.05
MAX_WARM_UPS = 6
WAIT_S = 600.0


def request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body, of one of the kinds that there are."""
    text = " ".join([rng.choice(["river", "seven"])] * rng.randint(1, 60))
    common = {"seed": rng.randrange(1000), "temperature": 1, "max_tokens": rng.choice([1, 4, 16])}
    content: Any = text
    match rng.randrange(6):
        case 0:
            return "/v1/completions", {**common, "prompt": text, "echo": True, "logprobs": 2, "max_tokens": 1}
        case 1:
            url = "data:image/png;base64," + base64.b64encode(picture(colour=(rng.randrange(8) * 30, 9, 9))).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, text]
        case 2:
            data = base64.b64encode(sound(rng.uniform(0.1, 3.0), pitch_hz=rng.randrange(8) * 100 + 200)).decode()
            content = [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}, text]
        case 3:
            schema = {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3}
            common["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
        case 4:
            common["n"] = 2
        case _:
            pass
    messages = [
        {"role": "system", "content": f"You are number {rng.randrange(4)}. " * 4},
        {"role": "user", "content": content},
    ]
    return "/v1/chat/completions", {**common, "messages": messages, "stream": rng.random() < 0.5}


def client(url: str, rng: random.Random, end: float, counts: Counter[str], lock: threading.Lock) -> None:
    """Asks until the time is over; counts what came of it."""
    with httpx.Client(base_url=url, timeout=WAIT_S) as http:
        while time.monotonic() < end:
            path, body = request(rng)
            leaves = rng.random() < 1 / 3
            try:
                outcome = ask(http, path, body, rng.uniform(0.01, 2.0) if leaves else None)
            except httpx.ReadTimeout:
                outcome = "left" if leaves else "lost: no answer in time"
            except httpx.HTTPError as error:
                outcome = f"lost: {error!r}"
            with lock:
                counts[outcome] += 1


def ask(http: httpx.Client, path: str, body: dict[str, Any], leave_after_s: float | None) -> str:
    """One request: "answered", "429", or what is wrong with its answer."""
    begun = time.monotonic()
    with http.stream("POST", path, json=body, timeout=leave_after_s or WAIT_S) as answer:
        text = ""
        for piece in answer.iter_text():
            text += piece
            if leave_after_s is not None and time.monotonic() - begun > leave_after_s:
                return "left"
    if answer.status_code == 429:
        time.sleep(0.2)
        return "429"
    whole = "[DONE]" in text if body.get("stream") else '"usage"' in text
    return "answered" if answer.status_code == 200 and whole else f"lost: {answer.status_code} {text[:200]}"


def load(url: str, clients: int, seconds: float, seed: int) -> Counter[str]:
    """Runs the clients; returns how many requests ended in which way."""
    counts, lock, end = Counter[str](), threading.Lock(), time.monotonic() + seconds
    threads = [
        threading.Thread(target=client, args=(url, random.Random(seed * 1000 + number), end, counts, lock))
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def resident_bytes(process_id: int) -> int:
    """Resident memory of a process of Linux."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process_id}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def settled(url: str) -> dict[str, float]:
    """The server's figures once nothing runs or waits."""
    end = time.monotonic() + WAIT_S
    while True:
        text = httpx.get(f"{url}/metrics", timeout=WAIT_S).text
        figures = {name: float(value) for name, value in re.findall(r"^(g3n_\w+) (\S+)$", text, re.MULTILINE)}
        if figures["g3n_running"] == figures["g3n_queue_length"] == 0:
            return figures
        assert time.monotonic() < end, figures
        time.sleep(0.2)


def main() -> int:
    """Runs it all; the exit code says whether it held."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--model", type=Path, default=demo_folder())
    parser.add_argument("--backend", choices=["torch", "mlx"], default="torch")
    arguments = parser.parse_args()
    flags = ["--model", str(arguments.model), "--backend", arguments.backend, "--port", "0"]
    flags += ["--max-queue", "24", "--cache-memory", "0.02"]
    command = [sys.executable, "-m", "g3n_mlx.server", *flags]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads wait for each other longer than tiny products take
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_thread) as server:
        assert server.stderr is not None
        while not (found := re.search(r"listening at (\S+)", server.stderr.readline())):
            pass
        threading.Thread(target=server.stderr.read, daemon=True).start()
        url = found[1]
        while True:
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        # Caches fill, threads start, allocators grow to what this load takes: that is no leak.
        before = 0
        for number in range(MAX_WARM_UPS):
            counts = load(url, arguments.clients, arguments.seconds / 4, seed=number + 2)
            settled(url)
            earlier, before = before, resident_bytes(server.pid)
            print(f"warm-up: {before / 1e6:.0f} MB,", dict(counts), flush=True)
            if before <= earlier * 1.01:
                break
        counts = load(url, arguments.clients, arguments.seconds, seed=1)
        figures = settled(url)
        after = resident_bytes(server.pid)
        hello = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
        alive = httpx.post(f"{url}/v1/chat/completions", json=hello, timeout=WAIT_S).status_code == 200
        server.terminate()
    growth = after / before - 1
    lost = {outcome: count for outcome, count in counts.items() if outcome.startswith("lost")}
    print(f"{arguments.clients} clients, {arguments.seconds:g} s:", dict(counts))
    print(f"resident memory: {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after ({growth:+.1%})")
    print({name: value for name, value in figures.items() if "bucket" not in name})
    print(f"answers afterwards: {alive}; exit code {server.returncode}; lost: {lost or 'none'}")
    return 0 if alive and not lost and growth <= MAX_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
