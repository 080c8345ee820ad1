"""The chat page in a real browser, against a real server: headless Chromium, moved by Playwright.

Without Chromium or Playwright these tests are skipped. What a test must know the model's answer for, it sets by a
grammar that it adds to the page's request on its way.
"""

import base64
import contextlib
import io
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image
from running import WAIT_S, picture, sound, video, wait_until

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
sync_api.expect.set_options(timeout=WAIT_S * 1000)
CHAT = "**/v1/chat/completions"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    installed = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            running = playwright.chromium.launch(executable_path=installed, args=FLAGS)
        except sync_api.Error as error:
            if installed is None:
                pytest.skip("there is no Chromium: install it, or run `playwright install chromium`")
            raise error
        yield running
        running.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """visit(url, width=390): a page in a fresh profile; it may call its server alone, and must not fail."""
    with contextlib.ExitStack() as open_profiles:
        wrong: list[str] = []

        def opened(url: str, width: int = 1000, *, locked: bool = False, **options: Any) -> Any:
            profile = browser.new_context(viewport={"width": width, "height": 800}, **options)
            open_profiles.callback(profile.close)
            profile.set_default_timeout(WAIT_S * 1000)
            page = profile.new_page()
            page.on("pageerror", lambda error: wrong.append(str(error)))
            allowed = (url, "data:", "blob:")
            page.on("request", lambda request: request.url.startswith(allowed) or wrong.append(request.url))
            page.goto(url)
            if not locked:
                sync_api.expect(page.locator("#name")).not_to_have_text("…")
            return page

        yield opened
        assert wrong == []


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


