"""The chat page where its storage is shared by tabs, full, or not there at all."""

import os

from asking import answered, ask, drop, instead, saying
from playwright.sync_api import expect
from running import wait_until


def test_tabs_follow_each_other(visit, server):
    page = visit(server.url)
    saying(page, "One.")
    ask(page, "Say a number")
    other = page.context.new_page()
    other.goto(page.url)
    answered(other)
    other.fill("#text", "Half a thou")
    saying(page, "Two.")
    ask(page, "Another", 2)
    expect(other.locator(".answer .words")).to_have_text(["One.", "Two."])
    expect(other.locator("#text")).to_have_value("Half a thou")
    # Both answer the same question of the other: two branches, and neither tab is moved from its own.
    saying(other, "Three.")
    saying(page, "Four.")
    for tab in (page, other):
        tab.get_by_role("button", name="Again").last.click()
    for tab, words in ((page, "Four."), (other, "Three.")):
        expect(tab.locator(".answer .words")).to_have_text(["One.", words])
        expect(tab.locator(".below .place")).to_contain_text("/3")
    other.click("#conversations-button")
    other.get_by_role("button", name="Rename").click()
    other.get_by_role("textbox", name="Title").fill("Numbers")
    other.keyboard.press("Enter")
    page.click("#conversations-button")
    expect(page.locator("#list .name")).to_have_text(["Numbers"])
    page.get_by_role("button", name="Delete Numbers").click()
    page.click("#confirm-yes")
    expect(other.locator(".answer")).to_have_count(0)
    expect(other.locator("#list .name")).to_have_count(0)
    expect(other.locator("#text")).to_have_value("Half a thou")


def test_full_storage_is_said_and_loses_nothing_of_the_tab(visit, server):
    page = visit(server.url)
    session = page.context.new_cdp_session(page)
    session.send("Storage.overrideQuotaForOrigin", {"origin": server.url, "quotaSize": 200_000})
    instead(page, "Yes.")
    ask(page, "First")
    page.click("#new")
    drop(page, "noise.txt", "text/plain", os.urandom(300_000).hex().encode())
    page.fill("#text", "Second")
    expect(page.locator("#notice")).to_contain_text("storage is full")
    page.press("#text", "Enter")
    answered(page)
    expect(page.locator("#notice")).to_contain_text("delete some conversations")
    page.click("#conversations-button")
    page.get_by_role("button", name="First", exact=True).click()
    expect(page.locator(".question .said")).to_have_text("First")
    page.click("#conversations-button")
    page.get_by_role("button", name="Second", exact=True).click()
    expect(page.locator(".question .said")).to_have_text("Second")
    expect(page.locator(".answer .words")).to_have_text("Yes.")
    # With room again, what was not kept is.
    session.send("Storage.overrideQuotaForOrigin", {"origin": server.url})
    page.click("#conversations-button")
    page.get_by_role("button", name="Delete First").click()
    page.click("#confirm-yes")
    wait_until(lambda: page.evaluate("remembered.messages.size === 0"))
    page.reload()
    expect(page.locator(".question .said")).to_have_text("Second")


def test_without_storage_it_chats(visit, server):
    page = visit(server.url)
    page.context.add_init_script(
        """for (const name of ["indexedDB", "localStorage", "sessionStorage"]) {
          Object.defineProperty(window, name, { get() { throw new DOMException("not allowed", "SecurityError"); } });
        }"""
    )
    page.reload()
    expect(page.locator("#notice")).to_contain_text("keeps no data")
    saying(page, "Yes.")
    ask(page, "First")
    ask(page, "Second", 2)
    page.click("#new")
    page.click("#conversations-button")
    page.get_by_role("button", name="First", exact=True).click()
    expect(page.locator(".question .said")).to_have_text(["First", "Second"])
