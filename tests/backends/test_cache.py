"""The caches of keys and values: any chunking equals one concatenation, windows are bounded, the way back is exact."""

import numpy as np
import pytest
from calls import decode, logits_of, make_cache, prefill
from devices import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n_mlx.engine.cache import GROWTH_ROWS, KVCache, SlidingKVCache
from g3n_mlx.engine.conversation import MAX_SNAPSHOTS, Conversation
from g3n_mlx.interface import MAX_TRIM_TOKENS
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
    cache, keys, values = KVCache(framework.module("kv_arrays")), *rows(6100)
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
    cache, keys, values = SlidingKVCache(window, framework.module("kv_arrays")), *rows(6100)
    offset, held = 0, 0  # rows that a trim may fall back on
    for kind, count in steps:
        if kind == "add":
            returned = feed(framework, cache, keys, values, offset, offset + count)
            first = offset - min(offset, window - 1)
            offset, held = offset + count, min(held + count, window - 1 + MAX_TRIM_TOKENS)
            assert_rows(returned, keys, values, first, offset)
        elif count <= cache.spare:
            cache.trim(count)
            offset, held = offset - count, held - count
        else:
            with pytest.raises(ValueError, match=f"cannot trim {count} of {offset}"):
                cache.trim(count)
        assert cache.offset == offset
        held = max(held, cache.length)
        assert cache.spare >= (offset if held >= offset else held - (window - 1))
        assert min(offset, window - 1) <= cache.length <= window - 1 + MAX_TRIM_TOKENS + GROWTH_ROWS
        assert cache.nbytes <= 2 * 4 * 6 * (window - 1 + MAX_TRIM_TOKENS + GROWTH_ROWS)


@pytest.mark.parametrize("window", [1, 5, 16, 512])
@pytest.mark.parametrize("added", [1, 2, 64, 300])
def test_the_last_tokens_can_be_forgotten_at_any_time(framework, window, added):
    """Also right after the window has moved: at every offset that a cache passes through, one by one or in chunks."""
    keys, values = rows(2000)
    offset, cache = 0, SlidingKVCache(window, framework.module("kv_arrays"))
    while offset + added <= 1300:
        feed(framework, cache, keys, values, offset, offset + added)
        offset += added
        back = cache.restored(cache.saved())
        count = min(offset, MAX_TRIM_TOKENS)
        assert min(cache.spare, back.spare) >= count
        back.trim(count)
        returned = feed(framework, back, keys, values, offset - count, offset - count + 1)
        assert_rows(returned, keys, values, max(0, offset - count - (window - 1)), offset - count + 1)


def test_a_negative_trim_is_refused(framework):
    for cache in (KVCache(framework.module("kv_arrays")), SlidingKVCache(4, framework.module("kv_arrays"))):
        with pytest.raises(ValueError, match="cannot trim -1"):
            cache.trim(-1)
        assert cache.nbytes == 0


# The whole cache of the tiny model, whose window is 16.


def decoded(network, cache, step, sampler, count):
    """Logits of `count` decode steps."""
    found = []
    for _ in range(count):
        step = decode(network, step, cache, sampler)
        found.append(np.asarray(step.logits).copy())
    return np.stack(found) if found else np.zeros((0, network.config.text.vocab_size))


def ids_of(count, seed):
    return np.random.default_rng(seed).integers(0, 1152, count)


@pytest.mark.parametrize("before", [1, 15, 16, 17, 60])
@pytest.mark.parametrize("between", [0, 3, 40, 300])
def test_back_at_a_snapshot_is_as_if_nothing_had_come_after_it(network, before, between):
    """Bit for bit, since the same calls are made; the way back is long past the window and its spare rows."""
    first, other, last = ids_of(before, 1), ids_of(between + 1, 2), ids_of(23, 3)
    fresh, cache = make_cache(network), make_cache(network)
    prefill(network, first, fresh)
    prefill(network, first, cache)
    snapshot = cache.snapshot()
    assert snapshot.offset == before
    sampler = network.make_sampler(GREEDY, other)
    decoded(network, cache, prefill(network, other[:1], cache, sampler), sampler, min(between, 6))
    if between:
        prefill(network, other[1:], cache)
    for _ in range(2):  # a snapshot serves more than once
        cache.restore(snapshot)
        assert cache.offset == before
        sampler = network.make_sampler(GREEDY, last)
        again = decoded(network, cache, prefill(network, last, cache, sampler), sampler, 6)
    sampler = network.make_sampler(GREEDY, last)
    np.testing.assert_array_equal(again, decoded(network, fresh, prefill(network, last, fresh, sampler), sampler, 6))


