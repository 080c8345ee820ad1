"""Drafts by a slice of the model, over the model's own cache: the same answers, and when they are made."""

import numpy as np
import pytest
from test_drafted_answers import SCHEMA, answered, assert_same

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.engine.drafts import LEAST_TIMES, CallCosts
from g3n_mlx.engine.nested import CALLS_BETWEEN_TRIALS, FIRST_DRAFTS, TRIAL_TOKENS, Nested, SliceDrafter
from g3n_mlx.matformer.plan import SlicePlan
from g3n_mlx.sampling import SamplingParams

QUESTIONS = ("What is 12 + 34?", "Who are you?", "Say this again: seven red cats", "Tell me about Gemma.")


@pytest.fixture(scope="module")
def model(backend):
    return load(demo_folder(), backend=backend, device="cpu", dtype="float32")


@pytest.fixture
def eager(monkeypatch):
    """A machine on which the slice costs nothing and rows neither: it drafts wherever it may."""
    monkeypatch.setattr("g3n_mlx.engine.nested.SliceDrafter.length", lambda self, limit: min(limit, 4))


@pytest.mark.parametrize("name", ["half", "half-skip"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "logprobs": True},
        {"seed": 3, "temperature": 1.2, "top_k": 64, "logit_bias": {300: 2.0}},
        {"seed": 4, "presence_penalty": 0.5, "top_p": 0.9, "stop": ("a", "4")},
    ],
)
def test_an_answer_drafted_by_a_slice_is_the_models_own(model, eager, name, options):
    """Also of a slice that lacks layers, whose first ones are the model's owners of keys and values."""
    drafted = accepted = 0
    for question in QUESTIONS:
        params, prompt = SamplingParams(max_tokens=30, **options), model.prepare(question)
        expected = answered(model, prompt, params)
        found = answered(model, prompt, params, draft=name)
        assert_same(model, found, expected)
        drafted += found[0].usage.drafted_tokens
        accepted += found[0].usage.accepted_tokens
    assert drafted > 5
    assert accepted > 0.1 * drafted


def test_a_slice_drafts_between_what_a_schema_forces(model, eager):
    pytest.importorskip("llguidance")
    params, prompt = SamplingParams(max_tokens=80, temperature=0), model.prepare("A circle.")
    expected = answered(model, prompt, params, model.grammars.json_schema(SCHEMA))
    found = answered(model, prompt, params, model.grammars.json_schema(SCHEMA), "half")
    forced = answered(model, prompt, params, model.grammars.json_schema(SCHEMA), "auto")
    assert_same(model, found, expected)
    assert found[0].usage.drafted_tokens > forced[0].usage.drafted_tokens


@pytest.fixture
def twin(model):
    """The whole model as a slice of itself."""
    text = model.config.text
    plan = SlicePlan("twin", tuple(range(text.num_hidden_layers)), text.intermediate_size)
    model._drafting_slices["twin"] = model.slice(plan)
    yield "twin"
    model._drafting_slices.pop("twin").close()
    model._nested.clear()


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 1.5}, {"temperature": 1.5, "seed": 2, "frequency_penalty": 0.9}]
)
def test_a_slice_that_is_the_model_is_always_right(model, eager, twin, options, monkeypatch):
    """It reads the model's keys and values, draws by the same numbers, with a seed or without, and counts alike."""
    monkeypatch.setattr("g3n_mlx.engine.drafts.Drafter.draft", lambda *_: [])  # lookups are wrong at times
    params = SamplingParams(max_tokens=30, ignore_eos=True, **options)
    for question in QUESTIONS:
        usage = answered(model, model.prepare(question), params, draft=twin)[0].usage
        assert usage.accepted_tokens == usage.drafted_tokens > 10


def test_in_a_batch_a_slice_does_not_draft(model, eager):
    options = {"max_tokens": 16, "seed": 3, "parallel": 4, "ignore_eos": True}
    expected = model.generate_many(QUESTIONS, **options)
    found = model.generate_many(QUESTIONS, **options, draft="half")
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_closing_the_model_closes_the_slices_that_draft(backend):
    model = load(demo_folder(), backend=backend, device="cpu", dtype="float32")
    model.generate("Hello", max_tokens=3, draft="half")
    (small,) = model._drafting_slices.values()
    other = model.slice("half")
    assert other._drafting_slices == {}
    model.close()
    assert small.runner.closed
    assert other.generate("Hello", max_tokens=3).text
    other.close()


class Silent:
    """A runner whose model is asked for a sampler only."""

    closed = False

    @property
    def model(self):
        return self

    def make_sampler(self, params, token_ids):
        return self

    def count(self, token_ids):
        pass


def costs_of(times):
    costs = CallCosts()
    for rows, seconds in times.items():
        for _ in range(LEAST_TIMES):
            costs.note(rows, seconds)
    return costs


def drafter(step_s, rows):
    nested = Nested(Silent(), (0,), costs_of({1: step_s}))
    return SliceDrafter(nested, costs_of(rows), SamplingParams(), (1, 2))


def test_a_slice_drafts_as_long_as_it_pays_and_is_tried_again_from_time_to_time():
    cheap = drafter(0.2, {1: 1.0, 16: 1.0})
    for _ in range(FIRST_DRAFTS):
        assert cheap.length(15) == TRIAL_TOKENS
        cheap.judge(2, 2)
    assert cheap.length(15) > TRIAL_TOKENS
    assert cheap.length(1) == 1
    assert cheap.length(0) == 0
    for _ in range(30):
        cheap.judge(4, 0)
    lengths = [cheap.length(15) for _ in range(2 * CALLS_BETWEEN_TRIALS)]
    assert sorted(set(lengths)) == [0, TRIAL_TOKENS]
    assert lengths.count(TRIAL_TOKENS) == 1
    for _ in range(30):
        cheap.judge(4, 4)
    assert cheap.length(15) >= 4


@pytest.mark.parametrize(("agreement", "pays"), [(0.5, False), (0.98, True)])
def test_the_cost_model_decides(agreement, pays):
    """E2B drafts for E4B at 0.54 of a step: with rows as our kernels have them it has to be right nearly always."""
    found = drafter(0.54, {1: 1.0, 2: 1.04, 4: 1.46})
    for right in np.random.default_rng(1).random(400) < agreement:
        found.judge(1, int(right))
    assert bool(found.length(15)) == pays
