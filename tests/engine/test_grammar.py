"""Constraints: masks let through what a grammar allows and nothing else, and a model's answers follow their schema."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_schemas import SCHEMAS

from g3n_mlx import Gemma3n, load
from g3n_mlx.engine.grammar import GrammarError, GrammarLimits, GrammarMatcher, Grammars
from g3n_mlx.prompt.tokenizer import Tokenizer

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

WIDTH = 1160  # more logits than the tokenizer has tokens
EOS = (1, 106)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, WIDTH, EOS)


@pytest.fixture(scope="module")
def model(tiny_folder: Path, backend: str) -> Gemma3n:
    return load(tiny_folder, backend=backend)


def walk(constraint: GrammarMatcher, seed: int, limit: int = 2000) -> list[int] | None:
    """Any answer that the masks let through, without its end; None when it has none after so many tokens."""
    generator, ids = np.random.default_rng(seed), []
    for _ in range(limit):
        token_id = int(generator.choice(np.flatnonzero(constraint.mask())))
        constraint.push(token_id)
        if token_id in EOS:
            return ids
        ids.append(token_id)
    return None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_any_walk_through_the_masks_validates(
    grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any], seed: int
) -> None:
    ids = walk(grammars.json_schema(schema), seed)
    assert ids is not None, "a bounded schema has bounded answers"
    jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_what_is_forced_is_all_that_the_masks_let_through(
    grammars: Grammars, schema: dict[str, Any], seed: int
) -> None:
    """At every place of an answer; looking ahead changes nothing."""
    constraint, generator = grammars.json_schema(schema), np.random.default_rng(seed)
    for _ in range(200):
        forced = constraint.forced()
        ahead = constraint.masks([*forced, 3])
        assert [list(np.flatnonzero(mask)) for mask in ahead[: len(forced)]] == [[token_id] for token_id in forced]
        np.testing.assert_array_equal(constraint.mask(), ahead[0])
        token_id = int(generator.choice(np.flatnonzero(ahead[0])))
        constraint.push(token_id)
        if token_id in EOS:
            return
        if len(ahead) > 1 and forced:
            np.testing.assert_array_equal(constraint.mask(), ahead[1])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=SCHEMAS, seed=st.integers(0, 2**32), wrong_at=st.integers(0, 12))
def test_masks_along_a_draft_are_those_that_its_tokens_lead_to(
    grammars: Grammars, schema: dict[str, Any], seed: int, wrong_at: int
) -> None:
    ids = walk(grammars.json_schema(schema), seed)
    assert ids is not None
    draft, constraint = [*ids[:wrong_at], 2, *ids[wrong_at:]], grammars.json_schema(schema)
    masks = constraint.masks(draft)
    assert len(masks) == min(wrong_at, len(ids)) + 1, "2 is no token of text, so the draft breaks the grammar there"
    for mask, token_id in zip(masks, draft, strict=False):
        np.testing.assert_array_equal(constraint.mask(), mask)
        if mask[token_id]:
            constraint.push(token_id)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_a_models_answer_validates_unless_it_was_cut(model: Gemma3n, schema: dict[str, Any], seed: int) -> None:
    grammars = Grammars(model.tokenizer, model.config.text.vocab_size, model.eos_token_ids)
    answer = model.generate("hi", constraint=grammars.json_schema(schema), seed=seed, temperature=1.5, max_tokens=120)
    if answer.finish_reason == "stop":
        jsonschema.validate(json.loads(answer.text), schema)


def test_a_model_writes_what_it_is_told_to_write(model: Gemma3n) -> None:
    grammars = Grammars(model.tokenizer, model.config.text.vocab_size, model.eos_token_ids)
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    answer = model.generate("hi", constraint=grammars.json_schema(schema), temperature=0, max_tokens=60)
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.text), schema)
    answer = model.generate("hi", constraint=grammars.regex("(yes|no), [0-9]{3}"), seed=3, max_tokens=60)
    assert answer.finish_reason == "stop"
    assert answer.text[-5:-3] == ", "
    assert answer.text.partition(",")[0] in ("yes", "no")


def test_a_mask_has_exactly_the_tokens_that_go_on(grammars: Grammars, tokenizer: Tokenizer) -> None:
    contents = [tokenizer.bytes_of(token_id) for token_id in range(WIDTH)]
    digits = grammars.regex("[0-9 ]+")
    expected = np.array([bool(content) and not content.strip(b"0123456789 ") for content in contents])
    np.testing.assert_array_equal(digits.mask(), expected)
    digits.push(int(np.flatnonzero(expected)[0]))
    expected[list(EOS)] = True  # both of them, now that there is a digit
    np.testing.assert_array_equal(digits.mask(), expected)


def test_a_character_of_several_bytes_is_never_left_half(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.regex("(🙂|é)")
    written = walk(constraint, 0)
    assert written is not None
    assert tokenizer.decode(written) in ("🙂", "é")
    constraint = grammars.regex("[^a]")  # any other character, also one that has no token of its own
    first = next(i for i in range(WIDTH) if tokenizer.bytes_of(i) == b"\xf0")
    assert constraint.mask()[first]
    constraint.push(first)
    assert not constraint.mask()[list(EOS)].any()


def test_neither_control_tokens_nor_ids_without_a_token_are_drawn(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.lark("start: <[*]> /(?s:.*)/")
    mask = constraint.mask()
    assert mask.sum() > 1000
    assert not mask[tokenizer.vocab_size :].any()
    assert not mask[[tokenizer.bos_id, tokenizer.id_of("<start_of_turn>"), tokenizer.id_of("<image_soft_token>")]].any()


def test_control_words_are_spelled_as_text(grammars: Grammars, tokenizer: Tokenizer) -> None:
    ids = walk(grammars.lark('start: "<start_of_turn>user"'), 0)
    assert ids is not None
    assert tokenizer.id_of("<start_of_turn>") not in ids
    assert tokenizer.decode(ids) == "<start_of_turn>user"


def test_forced_text_is_tokenized_as_the_tokenizer_does(grammars: Grammars, tokenizer: Tokenizer) -> None:
    text = "the price of peas,\n\nand more"
    assert walk(grammars.lark(f"start: {json.dumps(text)}"), 0) == tokenizer.encode(text)


def test_a_grammar_with_recursion(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.lark('start: "(" start ")" | "x"')
    for text in ("((", "x)"):
        for token_id in tokenizer.encode(text):
            constraint.push(token_id)
    assert not constraint.mask()[list(EOS)].any()
    constraint.push(tokenizer.encode(")")[0])
    assert np.flatnonzero(constraint.mask()).tolist() == sorted(EOS)


def test_a_token_outside_the_mask_is_refused(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.regex("[0-9]+")
    with pytest.raises(GrammarError, match="no text"):
        constraint.push(tokenizer.encode("x")[0])


def test_white_space_between_json_is_bounded(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.json_schema({"type": "object"})
    constraint.push(tokenizer.encode("{")[0])
    newline, space = tokenizer.id_of("\n"), tokenizer.encode(" ")[0]
    constraint.push(newline)
    assert not constraint.mask()[newline]
    for _ in range(40):
        constraint.push(space)
    assert not constraint.mask()[space]


@pytest.mark.parametrize("style", [{}, {"separators": (",", ":")}, {"indent": 2}, {"indent": 4}])
def test_usual_ways_of_writing_json_are_let_through(
    grammars: Grammars, tokenizer: Tokenizer, style: dict[str, Any]
) -> None:
    text = json.dumps({"a": [1, 2.5, {"b": None}, {}], "é\n": 'q"'}, ensure_ascii=False, **style)
    constraint = grammars.json_schema({"type": "object"})
    for token_id in tokenizer.encode(text):
        constraint.push(token_id)
    assert constraint.mask()[list(EOS)].all()


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (False, "False, expected"),
        ({"const": "\ud800"}, "can't be used"),
        ({"type": "integer", "minimum": 10**400}, "can't be used"),
        ([], "expected a JSON object"),
        ({"type": "text"}, "Invalid type: text"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "postcode"}, "postcode"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex parse error: look-around.* not supported"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "Unsatisfiable"),
        ({"$ref": "#/$defs/missing"}, "does not exist"),
        ({"$ref": "https://example.com/schema.json"}, "does not fetch"),
        ({"$ref": "#"}, "no text"),
        ({"const": float("nan")}, "not JSON"),
        ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "schema can't be used: oneOf .* use anyOf"),
    ],
)
def test_a_schema_that_cannot_be_kept_says_why(grammars: Grammars, schema: Any, reason: str) -> None:
    with pytest.raises(GrammarError, match=reason) as refused:
        grammars.json_schema(schema)
    assert "\n" not in str(refused.value)


BOUNDS = st.sampled_from([-5.5, -5, -1, -0.5, 0, 0.001, 0.5, 1, 1.5, 2, 5, 5.001, 6, 100])
NUMBERS = ["0", "-0", "0.0", "0.25", "0.5", "-0.5", "1", "1.0", "1.5", "-1", "2", "5", "5.0005", "-5", "6", "50"]


@settings(max_examples=60, deadline=None)
@given(
    bounds=st.tuples(BOUNDS, BOUNDS).map(sorted).filter(lambda bounds: bounds[0] < bounds[1]),
    keys=st.tuples(st.sampled_from(["minimum", "exclusiveMinimum"]), st.sampled_from(["maximum", "exclusiveMaximum"])),
    place=st.sampled_from(["%s", '{"items": %s}', '{"properties": {"a": %s}}', '{"anyOf": [%s]}']),
)
def test_no_number_outside_its_range_is_let_through(
    grammars: Grammars, tokenizer: Tokenizer, bounds: list[float], keys: tuple[str, str], place: str
) -> None:
    number = {"type": "number", **dict(zip(keys, bounds, strict=True))}
    schema = json.loads(place % json.dumps(number))
    written = '{"a": %s}' if "properties" in place else "[%s]" if "items" in place else "%s"
    for text in NUMBERS:
        constraint = grammars.json_schema(schema)
        try:
            for token_id in [*tokenizer.encode(written % text), EOS[0]]:
                constraint.push(token_id)
        except GrammarError:
            continue
        jsonschema.validate(json.loads(text), number)


def test_a_schema_true_lets_any_json_through(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.json_schema(True)
    for token_id in tokenizer.encode('[null, {"a": 1e5}]'):
        constraint.push(token_id)
    assert constraint.mask()[list(EOS)].all()


def test_values_in_a_schema_are_left_as_they_are(grammars: Grammars, tokenizer: Tokenizer) -> None:
    value = {"exclusiveMinimum": 0, "maximum": 0.5}
    constraint = grammars.json_schema({"enum": [value], "properties": {"items": {"const": value}}})
    for token_id in tokenizer.encode(json.dumps(value)):
        constraint.push(token_id)
    assert constraint.mask()[list(EOS)].all()


def test_options_of_the_library_in_a_schema_are_not_obeyed(grammars: Grammars) -> None:
    with pytest.raises(GrammarError, match="not"):
        grammars.json_schema({"not": {"type": "string"}, "x-guidance": {"lenient": True}})


@pytest.mark.parametrize("pattern", ["(a", "(?=a)b", r"(a)\1", "\x00["])
def test_a_regex_that_cannot_be_used_says_so(grammars: Grammars, pattern: str) -> None:
    with pytest.raises(GrammarError, match="can't be used"):
        grammars.regex(pattern)


@pytest.mark.parametrize("grammar", ["start: missing", "begin: /a/", "start: (", "", "start: <end_of_turn>"])
def test_a_grammar_that_cannot_be_used_says_so(grammars: Grammars, grammar: str) -> None:
    with pytest.raises(GrammarError, match="can't be used"):
        grammars.lark(grammar)


def test_half_a_character_is_refused(grammars: Grammars) -> None:
    for make in (grammars.regex, grammars.lark):
        with pytest.raises(GrammarError, match="not UTF-8"):
            make("start: \ud800")


def test_limits(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, WIDTH, EOS, GrammarLimits(characters=500, depth=8))
    grammars.json_schema({"items": {"items": {"items": {"type": "string"}}}})
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(5000):  # deeper than Python's own limit
        nested = {"items": nested}
    with pytest.raises(GrammarError, match="more than 8 levels"):
        grammars.json_schema(nested)
    for make in (grammars.regex, grammars.lark):
        with pytest.raises(GrammarError, match="600 characters, expected at most 500"):
            make("a" * 600)
    with pytest.raises(GrammarError, match="at most 500"):
        grammars.json_schema({"enum": ["a" * 600]})
    costly = Grammars(tokenizer, WIDTH, EOS, GrammarLimits(initial_fuel=1000))
    with pytest.raises(GrammarError, match="too big"):
        costly.json_schema({"enum": [f"value {number}" for number in range(2000)]})


def _chain(length: int, line: str, last: str) -> str:
    """Rules r0, r1, ... of which each is `line` with the next one's number."""
    rules = [f"r{number}: " + line.replace("NEXT", f"r{number + 1}") for number in range(length)]
    return "\n".join(["start: r0", *rules, f"r{length}: {last}"])


