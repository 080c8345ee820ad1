"""Several sequences in one call: each gets the logits that it would get alone."""

import numpy as np
import pytest
from calls import decode, logits_of, make_cache, prefill
from devices import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n_mlx.engine.runner import run
from g3n_mlx.rows import Draw, Rows
from g3n_mlx.sampling import SamplingParams

TOLERANCE = tolerance(1e-4)
GREEDY = SamplingParams(temperature=0)
MARGIN = 1e-3  # between the two best logits: below, rounding may rightly choose


def ids_of(count, seed):
    return np.random.default_rng(seed).integers(0, 1152, count)


def alone(network, ids, tokens, soft=()):
    """Logits after the prompt and after each of the tokens that follow greedily, and these tokens."""
    cache, sampler = make_cache(network), network.make_sampler(GREEDY, ids)
    step = prefill(network, ids, cache, sampler, soft)
    rows, drawn = [np.asarray(step.logits).copy()], [int(step)]
    for _ in range(tokens):
        step = decode(network, step, cache, sampler)
        rows.append(np.asarray(step.logits).copy())
        drawn.append(int(step))
    return np.stack(rows), drawn


def assert_same(found, expected):
    """Logits [n, V] and tokens, up to the first token whose margin is rounding's to decide."""
    rows, tokens = found
    expected_rows, expected_tokens = expected
    for row, expected_row, token, expected_token in zip(rows, expected_rows, tokens, expected_tokens, strict=True):
        np.testing.assert_allclose(row, expected_row, rtol=0, atol=TOLERANCE)
        second, best = np.sort(expected_row)[-2:]
        if best - second < MARGIN:
            return
        assert token == expected_token


def together(network, prompts, tokens, soft):
    """The same as `alone` for several prompts at once: prefill in one call, then every decode step in one."""
    caches = [make_cache(network) for _ in prompts]
    samplers = [network.make_sampler(GREEDY, ids) for ids in prompts]
    wishes = zip(caches, prompts, soft, samplers, strict=True)
    steps = [s for (s,) in run(network, [Rows(c, ids, m, Draw(sampler, 0)) for c, ids, m, sampler in wishes])]
    found = [([np.asarray(step.logits).copy()], [int(step)]) for step in steps]
    for _ in range(tokens):
        wishes = zip(caches, steps, samplers, strict=True)
        steps = [s for (s,) in run(network, [Rows(c, step, draw=Draw(sampler, 1)) for c, step, sampler in wishes])]
        for (rows, drawn), step in zip(found, steps, strict=True):
            rows.append(np.asarray(step.logits).copy())
            drawn.append(int(step))
    return found


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.sampled_from([1, 2, 15, 16, 17, 40, 90]), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_each_sequence_gets_what_it_would_get_alone(network, lengths, seed):
    """Mixed lengths; 30 decode steps take all of them across the window of 16, and its spare rows."""
    prompts = [ids_of(length, seed + i) for i, length in enumerate(lengths)]
    for found, ids in zip(together(network, prompts, 30, [()] * len(prompts)), prompts, strict=True):
        assert_same(found, alone(network, ids, 30))


def test_images_and_audio_stay_with_their_sequence(network):
    image = network.embed_images(np.random.default_rng(1).random((1, 64, 64, 3), np.float32))[0]
    clip = network.embed_audio(np.random.default_rng(2).random((1, 40, 128), np.float32), np.ones((1, 40), bool))[0]
    soft = [[(3, image)], (), [(0, clip), (len(clip) + 2, image)]]
    prompts = [ids_of(20 + len(image), 1), ids_of(9, 2), ids_of(len(clip) + len(image) + 10, 3)]
    for found, ids, media in zip(together(network, prompts, 8, soft), prompts, soft, strict=True):
        assert_same(found, alone(network, ids, 8, media))


def test_parts_of_prompts_and_tokens_share_a_call(network):
    """One sequence decodes while another's prompt is read, with a draw and without."""
    first, second = ids_of(25, 1), ids_of(50, 2)
    expected = alone(network, first, 3), alone(network, second, 0)
    caches = [make_cache(network) for _ in range(2)]
    samplers = [network.make_sampler(GREEDY, ids) for ids in (first, second)]
    step = prefill(network, first, caches[0], samplers[0])
    rows, drawn = [np.asarray(step.logits).copy()], [int(step)]
    for a, b in ((0, 20), (20, 21), (21, 50)):
        draw = Draw(samplers[1], 0) if b == 50 else None
        (step,), other = run(
            network, [Rows(caches[0], step, draw=Draw(samplers[0], 1)), Rows(caches[1], second[a:b], draw=draw)]
        )
        rows.append(np.asarray(step.logits).copy())
        drawn.append(int(step))
        assert len(other) == (draw is not None)
    assert_same((rows, drawn), expected[0])
    assert_same(([np.asarray(other[0].logits)], [int(other[0])]), expected[1])


def test_an_id_of_an_embedder_in_a_batch(network):
    """A decoded token of the image range is embedded by its own embedder, also among others."""
    token = network.config.vision.vocab_offset + 3
    bias = SamplingParams(temperature=0, logit_bias={token: 1e9})
    prompts = [ids_of(10, 1), ids_of(12, 2)]
    caches = [make_cache(network) for _ in prompts]
    samplers = [network.make_sampler(params, ids) for params, ids in zip((bias, GREEDY), prompts, strict=True)]
    steps = [
        prefill(network, ids, *pair) for ids, pair in zip(prompts, zip(caches, samplers, strict=True), strict=True)
    ]
    assert int(steps[0]) == token
    drawn = run(
        network, [Rows(c, s, draw=Draw(sampler, 1)) for c, s, sampler in zip(caches, steps, samplers, strict=True)]
    )
    for ids, step, (found,) in zip(prompts, steps, drawn, strict=True):
        whole = logits_of(network, np.append(ids, int(step)), make_cache(network))
        np.testing.assert_allclose(np.asarray(found.logits), whole[-1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 5, "frequency_penalty": 0.7, "temperature": 1.3}])
@pytest.mark.parametrize("wrong_from", [0, 2, 4])
def test_a_draft_is_verified_in_one_call(network, options, wrong_from):
    """The model's own draws after k + 1 rows: those of the accepted tokens are the ones it draws one by one."""
    ids, params, k = ids_of(30, 4), SamplingParams(**options), 4
    cache, sampler = make_cache(network), network.make_sampler(params, ids.tolist())
    step = prefill(network, ids, cache, sampler)
    tokens = [int(step)]
    for position in range(1, k + 2):
        step = decode(network, step, cache, sampler, position)
        tokens.append(int(step))
    draft = [token if i < wrong_from else (token + 1) % 1152 for i, token in enumerate(tokens[1 : k + 1])]

    cache, sampler = make_cache(network), network.make_sampler(params, ids.tolist())
    first = prefill(network, ids, cache, sampler)
    rows = Rows(cache, np.array([int(first), *draft]), draw=Draw(sampler, 1, [None] * (k + 1)))
    ((*verified,),) = run(network, [rows])
    accepted = next((i for i, token in enumerate(draft) if int(verified[i]) != token), k)
    assert accepted == wrong_from
    assert [int(one) for one in verified[: accepted + 1]] == tokens[1 : accepted + 2]
    cache.trim(k - accepted)
    sampler.forget(k - accepted)
    assert cache.offset == len(ids) + 1 + accepted
    step = verified[accepted]
    for position in range(accepted + 2, k + 2):
        step = decode(network, step, cache, sampler, position)
        assert int(step) == tokens[position]
