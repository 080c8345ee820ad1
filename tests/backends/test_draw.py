"""The draw on the device against the draw in numpy, token for token.

Equality is demanded where the uniform number is further than 1e-5 from a border of the CDF, and where no candidate
stands that near to the border of a filter: there the two roundings may rightly differ.
"""

import ml_dtypes
import numpy as np
import pytest
from devices import device_for
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference_draw import candidates, draw, masked, penalize

from g3n_mlx.sampling import NOT_FINITE, SamplingParams, Uniforms

MARGIN = 1e-5


def sampler_of(framework, params, prompt_ids, vocab_size):
    device = framework.module("device")
    return framework.module("sampling").Sampler(
        params, prompt_ids, vocab_size, device.device_of(device_for(framework.name))
    )


def near_a_filter(scores, params):
    """Whether a candidate's fate at top_p or min_p hangs on rounding."""
    ids, probabilities = candidates(scores, SamplingParams(temperature=params.temperature, top_k=params.top_k))
    before = np.cumsum(probabilities) - probabilities
    top_p = params.top_p < 1 and np.abs(before - params.top_p).min() < MARGIN
    worse = scores[ids] < scores[ids[0]]
    min_p = params.min_p > 0 and (np.abs(probabilities / probabilities[0] - params.min_p)[worse] < MARGIN).any()
    return not params.greedy and (top_p or min_p)


def assert_same_draws(framework, params, steps, prompt_ids=(), mask=None):
    """Draws a token from each of the [V] logits and compares it with numpy's, along the device's own answer."""
    uniforms, answer = Uniforms(params.seed), []
    sampler = sampler_of(framework, params, prompt_ids, len(steps[0]))
    for position, logits in enumerate(steps):
        scores = masked(penalize(logits, params, prompt_ids, answer), mask)
        token = int(sampler.draw(framework.array(logits), position, mask))
        assert mask is None or mask[token]
        if params.greedy:
            assert token == candidates(scores, params)[0][0]
        else:
            expected, distance = draw(scores, params, uniforms.at(position))
            assert token == expected or distance < MARGIN or near_a_filter(scores, params)
        answer.append(token)


def logits_of(vocab_size, kind, seed):
    """[V] float32: smooth, with the many ties of bfloat16, of a handful of values, or all equal."""
    generator = np.random.default_rng(seed)
    logits = (generator.standard_normal(vocab_size) * 4).astype(np.float32)
    if kind == "bfloat16":
        logits = logits.astype(ml_dtypes.bfloat16).astype(np.float32)
    elif kind == "few":
        logits = generator.choice(np.array([-3.0, -0.0, 0.0, 1.5, 2.0], np.float32), vocab_size)
    elif kind == "equal":
        logits = np.full(vocab_size, -0.0, np.float32)
        logits[generator.random(vocab_size) < 0.5] = 0.0
    return logits


KINDS = st.sampled_from(["smooth", "bfloat16", "few", "equal"])


@st.composite
def cases(draws):
    vocab_size = draws(st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 129, 300, 1000, 1153])))
    token_ids = st.integers(0, vocab_size - 1)
    biases = st.one_of(st.floats(-20, 20), st.just(-np.inf), st.just(-0.0))
    params = SamplingParams(
        temperature=draws(st.one_of(st.just(0.0), st.just(1.0), st.floats(0.01, 10))),
        top_k=draws(st.one_of(st.just(0), st.just(1), st.integers(2, vocab_size + 3))),
        top_p=draws(st.one_of(st.just(1.0), st.floats(0.01, 1))),
        min_p=draws(st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 0.9))),
        frequency_penalty=draws(st.one_of(st.just(0.0), st.floats(-2, 2))),
        presence_penalty=draws(st.one_of(st.just(0.0), st.floats(-2, 2))),
        repetition_penalty=draws(st.one_of(st.just(1.0), st.floats(0.5, 2))),
        logit_bias=draws(st.dictionaries(token_ids, biases, max_size=4)),
        seed=draws(st.integers(0, 2**32)),
    )
    assume(sum(np.isneginf(bias) for bias in params.logit_bias.values()) < vocab_size)
    kind, seed = draws(KINDS), draws(st.integers(0, 2**32))
    steps = [logits_of(vocab_size, kind, seed + i) for i in range(draws(st.integers(1, 4)))]
    return params, steps, draws(st.lists(token_ids, max_size=5))


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_draws_are_numpys(framework, case):
    params, steps, prompt_ids = case
    assert_same_draws(framework, params, steps, prompt_ids)


