"""One model, many threads and event loops: answers as one by one, and a process that ends well."""

import asyncio
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.engine.runner import Runner

QUESTIONS = ["Hello", "What is 12 + 30?", "Say three words.", "Who are you?"]
OPTIONS = {"temperature": 0.8, "seed": 1, "max_tokens": 12}


@pytest.fixture(scope="module")
def model(backend):
    """The demo model, loaded in a thread that has ended."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(load, demo_folder(), backend=backend, device="cpu", dtype="float32").result()


@pytest.fixture(scope="module")
def expected(model):
    return [model.generate(question, **OPTIONS).text for question in QUESTIONS]


def test_answers_in_threads_are_those_of_one_by_one(model, expected):
    def answer(index):
        return "".join(chunk.text for chunk in model.stream(QUESTIONS[index % 4], **OPTIONS))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(answer, range(12))) == expected * 3


def test_overlapping_streams_go_on_step_by_step(model):
    """None waits for another to end: both are in progress when each has given its first token."""
    meeting, texts = threading.Barrier(2, timeout=300), {}

    def stream(question):
        chunks = model.stream(question, **OPTIONS)
        first = next(chunks).text
        meeting.wait()
        texts[question] = first + "".join(chunk.text for chunk in chunks)

    threads = [threading.Thread(target=stream, args=(question,)) for question in QUESTIONS[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(texts) == set(QUESTIONS[:2])


def test_plain_routes_of_a_web_app(model, expected):
    """FastAPI runs `def` routes in threads of its own; here over a real socket, several at once."""
    fastapi, uvicorn = pytest.importorskip("fastapi"), pytest.importorskip("uvicorn")
    app = fastapi.FastAPI()

    @app.get("/answer")
    def answer(question: str) -> str:
        return model.generate(question, **OPTIONS).text

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/answer"
    try:
        with ThreadPoolExecutor(4) as clients:
            got = clients.map(lambda q: httpx.get(url, params={"question": q}, timeout=300).json(), QUESTIONS)
            assert list(got) == expected
    finally:
        server.should_exit = True
        thread.join()


def test_an_event_loop_goes_on_meanwhile(model, expected):
    async def everything():
        whole = model.agenerate(QUESTIONS[1], **OPTIONS)
        streamed = [chunk.text async for chunk in model.astream(QUESTIONS[0], **OPTIONS)]
        both = await asyncio.gather(whole, *(model.agenerate(question, **OPTIONS) for question in QUESTIONS[2:]))
        return ["".join(streamed), *(result.text for result in both)]

    assert asyncio.run(everything()) == expected


def test_cancelling_stops_the_generation_and_leaves_the_model_usable(model, expected, monkeypatch):
    calls = []
    network = model.runner.model

    class Counted:
        def __getattr__(self, name):
            return getattr(network, name)

        def __call__(self, batch):
            calls.append(len(batch.rows))
            return network(batch)

    async def cancelled():
        started = asyncio.Event()

        async def read():
            async for _ in model.astream(QUESTIONS[0], max_tokens=10_000, ignore_eos=True):
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        so_far = len(calls)
        await asyncio.to_thread(model.runner.call, lambda: None)  # behind whatever was under way
        assert len(calls) <= so_far + 1

    with monkeypatch.context() as patch:
        patch.setattr(model, "runner", Runner(Counted(), model.runner.thread, "demo"))
        asyncio.run(cancelled())
    assert model.generate(QUESTIONS[0], **OPTIONS).text == expected[0]


def test_errors_reach_their_own_caller(model):
    async def wrong():
        with pytest.raises(ValueError, match="temprature"):
            await model.agenerate("Hello", temprature=1)
        with pytest.raises(ValueError, match="the prompt is"):
            async for _ in model.astream([]):
                pass

    asyncio.run(wrong())


PROCESS = """
import asyncio, sys, threading
from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder
model = load(demo_folder(), backend=sys.argv[1], device="cpu")
def answer():
    count = len(model.generate("Hello", max_tokens=3, temperature=0).token_ids)
    print(f"{count}\\n", end="")  # in one piece: threads print at once
threads = [threading.Thread(target=answer) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(asyncio.run(model.agenerate("Hello", max_tokens=3, temperature=0)).token_ids))
"""


def test_a_process_that_used_threads_ends_well(backend):
    """Several times, since what can go wrong at exit is a race."""
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", PROCESS, backend], capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stdout.split()) == (0, ["3"] * 3), done.stderr
