"""Constrained decoding: which tokens may come next, so that an answer follows a JSON schema, a regex or a grammar.

`Grammars` reads a tokenizer's vocabulary once and makes one `GrammarMatcher` for each answer. The masks are
llguidance's (extra `server`). Text that a grammar forces is tokenized as the tokenizer would. JSON comes with little
white space, so that an answer can't run away in it: none, one space, or a new line and its indentation.
Sources: llguidance's docs/syntax.md, json_schema.md and special_tokens.md.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from g3n_mlx.engine import grammar_trial
from g3n_mlx.engine.schemas import MAX_DEPTH, depth_of, inner_values, schema_at, with_kept_ranges
from g3n_mlx.failures import BadValue, MissingPackage
from g3n_mlx.installation import install_command
from g3n_mlx.prompt.tokenizer import Tokenizer

# What makes llguidance multiply regexes, so that a short text may cost gigabytes; a long one may by its length alone.
_COSTLY = re.compile(r"&|~|allOf|multipleOf|\$ref|patternProperties|\\u")
_LONG = 8192  # characters
_TRIED = 64  # grammars that are known to compile
# A rule or terminal of a Lark grammar, as it begins; ids of tokens, of which a trial has 256 only.
_RULE = re.compile(r"(?:^|\{)[ \t]*[!?_]*[A-Za-z][\w-]*[^\n:\"/]*:", re.MULTILINE)
_TOKEN_IDS = re.compile(r"<\[[\^\d,\s-]*\]>")
# At every place where JSON allows white space, at most once.
WHITE_SPACE = r" |\n {0,40}"


class GrammarError(BadValue):
    """A schema or grammar that can't be used, or that became too complex while it was followed."""


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What a grammar from a stranger may cost."""

    characters: int = 256 << 10  # of a schema as JSON, a regex or a grammar
    depth: int = MAX_DEPTH  # of a schema
    # What the compiler may descend through: the levels of a schema and of all that its references name, and rules.
    levels: int = 8000
    rules: int = 2000
    compile_s: float = 10.0
    # llguidance's units; about 50,000 and 14,000 a millisecond
    initial_fuel: int = 1_000_000
    step_fuel: int = 200_000


class Grammars:
    """Makes constraints for one tokenizer and one model's logits. Building it takes seconds for 262,144 tokens."""

    def __init__(
        self, tokenizer: Tokenizer, width: int, eos_ids: Iterable[int], limits: GrammarLimits | None = None
    ) -> None:
        """width: of the logits, V; eos_ids: what ends an answer.

        Raises ImportError when llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError:
            raise MissingPackage(
                "schema, regex and lark need the package llguidance, which the extra 'server' brings: "
                + install_command("server")
            ) from None
        self.limits = limits or GrammarLimits()
        self.width = width
        self._llguidance = llguidance
        self._parser_limits = llguidance.LLParserLimits(
            initial_lexer_fuel=self.limits.initial_fuel, step_lexer_fuel=self.limits.step_fuel, verbose_errors=False
        )
        self._tried: OrderedDict[str, None] = OrderedDict()
        ends = sorted(eos_ids)
        vocabulary = _Vocabulary(tokenizer, width, ends)
        self._tokenizer = llguidance.LLTokenizer(vocabulary, eos_token=ends)  # pyright: ignore[reportArgumentType]
        reachable = np.ones(width, dtype=bool)
        reachable[vocabulary.special_token_ids] = False
        reachable[ends] = True
        self._reachable = np.packbits(reachable, bitorder="little")

    def json_schema(self, schema: Mapping[str, Any] | bool) -> "GrammarMatcher":
        """JSON that validates against a schema (Draft 2020-12); properties come in the schema's order.

        Raises GrammarError saying why when the schema is invalid, unsatisfiable, too large, or uses what can't be kept.
        """
        return self._constraint("schema", f"start: {self.inline(schema)}")

    def regex(self, pattern: str) -> "GrammarMatcher":
        """Text that a regex matches as a whole, in the syntax of Rust's regex crate. Raises GrammarError."""
        self._check_length("regex", pattern)
        return self._constraint("regex", self._llguidance.LLMatcher.grammar_from_regex(_utf8("regex", pattern)))

    def lark(self, grammar: str) -> "GrammarMatcher":
        """Text of a context-free grammar in llguidance's dialect of Lark, from its rule `start` on.

        Raises GrammarError.
        """
        self._check_length("grammar", grammar)
        rules = len(_RULE.findall(grammar))
        if rules > self.limits.rules:
            raise GrammarError(f"the grammar has {rules} rules, expected at most {self.limits.rules}: make it smaller")
        return self._constraint("grammar", _utf8("grammar", grammar))

    def inline(self, schema: Mapping[str, Any] | bool, *, lenient: bool = False) -> str:
        """JSON of a schema as a piece of a Lark grammar. lenient: keywords that can't be kept are left out of account.

        Raises GrammarError when the schema is no schema, too large or too deep.
        """
        if schema is False or not isinstance(schema, (Mapping, bool)):
            raise GrammarError(f"the schema is {schema!r:.80}, expected a JSON object or true")
        _check_depth(schema, self.limits.depth)
        _check_levels(schema, self.limits.levels)
        options = {"x-guidance": {"whitespace_pattern": WHITE_SPACE, "lenient": lenient}}
        try:
            text = json.dumps(options if schema is True else {**with_kept_ranges(schema), **options}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise GrammarError(f"the schema is not JSON: {error}") from None
        self._check_length("schema", text)
        return f"%json {text}"

    def _check_length(self, kind: str, text: str) -> None:
        if len(text) > self.limits.characters:
            raise GrammarError(
                f"the {kind} has {len(text)} characters, expected at most {self.limits.characters}: make it smaller"
            )

    def _constraint(self, kind: str, grammar: str) -> "GrammarMatcher":
        self._try(kind, grammar)
        return grammar_trial.on_large_stack(lambda: self._compiled(kind, grammar))

    def _try(self, kind: str, grammar: str) -> None:
        """Raises GrammarError when a grammar that may cost too much does."""
        if grammar in self._tried or (len(grammar) <= _LONG and not _COSTLY.search(grammar)):
            return
        limits = self.limits
        reason = grammar_trial.refusal(
            _TOKEN_IDS.sub("<[0]>", grammar), limits.initial_fuel, limits.step_fuel, limits.compile_s
        )
        if reason is not None:
            raise GrammarError(f"the {kind} can't be used: {_reason(reason)}")
        self._tried[grammar] = None
        while len(self._tried) > _TRIED:
            self._tried.popitem(last=False)

    def _compiled(self, kind: str, grammar: str) -> "GrammarMatcher":
        matcher = self._llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._parser_limits)
        if matcher.is_error():
            raise GrammarError(f"the {kind} can't be used: {_reason(matcher.get_error())}")
        constraint = GrammarMatcher(matcher, self.width, self._reachable)
        if not constraint.mask().any():
            raise GrammarError(f"the {kind} can't be used: there is no text that follows it")
        return constraint


