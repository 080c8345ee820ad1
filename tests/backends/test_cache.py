"""The caches of keys and values: any chunking equals one concatenation, windows are bounded, the way back is exact."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n_mlx.engine.conversation import MAX_SNAPSHOTS, Conversation
from g3n_mlx.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)


def rows(count):
    """Keys and values [1, 2, S, 3] that are all different."""
    keys = np.arange(count * 6, dtype=np.float32).reshape(1, 2, count, 3)
    return keys, -1 - keys


def feed(framework, cache, all_keys, all_values, start, stop):
    """Updates with the rows [start, stop); what the update returns, as numpy."""
    keys, values = (framework.array(np.ascontiguousarray(x[:, :, start:stop])) for x in (all_keys, all_values))
    return tuple(framework.numpy(x) for x in cache.update(keys, values))


def assert_rows(returned, all_keys, all_values, first, stop):
    np.testing.assert_array_equal(returned[0], all_keys[:, :, first:stop])
    np.testing.assert_array_equal(returned[1], all_values[:, :, first:stop])


# What is done to a cache: rows added (one by one mostly, or many), or rows forgotten.
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.one_of(st.integers(1, 3), st.integers(1, 40), st.sampled_from([255, 256, 257, 600]))
        ),
        st.tuples(st.just("trim"), st.one_of(st.integers(0, 3), st.integers(0, 300))),
    ),
    max_size=10,
)


@settings(max_examples=60, deadline=None)
@given(steps=steps)
def test_a_full_cache_is_one_concatenation(framework, steps):
    cache, keys, values = framework.module("cache").KVCache(), *rows(6100)
    offset = 0
    for kind, count in steps:
        if kind == "add":
            returned = feed(framework, cache, keys, values, offset, offset + count)
            offset += count
            assert_rows(returned, keys, values, 0, offset)
        elif count <= offset:
            cache.trim(count)
            offset -= count
        else:
            with pytest.raises(ValueError, match=f"cannot trim {count} of {offset}"):
                cache.trim(count)
        assert cache.offset == offset
        assert cache.nbytes <= 2 * 4 * 6 * (6100 + 256)


@settings(max_examples=100, deadline=None)
@given(window=st.sampled_from([1, 2, 5, 16, 300]), steps=steps)
def test_a_sliding_cache_is_the_end_of_one_concatenation(framework, window, steps):
    """An update returns the window - 1 rows before the new ones, and those; memory does not grow with the offset."""
    module = framework.module("cache")
    cache, keys, values = module.SlidingKVCache(window), *rows(6100)
    offset, held = 0, 0  # rows that a trim may fall back on
    for kind, count in steps:
        if kind == "add":
            returned = feed(framework, cache, keys, values, offset, offset + count)
            first = offset - min(offset, window - 1)
            offset += count
            held = cache.length
            assert_rows(returned, keys, values, first, offset)
        elif count <= offset and held - count >= min(offset - count, window - 1):
            cache.trim(count)
            offset, held = offset - count, held - count
        else:
            with pytest.raises(ValueError, match=f"cannot trim {count} of {offset}"):
                cache.trim(count)
        assert cache.offset == offset
        assert min(offset, window - 1) <= cache.length <= window + module.GROWTH_ROWS
        assert cache.nbytes <= 2 * 4 * 6 * (window + module.GROWTH_ROWS)


@pytest.mark.parametrize("window", [1, 5, 16])
def test_tokens_one_by_one_can_be_taken_back(framework, window):
    """Up to GROWTH_ROWS of them; after a long prefill none, for their window is gone."""
    cache, keys, values = framework.module("cache").SlidingKVCache(window), *rows(400)
    feed(framework, cache, keys, values, 0, 100)
    with pytest.raises(ValueError, match="is gone"):
        cache.trim(2)
    for offset in range(100, 200):
        feed(framework, cache, keys, values, offset, offset + 1)
    cache.trim(100)
    returned = feed(framework, cache, keys, values, 100, 110)
    assert_rows(returned, keys, values, 100 - (window - 1), 110)


def test_a_negative_trim_is_refused(framework):
    for cache in (framework.module("cache").KVCache(), framework.module("cache").SlidingKVCache(4)):
        with pytest.raises(ValueError, match="cannot trim -1"):
            cache.trim(-1)
        assert cache.nbytes == 0


# The whole cache of the tiny model, whose window is 16.


def decoded(network, cache, step, sampler, count):
    """Logits of `count` decode steps."""
    found = []
    for _ in range(count):
        step = network.decode(step, cache, sampler)
        found.append(np.asarray(step.logits).copy())
    return np.stack(found) if found else np.zeros((0, network.config.text.vocab_size))


def ids_of(count, seed):
    return np.random.default_rng(seed).integers(0, 1152, count)


@pytest.mark.parametrize("before", [1, 15, 16, 17, 60])
@pytest.mark.parametrize("between", [0, 3, 40, 300])
def test_back_at_a_snapshot_is_as_if_nothing_had_come_after_it(network, before, between):
    """Bit for bit, since the same calls are made; the way back is long past the window and its spare rows."""
    first, other, last = ids_of(before, 1), ids_of(between + 1, 2), ids_of(23, 3)
    fresh, cache = network.make_cache(), network.make_cache()
    network.prefill(first, fresh, None)
    network.prefill(first, cache, None)
    snapshot = cache.snapshot()
    assert snapshot.offset == before
    sampler = network.make_sampler(GREEDY, other)
    decoded(network, cache, network.prefill(other[:1], cache, sampler), sampler, min(between, 6))
    if between:
        network.prefill(other[1:], cache, None)
    for _ in range(2):  # a snapshot serves more than once
        cache.restore(snapshot)
        assert cache.offset == before
        sampler = network.make_sampler(GREEDY, last)
        again = decoded(network, cache, network.prefill(last, cache, sampler), sampler, 6)
    sampler = network.make_sampler(GREEDY, last)
    np.testing.assert_array_equal(again, decoded(network, fresh, network.prefill(last, fresh, sampler), sampler, 6))


def test_what_was_taken_back_leads_no_further_back(network):
    """Its windows have no row to spare until another token has run."""
    ids = ids_of(100, 1).tolist()
    whole = Conversation(network.make_cache())
    network.prefill(np.array(ids), whole.cache, None)
    whole.append(ids)
    whole.mark()
    fork = whole.fork(ids)
    assert fork.token_ids == ids[:-1]
    fork.mark()
    assert fork.reusable(ids[:-1]) == 0
    assert fork.fork(ids[:-1]) is None
    assert fork.resume(ids) == len(ids) - 1
    network.prefill(np.array(ids[-1:]), fork.cache, None)
    fork.append(ids[-1:])
    fork.mark()
    assert fork.fork(ids).token_ids == ids[:-1]


@pytest.mark.parametrize("before", [1, 2, 15, 16, 17, 60, 300])
def test_the_way_also_leads_to_the_token_before_a_snapshot(network, before):
    first, other, last = ids_of(before, 1), ids_of(300, 2), ids_of(23, 3)
    fresh, cache = network.make_cache(), network.make_cache()
    if before > 1:
        network.prefill(first[:-1], fresh, None)
    network.prefill(first, cache, None)
    snapshot = cache.snapshot()
    network.prefill(other, cache, None)
    expected, fork = network.logits(last, fresh), cache.fork(snapshot, 1)
    cache.restore(snapshot, 1)
    for back in (cache, fork):
        assert back.offset == before - 1
        np.testing.assert_allclose(network.logits(last, back), expected, rtol=0, atol=1e-4)


def test_a_snapshot_of_nothing(network):
    cache = network.make_cache()
    snapshot = cache.snapshot()
    ids = ids_of(30, 4)
    expected = network.logits(ids, network.make_cache())
    network.logits(ids_of(50, 5), cache)
    cache.restore(snapshot)
    assert cache.offset == 0
    np.testing.assert_array_equal(network.logits(ids, cache), expected)


def test_only_owners_of_keys_have_caches_and_windows_are_bounded(framework, network):
    text = network.config.text
    cache = network.make_cache()
    network.prefill(ids_of(700, 6), cache, None)
    assert list(cache.layers) == list(range(text.first_kv_shared_layer))
    row = 2 * 4 * text.num_key_value_heads * text.head_dim  # bytes of keys and values of a token, float32
    growth = framework.module("cache").GROWTH_ROWS
    sliding = (text.sliding_window + growth) * row
    full = -(-700 // growth) * growth * row
    assert cache.nbytes == 4 * sliding + full
    snapshot = cache.snapshot()
    assert snapshot.nbytes == 4 * text.sliding_window * row


@pytest.mark.parametrize("before", [1, 16, 60, 300])
def test_a_fork_goes_on_alone(network, before):
    """Bit for bit as a fresh cache, whatever its source does next; and the source as if it had never been forked."""
    first, other, last = ids_of(before, 1), ids_of(40, 2), ids_of(23, 3)
    fresh, source, plain = network.make_cache(), network.make_cache(), network.make_cache()
    for cache in (fresh, source, plain):
        network.prefill(first, cache, None)
    snapshot = source.snapshot()
    network.prefill(other, source, None)
    network.prefill(other, plain, None)
    forks = [source.fork(snapshot), source.fork(snapshot)]
    expected = network.logits(last, fresh)
    for fork in forks:
        assert fork.offset == before
        np.testing.assert_array_equal(network.logits(last, fork), expected)
    np.testing.assert_array_equal(network.logits(last, source), network.logits(last, plain))


def test_a_fork_at_nothing_is_an_empty_cache(network):
    cache = network.make_cache()
    snapshot = cache.snapshot()
    network.prefill(ids_of(30, 1), cache, None)
    assert cache.fork(snapshot).nbytes == 0


@pytest.mark.parametrize("seen", [1, 11, 100])
@pytest.mark.parametrize("tokens", [8, 40, 700])
def test_the_size_of_a_conversation_is_known_beforehand(network, seen, tokens):
    """With all its snapshots, which a short conversation has of few rows each."""
    small, long = Conversation(network.make_cache()), Conversation(network.make_cache())
    network.prefill(ids_of(seen, 1), small.cache, None)
    small.append(range(seen))
    small.mark()
    spans = np.array_split(np.arange(tokens), MAX_SNAPSHOTS + 1)
    for span in spans:
        network.prefill(ids_of(len(span), 1), long.cache, None)
        long.append(span.tolist())
        long.mark()
    most = small.nbytes_at(tokens, network.config.text.sliding_window)
    assert long.nbytes <= most
    if len(spans[0]) >= network.config.text.sliding_window:
        assert long.nbytes == most


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 700])
def test_the_size_of_a_cache_is_known_beforehand(network, tokens):
    small, cache = network.make_cache(), network.make_cache()
    network.prefill(ids_of(1, 1), small, None)
    network.prefill(ids_of(tokens, 1), cache, None)
    assert small.nbytes_at(tokens) == cache.nbytes
