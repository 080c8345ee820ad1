"""Gemma3n as users hold it, on the tiny checkpoint, in both backends: text, tokens, stops, turns, streams."""

import re
import threading
import weakref

import numpy as np
import pytest
from devices import device_for, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n_mlx import Audio, load
from g3n_mlx.engine.runner import Runner
from g3n_mlx.engine.sequence import PromptTooLong
from g3n_mlx.engine.stops import StopStrings
from g3n_mlx.prompt.prompt import Prompt

USER = [{"role": "user", "content": "Tell me about the sea, and about the wind over it, in a few words."}]
GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 12}


def opened(folder, backend):
    return load(folder, backend=backend, dtype="float32", device=device_for(backend))


@pytest.fixture(scope="module")
def shared(tiny_folder, backend):
    return opened(tiny_folder, backend)


@pytest.fixture
def model(shared):
    """Without a conversation."""
    shared.reset()
    return shared


def log_softmax(logits):
    wide = logits.astype(np.float64)
    best = wide.max(-1, keepdims=True)
    return wide - best - np.log(np.exp(wide - best).sum(-1, keepdims=True))


# Text, tokens, logprobs.


def test_greedy_tokens_are_the_goldens(model, golden_arrays):
    golden = golden_arrays("text_generation")
    count = int(np.argmax(golden["margins"] < 1e-3)) or len(golden["tokens"])
    ids = golden["input_ids"][0].tolist()
    result = model.generate(ids, temperature=0, ignore_eos=True, max_tokens=count)
    assert list(result.token_ids) == golden["tokens"][:count].tolist()
    assert result.finish_reason == "length"
    assert result.usage.prompt_tokens == len(ids)
    assert result.usage.completion_tokens == count


def test_one_chunk_a_token_then_one_with_the_usage(model):
    *tokens, last = model.stream(USER, **GREEDY)
    result = model.generate(USER, **GREEDY)
    assert [chunk.token for chunk in tokens] == list(result.token_ids)
    assert "".join(chunk.text for chunk in [*tokens, last]) == result.text
    assert all(chunk.finish_reason is None and chunk.usage is None for chunk in tokens)
    assert (last.token, last.finish_reason) == (None, "length")
    assert last.usage is not None
    assert model.tokenizer.decode(result.token_ids) == result.text


def test_prompts_of_every_kind(model):
    prepared = model.prepare(USER)
    answers = [
        model.generate(prompt, **GREEDY).token_ids
        for prompt in (USER, USER[0]["content"], prepared, list(prepared.token_ids), np.array(prepared.token_ids))
    ]
    assert answers.count(answers[0]) == len(answers)


def test_token_ids_are_taken_as_they_are(model):
    """No bos, no template."""
    result = model.generate([100, 101, 102], **GREEDY)
    assert result.usage.prompt_tokens == 3
    expected = model.logits([100, 101, 102])[-1].argmax()
    assert result.token_ids[0] == expected


@pytest.mark.parametrize("logprobs", [{"logprobs": True}, {"top_logprobs": 5}, {"logprobs": True, "top_logprobs": 1}])
def test_logprobs_are_the_log_softmax_of_the_logits(model, logprobs):
    """Of the raw logits, whatever penalties, filters and temperature choose."""
    sampling = {"temperature": 1.7, "top_k": 9, "repetition_penalty": 1.3, "seed": 3, "ignore_eos": True}
    result = model.generate(USER, max_tokens=12, **sampling, **logprobs)
    ids = model.prepare(USER).token_ids
    rows = log_softmax(model.logits([*ids, *result.token_ids[:-1]])[len(ids) - 1 :])
    chosen = rows[np.arange(12), result.token_ids]
    np.testing.assert_allclose(result.logprobs, chosen, rtol=0, atol=tolerance(1e-4))
    count = logprobs.get("top_logprobs", 0)
    if not count:
        assert result.top_logprobs is None
        return
    assert [len(top) for top in result.top_logprobs] == [count] * 12
    for row, top in zip(rows, result.top_logprobs, strict=True):
        np.testing.assert_allclose(
            [value for _, value in top], np.sort(row)[::-1][:count], rtol=0, atol=tolerance(1e-4)
        )


