"""The engine under load: places, clients that go away, time limits, failures, shutdown, the prefix cache."""

import asyncio
import base64
import socket
import threading
import time
from dataclasses import replace

import httpx
import openai
import pytest
from running import started, stopped, video, wait_until

from g3n_mlx.engine.grammar import GrammarError
from g3n_mlx.server import app
from g3n_mlx.server.engine import GRAMMAR_THREADS
from g3n_mlx.server.scheduler import DONE, Ended, Expired, Job, Task

HELLO = [{"role": "user", "content": "Hello"}]
AN_HOUR_S = 3600.0
CLOCK = {"type": "function", "function": {"name": "clock"}}
REGEX = {"type": "regex", "value": "[a-z ]*"}


class Gate:
    """A constraint that forbids nothing, and holds the model's thread while it is closed."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def mask(self):
        self.reached.set()
        assert self.open.wait(300)

    def push(self, token_id):
        pass


class Broken:
    """A constraint that fails at its third token."""

    def __init__(self, error):
        self.error, self.asked = error, 0

    def mask(self):
        self.asked += 1
        if self.asked == 3:
            raise self.error

    def push(self, token_id):
        pass


class Steps(list):
    """What a job delivers; calls back after each step."""

    def __init__(self, after=lambda steps: None):
        super().__init__()
        self.ended, self.after = threading.Event(), after

    def __call__(self, step):
        self.append(step)
        self.after(self)
        if step is DONE or isinstance(step, BaseException):
            self.ended.set()

    @property
    def tokens(self):
        return [step.token for step in self if step is not DONE and getattr(step, "token", None) is not None]


def job(server, deliver, text="Hello", constraint=None, timeout_s=AN_HOUR_S, **options):
    """A job of the scheduler, past the network; its answer has no end but max_tokens."""
    model = server.engine.model
    params = model.sampling_params(**{"ignore_eos": True, "temperature": 0.0, "max_tokens": 40, **options})
    now = time.monotonic()
    return Job(Task(model.prepare(text), params, constraint), deliver, now, now + timeout_s)


def run(server, *args, **options):
    """Submits a job; returns what it delivers."""
    steps = Steps()
    server.engine.scheduler.submit(job(server, steps, *args, **options))
    return steps


def ask(client, **options):
    given = {"model": "default", "messages": HELLO, "max_tokens": 3, "temperature": 0, **options}
    return client.chat.completions.create(**given)


def forever(server):
    """Options of an answer that would last for minutes."""
    bias = {str(token_id): -100 for token_id in server.engine.model.eos_token_ids}
    return {"max_tokens": 20_000, "logit_bias": bias}


@pytest.fixture
def held(serve):
    """held(parallel=1): a server whose model waits, and the gate that lets it go on."""
    gates = []

    def start(**options):
        server, gate = serve(**options), Gate()
        gates.append(gate)
        run(server, constraint=gate)
        assert gate.reached.wait(300)
        return server, gate

    yield start
    for gate in gates:
        gate.open.set()


def test_a_full_queue_is_a_429(held):
    """parallel + max_queue places; the one too many is told when to come again, and nobody in the queue is lost."""
    server, gate = held(parallel=1, max_queue=2)
    client, answers = server.openai(), []
    threads = [threading.Thread(target=lambda: answers.append(ask(client))) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.engine.places_taken == 3)
    with pytest.raises(openai.RateLimitError) as refused:
        ask(client)
    assert int(refused.value.response.headers["retry-after"]) > 0
    assert refused.value.type == "rate_limit_error"
    assert refused.value.code == "queue_full"
    with server.http() as http:
        assert http.get("/health").status_code == 200  # costs no place
    gate.open.set()
    for thread in threads:
        thread.join()
    assert len(answers) == 3
    assert ask(client).choices


def test_the_official_client_tries_again(held):
    server, gate = held(parallel=1, max_queue=0)
    place = threading.Thread(target=ask, args=(server.openai(),))
    place.start()
    wait_until(lambda: server.engine.places_taken == 1)
    threading.Timer(0.5, gate.open.set).start()
    assert ask(server.openai(max_retries=50)).choices
    place.join()


def test_a_short_answer_does_not_wait_behind_a_long_one(server):
    long = run(server, max_tokens=3000)
    short = run(server, "Hi", max_tokens=3)
    assert short.ended.wait(300)
    assert not long.ended.is_set()
    assert len(short.tokens) == 3
    # In turn: the long one got about as many steps as the short one, besides those it took alone.
    assert len(long.tokens) < 2500
    long.after = lambda steps: None
    stop_all(server, long)


def test_a_request_of_many_prompts_leaves_room_for_others(held):
    server, gate = held(parallel=1)
    order = []
    batch = [job(server, Steps(lambda steps, n=n: order.append(n)), max_tokens=1) for n in range(6)]
    single = job(server, Steps(lambda steps: order.append("single")), max_tokens=1)
    for one in batch:
        one.request = "batch"
    single.request = "single"
    for one in [*batch, single]:
        server.engine.scheduler.submit(one)
    gate.open.set()
    assert batch[-1].deliver.ended.wait(300)
    assert list(dict.fromkeys(order)) == [0, "single", 1, 2, 3, 4, 5]


def stop_all(server, *others):
    """Waits until nothing runs."""
    for running in list(server.engine.scheduler._rounds.tasks):
        running.job.stopped = True
    for steps in others:
        assert steps.ended.wait(300)


def test_answers_taken_in_turn_are_those_they_would_be_alone(server):
    texts = ["Hello", "What is two plus two?", "Name a river."]
    alone = [run(server, text, seed=index, temperature=1.0, max_tokens=20) for index, text in enumerate(texts)]
    for steps in alone:
        assert steps.ended.wait(300)
    together = [run(server, text, seed=index, temperature=1.0, max_tokens=20) for index, text in enumerate(texts)]
    for one, other in zip(alone, together, strict=True):
        assert other.ended.wait(300)
        assert one.tokens == other.tokens


def test_between_two_tokens_there_is_at_most_one_part_of_a_prompt(server, monkeypatch):
    """While one answer decodes, three prompts of many parts come."""
    network, calls = server.engine.model.runner.model, []

    class Counted:
        def __getattr__(self, name):
            return getattr(network, name)

        def __call__(self, batch):
            calls.append("d" if batch.steps else "p")
            return network(batch)

    monkeypatch.setattr(server.engine.model.runner, "_model", Counted())
    others = []

    def submit(steps, text, max_tokens):
        submitted = job(server, steps, text, max_tokens=max_tokens, prefill_step_size=16)
        submitted.task = replace(submitted.task, draft=False)  # so that a call of several tokens is a part of a prompt
        server.engine.scheduler.submit(submitted)

    def joined(steps):
        if len(steps.tokens) == 5 and not others:
            others.extend(Steps() for _ in range(3))
            for n, other in enumerate(others):
                submit(other, f"{n} " + "one two three " * 40, 1)

    first = Steps(joined)
    submit(first, "Hello", 60)
    for steps in (first, *others):
        assert steps.ended.wait(300)
    order = "".join(calls)
    assert order.count("p") > 20
    until_last = order[order.index("d") : order.rindex("d")]
    assert "pp" not in until_last
    assert "pd" in until_last


def test_a_stopped_job_ends_before_its_next_token(server):
    """What a client that goes away comes down to."""
    jobs = []

    def stop_at_five(steps):
        jobs[0].stopped = len(steps.tokens) == 5 or jobs[0].stopped

    steps = Steps(stop_at_five)
    jobs.append(job(server, steps, max_tokens=1000))
    server.engine.scheduler.submit(jobs[0])
    assert steps.ended.wait(300)
    assert len(steps.tokens) == 5
    assert steps[-1] is DONE


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_answer(server, stream):
    before = server.figure("completion_tokens_total")
    body = {"messages": HELLO, "stream": stream, **forever(server)}
    with server.http() as http:
        if stream:
            with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=body, timeout=0.3)
    wait_until(lambda: server.figure("running") == 0 and server.engine.places_taken == 0)
    assert server.figure("completion_tokens_total") - before < 20_000


def test_a_client_that_goes_away_while_it_waits(held):
    server, gate = held(parallel=1)
    with server.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 500}, timeout=0.3)
    wait_until(lambda: server.engine.places_taken == 0)
    gate.open.set()
    wait_until(lambda: server.figure("running") == 0 and server.figure("queue_length") == 0)
    assert server.figure("completion_tokens_total") == 40  # the one that held the model


def test_requests_have_a_time_limit(serve):
    server = serve(request_timeout_s=0.5)
    with pytest.raises(openai.InternalServerError, match=r"not complete after 0\.5 s") as late:
        ask(server.openai(max_retries=2), **forever(server))
    assert late.value.status_code == 503
    assert late.value.code == "timeout"
    labels = {"path": "/v1/chat/completions", "status": "503"}
    assert server.engine.metrics.registry.get_sample_value("g3n_requests_total", labels) == 1, "it was tried again"
    with pytest.raises(openai.APIError, match=r"not complete after 0\.5 s"):  # the status of a stream is sent by then
        list(ask(server.openai(), stream=True, **forever(server)))
    waiting = run(server, timeout_s=-1)
    assert waiting.ended.wait(300)
    assert isinstance(waiting[-1], Expired)
    wait_until(lambda: server.figure("running") == 0)
    assert server.engine.scheduler.alive


def test_a_request_has_to_arrive_in_time(serve, monkeypatch):
    monkeypatch.setattr(app, "SLACK_S", 0.1)
    server = serve(request_timeout_s=0.1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert half.recv(4096).startswith(b"HTTP/1.1 408 ")


class Panic(BaseException):
    """What Rust's panics look like in Python."""


