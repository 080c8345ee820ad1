"""GET /: the chat page, under a Content-Security-Policy that allows its content alone.

The files in chat_page/ are joined into one page when it is first asked for: its style, and its scripts in the order in
which they need each other.

The policy names the page's script and style by their digests, so no other script runs, whatever a response contains;
the page can't turn text into HTML (trusted types), speak to another server, be framed, or send a form.
"""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

# Each needs those before it.
SCRIPTS = (
    "temml/temml.min.js",  # LaTeX to MathML, by others: temml/LICENSE
    "dom.js",
    "code.js",
    "math.js",
    "entities.js",
    "footnotes.js",
    "markdown.js",
    "kept.js",
    "api.js",
    "media.js",
    "microphone.js",
    "store.js",
    "tree.js",
    "tabs.js",
    "conversation.js",
    "scrolling.js",
    "list.js",
    "settings.js",
    "start.js",
)

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """The chat page."""
    text, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


@cache
def _page() -> tuple[str, str]:
    """The page's text and its policy."""
    folder = files("g3n_mlx.server") / "chat_page"
    text = (folder / "page.html").read_text(encoding="utf-8")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    style = (folder / "page.css").read_text(encoding="utf-8")
    text = text.replace("<style></style>", f"<style>\n{style}</style>")
    text = text.replace("<script></script>", f"<script>\n{script}</script>")
    directives = {
        "default-src": "'none'",
        "script-src": _digest(text, "script"),
        "style-src": _digest(text, "style"),
        "connect-src": "'self'",
        "img-src": "blob: data:",
        "media-src": "blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return text, "; ".join(f"{name} {value}" for name, value in directives.items())


def _digest(text: str, element: str) -> str:
    """The policy's source expression for the page's only element of that name."""
    (content,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