def test_no_logprobs_unless_asked(model):
    result = model.generate(USER, **GREEDY)
    assert result.logprobs is None
    assert result.top_logprobs is None


def test_logits_of_a_long_prompt_come_in_chunks_and_agree(model, golden_arrays):
    golden = golden_arrays("text_logits")
    logits = model.logits(golden["input_ids"][0].tolist())
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, golden["logits"][0], rtol=0, atol=tolerance(1e-4))


def test_logits_leave_the_conversation_alone(model):
    first = model.generate(USER, **GREEDY)
    model.logits(list(range(100, 140)))
    ids = [*model.prepare(USER).token_ids, *first.token_ids, 100]
    assert model.generate(ids, **GREEDY).usage.cached_tokens == len(ids) - 2


def test_usage(model):
    usage = model.generate(USER, **GREEDY).usage
    assert usage.prompt_tokens == len(model.prepare(USER).token_ids)
    assert (usage.cached_tokens, usage.completion_tokens) == (0, 12)
    assert usage.time_to_first_token_s > 0
    assert usage.avg_prompt_tok_per_sec == pytest.approx(usage.prompt_tokens / usage.time_to_first_token_s)
    assert usage.avg_compl_tok_per_sec > 0
    assert usage.peak_memory_bytes > 50e6 or usage.peak_memory_bytes == 0
    assert model.generate(USER, **{**GREEDY, "max_tokens": 1}).usage.avg_compl_tok_per_sec == 0


# Seeds and defaults.


