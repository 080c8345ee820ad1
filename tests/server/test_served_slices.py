"""Slices of the served model: by name, each with its own caches and calls, and chosen by the server under load."""

import threading
import time

import openai
import pytest
from running import wait_until
from test_engine import Gate, run

from g3n_mlx.server.shedding import Shedding

ADD = [{"role": "user", "content": "What is 12 + 34?"}]
SLICES = ["half", "quarter", "eighth", "skip", "half-skip", "eighth-skip"]


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def ask(server, model="default", **options):
    """The completion and the headers of its response."""
    given = {"model": model, "messages": ADD, "max_tokens": 16, "temperature": 0, **options}
    raw = server.openai().chat.completions.with_raw_response.create(**given)
    return raw.parse(), raw.headers


@pytest.fixture(scope="module")
def sliced_server(demo):
    from running import started, stopped

    server = started(demo, slices=["all"])
    yield server
    stopped(server)


def test_every_slice_has_an_id_and_answers_under_it(sliced_server):
    server, model = sliced_server, sliced_server.engine.model
    ids = [entry.id for entry in server.openai().models.list()]
    assert ids == ["tiny", "tiny:whole", *(f"tiny:{name}" for name in SLICES)]
    for model_id in ids:
        name = model_id.partition(":")[2] or "whole"
        alone = model if name == "whole" else model.slice(name)
        found, headers = ask(server, model_id)
        assert found.choices[0].message.content == alone.generate(ADD, max_tokens=16, temperature=0.0).text
        assert (found.model, headers["x-g3n-slice"]) == (model_id, name)
    assert ask(server, "")[0].model == "tiny"
    with pytest.raises(openai.NotFoundError, match="'tiny:half'"):
        ask(server, "tiny:third")


def test_streams_completions_and_transcriptions_say_their_slice(sliced_server):
    client = sliced_server.openai()
    with client.chat.completions.with_streaming_response.create(
        model="tiny:half", messages=ADD, max_tokens=2, stream=True
    ) as response:
        assert response.headers["x-g3n-slice"] == "half"
        assert '"model":"tiny:half"' in next(response.iter_lines())
    raw = client.completions.with_raw_response.create(model="tiny:skip", prompt="Hi", max_tokens=0, echo=True)
    assert (raw.parse().model, raw.headers["x-g3n-slice"]) == ("tiny:skip", "skip")
    with open("examples/media/digits.ogg", "rb") as file:
        spoken = client.audio.transcriptions.with_raw_response.create(model="tiny:quarter", file=file)
    assert spoken.headers["x-g3n-slice"] == "quarter"


def test_a_prefix_is_found_again_by_the_same_slice_alone(sliced_server):
    words = [{"role": "user", "content": "Only of this test, and of no other one. " * 3}]

    def cached(model_id):
        usage = ask(sliced_server, model_id, messages=words)[0].usage
        return usage.prompt_tokens_details.cached_tokens

    ids = ["tiny:half", "tiny:quarter", "tiny"]
    fresh, again = ([cached(model_id) for model_id in ids] for _ in range(2))
    assert max(fresh) <= 8  # other tests' prompts begin with the same template
    assert min(again) > 20


def test_every_call_has_rows_of_one_slice(sliced_server, monkeypatch):
    """And each answer is what it is alone, whatever runs beside it."""
    server, scheduler = sliced_server, sliced_server.engine.scheduler
    expected = {model_id: ask(server, model_id)[0].choices[0].message.content for model_id in ("tiny", "tiny:half")}
    calls = []
    original = scheduler._rounds.calls

    def watched():
        found = original()
        calls.extend([running.job.served.slice for running in tasks] for tasks in found)
        return found

    monkeypatch.setattr(scheduler._rounds, "calls", watched)
    gate = Gate()
    held = run(server, constraint=gate, max_tokens=1)
    assert gate.reached.wait(300)
    texts, threads = [], []
    for model_id in ("tiny", "tiny:half", "tiny:half"):
        answer = lambda model_id=model_id: texts.append((model_id, ask(server, model_id)[0].choices[0].message.content))  # noqa: E731
        threads.append(threading.Thread(target=answer))
        threads[-1].start()
    wait_until(lambda: server.engine.places_taken == 3)
    gate.open.set()
    for thread in threads:
        thread.join()
    assert held.ended.wait(300)
    assert sorted(texts) == sorted((model_id, expected[model_id]) for model_id in ("tiny", "tiny:half", "tiny:half"))
    assert all(len(set(call)) == 1 for call in calls)
    assert ["half", "half"] in calls