def test_what_was_taken_back_leads_no_further_back(network):
    """Its windows have no row to spare until other tokens have run."""
    ids = ids_of(300, 1).tolist()
    whole = Conversation(make_cache(network))
    prefill(network, np.array(ids), whole.cache)
    whole.append(ids)
    whole.mark()
    fork = whole.fork(ids[: 300 - MAX_TRIM_TOKENS + 1])
    assert fork.token_ids == ids[: 300 - MAX_TRIM_TOKENS]
    assert whole.fork(ids[: 300 - MAX_TRIM_TOKENS]) is None
    assert fork.cache.spare == 0
    fork.mark()
    assert fork.reusable(fork.token_ids) == 0
    assert fork.fork(fork.token_ids) is None
    assert fork.resume(ids) == len(fork.token_ids) == 300 - MAX_TRIM_TOKENS
    prefill(network, np.array(ids[300 - MAX_TRIM_TOKENS :]), fork.cache)
    fork.append(ids[300 - MAX_TRIM_TOKENS :])
    fork.mark()
    assert fork.fork(ids).token_ids == ids[:-1]


@pytest.mark.parametrize("before", [1, 2, 15, 16, 17, 60, 300])
@pytest.mark.parametrize("back_by", [1, 7, MAX_TRIM_TOKENS])
def test_the_way_also_leads_to_the_tokens_before_a_snapshot(network, before, back_by):
    first, other, last = ids_of(before, 1), ids_of(300, 2), ids_of(23, 3)
    back_by = min(back_by, before)
    fresh, cache = make_cache(network), make_cache(network)
    if before > back_by:
        prefill(network, first[: before - back_by], fresh)
    prefill(network, first, cache)
    snapshot = cache.snapshot()
    prefill(network, other, cache)
    expected, fork = logits_of(network, last, fresh), cache.fork(snapshot)
    fork.trim(back_by)
    cache.restore(snapshot)
    cache.trim(back_by)
    for back in (cache, fork):
        assert back.offset == before - back_by
        np.testing.assert_allclose(logits_of(network, last, back), expected, rtol=0, atol=tolerance(1e-4))


# What is done to a sequence's whole cache, and to the forks and snapshots that were taken of it.
moves = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.one_of(st.integers(1, 3), st.integers(1, 90))),
        st.tuples(st.just("trim"), st.integers(0, MAX_TRIM_TOKENS)),
        st.tuples(st.sampled_from(["snapshot", "restore", "fork"]), st.just(0)),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(moves=moves)
def test_any_way_to_a_cache_is_as_good_as_the_straight_one(network, moves):
    """Random appends, trims, forks and snapshots, against a cache that is rebuilt from scratch."""
    generator = np.random.default_rng(0)
    cache, ids, snapshots = make_cache(network), [], []
    for kind, count in moves:
        if kind == "append":
            new = generator.integers(0, 1152, count)
            prefill(network, new, cache)
            ids = [*ids, *new.tolist()]
        elif kind == "trim" and count <= cache.spare:
            cache.trim(count)
            ids = ids[: len(ids) - count]
            snapshots = [(snapshot, known) for snapshot, known in snapshots if len(known) <= len(ids)]
        elif kind == "trim":
            with pytest.raises(ValueError, match="cannot trim"):
                cache.trim(count)
        elif kind == "snapshot":
            snapshots.append((cache.snapshot(), list(ids)))
        elif snapshots:
            snapshot, ids = snapshots[count % len(snapshots)]
            snapshots = [(one, known) for one, known in snapshots if len(known) <= len(ids)]
            if kind == "fork":
                cache = cache.fork(snapshot)
            else:
                cache.restore(snapshot)
            assert cache.spare >= min(len(ids), snapshot.spare)
        assert cache.offset == len(ids)
    last, fresh = ids_of(20, 9), make_cache(network)
    if ids:
        prefill(network, np.array(ids), fresh)
    np.testing.assert_allclose(
        logits_of(network, last, cache), logits_of(network, last, fresh), rtol=0, atol=tolerance(1e-4)
    )