@pytest.mark.parametrize("kind", ["smooth", "bfloat16", "few"])
@pytest.mark.parametrize("filters", [{"top_k": 64}, {"top_k": 64, "top_p": 0.95}, {"top_k": 5000, "min_p": 0.01}])
def test_draws_from_the_published_vocabulary(framework, kind, filters):
    for vocab_size in (262_400, 262_145):
        steps = [logits_of(vocab_size, kind, seed) for seed in range(2)]
        assert_same_draws(framework, SamplingParams(seed=3, **filters), steps)


@pytest.mark.parametrize("kind", ["smooth", "few"])
def test_draws_without_filters_from_the_published_vocabulary(framework, kind):
    """A sum over 262,400 numbers has to be as exact as the demand."""
    for seed in range(4):
        steps = [logits_of(262_400, kind, seed)]
        assert_same_draws(framework, SamplingParams(seed=seed), steps)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-3, 1e4, 1e38])
def test_extreme_temperatures(framework, temperature):
    assert_same_draws(framework, SamplingParams(temperature=temperature, seed=0), [logits_of(50, "smooth", 1)])


def test_min_p_of_one_keeps_all_that_tie_for_the_best(framework):
    logits = np.zeros(37, np.float32)
    logits[[3, 20, 36]] = 1.7
    drawn = set()
    sampler = sampler_of(framework, SamplingParams(min_p=1.0, seed=1), (), 37)
    for position in range(60):
        drawn.add(int(sampler.draw(framework.array(logits), position)))
    assert drawn == {3, 20, 36}