def test_without_slices_there_is_one_id_and_no_header(server):
    assert [entry.id for entry in server.openai().models.list()] == ["tiny"]
    assert "x-g3n-slice" not in ask(server)[1]


def test_the_order_of_events_decides_what_is_shed():
    clock = Clock()
    shedding = Shedding(["large", "small"], 2.0, clock)
    assert [shedding.chosen(waited) for waited in (0.0, 1.9, 2.0)] == [None] * 3
    assert shedding.chosen(2.1) == "large"
    clock.now += 1.0
    assert shedding.chosen(9.0) == "large"  # too soon to say that it is not enough
    clock.now += 1.0
    assert shedding.chosen(9.0) == "small"
    clock.now += 5.0
    assert shedding.chosen(9.0) == "small"  # there is no smaller one
    clock.now += 19.0
    assert shedding.chosen(0.0) == "small"
    clock.now += 1.0  # 20 s without a wait
    assert shedding.chosen(0.0) == "large"
    clock.now += 19.0
    assert shedding.chosen(2.1) == "small"
    clock.now += 19.9
    assert shedding.chosen(0.0) == "small"
    clock.now += 20.1
    assert shedding.chosen(0.0) is None
    clock.now += 1000.0
    assert shedding.chosen(0.0) is None


def test_late_first_tokens_count_for_the_slice_that_was_late():
    clock = Clock()
    shedding = Shedding(["large", "small"], 2.0, clock)
    shedding.first_token(None, 3.9)
    assert shedding.current is None
    shedding.first_token(None, 4.1)
    assert shedding.current == "large"
    clock.now += 10.0
    shedding.first_token(None, 60.0)  # it started before
    assert shedding.current == "large"
    shedding.first_token("large", 4.1)
    assert shedding.current == "small"


def test_who_waited_too_long_gets_a_smaller_slice_and_later_ones_the_model_again(serve):
    clock = Clock()
    server = serve(parallel=1, slices=["all"], shedding=Shedding(["half", "quarter"], 0.05, clock))
    gate, answers = Gate(), {}
    held = run(server, constraint=gate, max_tokens=1)
    assert gate.reached.wait(300)

    def asked(model_id, **options):
        answers[model_id, *options] = ask(server, model_id, **options)

    threads = [
        threading.Thread(target=asked, args=("default",), kwargs={"n": 2}),
        threading.Thread(target=asked, args=("tiny:whole",)),
        threading.Thread(target=asked, args=("tiny:skip",)),
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(server.engine.scheduler._waiting) == 4)
    time.sleep(0.06)
    gate.open.set()
    for thread in threads:
        thread.join()
    assert held.ended.wait(300)
    found, headers = answers["default", "n"]
    assert (found.model, headers["x-g3n-slice"]) == ("tiny:half", "half")
    half = server.engine.model.slice("half").generate(ADD, max_tokens=16, temperature=0.0).text
    assert [choice.message.content for choice in found.choices] == [half, half]
    for named in ("tiny:whole", "tiny:skip"):  # whoever named a slice gets it
        assert answers[named,][0].model == named
    assert server.engine.metrics.registry.get_sample_value("g3n_shed_total", {"slice": "half"}) == 1
    assert server.figure("shed_level") == 1
    clock.now += 0.6  # the load is gone
    found, headers = ask(server)
    assert (found.model, headers["x-g3n-slice"]) == ("tiny", "whole")
    assert server.figure("shed_level") == 0