def test_same_seed_same_text(model):
    answers = [model.generate(USER, seed=seed, max_tokens=20, ignore_eos=True).token_ids for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_both_backends_draw_the_same_text(tiny_folder, backends):
    if len(backends) < 2:
        pytest.skip("one backend is installed")
    sampling = {"seed": 4, "max_tokens": 24, "ignore_eos": True, "repetition_penalty": 1.1}
    mlx, torch = (opened(tiny_folder, backend).generate(USER, **sampling).token_ids for backend in backends)
    assert mlx == torch


def test_defaults_come_from_the_generation_config(model):
    """The file says top_k 64 and top_p 0.95, and nothing of temperature."""
    published = {"top_k": 64, "top_p": 0.95, "temperature": 1.0}
    for seed in range(3):
        plain = model.generate(USER, seed=seed, max_tokens=8, ignore_eos=True)
        spelled = model.generate(USER, seed=seed, max_tokens=8, ignore_eos=True, **published)
        assert plain.token_ids == spelled.token_ids
        none = model.generate(USER, seed=seed, max_tokens=8, ignore_eos=True, top_k=None, top_p=None)
        assert none.token_ids == plain.token_ids
    assert model.sampling_defaults == {"top_k": 64, "top_p": 0.95}
    assert model.eos_token_ids == {1, 106}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"temprature": 1.0}, "there is no option 'temprature': did you mean temperature"),
        ({"ignore_eos": "false"}, "ignore_eos is 'false', expected True or False"),
        ({"stop": 5}, "stop is 5, expected a list"),
        ({"logit_bias": {1152: 1.0}}, "logit_bias is .1152., expected ids below the vocabulary size, 1152"),
        ({"stop_token_ids": [-1]}, "stop_token_ids is"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.stream(USER, **options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], r"the prompt is \[\], expected a string, a list of messages or token ids"),
        (["hi"], r"the prompt is \['hi'\], expected a string"),
        (b"hi", "the prompt is b'hi', expected a string"),
        (5, "the prompt is 5, expected a string"),
        ([1.0, 2.0], r"the prompt is \[1.0, 2.0\], expected"),
        ([True], r"the prompt is \[True\], expected"),
        ([1152], r"the ids \[1152\], expected ids from 0 to 1151"),
        ([5, -1], r"the ids \[-1\]"),
        ([{"role": "user"}], r"messages\[0\]"),
        ([{"role": "user", "content": [{"type": "smell", "smell": 1}]}], r"messages\[0\].content\[0\].*smell"),
        ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], r"messages\[0\].content\[0\]"),
        ([{"role": "narrator", "content": "x"}], "narrator"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        model.stream(prompt)


def test_a_prompt_too_long_is_refused_and_forgets_nothing(model):
    model.generate(USER, **GREEDY)
    limit = model.config.text.max_position_embeddings
    with pytest.raises(PromptTooLong, match=f"{limit + 2} tokens, 3 too many for the context of {limit}"):
        model.stream([100] * (limit + 2))
    with pytest.raises(PromptTooLong, match="1 too many"):
        model.stream([100] * limit)
    with pytest.raises(PromptTooLong, match=f"1 too many for the context of {limit} tokens: shorten it"):
        model.logits([100] * (limit + 1))
    follow = [*model.prepare(USER).token_ids, 100]
    assert model.generate(follow, **GREEDY).usage.cached_tokens == len(follow) - 1


# Stops.


def test_a_stop_id_ends_the_answer(model):
    tokens = model.generate(USER, **GREEDY).token_ids
    stop = next(token for token in tokens[3:] if token not in tokens[:3])
    result = model.generate(USER, **GREEDY, stop_token_ids=[stop])
    assert result.token_ids == tokens[: tokens.index(stop)]
    assert result.finish_reason == "stop"


def test_eos_ends_the_answer_unless_ignored(model):
    """The bias makes eos the first token of all."""
    bias = {106: 100.0}
    ended = model.generate(USER, temperature=0, logit_bias=bias, max_tokens=3)
    assert (ended.token_ids, ended.text, ended.finish_reason) == ((), "", "stop")
    assert ended.usage.completion_tokens == 0
    ignored = model.generate(USER, temperature=0, logit_bias=bias, max_tokens=3, ignore_eos=True)
    assert (ignored.token_ids, ignored.finish_reason) == ((106,) * 3, "length")


def test_stop_strings_of_any_place_never_leak(model):
    """Every substring of the answer of two and more characters, so many that span tokens, and at its very end."""
    whole = model.generate(USER, **GREEDY)
    text = whole.text
    assert len(text) > 20
    for start in range(0, len(text) - 2, 5):
        for length in (2, 7):
            stop = text[start : start + length]
            *tokens, last = model.stream(USER, **GREEDY, stop=[stop, "never in there"])
            shown = "".join(chunk.text for chunk in [*tokens, last])
            assert shown == text[: text.index(stop)]
            assert last.finish_reason == "stop"
            assert len(tokens) <= 12


def test_stop_as_one_string(model):
    text = model.generate(USER, **GREEDY).text
    assert model.generate(USER, **GREEDY, stop=text[4:7]).text == text[: text.index(text[4:7])]


letters = st.text(alphabet="ab", max_size=6)


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(letters, max_size=8), stops=st.lists(letters.filter(bool), max_size=3))
def test_stop_strings_of_any_pieces(pieces, stops):
    """What is shown begins the text, ends where a stop string starts if there is one, and holds none."""
    watch, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += watch.push(piece)
        if watch.found:
            break
    text = "".join(pieces)
    assert (watch.found is not None) == any(stop in text for stop in stops)
    if watch.found:
        assert text.startswith(watch.found, len(shown))
    else:
        shown += watch.finish()
        assert shown == text
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)


@given(text=letters, stops=st.lists(letters.filter(bool), max_size=3))
def test_text_that_can_be_no_stop_is_not_held_back(text, stops):
    watch = StopStrings(stops)
    shown = watch.push(text)
    held = text[len(shown) :]
    assert watch.found or held == "" or any(stop.startswith(held) for stop in stops)


