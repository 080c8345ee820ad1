"""What the chat page keeps. A page that is closed stands for a crash: nothing of it runs at its end."""

import base64

from asking import answered, answering, ask, drop, instead, saying
from playwright import sync_api
from running import picture, wait_until


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
    # What was being written when a question was edited is still there after it.
    page.fill("#text", "Half a thou")
    page.get_by_role("button", name="Edit").last.click()
    page.fill("#text", "Very good")
    page.press("#text", "Enter")
    answered(page, 2)
    sync_api.expect(page.locator("#text")).to_have_value("Half a thou")


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
    sync_api.expect(names).to_be_focused()
    names.click()
    sync_api.expect(page.locator(".answer .words")).to_have_text("About apples, yes.")
    page.reload()
    page.click("#conversations-button")
    sync_api.expect(names).to_have_text(["About pears", "Fruit"])
    page.get_by_role("button", name="Delete Fruit").press("Enter")
    page.click("#confirm-no")
    sync_api.expect(names).to_have_count(2)
    sync_api.expect(page.get_by_role("button", name="Delete Fruit")).to_be_focused()
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
    sync_api.expect(page.locator("#conversations")).to_be_hidden()
    page.reload()
    page.click("#conversations-button")
    page.locator("#list .name").click()
    sync_api.expect(page.locator(".answer .words")).to_have_text("A white square.")
    page.wait_for_function("document.querySelector('.question img')?.naturalWidth === 60")


def test_one_conversation_is_exported_and_imported(visit, server, tmp_path):
    page = visit(server.url)
    instead(page, "Yes.")
    drop(page, "square.png", "image/png", picture())
    ask(page, "Is it: a square?")
    page.click("#new")
    ask(page, "Another")
    page.click("#conversations-button")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export Is it").click()
    assert download.value.suggested_filename == "Is-it-a-square.json"
    file = tmp_path / "one.json"
    download.value.save_as(file)
    other = visit(server.url)
    other.click("#conversations-button")
    other.set_input_files("#import-file", file)
    sync_api.expect(other.locator("#list .name")).to_have_text(["Is it: a square?"])
    other.locator("#list .name").click()
    sync_api.expect(other.locator(".answer .words")).to_have_text("Yes.")
    other.wait_for_function("document.querySelector('.question img')?.naturalWidth === 60")


def test_what_does_not_fit_is_not_sent_and_nothing_is_deleted_for_it(visit, server):
    page = visit(server.url)
    page.evaluate("globalThis.bytesOf = () => 2 ** 30")
    drop(page, "square.png", "image/png", picture())
    page.press("#text", "Enter")
    sync_api.expect(page.locator("#notice")).to_contain_text("a gibibyte")
    sync_api.expect(page.locator("#chosen img")).to_have_count(1)
