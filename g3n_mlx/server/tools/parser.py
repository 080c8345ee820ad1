"""Finds the calls in a response while it comes."""

import re
import uuid
from collections.abc import Collection, Sequence
from typing import Any

SPACE = r"[ \t\r\n]*"  # within a call


def _beginnings(pieces: Sequence[str]) -> str:
    """A regex for every proper beginning of the sequence that these pieces match."""
    pattern = ""
    for piece in reversed(pieces[:-1]):
        pattern = f"(?:{piece}{pattern})?"
    return pattern


# A call up to the brace of its arguments; the first group is the function's name.
_HEAD = [
    *(r"\{", SPACE, *'"name"', SPACE, ":", SPACE, '"', "([a-zA-Z0-9_.-]*)", '"'),
    *(SPACE, ",", SPACE, *'"parameters"', SPACE, ":", SPACE, r"\{"),
]
_INDENT = r"[ \t]*"
_FENCE = [_INDENT, *"```", "[a-z_]*", _INDENT, r"\n"]
_CALL = re.compile(f"(?:{''.join(_FENCE)})?{_INDENT}{''.join(_HEAD)}")
_MAYBE_CALL = re.compile(f"{_beginnings([_INDENT, *_HEAD])}|{_beginnings([*_FENCE, _INDENT, *_HEAD])}")

Delta = dict[str, Any]  # of OpenAI's streamed message: {"content": ...} or {"tool_calls": [...]}


class CallParser:
    """Turns a response's text, piece by piece, into deltas: plain text, and calls of known functions.

    However the text is split into pieces, the deltas add up to the same.
    """

    def __init__(self, names: Collection[str], *, content_is_json: bool = False) -> None:
        """names: of the functions; an object that names another one is text.

        content_is_json: calls stand only at the beginning of the response and after another call, not inside JSON.
        """
        self.num_calls = 0
        self._content_is_json = content_is_json
        self._names = names
        self._held = ""  # what may yet become a call
        self._line_begins = True  # where the held text stands
        self._step = self._text
        self._arguments_end = _ObjectEnd()

    def push(self, text: str) -> list[Delta]:
        """What is certain after the next piece."""
        self._held += text
        deltas: list[Delta] = []
        while self._held and self._step(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        """What was held back, once nothing more comes: the beginning of a call that was never finished is text."""
        rest, self._held = self._held, ""
        if self._step != self._text:
            rest = rest.strip(" \t\r\n`")
        return [{"content": rest}] if rest else []

    # Each step takes what it can from the held text, and says whether another step should look at the rest.

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
        """Drops the call's own brace."""
        self._held = self._held.lstrip(" \t\r\n")
        if self._held.startswith("}"):
            self._held, self._step = self._held[1:], self._between_calls
        elif self._held:
            self._step, self._line_begins = self._text, False
        return True

    def _between_calls(self, deltas: list[Delta]) -> bool:
        """Drops white space and the end of a fence."""
        self._held = self._held.lstrip(" \t\r\n")
        if self._may_call(0):
            return self._begin_call(deltas)
        if re.match(r"```\s", self._held):
            self._held = self._held[3:]
        else:
            self._step, self._line_begins = self._text, True
        return True

    def _may_call(self, begin: int) -> bool:
        """Whether a call of a known function begins there in the held text, or may do so yet."""
        call = _CALL.match(self._held, begin)
        return call[1] in self._names if call else _MAYBE_CALL.fullmatch(self._held, begin) is not None

    def _begin_call(self, deltas: list[Delta]) -> bool:
        """Begins a call once the held text has all of it up to its arguments."""
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
