"""One answer as a state machine, and the conversation's cache, with a model of the seam's calls that counts them."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n_mlx.engine import sequence as sequences
from g3n_mlx.engine.conversation import MAX_SNAPSHOTS, Conversation
from g3n_mlx.engine.runner import run
from g3n_mlx.engine.sequence import PromptTooLong, TokenSequence, prefill_spans
from g3n_mlx.prompt.prompt import Prompt
from g3n_mlx.sampling import SamplingParams

VOCABULARY = 50


class ListCache:
    """Remembers the ids themselves. It goes back to snapshots and by its spare rows, no further."""

    def __init__(self, spare=0):
        self.ids, self.spare = [], spare

    @property
    def offset(self):
        return len(self.ids)

    @property
    def nbytes(self):
        return 8 * len(self.ids)

    def trim(self, n):
        assert n <= self.spare
        del self.ids[len(self.ids) - n :]

    def snapshot(self):
        return SimpleNamespace(ids=tuple(self.ids), spare=min(self.spare, len(self.ids)), nbytes=0)

    def restore(self, snapshot):
        assert tuple(self.ids[: len(snapshot.ids)]) == snapshot.ids, "the ids before a snapshot have changed"
        self.ids = list(snapshot.ids)


class HashModel:
    """The next token is a hash of all ids before it, so a cache that holds other ids shows at once."""

    kv_arrays = None

    def __init__(self, spare=0):
        self.calls, self.spare = [], spare

    def make_cache(self, *_):
        return ListCache(self.spare)

    def make_sampler(self, params, prompt_ids):
        return self

    def draw(self, logits, position, mask):
        return logits

    def forget(self, n):
        pass

    def __call__(self, batch):
        kept = []
        for cache, count, wanted, entry in zip(batch.caches, batch.counts, batch.kept, batch.rows, strict=True):
            decoding = isinstance(entry.token_ids, int)
            self.calls.append(("decode" if decoding else "prefill", count))
            cache.ids.extend([entry.token_ids] if decoding else entry.token_ids.tolist())
            kept += [hash(tuple(cache.ids)) % VOCABULARY] * wanted
        return kept

    def begin_next(self, steps, caches):
        pass


@pytest.fixture(autouse=True, scope="module")
def list_caches():
    """A sequence that begins anew asks for a cache: the fake model's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "Cache", lambda config, _: ListCache(config.spare))
        yield


def begun(model, conversation, prompt, borders=(), context=1000, stop_ids=(), **options):
    params = SamplingParams(**{"max_tokens": 5, **options})
    config = SimpleNamespace(max_position_embeddings=context, spare=model.spare)
    asked = Prompt(tuple(prompt), tuple(borders))
    return TokenSequence(model, config, conversation, asked, params, frozenset(stop_ids), no_media)


def steps_of(model, sequence):
    """The steps of the answer, as they come."""
    while not sequence.finished:
        (drawn,) = run(model, [sequence.wish()])
        found = []
        sequence.told(drawn, lambda token, found=found: found.append(int(token)) or True)
        yield from found


def answer(model, conversation, prompt, **options):
    sequence = begun(model, conversation, prompt, **options)
    return list(steps_of(model, sequence)), sequence.timings


def no_media(features):
    raise AssertionError(features)


def fresh(prompt, **options):
    model = HashModel()
    return answer(model, Conversation(model.make_cache()), prompt, **options)[0]


PROMPT = tuple(range(20))


@given(
    start=st.integers(0, 40),
    length=st.integers(1, 60),
    borders=st.lists(st.integers(0, 70)),
    step_size=st.integers(1, 30),
)
def test_chunks_cover_everything_once_and_end_at_borders(start, length, borders, step_size):
    spans = list(prefill_spans(start, length, borders, step_size))
    assert [i for a, b in spans for i in range(a, b)] == list(range(start, length))
    assert all(0 < b - a <= step_size for a, b in spans)
    assert {b for b in borders if start < b < length} <= {b for _, b in spans}