def _references(length: int, line: str) -> dict[str, Any]:
    """$defs d0, d1, ... of which each is `line` with a reference to the next one."""
    defs = {
        f"d{number}": json.loads(line.replace("NEXT", json.dumps({"$ref": f"#/$defs/d{number + 1}"})))
        for number in range(length)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{length}": {"type": "null"}}}


@pytest.mark.parametrize("length", [1900, 3000, 16_000])
@pytest.mark.parametrize(
    ("line", "last"),
    [
        ("NEXT", '"x"'),
        ("NEXT", 'r0 | "x"'),
        ('"a" NEXT', '"x"'),
        ("((((((((NEXT))))))))", '"x"'),
        ('%json {"type": "null"} NEXT', '"x"'),
    ],
)
def test_rules_that_refer_to_each_other_far_down_do_not_end_the_process(
    grammars: Grammars, length: int, line: str, last: str
) -> None:
    text = _chain(length, line, last)
    if length > grammars.limits.rules:
        with pytest.raises(GrammarError, match=r"rules, expected at most 2000|characters, expected at most"):
            grammars.lark(text)
    else:
        grammars.lark(text)


@pytest.mark.parametrize("length", [500, 3000, 9000])
@pytest.mark.parametrize(
    "line", ["NEXT", '{"properties": {"a": NEXT}, "type": "object"}', '{"allOf": [NEXT, {"type": "null"}]}']
)
def test_references_that_lead_far_down_do_not_end_the_process(grammars: Grammars, length: int, line: str) -> None:
    schema = _references(length, line)
    if length == 9000 or (length == 3000 and line != "NEXT"):
        with pytest.raises(GrammarError, match=r"more than 8000 levels|characters"):
            grammars.json_schema(schema)
    else:
        grammars.json_schema(schema)
    if length == 500:  # the same in a grammar, which is where a function's parameters stand
        grammars.lark(f"start: %json {json.dumps(schema)}")
    else:
        with suppress(GrammarError):
            grammars.lark(f"start: %json {json.dumps(schema)}")


def test_a_cycle_of_references_alone_is_an_error(grammars: Grammars) -> None:
    schema = _references(2000, "NEXT")
    schema["$defs"]["d2000"] = {"$ref": "#/$defs/d0"}
    with pytest.raises(GrammarError, match="no text"):
        grammars.json_schema(schema)


@pytest.mark.parametrize(
    "make",
    [
        lambda one: one.json_schema({"allOf": [{"type": "string", "pattern": f"a.*b.*{n}"} for n in range(60)]}),
        lambda one: one.lark("start: R\nR: " + " & ".join(f"/(.|\\n)*{n}(.|\\n)*/" for n in range(500))),
        lambda one: one.json_schema({"type": "integer", "multipleOf": 10_000_019}),
        lambda one: one.lark('start: <[7-9]> %json {"type": "integer", "\\u006dultipleOf": 10000019}'),
    ],
)
def test_what_would_take_gigabytes_or_minutes_is_refused(tokenizer: Tokenizer, make: Any) -> None:
    with pytest.raises(GrammarError, match=r"it takes (too much memory|more than 2 s) to compile: make it simpler"):
        make(Grammars(tokenizer, WIDTH, EOS, GrammarLimits(compile_s=2.0)))


def test_a_trial_refuses_nothing_that_compiles(grammars: Grammars) -> None:
    grammars.lark("start: <[300]> R\nR: /[a-z]+/ & /.*x.*/")
    grammars.json_schema({"allOf": [{"type": "string", "pattern": "a.*"}, {"maxLength": 9}]})
    with pytest.raises(GrammarError, match=r"the grammar can't be used: .*unknown name"):
        grammars.lark("start: R\nR: X & Y")
