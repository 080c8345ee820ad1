"""GET /docs: the routes and their fields as a page, made from the OpenAPI document that /openapi.json sends.

Swagger UI is left out: it makes HTML of text, which the pages' policy forbids (trusted types), and is 1.5 MB. This page
has no script at all.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8884 }
h3 { margin: 1.5rem 0 .25rem; font: 600 1rem ui-monospace, monospace; overflow-wrap: anywhere }
p { margin: .25rem 0 }
table { width: 100%; margin: .5rem 0; border-collapse: collapse }
th, td { padding: .2rem .6rem .2rem 0; border-bottom: 1px solid #8883; text-align: left; vertical-align: top }
td { overflow-wrap: anywhere; white-space: pre-line }
td:first-child { width: 14rem; font-family: ui-monospace, monospace }
"""
LIMITS = {
    **{"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"},
    **{"minLength": "at least {} characters", "maxLength": "at most {} characters"},
    **{"minItems": "at least {}", "maxItems": "at most {}", "pattern": "as {}"},
}

router = APIRouter()


@router.get("/docs", include_in_schema=False)
async def reference(request: Request) -> HTMLResponse:
    """The page."""
    headers = {
        "Content-Security-Policy": (
            f"default-src 'none'; style-src {_style_digest()}; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(reference_page(request.app.openapi()), headers=headers)


@cache
def _style_digest() -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"


def reference_page(document: Mapping[str, Any]) -> str:
    """The page of an OpenAPI document: its routes, then the objects that they take and send."""
    title = escape(document["info"]["title"])
    routes = "".join(line for path, methods in document["paths"].items() for line in _route(path, methods))
    objects = "".join(
        line for name, schema in document["components"]["schemas"].items() for line in _object(name, schema)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
        f'<h1>{title}</h1><p>The same for programs: <a href="openapi.json">openapi.json</a></p>'
        f"<h2>Routes</h2>{routes}<h2>Objects</h2>{objects}</html>"
    )


def _route(path: str, methods: Mapping[str, Any]) -> Iterator[str]:
    for method, route in methods.items():
        yield f"<h3>{method.upper()} {escape(path)}</h3><p>{escape(route.get('description', ''))}</p>"
        for media_type, body in route.get("requestBody", {}).get("content", {}).items():
            yield f"<p>Takes {escape(media_type)}: {_type(body['schema'])}</p>"
        for body in route["responses"].get("200", {}).get("content", {}).values():
            if body.get("schema"):
                yield f"<p>Sends {_type(body['schema'])}</p>"


def _object(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{escape(schema.get("description", ""))}</p>'
    fields, required = schema.get("properties", {}), schema.get("required", ())
    if fields:
        rows = "".join(
            f"<tr><td>{escape(field)}</td><td>{_type(inner)}{_default(inner)}</td>"
            f"<td>{'required' if field in required else ''}</td></tr>"
            for field, inner in fields.items()
        )
        yield f"<table>{rows}</table>"


def _default(schema: Mapping[str, Any]) -> str:
    given = schema.get("default")
    return "" if given is None else f"; default: {escape(json.dumps(given, ensure_ascii=False))}"


def _type(schema: Mapping[str, Any]) -> str:
    """What a schema takes, as HTML; null, which stands for a field that is left out, is not said."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"] if one.get("type") != "null")
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if values:
        return ", ".join(escape(json.dumps(value, ensure_ascii=False)) for value in values)
    kind = schema.get("type", "anything")
    said = f"array of {_type(schema.get('items', {}))}" if kind == "array" else escape(schema.get("format", kind))
    limits = [words.format(schema[name]) for name, words in LIMITS.items() if name in schema]
    return ", ".join([said, *map(escape, limits)])