def test_frequencies_follow_the_probabilities(framework):
    """2,000 draws from four tokens; the bound is four standard deviations."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    sampler = sampler_of(framework, SamplingParams(seed=5), (), 4)
    counts = np.bincount(
        [int(sampler.draw(framework.array(logits), position)) for position in range(2000)], minlength=4
    )
    np.testing.assert_allclose(counts / 2000, np.exp(logits), atol=4 * np.sqrt(0.25 / 2000))


@settings(max_examples=60, deadline=None)
@given(kind=KINDS, vocab_size=st.sampled_from([1, 7, 64, 200, 3000]), count=st.integers(1, 30), seed=st.integers(0, 99))
def test_top_logprobs_stand_by_probability_then_id(framework, kind, vocab_size, count, seed):
    logits = logits_of(vocab_size, kind, seed)
    step = sampler_of(framework, SamplingParams(temperature=0), (), vocab_size).draw(framework.array(logits), 0)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide - wide.max()).sum()) - wide.max()
    order = np.lexsort((np.arange(vocab_size), -logits))[:count]
    top = step.top_logprobs(count)
    assert [token for token, _ in top] == order.tolist()
    np.testing.assert_allclose([value for _, value in top], expected[order], rtol=0, atol=1e-5)
    assert step.logprob() == pytest.approx(expected[int(step)], abs=1e-5)


@given(st.integers(0, 2**32), st.sampled_from([0, 1, 3, 50]), st.sampled_from([0.0, 0.7, 2.0]), st.integers(1, 300))
@settings(max_examples=50, deadline=None)
def test_masked(framework, seed, top_k, temperature, allowed):
    """What a grammar forbids is never drawn, however few tokens are left."""
    mask = np.zeros(300, bool)
    mask[np.random.default_rng(seed).permutation(300)[:allowed]] = True
    params = SamplingParams(seed=seed, top_k=top_k, temperature=temperature, presence_penalty=0.5)
    assert_same_draws(framework, params, [logits_of(300, "smooth", seed + step) for step in range(6)], (), mask)


def test_logprobs_are_those_before_penalties_and_filters(framework):
    logits = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    params = SamplingParams(top_k=2, temperature=0.3, logit_bias={3: -np.inf}, presence_penalty=1.0, seed=0)
    sampler = sampler_of(framework, params, (), 4)
    step = sampler.draw(framework.array(logits), 0)
    assert int(step) == 2
    log_softmax = logits - np.log(np.exp(logits).sum())
    assert step.logprob() == pytest.approx(log_softmax[2], abs=1e-6)
    assert [token for token, _ in step.top_logprobs(4)] == [3, 2, 1, 0]


def test_same_seed_same_tokens_other_seed_others(framework):
    steps = [logits_of(500, "smooth", seed) for seed in range(30)]

    def drawn(seed):
        sampler = sampler_of(framework, SamplingParams(seed=seed, temperature=2.0), (), 500)
        return [int(sampler.draw(framework.array(logits), i)) for i, logits in enumerate(steps)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_backends_draw_the_same(frameworks):
    """With equal logits and an equal seed, over a whole answer with penalties."""
    params = SamplingParams(seed=11, top_k=40, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.1)
    steps = [logits_of(1152, "bfloat16", seed) for seed in range(40)]
    answers = []
    for framework in frameworks.values():
        sampler = sampler_of(framework, params, (5, 6), 1152)
        answers.append([int(sampler.draw(framework.array(logits), i)) for i, logits in enumerate(steps)])
    assert all(answer == answers[0] for answer in answers)


def test_a_rejected_draft_does_not_change_an_answer(framework):
    """A uniform number belongs to its position, and tokens can be taken back out of the penalties' counts."""
    params = SamplingParams(seed=3, temperature=1.5, frequency_penalty=0.8, presence_penalty=0.3)
    steps = [logits_of(200, "smooth", seed) for seed in range(20)]
    plain, drafted = (sampler_of(framework, params, (5, 6), 200) for _ in range(2))
    expected = [int(plain.draw(framework.array(logits), i)) for i, logits in enumerate(steps)]
    found = []
    for i, logits in enumerate(steps):
        for ahead in range(3):  # drawn, and rejected
            drafted.draw(framework.array(logits_of(200, "few", i + ahead)), i + ahead)
        drafted.forget(3)
        found.append(int(drafted.draw(framework.array(logits), i)))
    assert found == expected


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 1, "top_k": 3, "top_p": 0.5},
        {"seed": 1, "repetition_penalty": 1.5, "logit_bias": {4: -np.inf}},
    ],
)
def test_logits_that_are_not_finite_are_told(framework, value, options):
    """Wherever the number stands, of a candidate or not; the token itself stays one that a step can begin with."""
    for vocab_size in (7, 3000):
        mask = np.zeros(vocab_size, dtype=bool)
        mask[[1, 5]] = True
        for place in (0, 5, vocab_size - 1, slice(None)):
            logits = logits_of(vocab_size, "smooth", 3)
            sampler = sampler_of(framework, SamplingParams(**options), [1], vocab_size)
            assert int(sampler.draw(framework.array(logits), 0, mask)) in (1, 5)
            logits[place] = value
            for step in (sampler.draw(framework.array(logits), 1), sampler.draw(framework.array(logits), 2, mask)):
                assert int(step) == NOT_FINITE
                assert 0 <= int(step.token.item()) < vocab_size


def test_tokens_without_a_draw_count_as_drawn(framework):
    """What a grammar forces counts for the penalties of what follows, and can be forgotten."""
    params = SamplingParams(temperature=0, frequency_penalty=3.0, presence_penalty=1.0, repetition_penalty=1.3)
    logits = logits_of(50, "smooth", 1)
    best = np.argsort(-logits)
    sampler = sampler_of(framework, params, (), 50)
    sampler.count([int(best[0]), int(best[1])])
    scores = penalize(logits, params, (), [int(best[0]), int(best[1])])
    assert int(sampler.draw(framework.array(logits), 2)) == candidates(scores, params)[0][0] != best[0]
    sampler.forget(3)
    assert int(sampler.draw(framework.array(logits), 0)) == best[0]
    sampler_of(framework, SamplingParams(), (), 50).count([1])  # nothing to count without penalties