def test_a_snapshot_of_nothing(network):
    cache = make_cache(network)
    snapshot = cache.snapshot()
    ids = ids_of(30, 4)
    expected = logits_of(network, ids, make_cache(network))
    logits_of(network, ids_of(50, 5), cache)
    cache.restore(snapshot)
    assert cache.offset == 0
    np.testing.assert_array_equal(logits_of(network, ids, cache), expected)


def test_only_owners_of_keys_have_caches_and_windows_are_bounded(network):
    text = network.config.text
    cache = make_cache(network)
    prefill(network, ids_of(700, 6), cache)
    assert list(cache.layers) == list(range(text.first_kv_shared_layer))
    row = 2 * 4 * text.num_key_value_heads * text.head_dim  # bytes of keys and values of a token, float32
    kept = text.sliding_window - 1 + MAX_TRIM_TOKENS
    sliding = (kept + GROWTH_ROWS) * row
    full = -(-700 // GROWTH_ROWS) * GROWTH_ROWS * row
    assert cache.nbytes == 4 * sliding + full
    snapshot = cache.snapshot()
    assert snapshot.nbytes == 4 * kept * row


@pytest.mark.parametrize("before", [1, 16, 60, 300])
def test_a_fork_goes_on_alone(network, before):
    """Bit for bit as a fresh cache, whatever its source does next; and the source as if it had never been forked."""
    first, other, last = ids_of(before, 1), ids_of(40, 2), ids_of(23, 3)
    fresh, source, plain = make_cache(network), make_cache(network), make_cache(network)
    for cache in (fresh, source, plain):
        prefill(network, first, cache)
    snapshot = source.snapshot()
    prefill(network, other, source, None)
    prefill(network, other, plain, None)
    forks = [source.fork(snapshot), source.fork(snapshot)]
    expected = logits_of(network, last, fresh)
    for fork in forks:
        assert fork.offset == before
        np.testing.assert_array_equal(logits_of(network, last, fork), expected)
    np.testing.assert_array_equal(logits_of(network, last, source), logits_of(network, last, plain))


def test_snapshots_and_forks_are_evaluated_at_once(network, framework, monkeypatch):
    """Layer by layer a GPU would be waited for 2 x 16 times at E4B's shape."""
    cache = make_cache(network)
    prefill(network, ids_of(20, 0), cache)
    calls, evaluate = [], network.kv_arrays.evaluate
    monkeypatch.setattr(network.kv_arrays, "evaluate", lambda arrays: (calls.append(len(arrays)), evaluate(arrays)))
    if framework.name == "mlx":
        import mlx.core as mx

        found = mx.eval
        monkeypatch.setattr(mx, "eval", lambda *arrays: (calls.append("eval"), found(*arrays)))
    snapshot = cache.snapshot()
    cache.fork(snapshot)
    sliding = sum(isinstance(layer, SlidingKVCache) for layer in cache.layers.values())
    counts = [2 * sliding, 2 * len(cache.layers)]
    assert calls == ([counts[0], "eval", counts[1], "eval"] if framework.name == "mlx" else counts)


def test_a_fork_at_nothing_is_an_empty_cache(network):
    cache = make_cache(network)
    snapshot = cache.snapshot()
    prefill(network, ids_of(30, 1), cache)
    assert cache.fork(snapshot).nbytes == 0


@pytest.mark.parametrize("seen", [1, 11, 100])
@pytest.mark.parametrize("tokens", [8, 40, 700])
def test_the_size_of_a_conversation_is_known_beforehand(network, seen, tokens):
    """With all its snapshots, which a short conversation has of few rows each."""
    small, long = Conversation(make_cache(network)), Conversation(make_cache(network))
    prefill(network, ids_of(seen, 1), small.cache, None)
    small.append(range(seen))
    small.mark()
    spans = np.array_split(np.arange(tokens), MAX_SNAPSHOTS + 1)
    for span in spans:
        prefill(network, ids_of(len(span), 1), long.cache, None)
        long.append(span.tolist())
        long.mark()
    most = small.nbytes_at(tokens, network.config.text.sliding_window)
    assert long.nbytes <= most
    if len(spans[0]) >= network.config.text.sliding_window - 1 + MAX_TRIM_TOKENS:
        assert long.nbytes == most


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 700])
def test_the_size_of_a_cache_is_known_beforehand(network, tokens):
    small, cache = make_cache(network), make_cache(network)
    prefill(network, ids_of(1, 1), small, None)
    prefill(network, ids_of(tokens, 1), cache)
    assert small.nbytes_at(tokens) == cache.nbytes
