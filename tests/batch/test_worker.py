"""The class that Ray Data maps: rows in, results out, the same with and without a cluster."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from g3n_mlx.batch import Worker

ray_only = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


def column(*values):
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


@pytest.fixture
def make():
    workers = []

    def made(**options):
        options["load_options"] = {"backend": "torch", "dtype": "float32"}
        workers.append(Worker("demo", parallel=3, **options))
        return workers[-1]

    yield made
    for worker in workers:
        worker.close()


def test_rows_of_requests(make):
    worker = make()
    bodies = [{"messages": [{"role": "user", "content": f"What is {i} + 5?"}], "temperature": 0} for i in range(4)]
    bodies[2]["temperature"] = "hot"
    url = "/v1/chat/completions"
    ids = [f"r{i}" for i in range(4)]
    first = worker({"custom_id": column(*ids), "url": column(*[url] * 4), "body": column(*map(json.dumps, bodies))})
    lines = [json.dumps({"custom_id": i, "url": url, "body": body}) for i, body in zip(ids, bodies, strict=True)]
    second = {}
    threads = [
        threading.Thread(target=lambda i=i: second.update({i: worker({"request": column(lines[i])})})) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(first["custom_id"]) == ids
    assert (
        list(first["text"]) == [second[i]["text"][0] for i in range(4)] == ["0 + 5 = 5", "1 + 5 = 6", "", "3 + 5 = 8"]
    )
    assert [bool(error) for error in first["error"]] == [False, False, True, False]
    assert [json.loads(line)["custom_id"] for line in first["result"]] == ids
    broken = worker({"request": column(lines[0], "{")})
    assert [bool(error) for error in broken["error"]] == [False, True]
    with pytest.raises(ValueError, match=r"Worker\(prompt=...\)"):
        worker({"path": column("a.png")})
    with pytest.raises(ValueError, match="the columns are text, expected path"):
        worker({"text": column("a.png")})


def test_rows_of_files(make, repository):
    path = repository / "examples" / "media" / "shapes.png"
    worker = make(prompt="How many circles are there?", temperature=0.0)
    paths, contents = column(str(path), "s3://bucket/x.png", "s3://bucket/notes.txt"), [path.read_bytes()] * 3
    found = worker({"path": paths, "bytes": column(*contents)})
    assert list(found["text"][:2]) == ["A red circle (1) and a blue square: there is 1 circle."] * 2
    assert found["error"][2] == "s3://bucket/notes.txt has no name of an image, audio or video file"
    assert list(worker({"path": paths[:1]})["text"]) == list(found["text"][:1])


@ray_only
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the actors by their processes' names")
def test_a_cluster_whose_actor_is_killed_has_the_results_of_a_local_run(tmp_path):
    requests = tmp_path / "requests.jsonl"
    body = {"max_tokens": 8, "temperature": 0}
    lines = [
        {"custom_id": f"r{i}", "url": "/v1/completions", "body": {**body, "prompt": f"{i} + 1 ="}} for i in range(256)
    ]
    requests.write_text("".join(json.dumps(line) + "\n" for line in [*lines, "broken"]))
    command = [sys.executable, "-m", "g3n_mlx", "batch", str(requests), "--model", "demo", "--dtype", "float32", "-o"]

    def texts(path):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({line["custom_id"] for line in found}) == len(found) == 257
        return {f["custom_id"]: f["error"] or f["response"]["body"]["choices"][0]["text"] for f in found}

    subprocess.run([*command, str(tmp_path / "local.jsonl")], check=True, capture_output=True, timeout=300)
    output = tmp_path / "ray.jsonl"
    on_ray = [*command, str(output), "--ray", "local", "--workers", "2"]
    with subprocess.Popen(on_ray, stderr=subprocess.PIPE, text=True) as running:
        killed = 0
        limit = time.monotonic() + 240
        while running.poll() is None and not killed and time.monotonic() < limit:
            if output.exists() and output.read_bytes().count(b"\n") > 32:
                actors = [p for p in psutil.Process(running.pid).children(recursive=True) if is_actor(p)]
                os.kill(actors[0].pid, 9)
                killed = actors[0].pid
            time.sleep(0.05)
        _, told = running.communicate(timeout=240)
    assert running.returncode == 0, told
    assert killed
    assert texts(output) == texts(tmp_path / "local.jsonl")


def is_actor(process):
    try:
        return "MapWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


@ray_only
@pytest.mark.slow
def test_the_example(repository):
    script = repository / "examples" / "batch" / "on_ray.py"
    assert len(script.read_text("utf-8").splitlines()) <= 40
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(line.partition(" |")[0] for line in done.stdout.splitlines() if " | " in line) == [
        "shapes.png",
        "sign.png",
    ]