class GrammarMatcher:
    """How far one answer has come in its grammar. Good for one answer."""

    def __init__(self, matcher: Any, width: int, reachable: np.ndarray) -> None:
        """matcher: llguidance's LLMatcher; reachable: packed bits of the ids with a text and of the ends."""
        self._matcher, self._width, self._reachable = matcher, width, reachable

    def mask(self) -> np.ndarray:
        """The tokens that may come next, bool [V]; an end of sequence where the answer may end.

        Raises GrammarError when the grammar has become too complex to follow.
        """
        drawable = self._matcher.compute_bitmask()
        self._check()
        return self._unpacked(drawable)

    def masks(self, draft: Sequence[int]) -> list[np.ndarray]:
        """The masks now and after each token of a draft, up to the first one that may not come there."""
        masks, ahead = [self.mask()], self._matcher.deep_copy()
        for token_id in draft:
            if not masks[-1][token_id] or not ahead.consume_token(token_id):
                break
            drawable = ahead.compute_bitmask()
            if ahead.is_error():  # too complex only if the draft is accepted: then the next `mask` says so
                break
            masks.append(self._unpacked(drawable))
        return masks

    def forced(self) -> list[int]:
        """The tokens that must come next; none where there is a choice, or where the answer may end."""
        tokens = self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    def _unpacked(self, drawable: bytes) -> np.ndarray:
        """A bit mask of llguidance's as bool [V], of the ids in reach."""
        bits = np.frombuffer(drawable, dtype=np.uint8)[: len(self._reachable)] & self._reachable
        return np.unpackbits(bits, count=self._width, bitorder="little").view(np.bool_)

    def push(self, token_id: int) -> None:
        """Takes note of a drawn token; raises GrammarError when the mask did not have it."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _reason(self._matcher.get_error())
            raise GrammarError(f"there is no text that follows this grammar from here on: {reason}")


class _Vocabulary:
    """A tokenizer as llguidance's LLTokenizer asks for it."""

    is_tokenizer_wrapper = True
    bos_token_id = None  # prompts are no business of a grammar

    def __init__(self, tokenizer: Tokenizer, width: int, eos_ids: Sequence[int]) -> None:
        self.eos_token_id = eos_ids[0]
        contents = [tokenizer.bytes_of(token_id) for token_id in range(width)]
        # Grammars write text; what has none is out of their reach, under a name of its own.
        self.special_token_ids = [token_id for token_id, content in enumerate(contents) if content is None]
        self.tokens = [
            f"<[{token_id}]>".encode() if content is None else content for token_id, content in enumerate(contents)
        ]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _check_depth(schema: Any, limit: int) -> None:
    """Raises GrammarError when lists and objects stand deeper inside each other; before anything recurses."""
    level, depth = [schema], 0
    while level := [inner for value in level for inner in inner_values(value)]:
        depth += 1
        if depth > limit:
            raise GrammarError(f"the schema is more than {limit} levels deep: make it flatter, with $defs and $ref")


