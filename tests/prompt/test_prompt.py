"""Messages to ids: the goldens, borders, and what is not text yet."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n_mlx.config.fields import read_json
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.media.opener import MediaOpener
from g3n_mlx.media.part import Media
from g3n_mlx.prompt.preparer import Preparer
from g3n_mlx.prompt.prompt import Prompt, PromptTooLong, encode
from g3n_mlx.prompt.template import Border, Control, render
from g3n_mlx.prompt.tokenizer import CONTROL_WORDS, Tokenizer

# control_words_in_text is the third deliberate difference from the reference: see the test below.
DEVIATIONS = {"system_parts_use_the_first", "unknown_part_is_dropped", "control_words_in_text"}
PLACEHOLDERS = {"image": "<image_soft_token>", "audio": "<audio_soft_token>"}
TINY = Path(__file__).resolve().parents[2] / "tests" / "tiny-gemma3n"
TEXT_ALONE = MediaOpener(TINY, ModelConfig.from_dict(read_json(TINY / "config.json")))
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["\n", "a\n\n", " b", *CONTROL_WORDS]))


@pytest.fixture(scope="module")
def tokenizer(tiny_folder) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


@pytest.mark.parametrize("ending", ["prompt", "transcript"])
def test_goldens(golden_json, tokenizer, ending):
    compared = 0
    for case in golden_json("chat_template"):
        if case["name"] in DEVIATIONS or "error" in case:
            continue
        pieces = render(case["messages"], case[ending]["add_generation_prompt"])
        single = [Control(PLACEHOLDERS[piece.kind]) if isinstance(piece, Media) else piece for piece in pieces]
        assert list(encode(single, tokenizer, {}).token_ids) == case[ending]["token_ids"], case["name"]
        compared += 1
    assert compared == 17


def prepared(messages, tokenizer, opener=None) -> Prompt:
    """The prompt of messages without media, unless there is something to open them."""
    return Preparer(tokenizer, opener or TEXT_ALONE, 10_000).prepare(messages)


def test_prepare_is_the_goldens_prompt(golden_json, tokenizer):
    (case,) = (case for case in golden_json("chat_template") if case["name"] == "single_turn")
    prompt = prepared(case["messages"], tokenizer)
    assert list(prompt.token_ids) == case["prompt"]["token_ids"]
    assert prepared(case["messages"][0]["content"], tokenizer) == prompt  # a string is one user message


def test_control_words_of_a_message_never_become_control_tokens(golden_json, tokenizer):
    (case,) = (case for case in golden_json("chat_template") if case["name"] == "control_words_in_text")
    prompt = prepared(case["messages"], tokenizer)
    assert tokenizer.decode(prompt.token_ids, skip_special=False) == case["prompt"]["text"]
    for word, count in {"<bos>": 1, "<start_of_turn>": 2, "<end_of_turn>": 1}.items():
        assert prompt.token_ids.count(tokenizer.id_of(word)) == count
    assert len(prompt.token_ids) > len(case["prompt"]["token_ids"])


@given(st.lists(TEXTS, min_size=1, max_size=5), st.one_of(st.none(), TEXTS))
@settings(max_examples=200, deadline=None)
def test_only_the_template_makes_control_tokens(tokenizer, texts, system):
    prompt = prepared(conversation(texts, system), tokenizer)
    control = [token_id for token_id in prompt.token_ids if token_id in {tokenizer.id_of(w) for w in CONTROL_WORDS}]
    start, end = tokenizer.id_of("<start_of_turn>"), tokenizer.id_of("<end_of_turn>")
    assert control == [tokenizer.bos_id, *[start, end] * len(texts), start]


@given(st.lists(TEXTS, min_size=1, max_size=5), st.one_of(st.none(), TEXTS))
@settings(max_examples=200, deadline=None)
def test_borders(tokenizer, texts, system):
    """They ascend, the last is the prompt's end, and what stands before one does not depend on what follows it."""
    messages = conversation(texts, system)
    prompt = prepared(messages, tokenizer)
    headers = sum(message["role"] == "assistant" for message in messages) + 1
    assert list(prompt.borders) == sorted(set(prompt.borders))
    assert prompt.borders[-1] == len(prompt.token_ids)
    assert len(prompt.borders) == headers + (1 if system is not None else 0)
    for count in range(1, len(texts), 2):  # the prompts of earlier turns are borders of this one
        earlier = prepared(conversation(texts[:count], system), tokenizer)
        assert len(earlier.token_ids) in prompt.borders
        assert prompt.token_ids[: len(earlier.token_ids)] == earlier.token_ids


def test_a_text_beyond_any_context_is_refused_before_it_is_read(tokenizer, monkeypatch):
    longest = max(len(token.encode()) for token in tokenizer._inner.get_vocab())
    assert tokenizer.max_token_bytes == longest
    fits, beyond = "a" * (6 * longest - len("user\n\nmodel\n")), "é" * (6 * longest // 2 + 1)
    assert Preparer(tokenizer, TEXT_ALONE, 6).prepare(fits).token_ids
    monkeypatch.setattr(tokenizer, "encode", None)
    with pytest.raises(PromptTooLong, match=rf"bytes, .* context of 6 tokens holds {6 * longest:,}.*: shorten it"):
        Preparer(tokenizer, TEXT_ALONE, 6).prepare(beyond)


def test_system_text_is_a_border_that_conversations_share(tokenizer):
    first, second = (prepared(conversation([text], "Be kind."), tokenizer) for text in ("Who are you?", "42"))
    assert first.borders[0] == second.borders[0]
    assert first.token_ids[: first.borders[0]] == second.token_ids[: second.borders[0]]
    assert tokenizer.decode(first.token_ids[: first.borders[0]]) == "user\nBe kind.\n\n"


def test_a_border_inside_a_token_moves_to_the_tokens_start(tokenizer):
    prompt = encode([Control("<bos>"), "a\n\n", Border(), "\n\nb"], tokenizer, {})
    assert prompt == Prompt(tuple([tokenizer.bos_id, *tokenizer.encode("a\n\n\n\nb")]), (2,))


def conversation(texts: list[str], system: str | None) -> list[dict]:
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]
