"""Drafts change no answer: tokens, text, scores and cache are those that the same seed gives without them."""

from dataclasses import replace

import numpy as np
import pytest
import random_schemas
from devices import device_for, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.engine.answer import chunks_of
from g3n_mlx.engine.drafts import LENGTHS, DraftConstraint
from g3n_mlx.engine.lookup import Lookup
from g3n_mlx.engine.results import Result
from g3n_mlx.engine.runner import all_logits
from g3n_mlx.rows import Rows
from g3n_mlx.sampling import SamplingParams

TOLERANCE = tolerance(1e-4)
MAX_TOKENS = 40
COPY = "Say this again: one two three four five six, one two three four five six"
SCHEMA = {
    "type": "object",
    "properties": {
        "name_of_the_shape": {"enum": ["circle", "square"]},
        "how_many_of_them_there_are": {"type": "integer"},
    },
    "required": ["name_of_the_shape", "how_many_of_them_there_are"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["tiny", "demo"])
def model(request, backend, tiny_folder):
    """Random weights with a window of 16 tokens, which every answer here crosses; and a model that answers."""
    folder = tiny_folder if request.param == "tiny" else demo_folder()
    return load(folder, backend=backend, device=device_for(backend), dtype="float32")


@pytest.fixture(scope="module")
def demo(backend):
    return load(demo_folder(), backend=backend, device=device_for(backend), dtype="float32")


def answered(model, prompt, params, constraint=None, draft="off"):
    """The result, and the conversation that it leaves."""
    conversation = model.conversation()
    answer = model.answer(conversation, prompt, params, constraint, draft)
    chunks = []
    while not answer.finished:
        chunks += chunks_of(*model.runner.advance([answer]))
    return Result.of(chunks, params), conversation


class Oracle:
    """A drafter that knows the answer, and is wrong at places of its own choice."""

    def __init__(self, tokens, seed, wrong):
        self.tokens, self.rng, self.wrong, self.seen = tokens, np.random.default_rng(seed), wrong, 1

    def push(self, token_id):
        self.seen += 1

    def draft(self, limit, together):
        count = min(limit, int(self.rng.choice([0, *LENGTHS])))
        right = [*self.tokens, *[5] * count][self.seen : self.seen + count]
        return [token ^ (self.rng.random() < self.wrong) for token in right]

    def pays(self, count, together):
        return bool(self.rng.random() < 0.8)


def with_oracle(patch, *arguments):
    patch.setattr("g3n_mlx.engine.drafting.Drafter", lambda *_: Oracle(*arguments))


def assert_same(model, found, expected):
    """Two results of the same request and the conversations that they have left."""
    (result, conversation), (other, kept) = found, expected
    assert result.token_ids == other.token_ids
    assert (result.text, result.finish_reason) == (other.text, other.finish_reason)
    assert result.usage.completion_tokens == other.usage.completion_tokens
    if other.logprobs is not None:
        np.testing.assert_allclose(result.logprobs, other.logprobs, rtol=0, atol=TOLERANCE)
    if other.top_logprobs is not None:
        for ours, theirs in zip(result.top_logprobs, other.top_logprobs, strict=True):
            assert [token for token, _ in ours] == [token for token, _ in theirs]
    assert conversation.token_ids == kept.token_ids
    assert conversation.cache.offset == kept.cache.offset
    network, ids = model.runner.model, np.arange(3, 8)
    rows = [
        model.runner.call(lambda cache=cache: all_logits(network, Rows(cache, ids)))
        for cache in (conversation.cache, kept.cache)
    ]
    np.testing.assert_allclose(*rows, rtol=0, atol=TOLERANCE)
    for cache in (conversation.cache, kept.cache):
        cache.trim(len(ids))


@st.composite
def sampling(draw):
    options = {"max_tokens": draw(st.integers(1, MAX_TOKENS)), "ignore_eos": draw(st.booleans())}
    if draw(st.booleans()):
        options |= {"temperature": 0.0}
    else:
        options |= {"temperature": draw(st.sampled_from([0.5, 1.0, 1.5])), "seed": draw(st.integers(0, 2**40))}
        options |= {"top_k": draw(st.sampled_from([0, 3, 64])), "top_p": draw(st.sampled_from([0.8, 1.0]))}
    if draw(st.booleans()):
        options |= {"repetition_penalty": draw(st.sampled_from([0.9, 1.2])), "frequency_penalty": 0.4}
        options |= {"presence_penalty": -0.3}
    if draw(st.booleans()):
        options |= {"logit_bias": {draw(st.integers(0, 1000)): draw(st.sampled_from([-np.inf, -5.0, 4.0]))}}
    if draw(st.booleans()):
        options |= {"logprobs": True, "top_logprobs": draw(st.sampled_from([0, 3]))}
    return SamplingParams(**options)


@settings(max_examples=15, deadline=None)
@given(
    params=sampling(),
    seed=st.integers(0, 99),
    wrong=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    ends=st.sampled_from(["", "stop id", "stop string"]),
    where=st.integers(0, MAX_TOKENS),
)
def test_an_answer_with_drafts_is_the_answer_without(model, params, seed, wrong, ends, where):
    """Right drafts, wrong ones and all between; the answer ends anywhere in them."""
    rng = np.random.default_rng(seed)
    prompt = model._prompt([int(i) for i in rng.integers(3, 1000, int(rng.integers(1, 40)))])
    whole, _ = answered(model, prompt, replace(params, max_tokens=MAX_TOKENS))
    tokens = whole.token_ids
    if ends == "stop id" and tokens:
        params = replace(params, stop_token_ids=(tokens[where % len(tokens)],))
    if ends == "stop string" and whole.text:
        start = where % len(whole.text)
        params = replace(params, stop=(whole.text[start : start + 3],))
    expected = answered(model, prompt, params)
    with pytest.MonkeyPatch.context() as patch:
        with_oracle(patch, tokens, seed, wrong)
        found = answered(model, prompt, params, draft="auto")
    assert_same(model, found, expected)
    usage = found[0].usage
    assert usage.accepted_tokens <= usage.drafted_tokens


@pytest.mark.parametrize("draft", ["auto", "lookup"])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 4, "repetition_penalty": 1.1}, {"seed": 8}])
def test_lookups_in_a_repeating_answer(model, options, draft):
    """A bias leaves four tokens, so that any text repeats itself."""
    bias = dict.fromkeys(range(40, 44), 30.0)
    params = SamplingParams(max_tokens=60, ignore_eos=True, logit_bias=bias, **options)
    prompt = model.prepare(COPY)
    expected = answered(model, prompt, params)
    found = answered(model, prompt, params, draft=draft)
    assert_same(model, found, expected)
    if draft == "lookup":  # among four tokens every pair comes again
        assert found[0].usage.accepted_tokens > 0
        assert found[0].usage.tokens_per_call > 1
    assert expected[0].usage.drafted_tokens == 0
    assert expected[0].usage.tokens_per_call == 1


