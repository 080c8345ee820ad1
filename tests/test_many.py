"""Answers to many prompts at once: each as alone, in whatever order they are complete, errors in their place."""

import itertools
from dataclasses import replace

import pytest
from devices import device_for

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.engine.grammar import GrammarError
from g3n_mlx.engine.runner import Runner
from g3n_mlx.sampling import SamplingParams

PROMPTS = ["Hello", "What is 7 + 5?", "Say this again: one two three four", "Who are you?", [5, 6, 7], "2 + 2?"]
OPTIONS = {"temperature": 0.9, "max_tokens": 12}


@pytest.fixture(scope="module")
def model(backend):
    return load(demo_folder(), backend=backend, device=device_for(backend), dtype="float32")


def alone(model, prompts, **options):
    return [model.generate(prompt, **options, seed=3 + i).token_ids for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("parallel", [1, 3, 16])
def test_each_is_what_it_would_be_alone(model, parallel):
    results = model.generate_many(PROMPTS, parallel=parallel, seed=3, **OPTIONS)
    assert [result.token_ids for result in results] == alone(model, PROMPTS, **OPTIONS)
    assert all(result.text and result.usage.completion_tokens == len(result.token_ids) for result in results)


def test_tokens_of_several_are_drawn_in_one_call(model, monkeypatch):
    """Four prompts of one chunk each: every decode step is one call for all that are in progress."""
    calls, network = [], model.runner.model

    class Counted:
        def __getattr__(self, name):
            return getattr(network, name)

        def __call__(self, batch):
            calls.append((len(batch.rows), bool(batch.steps)))
            return network(batch)

    monkeypatch.setattr(model, "runner", Runner(Counted(), model.runner.thread, "demo"))
    model.generate_many(PROMPTS[:4], parallel=4, temperature=0, max_tokens=9, ignore_eos=True)
    decoded = [count for count, is_decode in calls if is_decode]
    assert sum(decoded) == 4 * 8
    assert [count for count, is_decode in calls if not is_decode] == [1] * 4
    assert decoded.count(4) >= 5
    # At most one part of a prompt between two tokens.
    kinds = "".join("d" if is_decode else "p" for _, is_decode in calls)
    assert "pp" not in kinds.lstrip("p")


def test_a_bad_prompt_is_its_own_error(model):
    prompts = ["Hello", [], [{"role": "nobody", "content": "x"}], "2 + 2?"]
    found = dict(model.stream_many(iter(prompts), parallel=2, temperature=0, max_tokens=4))
    assert [type(found[i]).__name__ for i in range(4)] == [
        "Result",
        *[type(found[i]).__name__ for i in (1, 2)],
        "Result",
    ]
    assert isinstance(found[1], ValueError)
    assert isinstance(found[2], ValueError)
    assert "nobody" in str(found[2])
    with pytest.raises(ValueError, match="the prompt is"):
        model.generate_many(prompts, temperature=0, max_tokens=4)


def test_prompts_are_taken_when_there_is_room(model):
    """So an endless source of prompts is no problem, and a reader that stops early runs nothing more."""
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield f"{number} + 1?"

    answers = model.stream_many(endless(), parallel=2, temperature=0, max_tokens=3)
    first = [number for number, _ in itertools.islice(answers, 4)]
    answers.close()
    assert sorted(first) == first or len(set(first)) == 4
    assert len(taken) <= 7
    assert model.generate("Hello", temperature=0, max_tokens=3).text


def test_params_and_a_schema_for_all(model):
    pytest.importorskip("llguidance")
    params = SamplingParams(temperature=0, max_tokens=20)
    results = model.generate_many(PROMPTS[:3], params, regex="[a-c]{2}")
    assert all(set(result.text) <= set("abc") and len(result.text) == 2 for result in results)
    assert model.generate_many([], params) == []
    with pytest.raises(ValueError, match="constraint is good for one answer"):
        list(model.stream_many(["a"], replace(params), constraint=object()))
    with pytest.raises(ValueError, match="parallel is 0"):
        list(model.stream_many(["a"], parallel=0))


def test_what_fails_on_the_way_is_that_prompts_error_and_a_bug_ends_it(model, monkeypatch):
    class Failing:
        def __init__(self, error):
            self.error, self.asked = error, 0

        def mask(self):
            self.asked += 1
            if self.asked == 3:
                raise self.error

        def push(self, token_id):
            pass

    def constraints(error):
        made = iter([None, Failing(error), None])
        monkeypatch.setattr("g3n_mlx.model.constraint_of", lambda *_: next(made))

    prompts = ["Hello", "2 + 2?", "Who are you?"]
    constraints(GrammarError("too complex"))
    found = dict(model.stream_many(prompts, parallel=3, temperature=0, max_tokens=6, ignore_eos=True))
    assert str(found[1]) == "too complex"
    assert [len(found[i].token_ids) for i in (0, 2)] == [6, 6]
    constraints(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        list(model.stream_many(prompts, parallel=3, temperature=0, max_tokens=6, ignore_eos=True))