def _check_levels(schema: Any, limit: int) -> None:
    """Raises GrammarError when the compiler, which follows references, might descend further.

    At most it goes through every place that a reference names, once. A reference of another kind than `#/...` is
    counted as the whole schema.
    """
    named, level = set[str](), [schema]
    while level:
        named |= {value["$ref"] for value in level if isinstance(value, Mapping) and isinstance(value.get("$ref"), str)}
        level = [inner for value in level for inner in inner_values(value)]
    levels = depth_of(schema)
    for reference in named:
        levels += depth_of(schema_at(schema, reference))
        if levels > limit:
            raise GrammarError(
                f"the schema's references lead through more than {limit} levels: make it flatter, or smaller"
            )


def _utf8(kind: str, text: str) -> str:
    """The text; raises GrammarError when it has half a character, which llguidance can't take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GrammarError(f"the {kind} is not UTF-8 text: {error.reason}") from None
    return text


def _reason(error: str) -> str:
    """The first line of llguidance's message, a regex's reason behind it; the grammar and its own state come after."""
    first, _, rest = error.strip().partition("\n")
    for theirs, ours in _WORDINGS.items():
        first = first.replace(theirs, ours)
    if first.endswith(":"):
        first += "".join(line.removeprefix("error:") for line in rest.splitlines() if line.startswith("error:"))
    return first[:500]


_WORDINGS = {
    "NoExtensionBias": "there is no text that follows it",
    "NoExtension": "there is no text that follows it",
    "at 1(8): ": "",  # where in the grammar that it became part of the schema stands
    "failed to compile JSON schema: ": "",
    "oneOf constraints are not supported. Enable 'coerce_one_of' option to approximate oneOf with anyOf": (
        "oneOf of schemas that the same value may follow is not supported: use anyOf"
    ),
}
