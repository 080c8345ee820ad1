"""Tools: the convention by which a Gemma 3n, whose template knows none, is offered functions and calls them.

The system text lists the functions, one JSON object a line: name, description, JSON schema of the parameters. A call is
a JSON object `{"name": ..., "parameters": {...}}` that begins a line; it may be fenced, and text may come before it.
Several calls stand below each other. Results come back as a user's text, `Result of NAME:` and a fenced block.
A grammar keeps the answer to that: once it names an offered function, the rest of the call must fit its schema; with a
required call the answer is calls and nothing else, with a named one a single call of it. docs/tools.md has it all.
Sources: the JSON form is the one of "Function calling with Gemma", ai.google.dev; tool_choice and deltas are OpenAI's.
"""

import json
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from g3n_mlx.engine.grammar import WHITE_SPACE, GrammarError, GrammarMatcher, Grammars
from g3n_mlx.failures import BadValue

AUTO, REQUIRED = "auto", "required"
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
# White space in a call that is begun by the model: as it may go on, and as it is read.
_GAP = f"({WHITE_SPACE})?"
_SPACE = r"[ \t\r\n]*"
_NO_PARAMETERS: Mapping[str, Any] = {"properties": {}}
# Beside these, `properties` does not list all that there may be.
_FURTHER_PROPERTIES = {
    *("additionalProperties", "unevaluatedProperties", "patternProperties", "dependentSchemas"),
    *("allOf", "anyOf", "oneOf", "if", "$ref"),
}

# Behind these keywords stands data, where nothing is a reference ...
_DATA = {"const", "enum", "default", "examples"}
# ... and behind these an object whose keys are names, not keywords.
_SCHEMAS_BY_NAME = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}