def test_a_dropped_picture_is_answered(visit, server):
    page = visit(server.url)
    asked = saying(page, "A white square.")
    drop(page, "square.png", "image/png", picture())
    sync_api.expect(page.locator("#chosen img")).to_have_count(1)
    sync_api.expect(page.locator("#drop")).to_be_hidden()
    answer = ask(page, "What is this?")
    assert answer.locator(".words").inner_text() == "A white square."
    assert "tok/s" in answer.locator(".figures").inner_text()
    (message,) = asked[0]["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert message["content"][0]["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(picture()).decode()
    page.wait_for_function("document.querySelector('.question img').naturalWidth === 60")
    # The answer is part of the next question.
    ask(page, "And where?", 2)
    assert [message["role"] for message in asked[1]["messages"]] == ["user", "assistant", "user"]
    assert asked[1]["messages"][1]["content"] == "A white square."


def test_the_models_own_answer_comes_in_pieces(visit, server, model):
    page = visit(server.url)
    answering(page, temperature=0, max_tokens=24, logit_bias={"1": -100, "106": -100})
    expected = model.generate("Hello", temperature=0.0, max_tokens=24, logit_bias={1: -100.0, 106: -100.0}).text
    answer = ask(page, "Hello")
    assert "24 tokens" in answer.locator(".figures").inner_text()
    assert "cut at the limit" in answer.locator(".figures").inner_text()
    assert page.evaluate("branch().at(-1).text") == expected


def test_html_in_an_answer_stays_text(visit, server):
    page = visit(server.url)
    words = "<script>document.title = 'taken'</script> <img src=x onerror=\"document.title='taken'\"> <b>bold</b>"
    saying(page, words)
    answer = ask(page, "Well?")
    assert answer.locator(".words").inner_text() == words
    assert answer.locator("script, img, b").count() == 0
    assert page.title() == "tiny"


def test_stop_ends_the_answer_here_and_on_the_server(visit, server):
    page = visit(server.url)
    answering(page, logit_bias={"1": -100, "106": -100}, max_tokens=20_000)
    for way in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        page.fill("#text", "Go on for ever")
        page.press("#text", "Enter")
        sync_api.expect(page.locator(".answer .words > :not(.wait)").first).to_be_visible()
        sync_api.expect(page.locator("#send")).to_be_hidden()
        way()
        answer = answered(page)
        assert "stopped" in answer.locator(".figures").inner_text()
        assert answer.locator(".words").inner_text()
        sync_api.expect(page.locator("#send")).to_be_visible()
        wait_until(lambda: server.figure("running") == 0)
        page.click("#new")
        sync_api.expect(page.locator(".answer")).to_have_count(0)
    page.fill("#text", "Go on for ever")
    page.press("#text", "Enter")
    sync_api.expect(page.locator(".answer .words > :not(.wait)").first).to_be_visible()
    page.click("#new")  # stops it too
    wait_until(lambda: server.figure("running") == 0)
    asked = saying(page, "Yes.")
    assert ask(page, "Are you still there?").locator(".words").inner_text() == "Yes."
    assert asked[0]["messages"] == [{"role": "user", "content": "Are you still there?"}]


def test_an_answer_is_asked_for_again(visit, server):
    page = visit(server.url)
    saying(page, "One.")
    ask(page, "Say a number")
    asked = saying(page, "Two.")
    page.get_by_role("button", name="Again").click()
    sync_api.expect(page.locator(".answer .words")).to_have_text("Two.")
    answered(page)  # the words stand there before the answer is one of the messages
    assert len(asked[0]["messages"]) == 1
    assert page.evaluate("branch().length") == 2


def test_sound_and_video(visit, server):
    page = visit(server.url)
    asked = saying(page, "A tone.")
    page.set_input_files("#files", {"name": "tone.wav", "mimeType": "audio/wav", "buffer": sound()})
    ask(page, "What is this?")
    part = asked[0]["messages"][0]["content"][0]
    assert part["type"] == "input_audio"
    assert base64.b64decode(part["input_audio"]["data"]) == sound()
    pytest.importorskip("av", reason="PyAV is not installed: the server can't read videos")
    page.set_input_files("#files", {"name": "film.mp4", "mimeType": "video/mp4", "buffer": video()})
    ask(page, "And this?", 2)
    assert asked[1]["messages"][2]["content"][0]["type"] == "video_url"


def test_the_microphone(visit, server):
    """What Chromium records arrives as a sound that the server reads."""
    page = visit(server.url)
    asked = saying(page, "Beeps.")
    page.click("#record")
    page.get_by_text("0:01").wait_for()
    page.keyboard.press("Escape")
    sync_api.expect(page.locator("#row")).to_be_visible()
    sync_api.expect(page.locator("#chosen")).to_be_hidden()
    page.click("#record")
    page.get_by_text("0:01").wait_for()
    page.click("#keep")
    sync_api.expect(page.locator("#chosen .chip")).to_contain_text("Recording.wav")
    assert ask(page, "What did I say?").locator(".words").inner_text() == "Beeps."
    wave = base64.b64decode(asked[0]["messages"][0]["content"][0]["input_audio"]["data"])
    assert wave[:4] + wave[8:12] == b"RIFFWAVE"
    assert int.from_bytes(wave[24:28], "little") == 16_000
    assert len(wave) - 44 > 6_400  # a fifth of a second of 16-bit samples; a busy machine hears less than it waits
    assert any(wave[44:])


def test_a_large_picture_is_sent_smaller(visit, server):
    page = visit(server.url)
    asked = saying(page, "Large.")
    size = page.evaluate(
        """async () => {
          const canvas = document.createElement("canvas"), noise = new Uint8ClampedArray(4 * 2400 * 1200);
          for (let i = 0; i < noise.length; i++) noise[i] = (i * 7919) % 251;
          canvas.width = 2400;
          canvas.height = 1200;
          canvas.getContext("2d").putImageData(new ImageData(noise, 2400, 1200), 0, 0);
          const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 1));
          choose([new File([blob], "large.jpg", { type: "image/jpeg" })]);
          return blob.size;
        }"""
    )
    assert size > 2 << 20
    ask(page, "What is this?")
    url = asked[0]["messages"][0]["content"][0]["image_url"]["url"]
    written = base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(written)).size == (1536, 768)