def test_the_end_of_the_context_within_a_draft(model, monkeypatch):
    text = replace(model.config.text, max_position_embeddings=50)
    params = SamplingParams(temperature=0, ignore_eos=True)
    prompt = model._prompt(list(range(3, 25)))
    monkeypatch.setattr(model.checkpoint, "config", replace(model.config, text=text))
    expected = answered(model, prompt, params)
    assert len(expected[0].token_ids) == 28
    assert expected[0].finish_reason == "length"
    with_oracle(monkeypatch, expected[0].token_ids, 1, 0.1)
    found = answered(model, prompt, params, draft="auto")
    monkeypatch.undo()
    assert_same(model, found, expected)


@settings(max_examples=10, deadline=None)
@given(schema=random_schemas.SCHEMAS, params=sampling(), seed=st.integers(0, 99))
def test_forced_tokens_and_drafts_under_a_schema(demo, schema, params, seed):
    pytest.importorskip("llguidance")
    params = replace(params, logit_bias={})  # -inf on what a schema forces is an error with drafts and without
    prompt = demo.prepare("Describe it.")
    make = lambda: demo.grammars.json_schema(schema)  # noqa: E731
    expected = answered(demo, prompt, params, make())
    found = answered(demo, prompt, params, make(), "lookup")
    assert_same(demo, found, expected)
    with pytest.MonkeyPatch.context() as patch:
        with_oracle(patch, expected[0].token_ids, seed, 0.3)
        found = answered(demo, prompt, params, make(), "auto")
    assert_same(demo, found, expected)