# Turns.


def follow_up(reply, question="And what of the rain?"):
    return [*USER, {"role": "assistant", "content": reply}, {"role": "user", "content": question}]


def scores(model, prompt):
    """Ten greedy tokens, each with all its log probabilities by id."""
    tokens, rows, end = [], [], None
    for chunk in model.stream(prompt, temperature=0, ignore_eos=True, max_tokens=10, top_logprobs=1152):
        if chunk.token is None:
            end = chunk
        else:
            tokens.append(chunk.token)
            rows.append([value for _, value in sorted(chunk.top_logprobs)])
    return tokens, np.array(rows), end.usage.cached_tokens


def assert_as_fresh(model, prompt):
    """Greedy tokens and log probabilities of a continued conversation and of a fresh one; returns the ids cached."""
    tokens, rows, cached = scores(model, prompt)
    model.reset()
    fresh_tokens, fresh_rows, none = scores(model, prompt)
    assert none == 0
    # A token may differ where two are as near as rounding; none is here.
    assert tokens == fresh_tokens
    np.testing.assert_allclose(rows, fresh_rows, rtol=0, atol=tolerance(1e-4))
    return cached


@pytest.mark.parametrize("max_tokens", [3, 40])  # the window is 16
def test_the_next_turn_runs_what_is_new(model, max_tokens):
    first = model.generate(USER, **{**GREEDY, "max_tokens": max_tokens})
    cached = assert_as_fresh(model, follow_up(first.text))
    assert cached >= len(model.prepare(USER).token_ids)


def test_ids_that_go_on_are_all_cached(model):
    ids = [*model.prepare(USER).token_ids]
    first = model.generate(ids, **GREEDY)
    ids += [*first.token_ids, 105, 200, 201, 202]
    assert assert_as_fresh(model, ids) == len(ids) - 5


def test_another_reply_than_the_generated_one_goes_back_to_the_prompt(model):
    model.generate(USER, **{**GREEDY, "max_tokens": 40})
    assert assert_as_fresh(model, follow_up("Something else entirely.")) == len(model.prepare(USER).token_ids)


def test_a_reply_that_is_tokenized_differently(model):
    """The template strips the reply, and no tokenizer gives back the ids that a random model drew."""
    first = model.generate(USER, seed=5, temperature=3.0, max_tokens=30, ignore_eos=True)
    prompt = model.prepare(follow_up(first.text))
    begun = len(model.prepare(USER).token_ids)
    assert prompt.token_ids[begun : begun + 30] != first.token_ids
    assert assert_as_fresh(model, follow_up(first.text)) >= begun


def test_many_turns(model):
    messages, cached = list(USER), []
    for turn in range(4):
        result = model.generate(messages, **{**GREEDY, "max_tokens": 20})
        cached.append(result.usage.cached_tokens)
        messages += [{"role": "assistant", "content": result.text}, {"role": "user", "content": f"Turn {turn}?"}]
    assert cached == sorted(cached)
    assert assert_as_fresh(model, messages) >= cached[-1]


def test_another_question_after_the_same_system_text_is_bit_for_bit_a_fresh_one(model):
    """It goes on from the snapshot after the system text, by the calls of a fresh run."""
    system = {
        "role": "system",
        "content": "You are a sailor who has seen every sea there is and who likes short words.",
    }
    model.generate([system, *USER], **{**GREEDY, "max_tokens": 30})
    question = [system, {"role": "user", "content": "Where is the harbour?"}]
    tokens, rows, cached = scores(model, question)
    assert 16 < cached < len(model.prepare(question).token_ids)
    model.reset()
    fresh_tokens, fresh_rows, _ = scores(model, question)
    assert tokens == fresh_tokens
    np.testing.assert_array_equal(rows, fresh_rows)


