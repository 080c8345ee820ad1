"""Logits and greedy tokens of the whole text model against the reference; one-shot, in chunks, token by token."""

from itertools import pairwise

import numpy as np
import pytest
from calls import decode, logits_of, make_cache, prefill
from devices import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.sampling import SamplingParams

TOLERANCE = tolerance(1e-4)
GREEDY = SamplingParams(temperature=0)


def scored(network, ids, spans):
    """Logits of all rows, the prompt cut at the given positions."""
    cache, borders = make_cache(network), [0, *spans, len(ids)]
    return np.concatenate([logits_of(network, ids[a:b], cache) for a, b in pairwise(borders)])


@pytest.mark.parametrize("case", ["", "media_token_"])
def test_logits(network, golden_arrays, case):
    golden = golden_arrays("text_logits")
    ids = golden[f"{case}input_ids"][0].astype(np.int64)
    np.testing.assert_allclose(scored(network, ids, []), golden[f"{case}logits"][0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("row", [0, 1])
def test_rows_of_the_padded_batch_alone(network, golden_arrays, row):
    golden = golden_arrays("text_logits")
    real = golden["padded_attention_mask"][row].astype(bool)
    ids = golden["padded_input_ids"][row][real].astype(np.int64)
    np.testing.assert_allclose(scored(network, ids, []), golden["padded_logits"][row][real], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 5, 15, 16, 17, 40])
def test_chunks_change_nothing(network, golden_arrays, chunk):
    """Across the border of the sliding window of 16 in every way."""
    golden = golden_arrays("text_logits")
    ids = golden["input_ids"][0].astype(np.int64)
    ours = scored(network, ids, range(chunk, len(ids), chunk))
    np.testing.assert_allclose(ours, golden["logits"][0], rtol=0, atol=TOLERANCE)


@settings(max_examples=15, deadline=None)
@given(borders=st.sets(st.integers(1, 73), max_size=6), data=st.data())
def test_any_prefill_gives_the_same_next_token(network, golden_arrays, borders, data):
    """Prefill in any chunks, its last one cut to one row behind the owners of keys, equals whole-prompt logits."""
    golden = golden_arrays("text_logits")
    length = data.draw(st.integers(2, golden["input_ids"].shape[1]))
    ids = golden["input_ids"][0, :length].astype(np.int64)
    cache, sampler = make_cache(network), network.make_sampler(GREEDY, ids)
    cuts = [0, *sorted(border for border in borders if border < length), length]
    step = None
    for a, b in pairwise(cuts):
        step = prefill(network, ids[a:b], cache, sampler if b == length else None)
    assert cache.offset == length
    expected = golden["logits"][0, length - 1]
    np.testing.assert_allclose(np.asarray(step.logits), expected, rtol=0, atol=TOLERANCE)
    assert int(step) == expected.argmax()


def test_greedy_tokens_and_their_logits(network, golden_arrays):
    """The goldens decode ids of the image and audio ranges too, which are embedded by their embedders."""
    golden = golden_arrays("text_generation")
    ids = golden["input_ids"][0].astype(np.int64)
    cache, sampler = make_cache(network), network.make_sampler(GREEDY, ids)
    step = prefill(network, ids, cache, sampler)
    for position, (token, logits) in enumerate(zip(golden["tokens"], golden["logits"], strict=True)):
        np.testing.assert_allclose(np.asarray(step.logits), logits, rtol=0, atol=TOLERANCE, err_msg=str(position))
        assert int(step) == token
        step = decode(network, step, cache, sampler)
    vision = network.config.vision.vocab_offset
    assert (golden["tokens"] >= vision).any()


def test_bfloat16_is_as_near_as_the_reference_in_bfloat16(framework, tiny_folder, golden_arrays, golden_json):
    """golden/noise.json: how far the reference in bfloat16 is from itself in float32; ours may be 1.5 times that."""
    golden, allowed = golden_arrays("text_logits"), golden_json("noise")["text_logits.logits"]["bfloat16"]
    ids = golden["input_ids"][0].astype(np.int64)
    network = framework.model(Checkpoint.open(tiny_folder), "bfloat16")
    ours = scored(network, ids, [])
    assert np.abs(ours - golden["logits"][0]).max() <= 1.5 * allowed
    chunked = scored(network, ids, range(7, len(ids), 7))
    assert np.abs(chunked - golden["logits"][0]).max() <= 1.5 * allowed


def test_embedders_are_read_when_their_ids_occur(framework, tiny_folder, golden_arrays, monkeypatch):
    read, original_read, original_mapped = [], Checkpoint.read, Checkpoint.mapped
    monkeypatch.setattr(
        Checkpoint, "read", lambda self, name, *span: (read.append(name), original_read(self, name, *span))[1]
    )
    monkeypatch.setattr(Checkpoint, "mapped", lambda self, name: (read.append(name), original_mapped(self, name))[1])
    network = framework.model(Checkpoint.open(tiny_folder))
    logits_of(network, golden_arrays("text_logits")["input_ids"][0].astype(np.int64), make_cache(network))
    assert not [name for name in read if not name.startswith("language_model.")]
    assert not [name for name in read if "per_layer.weight" in name]
    logits_of(network, golden_arrays("text_logits")["media_token_input_ids"][0].astype(np.int64), make_cache(network))
    assert {name.split(".")[0] for name in read} == {"language_model", "embed_vision", "embed_audio"}