def test_what_went_wrong_is_said(visit, server):
    page = visit(server.url)
    saying(page, "Now it works.")
    drop(page, "notes.zip", "application/zip", b"PK")
    sync_api.expect(page.locator("#notice")).to_contain_text("notes.zip")
    drop(page, "broken.png", "image/png", b"no picture")
    sync_api.expect(page.locator("#chosen .chip")).to_contain_text("broken.png")  # the browser can't show it either
    failed = ask(page, "What is this?")
    sync_api.expect(failed.locator(".error")).to_contain_text("messages[0].content[0]")
    # What was refused does not make the next question fail.
    assert ask(page, "And now?", 2).locator(".words").inner_text() == "Now it works."
    assert page.evaluate("asMessages(branch().at(-1)).then((all) => all.map((message) => message.content))") == [
        "And now?",
        "Now it works.",
    ]
    page.click("#new")
    page.route(CHAT, lambda route: route.abort())
    assert "can't be reached" in ask(page, "Hello").locator(".error").inner_text()
    saying(page, "Now it works.")
    page.get_by_role("button", name="Again").click()
    sync_api.expect(page.locator(".answer .words")).to_have_text("Now it works.")
    sync_api.expect(page.locator(".error")).to_have_count(0)


def test_the_key_is_asked_for(visit, serve):
    page = visit(serve(api_key="sesame", name="locked").url, locked=True)
    sync_api.expect(page.locator("#key-dialog")).to_be_visible()
    page.fill("#key", "mustard")
    page.press("#key", "Enter")
    sync_api.expect(page.locator("#key-why")).to_contain_text("does not take")
    page.fill("#key", "sesame")
    page.press("#key", "Enter")
    sync_api.expect(page.locator("#key-dialog")).to_be_hidden()
    sync_api.expect(page.locator("#name")).to_have_text("locked")
    saying(page, "Open.")
    assert ask(page, "Well?").locator(".words").inner_text() == "Open."
    assert page.evaluate("JSON.stringify(localStorage)").find("sesame") < 0
    page.reload()
    sync_api.expect(page.locator("#name")).to_have_text("locked")


def test_model_slice_temperature_and_instructions(visit, serve):
    server = serve(name="gemma-3n-e4b", slice_name="e2.49b-block")
    page = visit(server.url)
    sync_api.expect(page.locator("#name")).to_have_text("gemma-3n-e4b")
    sync_api.expect(page.locator("#slice")).to_have_text("e2.49b-block")
    asked = saying(page, "Yes.")
    ask(page, "One")
    assert "temperature" not in asked[0]
    page.click("#settings-button")
    page.focus("#temperature")
    for _ in range(7):
        page.keyboard.press("ArrowLeft")
    page.fill("#system", "Be brief.")
    page.keyboard.press("Escape")
    sync_api.expect(page.locator("#settings")).to_be_hidden()
    sync_api.expect(page.locator("#settings-button")).to_have_text("Temperature 0.3")
    ask(page, "Two", 2)
    assert asked[1]["temperature"] == 0.3
    assert asked[1]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.reload()
    sync_api.expect(page.locator(".answer .below")).to_have_count(2)
    page.click("#new")
    page.click("#settings-button")
    page.click("#temperature-reset")
    page.fill("#system", "")
    page.keyboard.press("Escape")
    ask(page, "Three")
    assert "temperature" not in asked[2]
    assert asked[2]["messages"] == [{"role": "user", "content": "Three"}]


def test_light_and_dark(visit, server):
    def brightness(page: Any) -> int:
        ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return sum(map(int, re.findall(r"\d+", ground)[:3]))

    assert brightness(visit(server.url, color_scheme="light")) > 600
    page = visit(server.url, color_scheme="dark")
    assert brightness(page) < 150
    page.click("#settings-button")
    page.get_by_role("radio", name="Light").check(force=True)
    assert brightness(page) > 600
    page.reload()
    assert brightness(page) > 600


LONG = f"""```python
{"x = 1234567890" * 30}
```

| {"long heading | " * 12}
|{"---|" * 12}

{"w" * 300}"""


@pytest.mark.parametrize("width", [320, 390, 1400])
def test_nothing_is_wider_than_the_window(visit, server, width):
    page = visit(server.url, width=width, has_touch=width < 400, is_mobile=width < 400)
    instead(page, LONG)
    drop(page, "wide.png", "image/png", picture())
    page.fill("#text", "m" * 200)
    page.click("#send")
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("$('scroller').scrollWidth - $('scroller').clientWidth") == 0
    for button in page.get_by_role("button").all():
        box = button.bounding_box()
        assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] >= 24)