@dataclass(frozen=True, slots=True)
class Function:
    """A function that the model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]  # the JSON schema of an object
    strict: bool  # refuse a schema with keywords that the grammar can't keep, instead of passing over them

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> "Function":
        """Reads OpenAI's `function` object; raises ValueError naming what is wrong with it."""
        name, parameters = fields.get("name"), fields.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise BadValue(f"a function's name is {name!r:.80}, expected 1 to 64 of the letters a-z A-Z 0-9 _ . -")
        if parameters is None or parameters == {}:
            parameters = _NO_PARAMETERS
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise BadValue(f"the parameters of {name} are {parameters!r:.80}, expected the JSON schema of an object")
        parameters = {"type": "object", **parameters}
        description = fields.get("description") or ""
        return Function(name, description, parameters, fields.get("strict") is True)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The schema that a call must fit: where it lists properties, those and no others, though it may not say so."""
        if "properties" not in self.parameters or _FURTHER_PROPERTIES & self.parameters.keys():
            return self.parameters
        return {**self.parameters, "additionalProperties": False}

    @property
    def call(self) -> Mapping[str, Any]:
        """The schema of a call as a whole."""
        properties = {"name": {"const": self.name}, "parameters": _moved(self.arguments, "#/properties/parameters")}
        return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}

    def line(self) -> str:
        """What the system text says about it."""
        described = {"description": self.description} if self.description else {}
        return json.dumps({"name": self.name, **described, "parameters": self.parameters}, ensure_ascii=False)


class Tools:
    """The functions of one request, and which of them must be called."""

    def __init__(
        self,
        functions: Sequence[Mapping[str, Any]],
        choice: str = AUTO,
        *,
        named: str | None = None,
        parallel: bool = True,
    ) -> None:
        """functions: OpenAI's `function` objects; choice: "auto" or "required"; named: the one that must be called.

        Raises ValueError on a bad function, two of one name, or a name that is not among them.
        """
        self.functions = [Function.from_dict(fields) for fields in functions]
        names = [function.name for function in self.functions]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise BadValue(f"two functions have the name {twice[0]!r}; names must differ")
        if named is not None and named not in names:
            raise BadValue(f"tool_choice names the function {named!r:.80}; there are {', '.join(names)}")
        if not names:
            raise BadValue("there are no functions to call")
        self.required = named is not None or choice == REQUIRED
        self.named = named
        self.parallel = parallel

    def system_text(self) -> str:
        """The convention and the functions, for the beginning of the system text."""
        lines = [
            "You can call functions. To call one, answer with a JSON object on a line of its own:",
            '{"name": "NAME OF THE FUNCTION", "parameters": {"NAME OF AN ARGUMENT": ITS VALUE}}',
            "The user then tells you what the function returned.",
        ]
        if self.parallel and self.named is None:
            lines.append("To call several functions, write several such objects, one a line.")
        if self.named is not None:
            lines.append(f"Now call {self.named}.")
        elif self.required:
            lines.append("Now call a function.")
        else:
            lines.append("Call a function when you need it; otherwise answer as usual.")
        lines.append("The functions, each with the JSON schema of its parameters:")
        return "\n".join([*lines, *(function.line() for function in self.functions)])

    def constraint(self, grammars: Grammars, content: Mapping[str, Any] | bool | None = None) -> GrammarMatcher:
        """What the answer must look like. content: the schema of an answer that is no call; None lets any text through.

        Raises GrammarError saying which parameters can't be kept, and why.
        """
        try:
            return grammars.lark(self._lark(grammars, content))
        except GrammarError:
            # Built one by one to find the function that is to blame.
            for function in self.functions:
                try:
                    grammars.lark(f"start: {grammars.inline(function.arguments, lenient=not function.strict)}")
                except GrammarError as error:
                    raise GrammarError(f"the parameters of {function.name}: {error}") from None
            raise

    def parser(self, *, content_is_json: bool = False) -> "CallParser":
        """Finds the calls in an answer. content_is_json: an answer that calls nothing is JSON, which stays whole."""
        return CallParser({function.name for function in self.functions}, content_is_json=content_is_json)

    def _lark(self, grammars: Grammars, content: Mapping[str, Any] | bool | None) -> str:
        """An answer of the convention: calls alone where one is required, else any text, which may end in calls.

        Where text must be JSON, it is that or calls: both are JSON then, so that the grammar need not tell them apart.
        """
        rules: list[str] = []
        called = [function for function in self.functions if self.named in (None, function.name)]
        if content is not None and not self.required:
            rules = [
                f"call_{number}: {grammars.inline(function.call, lenient=not function.strict)}"
                for number, function in enumerate(called)
            ]
            call = " | ".join(f"call_{number}" for number in range(len(called)))
            more = rf"(/\n/ ({call}))*" if self.parallel else ""
            return "\n".join([f"start: content | ({call}) {more}", f"content: {grammars.inline(content)}", *rules])
        for number, function in enumerate(called):
            name = re.escape(function.name)
            rules += [
                # As the system text shows it: white space is no choice that a small model could get lost in.
                rf'call_{number}: /\{{"name": "{name}", "parameters": / args_{number} /\}}/',
                # Text ends as soon as it names a function at the beginning of a line: from there on it is a call.
                rf'head_{number}[lazy]: /((?s:.*)\n)?[ \t]*\{{{_SPACE}"name"{_SPACE}:{_SPACE}"{name}"/',
                rf'rest_{number}: /{_GAP},{_GAP}"parameters"{_GAP}:{_GAP}/ args_{number} /{_GAP}\}}/',
                f"args_{number}: {grammars.inline(function.arguments, lenient=not function.strict)}",
            ]
        call = " | ".join(f"call_{number}" for number in range(len(called)))
        more = rf"(/\n/ ({call}))*" if self.parallel and self.named is None else ""
        if self.required:
            return "\n".join([f"start: ({call}) {more}", *rules])
        first = " | ".join(f"head_{number} rest_{number}" for number in range(len(called)))
        return "\n".join([f"start: /(?s:.*)/ | ({first}) {more} (/\n```\n?/)?", *rules])


def _moved(schema: Any, place: str) -> Any:
    """A copy of a schema that stands at a place inside another one, its pointers into itself led there.

    A schema with an `$id` of its own is left as it is: its pointers begin at itself wherever it stands.
    """
    if isinstance(schema, list | tuple):
        return [_moved(value, place) for value in schema]
    if not isinstance(schema, Mapping) or _has_id(schema):
        return schema
    return {key: _moved_value(key, value, place) for key, value in schema.items()}


def _moved_value(key: str, value: Any, place: str) -> Any:
    """What stands behind a keyword of a schema that is moved."""
    if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
        return place + value[1:]
    if key in _DATA:
        return value
    if key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
        return {name: _moved(named, place) for name, named in value.items()}
    return _moved(value, place)


def _has_id(schema: Mapping[str, Any]) -> bool:
    """Whether pointers begin anew in a schema; of older drafts, an `$id` that is but a fragment is an anchor."""
    identity = schema.get("$id")
    return isinstance(identity, str) and not identity.startswith("#")


def calls_text(calls: Sequence[tuple[str, str]]) -> str:
    """Calls of an earlier answer, (name, arguments as JSON), as the model wrote them."""
    return "\n".join(_call_text(name, arguments) for name, arguments in calls)


def _call_text(name: str, arguments: str) -> str:
    try:
        return json.dumps({"name": name, "parameters": json.loads(arguments)}, ensure_ascii=False)
    except (ValueError, RecursionError):  # what is no JSON, or too deep, stays the text that it is
        return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)


def result_parts(name: str, content: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A function's result, parts of a message, as parts of the user's turn; the name may be unknown, ''.

    Texts stand in a fence that they can't end, media behind it.
    """
    text = "\n".join(part.get("text") or "" for part in content if part["type"] == "text")
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`{3,}", text))])
    fenced = f"Result of {name or 'the function'}:\n{fence}tool_output\n{text}\n{fence}"
    return [{"type": "text", "text": fenced}, *(dict(part) for part in content if part["type"] != "text")]


def _beginnings(pieces: Sequence[str]) -> str:
    """A regex for all that such a sequence may begin with, the whole of it left out."""
    pattern = ""
    for piece in reversed(pieces[:-1]):
        pattern = f"(?:{piece}{pattern})?"
    return pattern


# A call's text up to the brace of its arguments; the first group is the function's name.
_HEAD = [
    *(r"\{", _SPACE, *'"name"', _SPACE, ":", _SPACE, '"', "([a-zA-Z0-9_.-]*)", '"'),
    *(_SPACE, ",", _SPACE, *'"parameters"', _SPACE, ":", _SPACE, r"\{"),
]
_INDENT = r"[ \t]*"
_FENCE = [_INDENT, *"```", "[a-z_]*", _INDENT, r"\n"]
_CALL = re.compile(f"(?:{''.join(_FENCE)})?{_INDENT}{''.join(_HEAD)}")
_MAYBE_CALL = re.compile(f"{_beginnings([_INDENT, *_HEAD])}|{_beginnings([*_FENCE, _INDENT, *_HEAD])}")