@given(borders=st.lists(st.integers(1, 59), min_size=1), step_size=st.integers(1, 30), data=st.data())
def test_chunks_after_a_border_are_those_of_a_fresh_run(borders, step_size, data):
    border = data.draw(st.sampled_from(borders))
    whole = list(prefill_spans(0, 60, borders, step_size))
    assert list(prefill_spans(border, 60, borders, step_size)) == [span for span in whole if span[0] >= border]


@given(st.integers(0, 59), st.sets(st.integers(1, 60)), st.integers(1, 20))
def test_chunks_end_where_the_prompt_says_wherever_they_start(start, borders, step_size):
    """A prompt that goes on from the end of a reply, which is no border, is cut where a fresh one is."""
    ends = [end for _, end in prefill_spans(0, 60, borders, step_size) if end > start]
    assert [end for _, end in prefill_spans(start, 60, borders, step_size)] == ends


def test_prompt_too_long_says_by_how_much():
    model = HashModel()
    with pytest.raises(PromptTooLong, match="20 tokens, 5 too many for the context of 16 tokens"):
        answer(model, Conversation(model.make_cache()), PROMPT, context=16)
    with pytest.raises(PromptTooLong, match="1 too many"):
        answer(model, Conversation(model.make_cache()), PROMPT, context=20)
    assert model.calls == []


def test_the_context_ends_the_answer():
    tokens, timings = answer(HashModel(), Conversation(ListCache()), PROMPT, context=23, max_tokens=None)
    assert len(tokens) == 3
    assert timings.at_limit
    tokens, timings = answer(HashModel(), Conversation(ListCache()), PROMPT, context=23, max_tokens=2)
    assert len(tokens) == 2


def test_max_tokens_ends_the_answer_and_nothing_more_is_decoded():
    model = HashModel()
    tokens, timings = answer(model, Conversation(model.make_cache()), PROMPT, max_tokens=4, prefill_step_size=8)
    assert len(tokens) == timings.completion_tokens == 4
    assert timings.at_limit
    assert model.calls == [("prefill", 8), ("prefill", 8), ("prefill", 4)] + [("decode", 1)] * 3


def test_a_stop_id_ends_the_answer_and_is_not_part_of_it():
    tokens = fresh(PROMPT, max_tokens=8)
    stop = next(token for token in tokens[2:] if token not in tokens[:2])
    stopped, timings = answer(HashModel(), Conversation(ListCache()), PROMPT, stop_ids=[stop], max_tokens=8)
    assert stopped == tokens[: tokens.index(stop)]
    assert timings.completion_tokens == len(stopped)
    assert not timings.at_limit
    none, timings = answer(HashModel(), Conversation(ListCache()), PROMPT, stop_ids=[tokens[0]])
    assert none == []
    assert timings.completion_tokens == 0


def test_a_stop_id_as_the_last_allowed_token_is_no_limit():
    tokens = fresh(PROMPT, max_tokens=2)
    _, timings = answer(HashModel(), Conversation(ListCache()), PROMPT, stop_ids=[tokens[1]], max_tokens=2)
    assert timings.completion_tokens == (0 if tokens[0] == tokens[1] else 1)
    assert not timings.at_limit


def test_an_answer_that_is_closed_runs_nothing_more():
    model = HashModel()
    conversation = Conversation(model.make_cache())
    steps = steps_of(model, begun(model, conversation, PROMPT, max_tokens=None))
    first = [next(steps) for _ in range(3)]
    calls = list(model.calls)
    steps.close()
    assert model.calls == calls
    assert conversation.token_ids == [*PROMPT, *first[:2]]
    assert conversation.cache.ids == conversation.token_ids


def test_the_next_turn_runs_what_is_new():
    model = HashModel()
    conversation = Conversation(model.make_cache())
    reply, _ = answer(model, conversation, PROMPT)
    model.calls.clear()
    prompt = (*PROMPT, *reply, 7, 8, 9)
    tokens, timings = answer(model, conversation, prompt)
    assert tokens == fresh(prompt)
    assert timings.cached_tokens == len(PROMPT) + len(reply) - 1  # the last drawn token was not run
    assert model.calls[0] == ("prefill", 4)