def test_by_keyboard_alone(visit, server):
    page = visit(server.url)
    saying(page, "Yes.")
    sync_api.expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator(".question .said").inner_text() == "One\nTwo"
    names = []
    for _ in range(7):
        page.keyboard.press("Shift+Tab")
        names.append(page.evaluate("(document.activeElement.ariaLabel || document.activeElement.textContent).trim()"))
    assert names == [
        "Attach pictures, sound, video or files",
        "Again",
        "Copy",
        "Edit",
        "New chat",
        "Settings",
        "Conversations",
    ]
    page.keyboard.press("Control+Shift+O")
    sync_api.expect(page.locator(".question")).to_have_count(0)


def test_every_control_has_a_name(visit, server):
    nameless = visit(server.url).evaluate(
        """() => [...document.querySelectorAll("button, input:not([hidden]), textarea, select")]
          .filter((node) => !node.ariaLabel && !node.textContent.trim() && !node.labels?.length)
          .map((node) => node.id)"""
    )
    assert nameless == []


# What the browser is told to forbid.


def test_the_policy(visit, server):
    page = visit(server.url)
    with server.http() as http:
        answer = http.get("/")
    policy = dict(directive.split(" ", 1) for directive in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["form-action"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    forbidden = page.evaluate(
        """async () => {
          const tried = {};
          const attempt = async (name, work) => {
            try { await work(); tried[name] = "worked"; } catch { tried[name] = "refused"; }
          };
          await attempt("html", () => { document.createElement("p").innerHTML = "<b>x</b>"; });
          await attempt("fetch", () => fetch("http://127.0.0.1:9/"));
          const script = document.createElement("script");
          script.append("document.title = 'taken'");
          await attempt("script", () => { document.head.append(script); if (document.title !== "taken") throw 0; });
          await attempt("picture", () => new Promise((done, failed) => {
            const image = new Image();
            image.onload = done;
            image.onerror = failed;
            image.src = "/favicon.ico";
          }));
          return tried;
        }"""
    )
    assert set(forbidden.values()) == {"refused"}, forbidden


def test_the_page_writes_no_html(repository):
    folder = repository / "g3n_mlx/server/chat_page"
    text = "\n".join(file.read_text("utf-8") for file in folder.iterdir() if file.is_file())
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "eval(", "Function("):
        assert word not in text
    assert set(re.findall(r"https?://[\w.]+", text)) == {"http://www.w3.org"}  # the name space of SVG
    assert not re.search(r"\bsrc=|@import|url\(|\son\w+=", text)


# Markdown.

RENDER = """(sources) => sources.map((source) => {
  const node = make("div");
  new Words(node).show(source);
  return node.innerHTML;
})"""
OUT = 'target="_blank" rel="noopener noreferrer"'
MARKDOWN = [
    ("Hello", "<p>Hello</p>"),
    ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
    ("**b** *i* ~~d~~ `c`", "<p><strong>b</strong> <em>i</em> <del>d</del> <code>c</code></p>"),
    ("***b***", "<p><strong><em>b</em></strong></p>"),
    ("__b__ _i_ snake_case_name 2 * 3 * 4", "<p><strong>b</strong> <em>i</em> snake_case_name 2 * 3 * 4</p>"),
    ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    ("*a **b** c*", "<p><em>a <strong>b</strong> c</em></p>"),
    ("**a `*` b**", "<p><strong>a <code>*</code> b</strong></p>"),
    ("**never closed", "<p>**never closed</p>"),
    (r"\*a\* \<b\>", "<p>*a* &lt;b&gt;</p>"),
    ("`` a ` b ``", "<p><code>a ` b</code></p>"),
    ("# One\n### Three ###", "<h1>One</h1><h3>Three</h3>"),
    ("#hashtag", "<p>#hashtag</p>"),
    ("---", "<hr>"),
    ("> a\n> b\nc\n\nd", "<blockquote><p>a<br>b<br>c</p></blockquote><p>d</p>"),
    ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("* a\n\n* b\n\nc", "<ul><li>a</li><li>b</li></ul><p>c</p>"),
    ("3. a\n4. b\n\n   c", '<ol start="3"><li>a</li><li>b<p>c</p></li></ol>'),
    ("1. a\n   - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
    ("text:\n- a\n- b", "<p>text:</p><ul><li>a</li><li>b</li></ul>"),
    ("- [ ] a\n- [x] b", "<ul><li>☐ a</li><li>☑ b</li></ul>"),
    ("[a](https://b.c/d)", f'<p><a href="https://b.c/d" {OUT}>a</a></p>'),
    ("[a](javascript:alert)", "<p><span>a</span></p>"),
    ("[a](JaVaScRiPt:alert%281%29)", "<p><span>a</span></p>"),
    ("[a](data:text/html,x)", "<p><span>a</span></p>"),
    ("[a](/relative)", "<p><span>a</span></p>"),
    ("![cat](https://b.c/d.png)", f'<p><a href="https://b.c/d.png" {OUT}>cat</a></p>'),
    ("<javascript:alert>", "<p>&lt;javascript:alert&gt;</p>"),
    ("see https://a.b/c_d(e).", f'<p>see <a href="https://a.b/c_d(e)" {OUT}>https://a.b/c_d(e)</a>.</p>'),
    ("(https://a.b/)", f'<p>(<a href="https://a.b/" {OUT}>https://a.b/</a>)</p>'),
    ('[a](https://b.c/"onclick="x)', f'<p><a href="https://b.c/&quot;onclick=&quot;x" {OUT}>a</a></p>'),
    ("[[a] (https://d.e) b](https://b.c/) d", f'<p><a href="https://b.c/" {OUT}>[a] (https://d.e) b</a> d</p>'),
    ("a[0] and [b] (c)", "<p>a[0] and [b] (c)</p>"),
    ("<b>x</b> &amp; <br>y", "<p>&lt;b&gt;x&lt;/b&gt; &amp; <br>y</p>"),
    (
        "| a | b |\n|---|--:|\n| 1 | 2 \\| 3 |\n| 4 |",
        '<div class="scroll" tabindex="0"><table><thead><tr><th>a</th><th class="to-right">b</th></tr></thead><tbody>'
        '<tr><td>1</td><td class="to-right">2 | 3</td></tr><tr><td>4</td><td class="to-right"></td></tr>'
        "</tbody></table></div>",
    ),
    ("a | b", "<p>a | b</p>"),
    (
        "&lt;i&gt; &#8364; &#x3c0; &none; &constructor; `&amp;`",
        "<p>&lt;i&gt; € π &amp;none; &amp;constructor; <code>&amp;amp;</code></p>",
    ),
    ("a[^1]\n\n[^1]: *Why*.", '<p>a<sup>1</sup></p><p class="note"><sup>1</sup> <em>Why</em>.</p>'),
    ("$5 and $6, $ 7$", "<p>$5 and $6, $ 7$</p>"),
    ("", ""),
]


@pytest.fixture(scope="module")
def still(browser: Any, server: Any) -> Iterator[Any]:
    """A page for tests that leave it as it is."""
    profile = browser.new_context()
    page = profile.new_page()
    page.goto(server.url)
    yield page
    profile.close()


def test_markdown(still):
    rendered = still.evaluate(RENDER, [source for source, _ in MARKDOWN])
    assert rendered == [expected for _, expected in MARKDOWN]


def test_code_blocks(still):
    sources = ["```py\nx = [1]\n\n  y\n```\nafter", "~~~\n```\n~~~", "```\nopen\n  yet", "1. a\n   ```\n   b\n   ```"]
    texts = still.evaluate(
        """(sources) => sources.map((source) => {
          const node = make("div");
          new Words(node).show(source);
          return [node.querySelector("pre code").textContent, node.querySelector(".block span").textContent];
        })""",
        sources,
    )
    assert texts == [["x = [1]\n\n  y", "py"], ["```", "text"], ["open\n  yet", "text"], ["b", "text"]]


WRITTEN = r"* ** _ ~~ ` ``` # | |-|-| [ ]( ) ![ \ --- = a b é🙂 <br> &lt; <script> </script> javascript: https://a.b/"
SPACED = ["\n", "\n\n", "- ", "1. ", "  ", "> ", "\t", "\x00", "\u2028", "<img src=x onerror=x>", "data:text/html,<b>"]
PIECES = WRITTEN.split() + SPACED
ALLOWED = "P BR STRONG EM DEL CODE PRE A SPAN UL OL LI BLOCKQUOTE HR DIV H1 H2 H3 H4 H5 H6"
ALLOWED += " SUP TABLE THEAD TBODY TR TH TD BUTTON svg path"


def test_any_text_renders_safely_and_the_same_however_it_comes(still):
    generator = random.Random(3)
    sources = ["".join(generator.choices(PIECES, k=generator.randint(1, 40))) for _ in range(400)]
    found = still.evaluate(
        """(sources) => {
          const tags = new Set(), attributes = new Set(), links = new Set(), differ = [];
          for (const source of sources) {
            const node = make("div"), growing = make("div"), words = new Words(growing);
            new Words(node).show(source);
            for (let end = 1; end <= source.length; end += 5) words.show(source.slice(0, end));
            words.show(source);
            if (node.innerHTML !== growing.innerHTML) differ.push(source);
            for (const inner of node.querySelectorAll(":not(math, math *)")) {
              tags.add(inner.tagName);
              if (inner.tagName === "A") links.add(inner.protocol);
              if (!inner.closest("button")) for (const attribute of inner.attributes) attributes.add(attribute.name);
            }
          }
          return { tags: [...tags], attributes: [...attributes], links: [...links], differ };
        }""",
        sources,
    )
    assert found["differ"] == []
    assert set(found["tags"]) <= set(ALLOWED.split())
    assert set(found["attributes"]) <= {"href", "target", "rel", "class", "tabindex", "start"}
    assert set(found["links"]) == {"https:"}


@pytest.mark.parametrize(
    "piece",
    [
        "*",
        "**a",
        "[",
        "![",
        "`",
        "_a ",
        "> ",
        "- ",
        "(",
        "[a](",
        "~~",
        "<",
        "|",
        "1. ",
        "$",
        "$$a ",
        "\\(",
        "\\[a\n",
        "&amp",
        "[^",
    ],
)
def test_long_runs_take_no_long_time(still, piece):
    """Of a hundred thousand characters; what is quadratic in them takes minutes."""
    text = piece * (100_000 // len(piece))
    assert still.evaluate("(text) => { const node = make('div'); new Words(node).show(text); return 1; }", text) == 1


# Kept conversations. A page that is closed stands for a crash: nothing of it runs at its end.


def test_a_reload_and_a_new_page_lose_nothing(visit, server):
    page = visit(server.url)
    saying(page, "A white square.")
    drop(page, "square.png", "image/png", picture())
    ask(page, "What is this?")
    page.fill("#text", "And half a thou")
    drop(page, "other.png", "image/png", picture(colour=(0, 0, 200)))
    wait_until(lambda: page.evaluate("readDraft(draftId() + ':media').then((draft) => draft?.media.length === 1)"))
    page.reload()
    for again in (page, page.context.new_page()):
        again.goto(page.url)
        sync_api.expect(again.locator(".answer .words")).to_have_text("A white square.")
        again.wait_for_function("document.querySelector('.question img')?.naturalWidth === 60")
        sync_api.expect(again.locator("#text")).to_have_value("And half a thou")
        sync_api.expect(again.locator("#chosen img")).to_have_count(1)
    asked = saying(page, "It is blue.")
    page.press("#text", "Enter")
    answered(page, 2)
    assert [message["role"] for message in asked[0]["messages"]] == ["user", "assistant", "user"]
    picture_url = asked[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert picture_url == "data:image/png;base64," + base64.b64encode(picture()).decode()


def test_an_answer_that_a_crash_cut_is_kept_and_goes_on(visit, server):
    page = visit(server.url)
    answering(page, logit_bias={"1": -100, "106": -100}, max_tokens=20_000)
    page.fill("#text", "Go on for ever")
    page.press("#text", "Enter")
    wait_until(
        lambda: page.evaluate("everyMessage().then((all) => all.some((one) => one.role === 'assistant' && one.text))")
    )
    url, profile = page.url, page.context
    page.close()
    page = profile.new_page()
    page.goto(url)
    answer = answered(page)
    sync_api.expect(answer.locator(".figures")).to_contain_text("interrupted")
    before = page.evaluate("branch().at(-1).text")
    asked = saying(page, " And so on.")
    page.get_by_role("button", name="Continue").click()
    wait_until(lambda: page.evaluate("branch().at(-1).reason === 'stop'"))
    assert page.evaluate("branch().at(-1).text") == before + " And so on."
    assert asked[0]["continue_final_message"] is True
    assert asked[0]["messages"][-1] == {"role": "assistant", "content": before}


def test_edits_and_other_answers_are_branches(visit, server):
    page = visit(server.url)
    saying(page, "One.")
    ask(page, "Say a number")
    saying(page, "Thanks.")
    ask(page, "Good", 2)
    saying(page, "Two.")
    page.get_by_role("button", name="Again").first.click()
    sync_api.expect(page.locator(".answer .words")).to_have_text("Two.")
    answered(page)
    sync_api.expect(page.locator(".place")).to_have_text("2/2")
    page.reload()
    page.get_by_role("button", name="Earlier answer").click()
    sync_api.expect(page.locator(".answer .words")).to_have_text(["One.", "Thanks."])
    asked = saying(page, "Three.")
    page.press("#text", "ArrowUp")
    sync_api.expect(page.locator("#text")).to_have_value("Good")
    page.fill("#text", "Another, please")
    page.press("#text", "Enter")
    sync_api.expect(page.locator(".answer .words")).to_have_text(["One.", "Three."])
    answered(page, 2)
    assert [message["content"] for message in asked[0]["messages"]] == ["Say a number", "One.", "Another, please"]
    page.get_by_role("button", name="Earlier question").click()
    sync_api.expect(page.locator(".question .said")).to_have_text(["Say a number", "Good"])
    assert page.evaluate("everyMessage().then((all) => all.length)") == 7


def test_the_list_of_conversations(visit, server):
    page = visit(server.url)
    for text in ("About apples", "About pears"):
        saying(page, f"{text}, yes.")
        ask(page, text)
        page.click("#new")
        sync_api.expect(page.locator(".answer")).to_have_count(0)
    page.click("#conversations-button")
    names = page.locator("#list .name")
    sync_api.expect(names).to_have_text(["About pears", "About apples"])
    page.fill("#search", "APPLES, Y")
    sync_api.expect(names).to_have_text(["About apples"])
    page.get_by_role("button", name="Rename About apples").click()
    page.get_by_role("textbox", name="Title").fill("Fruit")
    page.keyboard.press("Enter")
    sync_api.expect(names).to_have_text(["Fruit"])
    names.click()
    sync_api.expect(page.locator(".answer .words")).to_have_text("About apples, yes.")
    page.reload()
    page.click("#conversations-button")
    sync_api.expect(names).to_have_text(["About pears", "Fruit"])
    page.get_by_role("button", name="Delete Fruit").click()
    page.click("#confirm-no")
    sync_api.expect(names).to_have_count(2)
    page.get_by_role("button", name="Delete Fruit").click()
    page.click("#confirm-yes")
    sync_api.expect(names).to_have_text(["About pears"])
    sync_api.expect(page.locator(".answer")).to_have_count(0)


def test_export_clear_and_import(visit, server, tmp_path):
    page = visit(server.url)
    saying(page, "A white square.")
    drop(page, "square.png", "image/png", picture())
    ask(page, "What is this?")
    page.click("#conversations-button")
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "all.json"
    download.value.save_as(file)
    page.click("#clear")
    page.click("#confirm-yes")
    sync_api.expect(page.locator("#list .name")).to_have_count(0)
    assert page.evaluate("everyMessage().then((all) => all.length)") == 0
    page.set_input_files("#import-file", file)
    sync_api.expect(page.locator("#list .name")).to_have_text(["What is this?"])
    page.set_input_files("#import-file", {"name": "x.json", "mimeType": "application/json", "buffer": b"{}"})
    sync_api.expect(page.locator("#notice")).to_contain_text("x.json can't be imported")
    page.reload()
    page.click("#conversations-button")
    page.locator("#list .name").click()
    sync_api.expect(page.locator(".answer .words")).to_have_text("A white square.")
    page.wait_for_function("document.querySelector('.question img')?.naturalWidth === 60")


def test_what_does_not_fit_is_not_sent_and_nothing_is_deleted_for_it(visit, server):
    page = visit(server.url)
    page.evaluate("globalThis.bytesOf = () => 2 ** 30")
    drop(page, "square.png", "image/png", picture())
    page.press("#text", "Enter")
    sync_api.expect(page.locator("#notice")).to_contain_text("a gibibyte")
    sync_api.expect(page.locator("#chosen img")).to_have_count(1)


def test_settings_go_into_the_request(visit, serve):
    page = visit(serve(slices=["all"]).url)
    asked = answering(page)
    page.click("#settings-button")
    for name, value in {"top_p": "0.5", "top_k": "40", "seed": "7", "max_tokens": "12"}.items():
        page.fill(f"#{name}", value)
    page.check("#json")
    chosen = page.locator("#model-id option").nth(1).get_attribute("value")
    page.select_option("#model-id", chosen)
    page.keyboard.press("Escape")
    page.reload()
    sync_api.expect(page.locator("#model-id")).to_have_value(chosen)
    ask(page, "Hello")
    expected = {"top_p": 0.5, "top_k": 40, "seed": 7, "max_tokens": 12, "model": chosen}
    assert {name: asked[0][name] for name in expected} == expected
    assert asked[0]["response_format"] == {"type": "json_object"}
    sync_api.expect(page.locator("#context")).to_contain_text("tokens left")


def test_a_text_file_is_attached(visit, server):
    page = visit(server.url)
    asked = saying(page, "Yes.")
    drop(page, "notes.md", "text/markdown", b"Apples are red.")
    sync_api.expect(page.locator("#chosen .chip")).to_contain_text("notes.md")
    ask(page, "Read this")
    file = asked[0]["messages"][0]["content"][0]["file"]
    assert file["filename"] == "notes.md"
    assert base64.b64decode(file["file_data"].split(",")[1]) == b"Apples are red."


def test_suggestions_are_what_the_model_can_do(visit, server):
    page = visit(server.url)
    sync_api.expect(page.locator("#suggestions button")).to_have_count(3)
    page.evaluate("showSuggestions({ vision: false, audio: false })")
    sync_api.expect(page.locator("#suggestions button")).to_have_count(1)
    page.locator("#suggestions button").click()
    sync_api.expect(page.locator("#text")).to_have_value("What is 12 + 34?")


def test_latex_becomes_mathml(still):
    sources = [r"so \(x^2\) it is", "\\[\n\\frac{a}{b}\n\\]", "$$\na_1\n$$", "if $n > 1$, then", "a $$b^c$$ d"]
    found = still.evaluate(
        """(sources) => sources.map((source) => {
          const node = make("div");
          new Words(node).show(source);
          const math = [...node.querySelectorAll("math")];
          return [math.length, math[0]?.className || "", math[0]?.querySelectorAll("msup, msub, mfrac").length,
            node.querySelectorAll("[style]").length, math[0]?.namespaceURI];
        })""",
        sources,
    )
    assert [row[0] for row in found] == [1] * 5
    assert ["display" in row[1] for row in found] == [False, True, True, False, True]
    assert [row[2] for row in found] == [1, 1, 1, 0, 1]
    assert {row[4] for row in found} == {"http://www.w3.org/1998/Math/MathML"}


def test_latex_can_do_nothing_but_show(still):
    sources = [r"\(\href{javascript:alert(1)}{x}\)", r"\(\includegraphics{https://a.b/c.png}\)", r"\(\frac{\)"]
    sources += [r"\(\def\a{\a\a}\a\)", r"\(\style{background:url(https://a.b)}{x}\)", r"\(\htmlData{a=b}{x}\)"]
    assert (
        still.evaluate(
            RENDER.replace("node.innerHTML", "node.querySelectorAll('a, img, [href], [style]').length"), sources
        )
        == [0] * 6
    )


def test_code_has_colours(still):
    source = "```python\n# why\nif x == 'a': return 1\n```"
    found = still.evaluate(
        RENDER.replace(
            "node.innerHTML",
            "[...node.querySelectorAll('code span')].map((span) => [span.className, span.textContent])",
        ),
        [source],
    )
    assert found == [
        [
            ["code-comment", "# why"],
            ["code-keyword", "if"],
            ["code-string", "'a'"],
            ["code-keyword", "return"],
            ["code-number", "1"],
        ]
    ]