@pytest.mark.parametrize("logprobs", [False, True])
def test_the_keys_of_a_schema_go_through_in_few_calls(demo, logprobs, monkeypatch):
    pytest.importorskip("llguidance")
    monkeypatch.setattr(Lookup, "match", lambda self: (0, 0))  # whether lookups draft depends on measured times
    options = {"temperature": 0, "schema": SCHEMA, "max_tokens": 80, "logprobs": logprobs}
    expected = demo.generate("A circle.", **options)
    found = demo.generate("A circle.", **options, draft="auto")
    assert found.text == expected.text
    assert found.usage.accepted_tokens == found.usage.drafted_tokens > 15
    assert found.usage.tokens_per_call > 1.3
    if logprobs:
        np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=TOLERANCE)


def test_a_forbidden_token_that_a_schema_forces_is_the_same_error(demo):
    pytest.importorskip("llguidance")
    forced = demo.grammars.json_schema(SCHEMA)
    forced.push(next(i for i in np.flatnonzero(forced.mask()) if demo.tokenizer.decode([int(i)]) == "{"))
    forced.push(int(np.flatnonzero(forced.mask() & quote_mask(demo))[0]))
    bias = {forced.forced()[2]: -np.inf}
    for draft in ("off", "auto"):
        with pytest.raises(ValueError, match="no text that follows this grammar"):
            demo.generate("A circle.", schema=SCHEMA, temperature=0, logit_bias=bias, draft=draft)


def quote_mask(model):
    return np.array([model.tokenizer.decode([i]) == '"' for i in range(model.config.text.vocab_size)])


class Plain:
    """A rule that does not look ahead: even ids only."""

    def __init__(self, width):
        self.width, self.pushed, self.asked = width, [], 0

    def mask(self):
        self.asked += 1
        return np.arange(self.width) % 2 == 0

    def push(self, token_id):
        self.pushed.append(token_id)


def test_a_rule_that_does_not_look_ahead_is_asked_before_every_draw(model):
    results = []
    for draft in ("off", "lookup"):
        rule = Plain(model.config.text.vocab_size)
        assert not isinstance(rule, DraftConstraint)
        result = model.generate([5, 6, 5, 6, 5, 6], constraint=rule, temperature=0, max_tokens=20, draft=draft)
        assert rule.asked == len(rule.pushed) >= len(result.token_ids)
        assert result.usage.drafted_tokens == 0
        results.append(result.token_ids)
    assert results[0] == results[1]


@pytest.mark.parametrize("draft", ["auto", "lookup"])
def test_drafts_of_several_sequences_in_a_call(model, draft):
    prompts = [COPY, "Hello", [5, 6, 7, 8, 5, 6], "1 2 3 1 2 3 1 2"]
    bias = dict.fromkeys(range(40, 44), 30.0)
    options = {"max_tokens": 40, "seed": 3, "parallel": 3, "ignore_eos": True, "logit_bias": bias}
    expected = model.generate_many(prompts, **options)
    found = model.generate_many(prompts, **options, draft=draft)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    if draft == "lookup":
        assert sum(one.usage.accepted_tokens for one in found)


def test_a_stream_closed_within_a_draft_leaves_a_good_conversation(model, monkeypatch):
    prompt = [int(i) for i in np.random.default_rng(1).integers(3, 1000, 30)]
    options = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
    model.reset()
    expected = model.generate(prompt, **options)
    with_oracle(monkeypatch, expected.token_ids, 1, 0.0)
    for stopped_after in (1, 2, 3, 5, 8, 13):
        model.reset()
        stream = model.stream(prompt, **options, draft="auto")
        tokens = [next(stream).token for _ in range(stopped_after)]
        stream.close()
        assert tuple(tokens) == expected.token_ids[:stopped_after]
        # The next turn parts from the answer where the reader stopped: behind what the cache has taken in.
        longer = [*prompt, *tokens, 7, 8, 9]
        result = model.generate(longer, **options)
        assert result.usage.cached_tokens >= len(prompt) + stopped_after - 1
        model.reset()
        assert result.token_ids == model.generate(longer, **options).token_ids


def test_a_wrong_way_to_draft_is_one_error(model):
    with pytest.raises(
        ValueError, match="draft is 'fast', expected 'off', 'auto', 'lookup' or the name of a slice: no "
    ):
        model.generate("Hello", draft="fast")
    with pytest.raises(ValueError, match="draft is 3, expected 'off'"):
        model.generate("Hello", draft=3)