def test_the_same_conversation_twice_is_bit_for_bit_the_same(model):
    runs = []
    for _ in range(2):
        model.reset()
        first = model.generate(USER, **{**GREEDY, "max_tokens": 30})
        runs.append(scores(model, follow_up(first.text)))
    assert runs[0][0] == runs[1][0]
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


def test_prompt_chunks_change_nothing(model):
    whole = scores(model, USER)
    for size in (1, 7, 16):
        model.reset()
        result = model.generate(USER, **{**GREEDY, "max_tokens": 10}, prefill_step_size=size, logprobs=True)
        assert list(result.token_ids) == whole[0]
        chosen = whole[1][np.arange(10), whole[0]]
        np.testing.assert_allclose(result.logprobs, chosen, rtol=0, atol=tolerance(1e-4))


def test_a_prompt_without_its_own_end_as_border(model):
    """Borders are places to snapshot; a prompt may come without any."""
    ids = model.prepare(USER).token_ids
    assert model.generate(Prompt(ids, ()), **GREEDY).token_ids == model.generate(USER, **GREEDY).token_ids


# Streams that end early, or overlap.


def test_a_closed_stream_stops_and_the_next_answer_is_right(model):
    whole = model.generate(USER, **GREEDY).token_ids
    model.reset()
    stream = model.stream(USER, **GREEDY)
    assert [next(stream).token for _ in range(4)] == list(whole[:4])
    stream.close()
    follow = [*model.prepare(USER).token_ids, *whole[:4], 300, 301]
    assert assert_as_fresh(model, follow) == len(follow) - 3


def test_a_stream_that_never_started_changes_nothing(model):
    model.generate(USER, **GREEDY)
    model.stream("another one", **GREEDY).close()
    follow = [*model.prepare(USER).token_ids, 100]
    assert model.generate(follow, **GREEDY).usage.cached_tokens == len(follow) - 1


def test_two_streams_do_not_disturb_each_other(model):
    prompts = (USER, "Count the boats in the harbour, one by one, and their masts.")
    alone = []
    for prompt in prompts:
        model.reset()
        alone.append(list(model.generate(prompt, **GREEDY).token_ids))
    model.reset()
    streams = [model.stream(prompt, **GREEDY) for prompt in prompts]
    together = [[], []]
    for _ in range(12):
        for tokens, stream in zip(together, streams, strict=True):
            tokens.append(next(stream).token)
    assert together == alone
    assert [next(stream).finish_reason for stream in streams] == ["length", "length"]
    assert list(model.generate(USER, **GREEDY).token_ids) == alone[0]


@pytest.mark.parametrize("broken", ["prefill", "decode"])
def test_an_interrupt_inside_a_model_call_leaves_a_usable_model(model, monkeypatch, broken):
    whole = model.generate(USER, **GREEDY).token_ids
    network = model.runner.model

    class Interrupted:
        def __getattr__(self, name):
            return getattr(network, name)

        def __call__(self, batch):
            logits = network(batch)  # the cache has moved on, the conversation has not
            if (broken == "decode") == bool(batch.steps):
                raise KeyboardInterrupt
            return logits

    with monkeypatch.context() as patch:
        patch.setattr(model, "runner", Runner(Interrupted(), model.runner.thread, "tiny"))
        with pytest.raises(KeyboardInterrupt):
            model.generate([*model.prepare(USER).token_ids, *whole], **GREEDY)
    assert model.generate(USER, **GREEDY).token_ids == whole


def test_reset_forgets(model):
    model.generate(USER, **GREEDY)
    model.reset()
    follow = [*model.prepare(USER).token_ids, 100]
    assert model.generate(follow, **GREEDY).usage.cached_tokens == 0


# The object itself.


def test_the_repr_says_which_model_runs_where(model, tiny_folder, backend):
    assert re.fullmatch(
        rf"Gemma3n\(tiny-gemma3n, not quantized, {backend} on cpu, float32, [\d.]+ [KM]B of weights in memory\)",
        repr(model),
    )


