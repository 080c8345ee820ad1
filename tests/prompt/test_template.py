"""Conversations as the published template renders them, and what we refuse."""

import re

import pytest

from g3n_mlx.media.part import Media
from g3n_mlx.prompt.template import Border, Control, Piece, render

# What the goldens have in a media part's place.
PLACEHOLDERS = {"image": "<image_soft_token>", "audio": "<audio_soft_token>"}
# Deliberate differences, each with a test of its own.
DEVIATIONS = {"system_parts_use_the_first", "unknown_part_is_dropped"}


def written(pieces: list[Piece]) -> str:
    """The text that the reference tokenizes."""
    words = []
    for piece in pieces:
        match piece:
            case Control():
                words.append(piece.word)
            case Media():
                words.append(PLACEHOLDERS[piece.kind])
            case str():
                words.append(piece)
    return "".join(words)


def user(content) -> dict:
    return {"role": "user", "content": content}


@pytest.mark.parametrize("ending", ["prompt", "transcript"])
def test_goldens(golden_json, ending):
    rendered = 0
    for case in golden_json("chat_template"):
        if case["name"] in DEVIATIONS or "error" in case:
            continue
        pieces = render(case["messages"], case[ending]["add_generation_prompt"])
        assert written(pieces) == case[ending]["text"], case["name"]
        rendered += 1
    assert rendered == 18


def test_golden_errors(golden_json):
    cases = [case for case in golden_json("chat_template") if "error" in case]
    assert len(cases) == 2
    for case in cases:
        with pytest.raises(ValueError, match="^" + re.escape(case["error"])):
            render(case["messages"])


def test_all_text_parts_of_a_system_message_count(golden_json):
    (case,) = (case for case in golden_json("chat_template") if case["name"] == "system_parts_use_the_first")
    text = written(render(case["messages"]))
    assert text == case["prompt"]["text"].replace("Be kind.", "Be kind.Ignored part.")


def test_control_words_of_a_message_are_text():
    pieces = render([user("a <end_of_turn>"), {"role": "assistant", "content": ["<start_of_turn>"]}, user("b")])
    assert [piece.word for piece in pieces if isinstance(piece, Control)] == [
        "<bos>",
        *["<start_of_turn>", "<end_of_turn>"] * 3,
        "<start_of_turn>",
    ]


def test_borders_follow_the_system_text_and_the_model_headers():
    pieces = render([{"role": "system", "content": "S"}, user("q"), {"role": "assistant", "content": "a"}, user("r")])
    before = [written(pieces[:index]) for index, piece in enumerate(pieces) if isinstance(piece, Border)]
    assert len(before) == 3
    assert before[0].endswith("user\nS\n\n")
    assert all(text.endswith("<start_of_turn>model\n") for text in before[1:])
    assert before[-1] == written(pieces)


def test_media_parts_know_their_kind_and_place():
    parts = [{"type": "image", "image": "a.png"}, "words", {"type": "input_audio", "input_audio": {}}]
    media = [piece for piece in render([user(parts)]) if isinstance(piece, Media)]
    assert [(piece.kind, piece.where) for piece in media] == [
        ("image", "messages[0].content[0]"),
        ("audio", "messages[0].content[2]"),
    ]
    assert media[0].part is parts[0]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages is empty"),
        ("hello", "messages is a str, expected a list"),
        (["hello"], r"messages\[0\] is 'hello', expected a dict with 'role' and 'content'"),
        ([{"role": "user"}], r"messages\[0\] is .*expected a dict with 'role' and 'content'"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\] has the role 'tool', expected one of system, user"),
        ([{"role": "system", "content": "x"}], "a system message alone"),
        ([user(None)], r"messages\[0\]\.content is of type NoneType"),
        ([user(7)], r"messages\[0\]\.content is of type int"),
        ([user([7])], r"messages\[0\]\.content\[0\] is 7, expected a string or a dict"),
        ([user(["x", {"text": "no type"}])], r"messages\[0\]\.content\[1\] is .*'type'"),
        ([user([{"type": "smell"}])], r"messages\[0\]\.content\[0\]: the part type 'smell' is unknown; known are text"),
        ([user([{"type": "text"}])], r"messages\[0\]\.content\[0\]: the text part's 'text' is None"),
        (
            [{"role": "system", "content": [{"type": "image"}]}, user("x")],
            r"messages\[0\]\.content\[0\]: a system message can't hold 'image' parts",
        ),
        ([{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}], r"messages\[1\] has the role"),
    ],
)
def test_what_can_not_be_rendered_is_named(messages, expected):
    with pytest.raises(ValueError, match=expected):
        render(messages)
