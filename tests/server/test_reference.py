"""GET /docs: every route and field of the OpenAPI document, without a script, under the pages' policy."""

import base64
import hashlib
import html
import re
from html.parser import HTMLParser

import pytest

from g3n_mlx.server.reference import reference_page


def text_of(page):
    return html.unescape(re.sub("<[^>]*>", " ", page))


def test_the_page_has_every_route_and_object(server):
    with server.http() as http:
        document, reply = http.get("/openapi.json").json(), http.get("/docs")
    assert reply.headers["content-type"].startswith("text/html")
    told = text_of(reply.text)
    for path in document["paths"]:
        assert path in told
    for name, schema in document["components"]["schemas"].items():
        assert f'id="{name}"' in reply.text
        assert all(field in told for field in schema.get("properties", {}))
    assert {"#" + name for name in document["components"]["schemas"]} >= set(re.findall('href="(#.*?)"', reply.text))


def test_the_policy_allows_the_style_alone(server):
    with server.http() as http:
        reply = http.get("/docs")
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    (style,) = re.findall("<style>(.*?)</style>", reply.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy["default-src"] == "'none'"
    assert policy["style-src"] == f"'sha256-{digest}'"
    assert "script-src" not in policy
    assert not re.search(r"<script|\sstyle=|\son\w+=|https?://", reply.text)


def test_it_needs_no_key(serve):
    """A browser that goes there has none, and the page says nothing of the model."""
    with serve(api_key="k").http() as http:
        assert http.get("/docs").status_code == 200
        assert http.get("/openapi.json").status_code == 401


def test_words_stay_words():
    evil = '"><script>alert(1)</script>'
    schema = {"properties": {evil: {"enum": [evil], "default": evil}}, "description": evil}
    route = {"description": evil, "responses": {}}
    page = reference_page(
        {"info": {"title": evil}, "paths": {evil: {"get": route}}, "components": {"schemas": {evil: schema}}}
    )
    tags = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)

    Tags().feed(page)
    assert "script" not in tags
    assert page.count("&lt;script") >= 6


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]}, "integer, ≥ 0"),
        ({"type": "array", "items": {"$ref": "#/components/schemas/A"}, "maxItems": 3}, "array of A, at most 3"),
        ({"const": "text", "default": "text"}, '"text"; default: "text"'),
    ],
)
def test_types(schema, told):
    page = reference_page(
        {"info": {"title": "t"}, "paths": {}, "components": {"schemas": {"A": {"properties": {"field": schema}}}}}
    )
    assert told in re.sub(" +", " ", text_of(page).replace(" A ", "A"))