def test_another_reply_goes_back_to_the_prompt_before_it():
    model = HashModel()
    conversation = Conversation(model.make_cache())
    answer(model, conversation, PROMPT)
    prompt = (*PROMPT, 49, 48, 47, 7, 8, 9)
    tokens, timings = answer(model, conversation, prompt)
    assert tokens == fresh(prompt)
    assert timings.cached_tokens == len(PROMPT)


def test_another_user_message_goes_back_to_the_system_text():
    model = HashModel()
    conversation = Conversation(model.make_cache())
    answer(model, conversation, PROMPT, borders=(6, len(PROMPT)))
    prompt = (*PROMPT[:9], 40, 41)
    tokens, timings = answer(model, conversation, prompt, borders=(6, len(prompt)))
    assert tokens == fresh(prompt)
    assert timings.cached_tokens == 6


def test_the_same_prompt_again_runs_its_last_token():
    """The snapshot at its very end leads to the token before as well, which has to run to give logits."""
    model = HashModel(spare=2)
    conversation = Conversation(model.make_cache())
    first, _ = answer(model, conversation, PROMPT, borders=(6, 12, len(PROMPT)))
    for _ in range(3):
        again, timings = answer(model, conversation, PROMPT, borders=(6, 12, len(PROMPT)))
        assert again == first
        assert timings.cached_tokens == len(PROMPT) - 1
    other, timings = answer(model, conversation, [*PROMPT[:-1], 77], borders=(6, 12, len(PROMPT)))
    assert other == fresh([*PROMPT[:-1], 77])
    assert timings.cached_tokens == len(PROMPT) - 1
    _, timings = answer(model, conversation, PROMPT[:12], borders=(6, 12))
    assert timings.cached_tokens == 11
    _, timings = answer(model, conversation, [PROMPT[0], 88])
    assert timings.cached_tokens == 0


def test_snapshots_are_bounded_and_the_first_stays():
    model = HashModel()
    conversation = Conversation(model.make_cache())
    prompt = list(range(4))
    answer(model, conversation, prompt, borders=(4,), max_tokens=1)
    for turn in range(2 * MAX_SNAPSHOTS):
        prompt += [30 + turn, 2, 3]
        answer(model, conversation, prompt, max_tokens=1)
    assert len(conversation._marks) == MAX_SNAPSHOTS
    _, timings = answer(model, conversation, [*range(4), 9, 9])
    assert timings.cached_tokens == 4


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(
    spare=st.integers(0, 3),
    turns=st.lists(st.tuples(prompts, st.lists(st.integers(1, 12), max_size=3), st.integers(1, 6)), max_size=10),
)
def test_any_sequence_of_prompts_is_answered_as_if_fresh(spare, turns):
    """Prompts of three ids, so that many begin alike; the cache always holds exactly the ids it is said to hold."""
    model = HashModel(spare)
    conversation = Conversation(model.make_cache())
    for prompt, borders, step_size in turns:
        tokens, timings = answer(model, conversation, prompt, borders=borders, prefill_step_size=step_size)
        assert tokens == fresh(prompt)
        assert conversation.cache.ids == conversation.token_ids == [*prompt, *tokens[:-1]]
        assert timings.cached_tokens < len(prompt)
        assert timings.prompt_tokens == len(prompt)


def test_the_end_of_a_prompt_that_another_does_not_share_is_trimmed():
    """By the spare rows, without a snapshot there."""
    model = HashModel(spare=8)
    conversation = Conversation(model.make_cache())
    answer(model, conversation, PROMPT)
    prompt = (*PROMPT[:-2], 40, 41, 42)
    tokens, timings = answer(model, conversation, prompt)
    assert tokens == fresh(prompt)
    assert timings.cached_tokens == len(PROMPT) - 2
