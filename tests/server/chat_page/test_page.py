"""The chat page in a real browser, against a real server."""

import base64
import importlib.util
import io
import itertools
import re
from typing import Any

import pytest
from asking import CHAT, answered, answering, ask, drop, instead, saying
from PIL import Image
from playwright import sync_api
from running import picture, sound, video, wait_until


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
    sync_api.expect(failed.locator(".error")).to_contain_text("broken.png")
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
    sync_api.expect(page.locator("#slice")).to_have_attribute("title", re.compile("within gemma-3n-e4b"))
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


def test_text_of_twice_the_size_fits_a_small_phone(visit, serve):
    page = visit(serve(slices=["all"]).url, width=360, has_touch=True, is_mobile=True)
    instead(page, LONG)
    page.evaluate("document.documentElement.style.fontSize = '200%'")
    page.evaluate("fit()")
    too_wide = """() => [document.documentElement, $("scroller"), ...document.querySelectorAll(":popover-open")]
      .filter((node) => node.scrollWidth > node.clientWidth).map((node) => node.id || node.tagName)"""
    assert page.evaluate(too_wide) == []
    header = [page.locator(name).bounding_box() for name in ("#conversations-button", "#model", "#settings-button")]
    assert all(box["x"] + box["width"] <= after["x"] + 1 for box, after in itertools.pairwise(header))
    assert page.locator("#text").bounding_box()["width"] > 150
    page.fill("#text", "Well?")
    page.tap("#send")
    answered(page)
    assert page.evaluate(too_wide) == []
    for name in ("settings", "conversations"):
        page.click(f"#{name}-button")
        assert page.evaluate(too_wide) == []
        page.keyboard.press("Escape")


def test_targets_are_large_enough_for_a_finger(visit, server):
    page = visit(server.url, width=390, has_touch=True, is_mobile=True)
    instead(page, "Yes.")
    page.fill("#text", "Well?")
    page.tap("#send")
    answered(page)
    page.tap("#conversations-button")
    for button in page.get_by_role("button").all():
        box = button.bounding_box()
        assert box is None or (box["width"] >= 40 and box["height"] >= 40), button.evaluate("(it) => it.outerHTML")


def test_the_page_stays_at_the_end_of_what_comes(visit, server):
    page = visit(server.url)
    instead(page, LONG)
    for count in (1, 2):
        ask(page, "Well?", count)
    page.evaluate(
        """() => {
          const grow = (height) => { $("log").append(make("div")); $("log").lastChild.style.height = `${height}px`; };
          grow(50);
          toBottom();
          grow(500); // before the page is told that it has scrolled
        }"""
    )
    rest = "(node) => node.scrollHeight - node.scrollTop - node.clientHeight"
    wait_until(lambda: page.locator("#scroller").evaluate(rest) < 5)
    # A reader who scrolls up stays there.
    page.mouse.move(500, 300)
    page.mouse.wheel(0, -300)
    sync_api.expect(page.locator("#latest")).to_be_visible()
    page.click("#latest")
    sync_api.expect(page.locator("#latest")).to_be_hidden()


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


def test_suggestions_are_what_the_model_can_do(visit, server):
    page = visit(server.url)
    words = ["What is 12 + 34?", "What is in this picture?", "Transcribe this.", "What happens in this video?"]
    tries = page.locator("#suggestions button")
    sync_api.expect(tries).to_have_text(words if importlib.util.find_spec("av") else words[:3])
    page.evaluate("showSuggestions({ vision: false, audio: false, video: false })")
    sync_api.expect(tries).to_have_text(words[:1])
    sync_api.expect(page.locator("#brings")).to_have_text("Ask something, add a file.")
    sync_api.expect(page.locator("#record")).to_be_hidden()
    tries.click()
    sync_api.expect(page.locator("#text")).to_have_value("What is 12 + 34?")


def test_the_slice_that_answers_is_named(visit, serve):
    page = visit(serve(slices=["all"]).url)
    sync_api.expect(page.locator("#slice")).to_have_text("full size")
    chosen = page.locator("#model-id option").last.get_attribute("value")
    page.click("#settings-button")
    page.select_option("#model-id", chosen)
    sync_api.expect(page.locator("#slice")).to_have_text(chosen.removeprefix("tiny:"))