Delta = dict[str, Any]  # of OpenAI's streamed message: {"content": ...} or {"tool_calls": [...]}


class CallParser:
    """Turns an answer's text, piece by piece, into deltas: text that stays text, and calls of known functions.

    However the text is cut into pieces, the deltas add up to the same.
    """

    def __init__(self, names: Collection[str], *, content_is_json: bool = False) -> None:
        """names: of the functions; an object that names another one is text.

        content_is_json: calls stand at the beginning of the answer and behind another call only, not inside JSON.
        """
        self.num_calls = 0
        self._content_is_json = content_is_json
        self._names = names
        self._held = ""  # what can't be told yet
        self._line_begins = True  # where the held text stands
        self._step = self._text
        self._arguments_end = _ObjectEnd()

    def push(self, text: str) -> list[Delta]:
        """What is certain after the next piece of the answer."""
        self._held += text
        deltas: list[Delta] = []
        while self._held and self._step(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        """What was held back, once nothing more comes: the beginning of a call that never was one is text."""
        rest, self._held = self._held, ""
        if self._step != self._text:
            rest = rest.strip(" \t\r\n`")
        return [{"content": rest}] if rest else []

    # Each step takes what it can from the held text, and says whether another one should look at the rest.

    def _text(self, deltas: list[Delta]) -> bool:
        """Passes text on, up to where a call begins or may begin."""
        begins = [0] if self._line_begins else []
        if not self._content_is_json:
            begins += [newline.end() for newline in re.finditer("\n", self._held)]
        for begin in begins:
            if self._may_call(begin):
                self._pass_on(begin, deltas)
                return self._begin_call(deltas)
        self._pass_on(len(self._held), deltas)
        return False

    def _arguments(self, deltas: list[Delta]) -> bool:
        """Passes a call's arguments on, up to their last brace."""
        end = self._arguments_end.find(self._held)
        self._add_to_call(deltas, {"arguments": self._held[:end]})
        self._held = self._held[end:]
        if self._arguments_end.found:
            self._step = self._after_arguments
        return self._arguments_end.found

    def _after_arguments(self, _: list[Delta]) -> bool:
        """Leaves out the call's own brace."""
        self._held = self._held.lstrip(" \t\r\n")
        if self._held.startswith("}"):
            self._held, self._step = self._held[1:], self._between_calls
        elif self._held:
            self._step, self._line_begins = self._text, False
        return True

    def _between_calls(self, deltas: list[Delta]) -> bool:
        """Leaves out white space and the end of a fence."""
        self._held = self._held.lstrip(" \t\r\n")
        if self._may_call(0):
            return self._begin_call(deltas)
        if re.match(r"```\s", self._held):
            self._held = self._held[3:]
        else:
            self._step, self._line_begins = self._text, True
        return True

    def _may_call(self, begin: int) -> bool:
        """Whether the held text calls a known function from there on, or is the beginning of what may."""
        call = _CALL.match(self._held, begin)
        return call[1] in self._names if call else _MAYBE_CALL.fullmatch(self._held, begin) is not None

    def _begin_call(self, deltas: list[Delta]) -> bool:
        """Begins the call that the held text begins with, once it is there as far as its arguments."""
        call = _CALL.match(self._held)
        if call is None:
            return False
        self.num_calls += 1
        self._step, self._arguments_end = self._arguments, _ObjectEnd()
        self._held = self._held[call.end() - 1 :]
        self._add_to_call(
            deltas,
            {"name": call[1], "arguments": ""},
            {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"},
        )
        return True

    def _add_to_call(self, deltas: list[Delta], function: Delta, identity: Delta | None = None) -> None:
        deltas.append({"tool_calls": [{"index": self.num_calls - 1, **(identity or {}), "function": function}]})

    def _pass_on(self, end: int, deltas: list[Delta]) -> None:
        text, self._held = self._held[:end], self._held[end:]
        if text:
            deltas.append({"content": text})
            self._line_begins = text.endswith("\n") and not self._content_is_json


class _ObjectEnd:
    """Looks for the brace that ends a JSON object, whose text comes in pieces."""

    def __init__(self) -> None:
        self.found = False
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int:
        """How much of the next piece belongs to the object."""
        for index, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = letter == "\\"
                self._in_string = letter != '"'
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.found = True
                    return index + 1
        return len(text)