@pytest.mark.parametrize("error", [RuntimeError("broken"), MemoryError(), Panic()])
def test_a_failure_in_one_request_harms_no_other(server, client, error):
    other = run(server, "Hi", max_tokens=30)
    failed = run(server, constraint=Broken(error))
    assert failed.ended.wait(300)
    assert failed[-1] is error
    assert len(failed.tokens) == 2
    assert other.ended.wait(300)
    assert len(other.tokens) == 30
    assert ask(client).choices
    wait_until(lambda: server.figure("running") == 0)


@pytest.mark.parametrize("place", ["answer", "score"])
def test_a_panic_before_the_first_step_harms_no_other(server, client, monkeypatch, place):
    scheduler, panic = server.engine.scheduler, Panic()

    def broken(*_):
        raise panic

    with monkeypatch.context() as patched:
        patched.setattr(type(scheduler._model), place, broken)
        if place == "answer":
            failed = run(server, "Hi")
        else:
            failed = Steps()
            prompt = server.engine.model.prepare("Hi")
            scheduler.submit(Job(Task(prompt, None, scored=1), failed, time.monotonic(), time.monotonic() + 300))
        assert failed.ended.wait(300)
    assert failed[-1] is panic
    assert scheduler.alive
    assert ask(client).choices


def test_a_grammar_that_takes_long_to_compile_stops_nobody_else(server, client):
    """As many as there are threads for grammars; each ends with a 400."""
    refused, ended = [], threading.Event()

    def constrained(number):
        schema = {"type": "integer", "multipleOf": 10_000_019 + number}
        with pytest.raises(openai.BadRequestError, match="to compile: make it simpler"):
            ask(client, response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
        refused.append(number)
        ended.set()

    threads = [threading.Thread(target=constrained, args=(number,)) for number in range(GRAMMAR_THREADS)]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.engine.places_taken == GRAMMAR_THREADS)
    assert ask(client).choices
    assert ask(client, messages=[{"role": "user", "content": "How are you?"}]).choices
    assert not ended.is_set()
    for thread in threads:
        thread.join()
    assert len(refused) == GRAMMAR_THREADS


