"""What a request offers: the functions, the system text about them, and the grammar that keeps a response to them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from g3n_mlx.engine.grammar import WHITE_SPACE, GrammarError, GrammarMatcher, Grammars
from g3n_mlx.failures import BadValue
from g3n_mlx.server.errors import ApiError
from g3n_mlx.server.schemas.chat import ChatRequest, NamedTool
from g3n_mlx.server.tools.functions import Function
from g3n_mlx.server.tools.parser import SPACE, CallParser

AUTO, REQUIRED = "auto", "required"
_GAP = f"({WHITE_SPACE})?"  # white space within a call that the model has begun


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

    @staticmethod
    def from_request(body: ChatRequest) -> "Tools | None":
        """The tools of a request; None when nothing may be called. Raises ApiError 400 on tools that can't be."""
        choice = body.tool_choice
        if not body.tools and choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
        if not body.tools or choice == "none":
            return None
        try:
            return Tools(
                [tool.function.model_dump(exclude_unset=True) for tool in body.tools],
                REQUIRED if choice == "required" else AUTO,
                named=choice.function.name if isinstance(choice, NamedTool) else None,
                parallel=body.parallel_tool_calls is not False,
            )
        except ValueError as error:
            raise ApiError(400, str(error), param="tools") from None

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
        """What the response must look like. content: the schema of a response without calls; None is any text.

        Raises GrammarError naming the function whose parameters can't be enforced, and why.
        """
        try:
            return grammars.lark(self._lark(grammars, content))
        except GrammarError:
            # Built one by one to find the function at fault.
            for function in self.functions:
                try:
                    grammars.lark(f"start: {grammars.inline(function.arguments, lenient=not function.strict)}")
                except GrammarError as error:
                    raise GrammarError(f"the parameters of {function.name}: {error}") from None
            raise

    def parser(self, *, content_is_json: bool = False) -> "CallParser":
        """Finds the calls in a response. content_is_json: a response without calls is JSON, which is not split."""
        return CallParser({function.name for function in self.functions}, content_is_json=content_is_json)

    def _lark(self, grammars: Grammars, content: Mapping[str, Any] | bool | None) -> str:
        """The convention as a grammar: calls alone where one is required, else any text, which may end in calls.

        Where the text must be JSON, it is that or calls: both are JSON then, so the grammar need not tell them apart.
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
                # As the system text shows it: free white space would only lead a small model astray.
                rf'call_{number}: /\{{"name": "{name}", "parameters": / args_{number} /\}}/',
                # Text ends as soon as a line begins by naming a function: from there on it is a call.
                rf'head_{number}[lazy]: /((?s:.*)\n)?[ \t]*\{{{SPACE}"name"{SPACE}:{SPACE}"{name}"/',
                rf'rest_{number}: /{_GAP},{_GAP}"parameters"{_GAP}:{_GAP}/ args_{number} /{_GAP}\}}/',
                f"args_{number}: {grammars.inline(function.arguments, lenient=not function.strict)}",
            ]
        call = " | ".join(f"call_{number}" for number in range(len(called)))
        more = rf"(/\n/ ({call}))*" if self.parallel and self.named is None else ""
        if self.required:
            return "\n".join([f"start: ({call}) {more}", *rules])
        first = " | ".join(f"head_{number} rest_{number}" for number in range(len(called)))
        return "\n".join([f"start: /(?s:.*)/ | ({first}) {more} (/\n```\n?/)?", *rules])