def test_the_repr_of_a_quantized_slice(backend):
    with load("demo", backend=backend, matformer="half", device=device_for(backend)) as model:
        assert repr(model).startswith(f"Gemma3n(demo, slice Half, 4 and 8 bits, {backend} on cpu, ")


def test_the_memory_of_the_repr_is_what_the_weights_take(tiny_folder, backend):
    """Of the layers and the embeddings, whatever the width of the activations."""
    sizes = []
    for dtype in ("float32", "bfloat16"):
        with load(tiny_folder, backend=backend, dtype=dtype, device=device_for(backend)) as model:
            network = model.runner.model.language_model
            if backend == "mlx":
                from mlx.utils import tree_flatten

                # What is stacked for one row lies in the memory of its parts.
                arrays = dict(tree_flatten(network.parameters()))
                parts = [name for name in arrays if not {"qkv_proj", "gate_up_proj"} & set(name.split("."))]
                held = sum(arrays[name].nbytes for name in parts)
            else:
                held = sum(tensor.nbytes for tensor in network.parameters())
            sizes.append(model.checkpoint.nbytes_in_memory({"float32": 4, "bfloat16": 2}[dtype]))
            assert sizes[-1] == pytest.approx(held, rel=0.02)
    assert sizes[0] == 2 * sizes[1]


def test_close_frees_the_weights_and_every_later_call_is_one_clear_error(tiny_folder, backend):
    model = opened(tiny_folder, backend)
    pixels = np.zeros((8, 8, 3), np.uint8)
    model.encode_image(pixels)
    stream = model.stream(USER, **GREEDY)
    next(stream)
    parts = [weakref.ref(part) for part in (model.runner.model.language_model, model.runner.model.towers.vision_tower)]
    prompt = model.prepare(USER)
    model.close()
    model.close()
    assert [part() for part in parts] == [None, None]
    assert repr(model).endswith("closed)")
    calls = [
        lambda: model.generate(USER),
        lambda: model.stream([100]),
        lambda: next(stream),
        lambda: model.logits([100]),
        lambda: next(model.score(prompt)),
        lambda: model.prepare(USER),
        lambda: model.count_tokens([100]),
        lambda: model.encode_image(pixels),
        lambda: model.encode_audio(np.zeros(8000, np.float32), 16000),
        lambda: model.split_audio(Audio(np.zeros(8000, np.float32), 16000)),
        lambda: model.answer(model.conversation(), prompt, model.sampling_params()),
        model.drop_towers,
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^the model tiny-gemma3n has been closed: load it again$"):
            call()


def test_with_closes_also_after_an_error(tiny_folder, backend):
    model = opened(tiny_folder, backend)

    def used():
        with model as same:
            assert same.generate("hi", **GREEDY).token_ids
            raise KeyError

    with pytest.raises(KeyError):
        used()
    with pytest.raises(ValueError, match="has been closed"):
        model.generate("hi")


def test_a_notebook_shows_an_answer_as_markdown(model):
    result = model.generate(USER, **GREEDY)
    shown = result._repr_markdown_()
    assert shown.startswith(result.text)
    assert re.search(r"\n\n---\n\*12 tokens, [\d.]+ tokens/s, truncated\*$", shown)
    ended = model.generate(USER, temperature=0, logit_bias={106: 100.0})
    assert ended._repr_markdown_() == "\n\n---\n*0 tokens*"


def test_a_model_warms_up_in_its_own_thread(backend):
    with load("demo", backend=backend, device=device_for(backend), dtype="float32") as model:
        expected = model.generate("What is 3 + 4?", temperature=0).text
        model.reset()
        before = threading.active_count()
        model.warm_up()
        assert model.generate("What is 3 + 4?", temperature=0).text == expected
        assert threading.active_count() == before