def test_nobody_waits_for_a_thread_that_is_no_more(serve, monkeypatch):
    """Should the scheduler itself fail, whoever waits is told, and so is /health."""
    server = serve()
    scheduler = server.engine.scheduler
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(scheduler, "_round", lambda: 1 / 0)
    with pytest.raises(openai.InternalServerError) as refused:
        ask(server.openai())
    assert refused.value.status_code == 503
    wait_until(lambda: not scheduler.alive)
    with pytest.raises(openai.InternalServerError):
        ask(server.openai())
    with server.http() as http:
        assert http.get("/health").status_code == 503


def test_shutdown_finishes_what_was_begun(demo):
    server = started(demo)
    stream = ask(server.openai(), max_tokens=60, stream=True, logit_bias=forever(server)["logit_bias"])
    next(iter(stream))
    ending = threading.Thread(target=stopped, args=(server,))
    ending.start()
    wait_until(lambda: server.runner.should_exit)
    chunks = list(stream)
    ending.join()
    assert chunks[-1].choices[0].finish_reason == "length"
    assert not server.engine.scheduler.alive
    steps = run(server)
    assert isinstance(steps[-1], Ended)
    with pytest.raises(openai.APIConnectionError):
        ask(server.openai())


def test_the_prefix_cache_is_shared_between_requests(serve):
    server = serve()
    client = server.openai()
    system = {"role": "system", "content": "You are a lighthouse keeper, and answer in one sentence. " * 4}

    def cached(*messages):
        usage = ask(client, messages=[system, *messages]).usage
        return usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens

    found, first = cached(*HELLO)
    assert found < 8
    again, _ = cached(*HELLO)
    other, _ = cached({"role": "user", "content": "Is there fog tonight?"})
    assert 40 < other < again == first - 1  # the system text; a prompt's last token has to run
    answer = ask(client, messages=[system, *HELLO]).choices[0].message
    follow, _ = cached(*HELLO, answer.model_dump(include={"role", "content"}), {"role": "user", "content": "And now?"})
    assert follow >= first
    assert server.figure("prefix_cache_hits_total") >= 3
    assert server.figure("cached_tokens_total") >= again + other + follow
    assert server.figure("prefix_cache_bytes") > 0


