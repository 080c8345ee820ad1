"""What a test does on the chat page: asks, sets the model's answer, drops files.

What a test must know the model's answer for, it sets by a grammar that it adds to the page's request on its way.
"""

import base64
import json
import re
from typing import Any

from playwright import sync_api
from running import WAIT_S

CHAT = "**/v1/chat/completions"


def answering(page: Any, **fields: Any) -> list[dict[str, Any]]:
    """Adds fields to every request for an answer; what the page asked for comes into the list that is returned."""
    asked: list[dict[str, Any]] = []

    def changed(route: Any) -> None:
        asked.append(route.request.post_data_json)
        route.continue_(post_data=json.dumps({"max_tokens": 200, **asked[-1], **fields}))

    page.unroute(CHAT)
    page.route(CHAT, changed)
    return asked


def saying(page: Any, words: str) -> list[dict[str, Any]]:
    """Makes the model answer with these words."""
    return answering(page, grammar={"type": "regex", "value": re.escape(words)})


def instead(page: Any, words: str) -> None:
    """Answers in the server's place, at once: for what is about looks alone."""
    choices = [{"index": 0, "delta": {"content": words}, "finish_reason": None}]
    last = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    events = "".join(f"data: {json.dumps({'choices': some})}\n\n" for some in (choices, last))
    page.route(CHAT, lambda route: route.fulfill(body=events + "data: [DONE]\n\n", content_type="text/event-stream"))


def ask(page: Any, text: str, count: int = 1) -> Any:
    """Asks, and waits until there are so many answers; the last one."""
    page.fill("#text", text)
    page.press("#text", "Enter")
    return answered(page, count)


def answered(page: Any, count: int = 1) -> Any:
    sync_api.expect(page.locator(".answer .below")).to_have_count(count, timeout=WAIT_S * 1000)
    return page.locator(".answer").last


def drop(page: Any, name: str, kind: str, content: bytes) -> None:
    """Drags a file onto the page and lets it go."""
    page.evaluate(
        """([name, type, content]) => {
          const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([bytes], name, { type }));
          for (const event of ["dragenter", "dragover", "drop"]) {
            document.body.dispatchEvent(new DragEvent(event, { dataTransfer, bubbles: true, cancelable: true }));
          }
        }""",
        [name, kind, base64.b64encode(content).decode()],
    )
