"""What is left on the chat page after its browser was killed while an answer came and a draft was written."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from asking import answering, drop
from playwright import sync_api
from running import WAIT_S, picture, wait_until


@contextmanager
def browsing(playwright: Any, options: dict[str, Any], profile: Path) -> Iterator[Any]:
    """A page of a browser that keeps its profile in a folder."""
    context = playwright.chromium.launch_persistent_context(str(profile), **options)
    context.set_default_timeout(WAIT_S * 1000)
    yield context.pages[0]
    with suppress(sync_api.Error):  # of a browser that was killed
        context.close()


def kill(profile: Path) -> None:
    """Ends the browser with this profile, and its children, as SIGKILL does: nothing of it runs at its end."""
    owner = f"--user-data-dir={profile}"
    (main,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if owner in process.cmdline() and not any(word.startswith("--type=") for word in process.cmdline())
    ]
    family = [*main.children(recursive=True), main]
    for process in family:
        os.kill(process.pid, signal.SIGKILL)
    psutil.wait_procs(family, timeout=WAIT_S)


@pytest.mark.usefixtures("browser")  # skips without Chromium
@pytest.mark.skipif(sys.platform != "linux", reason="finds the browser's processes as Linux has them")
def test_a_killed_browser_loses_the_last_words_alone(playwright, launch_options, server, tmp_path):
    profile = tmp_path / "profile"
    with browsing(playwright, launch_options, profile) as page:
        page.goto(server.url)
        sync_api.expect(page.locator("#name")).not_to_have_text("…")
        answering(page, logit_bias={"1": -100, "106": -100}, max_tokens=20_000)
        drop(page, "square.png", "image/png", picture())
        page.fill("#text", "Go on for ever")
        page.press("#text", "Enter")
        # The answer is saved every second, and goes on after that.
        saved = "everyMessage().then((all) => all.find(({ role }) => role === 'assistant')?.text.length || 0)"
        wait_until(lambda: page.evaluate(saved) > 0)
        page.type("#text", "And half a thou")
        wait_until(lambda: page.evaluate("readDraft(draftId()).then((draft) => draft?.text === 'And half a thou')"))
        length, url = page.evaluate(saved), page.url
        kill(profile)
    wait_until(lambda: server.figure("running") == 0)
    with browsing(playwright, launch_options, profile) as page:
        page.goto(url)
        sync_api.expect(page.locator(".answer .figures")).to_contain_text("interrupted")
        assert page.evaluate("branch().at(-1).text.length") >= length
        page.wait_for_function("document.querySelector('.question img')?.naturalWidth === 60")
        sync_api.expect(page.locator("#text")).to_have_value("And half a thou")
        page.goto(f"{server.url}/#")
        page.click("#conversations-button")
        sync_api.expect(page.locator("#list .name")).to_have_text(["Go on for ever"])


@pytest.mark.parametrize("begun", [False, True])
def test_a_crash_at_any_moment_of_sending_loses_no_word(visit, server, begun):
    """The database takes so many transactions more, then the page is loaded again."""
    page = visit(server.url)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    if begun:
        page.fill("#text", "First")
        page.press("#text", "Enter")
        sync_api.expect(page.locator(".error")).to_be_visible()
    for transactions in range(4):
        words = f"Written {transactions}"
        page.fill("#text", words)
        wait_until(lambda words=words: page.evaluate("readDraft(draftId()).then((draft) => draft?.text)") == words)
        page.evaluate(
            """(left) => {
              const transaction = IDBDatabase.prototype.transaction;
              IDBDatabase.prototype.transaction = function (stores, mode, options) {
                if (mode === "readwrite" && left-- <= 0) throw new Error("crashed");
                return transaction.call(this, stores, mode, options);
              };
            }""",
            transactions,
        )
        page.press("#text", "Enter")
        wait_until(lambda: page.evaluate("running === null && Boolean(branch().at(-1)?.failure)"))
        page.reload()
        sync_api.expect(page.locator("#name")).not_to_have_text("…")
        kept = page.evaluate("everyMessage().then((all) => all.map(({ text }) => text))")
        shown = page.locator(".question .said").all_inner_texts()
        assert (page.input_value("#text") == words) != (words in kept), transactions
        assert (words in kept) == (words in shown)
        if not begun and shown:
            page.click("#new")