def test_a_place_keeps_no_jobs_that_are_done(serve):
    """A transcription of hours runs hundreds, each with a prompt of its own."""
    server, kept = serve(), []

    async def several():
        with server.engine.place() as place:
            for _ in range(3):
                async for _ in place.run([job(server, None, max_tokens=2).task] * 2):
                    pass
                kept.append(len(place.jobs))

    asyncio.run(several())
    assert kept == [0, 0, 0]


@pytest.mark.parametrize("options", [{"tools": [CLOCK]}, {"extra_body": {"grammar": REGEX}}])
def test_a_grammar_that_fails_on_the_way_names_its_field(serve, monkeypatch, options):
    server = serve()
    monkeypatch.setattr(type(server.engine.grammars), "_constraint", lambda *_: Broken(GrammarError("too complex")))
    with pytest.raises(openai.BadRequestError, match="too complex") as refused:
        ask(server.openai(), max_tokens=9, **options)
    assert refused.value.param == ("tools" if "tools" in options else "grammar")


def test_media_are_not_opened_for_longer_than_the_request_lasts(serve):
    """A thread that goes on with what nobody waits for any more would be missing to the others."""
    server = serve(request_timeout_s=0.5)
    long = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + base64.b64encode(video(2)).decode()}}
    with server.engine.place() as place:
        assert place.policy.deadline == place.deadline
    policy = replace(server.engine.limits.policy, deadline=time.monotonic() - 1)
    with pytest.raises(TimeoutError):
        server.engine.model.prepare([{"role": "user", "content": [long]}], policy)


def test_a_hit_gives_the_same_answer(serve):
    server = serve()
    client = server.openai()
    options = {"messages": [{"role": "system", "content": "Be brief."}, *HELLO], "max_tokens": 20, "seed": 3}
    first, second = (ask(client, temperature=1, **options) for _ in range(2))
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens_details.cached_tokens
    assert first.choices[0].message.content == second.choices[0].message.content


def test_the_prefix_cache_stays_within_its_memory(serve):
    server = serve(cache_bytes=3 << 20)
    client = server.openai()
    for number in range(12):
        ask(client, messages=[{"role": "user", "content": f"{number} is a number. " * 30}])
        assert server.figure("prefix_cache_bytes") <= 3 << 20
    assert server.figure("prefix_cache_bytes") > 0


def test_caches_in_progress_stay_within_the_memory(held):
    """Answers that together may need more than there is wait for each other; one that needs more alone may run."""
    server, gate = held(parallel=4, cache_bytes=1)
    others = [run(server, "Hi", max_tokens=2) for _ in range(2)]
    gate.open.set()
    most = 0
    while not all(steps.ended.is_set() for steps in others):
        most = max(most, server.engine.scheduler.running)
        time.sleep(0.001)
    assert most == 1
