"""Headless Chromium, moved by Playwright. Without either, the tests of the chat page are skipped."""

import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from running import WAIT_S

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
if importlib.util.find_spec("playwright") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module")
def playwright() -> Iterator[Any]:
    from playwright import sync_api

    sync_api.expect.set_options(timeout=WAIT_S * 1000)
    with sync_api.sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def launch_options() -> dict[str, Any]:
    """Of every browser that Playwright launches here."""
    return {"executable_path": next(filter(None, map(shutil.which, NAMES)), None), "args": FLAGS}


@pytest.fixture(scope="module")
def browser(playwright: Any, launch_options: dict[str, Any]) -> Iterator[Any]:
    from playwright import sync_api

    try:
        running = playwright.chromium.launch(**launch_options)
    except sync_api.Error as error:
        if launch_options["executable_path"] is None:
            pytest.skip("there is no Chromium: install it, or run `playwright install chromium`")
        raise error
    yield running
    running.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """visit(url, width=390): a page in a fresh profile; it may call its server alone, and must not fail."""
    from playwright.sync_api import expect

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
                expect(page.locator("#name")).not_to_have_text("…")
            return page

        yield opened
        assert wrong == []


@pytest.fixture(scope="module")
def still(browser: Any, server: Any) -> Iterator[Any]:
    """A page for tests that leave it as it is."""
    profile = browser.new_context()
    page = profile.new_page()
    page.goto(server.url)
    yield page
    profile.close()
