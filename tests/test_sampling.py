"""Sampling options, and the laws of the numpy draw that both backends are compared with."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from reference_draw import candidates, draw, penalize

from g3n_mlx.failures import Error
from g3n_mlx.sampling import SamplingOptions, SamplingParams, Uniforms

NEUTRAL = SamplingParams()


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected at least 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": True}, "temperature is True, expected a number"),
        ({"frequency_penalty": 10**400}, "frequency_penalty is 1000"),
        ({"repetition_penalty": 10**400}, "repetition_penalty is 1000"),
        ({"logit_bias": {3: 10**400}}, "logit_bias is"),
        ({"logit_bias": {float("inf"): 1}}, "logit_bias is"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": 0}, "top_p is 0, expected above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": "0.9"}, "top_p is '0.9'"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias is"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias is"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"stop": [""]}, "stop is"),
        ({"stop": [1]}, "stop is"),
        ({"top_logprobs": -1}, "top_logprobs is -1"),
        ({"prefill_step_size": 0}, "prefill_step_size is 0"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize("name", SamplingOptions.__annotations__)
def test_whatever_an_option_is_given_is_taken_or_an_error(name):
    for value in (None, [], {}, True, "x", 0, -1, 10**9, 10**400, np.nan, np.inf, [[]], [10**400], {"x": []}, object()):
        with suppress(Error):
            SamplingParams(**{name: value})


def test_spellings_that_mean_the_same():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(stop="x") == SamplingParams(stop=["x"]) == SamplingParams(stop=("x",))
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None) == NEUTRAL
    assert SamplingParams(logit_bias={"5": 1}).logit_bias == {5: 1.0}  # keys as JSON has them
    assert SamplingParams(seed=np.int64(3), top_k=np.int32(4), temperature=np.float32(0.5)).seed == 3


def test_ids_have_to_be_tokens():
    SamplingParams(logit_bias={9: 1.0}, stop_token_ids=[0, 9]).check_vocabulary(10)
    for options in ({"logit_bias": {10: 1.0}}, {"stop_token_ids": [10]}, {"logit_bias": {-1: 1.0}}):
        with pytest.raises(ValueError, match="expected ids below the vocabulary size, 10"):
            SamplingParams(**options).check_vocabulary(10)


def test_greedy_and_penalizes():
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(top_k=1).greedy
    assert not NEUTRAL.greedy
    assert not NEUTRAL.penalizes
    for options in ({"frequency_penalty": 0.1}, {"presence_penalty": -0.1}, {"repetition_penalty": 1.1}):
        assert SamplingParams(**options).penalizes


def test_published_defaults():
    published = {"do_sample": True, "top_k": 64, "top_p": 0.95, "bos_token_id": 2, "temperature": None}
    assert SamplingParams.published_defaults(published) == {"top_k": 64, "top_p": 0.95}
    assert SamplingParams.published_defaults({}) == {}
    greedy = SamplingParams.published_defaults({"do_sample": False, "temperature": 0.7})
    assert SamplingParams(**greedy).greedy


# The uniform numbers.


def test_uniform_numbers_are_a_seeds_own():
    def first(seed):
        uniforms = Uniforms(seed)
        return [uniforms.at(position) for position in range(1000)]

    assert first(1) == first(1) != first(2)
    assert first(None) != first(None)
    numbers = np.array(first(3))
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    assert (numbers.astype(np.float32) == numbers).all()
    assert abs(numbers.mean() - 0.5) < 0.05


@given(st.integers(0, 2**200), st.lists(st.integers(0, 40_000), min_size=1, max_size=20))
def test_a_uniform_number_is_its_positions_own(seed, positions):
    """In whatever order they are asked for, of whatever size the seed is."""
    uniforms = Uniforms(seed)
    asked = [uniforms.at(position) for position in positions]
    assert asked == [Uniforms(seed).at(position) for position in positions]


def test_uniform_numbers_do_not_change_between_versions():
    """A seed that someone noted down gives the same answer later."""
    assert [Uniforms(7).at(position) for position in (0, 1, 1000)] == [
        0.268638551235199,
        0.23281240463256836,
        0.5559308528900146,
    ]


# The draw. Few values, so that many tie.

logits = arrays.arrays(
    np.float32,
    st.integers(1, 30),
    elements=st.one_of(st.sampled_from([-2.0, -0.0, 0.0, 1.0]), st.floats(-20, 20, width=32)),
)
temperatures = st.floats(0.05, 20)


@given(scores=logits, temperature=temperatures)
def test_candidates_are_all_by_logit_then_id(scores, temperature):
    ids, probabilities = candidates(scores, SamplingParams(temperature=temperature))
    order = [(-float(scores[i]), int(i)) for i in ids]
    assert order == sorted(order)
    wide = scores.astype(np.float64) / temperature
    expected = np.exp(wide - wide.max())
    expected /= expected.sum()
    np.testing.assert_allclose(probabilities, expected[ids], rtol=1e-9)
    missing = set(range(len(scores))) - set(ids.tolist())
    assert sum(expected[i] for i in missing) < 1e-14  # where the sum has reached 1 no draw arrives


@given(scores=logits, top_k=st.integers(1, 40))
def test_top_k_keeps_the_first(scores, top_k):
    ids, probabilities = candidates(scores, SamplingParams(top_k=top_k, temperature=20.0))
    every, _ = candidates(scores, SamplingParams(temperature=20.0))
    assert ids.tolist() == every[:top_k].tolist()
    assert probabilities.sum() == pytest.approx(1)


@given(scores=logits, top_p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_reach_it(scores, top_p):
    every, probabilities = candidates(scores, NEUTRAL)
    reached = np.cumsum(probabilities)
    assume(np.abs(reached - top_p).min() > 1e-9)
    ids, kept = candidates(scores, SamplingParams(top_p=top_p))
    count = int((reached < top_p).sum()) + 1
    assert ids.tolist() == every[:count].tolist()
    np.testing.assert_allclose(kept, probabilities[:count] / probabilities[:count].sum())


@given(scores=logits, min_p=st.floats(0, 1))
def test_min_p_is_a_share_of_the_best(scores, min_p):
    every, probabilities = candidates(scores, NEUTRAL)
    shares = probabilities / probabilities[0]
    assume(np.abs(shares - min_p)[shares != 1].min(initial=1) > 1e-9)
    ids, _ = candidates(scores, SamplingParams(min_p=min_p))
    assert ids.tolist() == every[shares >= min_p].tolist()


@given(scores=logits)
def test_greedy_is_the_first_candidate(scores):
    ids, probabilities = candidates(scores, SamplingParams(temperature=0))
    assert ids.tolist() == [int(np.argmax(scores))]
    assert probabilities.tolist() == [1]


@settings(max_examples=50)
@given(
    scores=logits, top_k=st.integers(0, 9), top_p=st.floats(0.3, 1), uniforms=st.lists(st.floats(0, 0.999), min_size=2)
)
def test_a_draw_is_the_inverse_of_the_cdf(scores, top_k, top_p, uniforms):
    params = SamplingParams(top_k=top_k, top_p=top_p)
    ids, probabilities = candidates(scores, params)
    places = []
    for uniform in sorted(uniforms):
        token, distance = draw(scores, params, uniform)
        place = ids.tolist().index(token)
        places.append(place)
        assert probabilities[:place].sum() <= uniform + 1e-9
        assert uniform < probabilities[: place + 1].sum() + 1e-9
        assert distance >= 0
    assert places == sorted(places)


@given(scores=logits)
def test_no_penalty_changes_nothing(scores):
    np.testing.assert_array_equal(penalize(scores, NEUTRAL, [0], [0, 0]), scores)


def test_penalties_by_hand():
    scores = np.array([2.0, -2.0, 4.0, 1.0], np.float32)
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias={3: -1.0})
    # id 0: in the prompt; 1: twice in the answer; 2: in both; 3: in none, biased
    ours = penalize(scores, params, [0, 2], [1, 1, 2])
    np.testing.assert_array_equal(ours, np.array([1.0, -4.0 - 1.0 - 0.25, 2.0 - 0.5 - 0.25, 0.0], np.float32))
    np.testing.assert_array_equal(scores, [2.0, -2.0, 4.0, 1.0])


@given(scores=logits, data=st.data())
def test_a_bias_of_minus_infinity_forbids(scores, data):
    assume(len(scores) > 1)
    forbidden = data.draw(st.integers(0, len(scores) - 1))
    params = SamplingParams(logit_bias={forbidden: -np.inf}, seed=1)
    uniform = data.draw(st.floats(0, 0.9999999))
    token, _ = draw(penalize(scores, params, [], []), params, uniform)
    assert token != forbidden


@pytest.mark.parametrize(
    "option",
    [{"logit_bias": [1]}, {"logit_bias": {"x": 1}}, {"logit_bias": {1: "x"}}, {"stop_token_ids": ["a"]},
     {"ignore_eos": "false"}, {"stop_token_ids": [1.5]}],
)  # fmt: skip
def test_options_of_a_wrong_kind_are_named(option):
    with pytest.raises(ValueError, match=f"^{next(iter(option))} is .*, expected "):
        SamplingParams(**option)
