"""Where chat templates out of files are run: jinja2's sandbox, set up as transformers sets it up.

Source: transformers, utils/chat_template_utils.py, `_compile_jinja_template`.
"""

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """`{% generation %}`, by which trainers find the answers in a conversation: here it is what stands in it."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox without powers and repetitions, which could take any memory and time."""

    intercepted_binops = frozenset({"**", "*"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise SecurityError(f"{operator} of these is not allowed in a chat template")
        return left * right


def environment() -> jinja2.Environment:
    """What compiles templates."""
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    names: dict[str, Any] = {"raise_exception": _raise, "strftime_now": _now}
    sandbox.filters["tojson"] = _to_json
    sandbox.globals.update(names)
    return sandbox


def _to_json(value: Any, **options: Any) -> str:
    settings: dict[str, Any] = {"ensure_ascii": False, **options}
    return json.dumps(value, **settings)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
