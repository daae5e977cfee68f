"""The chat page in a real Chromium, against a real server with scripted replies."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.support import MARKS, ask, last, reply, send, storage
from tests.talker import engine, eventually, serving

pytestmark = MARKS


def test_answer_is_rendered_as_markdown(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    ask(page, "markdown please")
    answer = last(page).locator(".said")
    expect(answer.locator("strong")).to_have_text("bold")
    expect(answer.locator("pre code")).to_have_text(re.compile(r"^def area\(r: float\)"))
    expect(answer.locator("td").first).to_have_text("1")
    expect(answer.locator(".code").get_by_role("button", name="Copy")).to_be_visible()
    expect(page.locator("header h1")).to_have_text("markdown please")
    # announced to screen readers once, at the end
    expect(page.get_by_role("status")).to_contain_text("bold")


def test_suggestion_starts_a_chat(page: Page) -> None:
    page.get_by_role("button", name="Who are you?").click()
    expect(last(page)).to_contain_text("You said: Who are you?")
    expect(page.get_by_text("What is on your mind?")).to_be_hidden()


def test_tool_calls_are_shown_as_blocks_and_sent_back_as_parts(page: Page) -> None:
    ask(page, "calculate 12 * 34")
    expect(last(page).locator(".tool")).to_have_text("calculator12 * 34408")
    expect(last(page).locator(".md").last).to_have_text("So it is 408.")
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "thanks")
    parts = json.loads(sent.value.post_data or "")["messages"][1]["content"]
    assert [part["type"] for part in parts] == ["text", "python", "python_output", "text"]


def test_text_streams_and_can_be_stopped(page: Page, server: tuple[str, Any]) -> None:
    send(page, "long story")
    expect(last(page)).to_contain_text("word word")
    page.get_by_role("button", name="Stop").click()
    expect(last(page).locator(".note")).to_have_text("Stopped.")
    assert 0 < last(page).locator(".said").inner_text().count("word") < 150
    assert eventually(lambda: server[1].load == 0)
    send(page, "long story")
    expect(last(page)).to_contain_text("word word")
    page.keyboard.press("Escape")
    expect(last(page).locator(".note")).to_have_text("Stopped.")
    ask(page, "go on")  # a stopped chat can continue
    expect(last(page)).to_contain_text("You said: go on")


def test_model_output_cannot_run_or_load_anything(page: Page) -> None:
    ask(page, "hostile")
    assert page.title() == "zangchat"
    assert last(page).locator(".said img, .said script").count() == 0
    (link,) = last(page).locator(".said a").all()  # the image is not loaded, only linked
    assert (link.get_attribute("href"), link.get_attribute("target")) == (
        "http://elsewhere.example/x",
        "_blank",
    )
    assert "noopener" in (link.get_attribute("rel") or "")
    ask(page, "<b>mine</b> <img src=x>")
    assert page.locator("article.user b, article.user img").count() == 0
    expect(page.locator("article.user").last).to_contain_text("<b>mine</b>")


def test_message_is_edited_and_answer_regenerated(page: Page) -> None:
    ask(page, "first")
    ask(page, "second")
    with page.expect_request("**/chat/completions") as sent:
        page.get_by_role("button", name="Regenerate").click()
    assert [message["role"] for message in json.loads(sent.value.post_data or "")["messages"]] == [
        "user",
        "assistant",
        "user",
    ]
    expect(last(page).get_by_role("button", name="Regenerate")).to_be_visible()
    expect(page.locator("article")).to_have_count(4)

    page.locator("article.user").first.hover()
    page.locator("article.user").first.get_by_role("button", name="Edit").click()
    expect(page.get_by_label("Message", exact=True)).to_have_value("first")
    page.keyboard.press("Escape")  # cancels the edit
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    page.locator("article.user").first.hover()
    page.locator("article.user").first.get_by_role("button", name="Edit").click()
    ask(page, "instead")
    expect(page.locator("article")).to_have_count(2)
    expect(last(page)).to_contain_text("You said: instead")


def test_enter_sends_and_shift_enter_breaks_the_line(page: Page) -> None:
    field = page.get_by_label("Message", exact=True)
    field.fill("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator("article.user .said")).to_have_text(re.compile(r"one\s*two"))
    expect(last(page).get_by_role("button", name="Regenerate")).to_be_visible()


def test_page_works_from_the_keyboard(page: Page) -> None:
    def tab_to(name: str, *, back: bool = False) -> None:
        for _ in range(30):
            page.keyboard.press("Shift+Tab" if back else "Tab")
            if (
                page.evaluate(
                    "document.activeElement.ariaLabel || document.activeElement.textContent"
                )
                == name
            ):
                return
        raise AssertionError(f"{name} is not reached by Tab")

    field = page.get_by_label("Message", exact=True)
    expect(field).to_be_focused()
    tab_to("Who are you?", back=True)
    page.keyboard.press("Enter")
    expect(last(page)).to_contain_text("You said: Who are you?")
    expect(field).to_be_focused()  # not lost although the pressed button has disappeared
    tab_to("Regenerate", back=True)
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(field).to_be_focused()
    expect(last(page).get_by_role("button", name="Regenerate")).to_be_visible()
    page.keyboard.type("long story")
    page.keyboard.press("Enter")
    expect(last(page)).to_contain_text("word")
    tab_to("Stop")
    page.keyboard.press("Enter")
    expect(last(page).locator(".note")).to_have_text("Stopped.")
    expect(field).to_be_focused()
    tab_to("Delete Who are you?", back=True)
    page.keyboard.press("Enter")
    expect(page.locator("#chats li")).to_have_count(0)
    expect(field).to_be_focused()


def test_chats_stay_in_the_browser_until_deleted(page: Page) -> None:
    ask(page, "remember **me**")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    ask(page, "another")
    page.reload()
    expect(page.locator("#chats li")).to_have_count(2)
    page.get_by_role("button", name="remember **me**", exact=True).click()
    expect(last(page).locator("strong")).to_have_text("me")
    page.locator("#chats li.current").hover()
    page.get_by_role("button", name="Delete remember **me**").click()
    expect(page.locator("#chats li")).to_have_count(1)
    page.reload()
    expect(page.locator("#chats li")).to_have_text(["another"])


def test_settings_are_sent_and_kept(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest reply, tokens").fill("9")
    page.get_by_label("Top-k (0 = off)").fill("3")
    page.get_by_label("System prompt of new chats").fill("be brief")
    page.get_by_label("Appearance").select_option("dark")
    page.get_by_role("button", name="Done").click()
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "hello there")
    body = json.loads(sent.value.post_data or "")
    assert (body["max_tokens"], body["top_k"], body["top_p"], body["messages"][0]) == (
        9,
        3,
        0.9,
        {"role": "system", "content": "be brief"},
    )
    expect(last(page).locator(".said")).to_have_text("You said:")
    expect(last(page).locator(".note")).to_contain_text("longest allowed length")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Longest reply, tokens")).to_have_value("9")
    page.evaluate("saveSettings({key: 'k'})")
    page.get_by_role("button", name="Defaults").click()
    expect(page.get_by_label("Longest reply, tokens")).to_have_value("800")
    # the operator's later choices count again
    assert storage(page, "zangchat.settings") == {"key": "k"}
    assert page.evaluate("settings.key") == "k"


def test_commands_change_settings_without_asking_the_model(page: Page) -> None:
    for command, message in (
        ("/temperature 0.3", "Temperature 0.3."),
        ("/temperature 7", "between 0 and 2"),
        ("/topk 5", "Top-k 5."),
        ("/topk 3.5", "a whole number between 0 and 1000000"),
        ("/system be brief", "The system prompt of this chat is set."),
        ("/nonsense", "There is no command /nonsense"),
        ("/help", "/regenerate"),
    ):
        send(page, command)
        expect(page.locator("#hint")).to_contain_text(message)
    expect(page.locator("article")).to_have_count(0)
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "/etc/hosts is a file")  # not a command
    body = json.loads(sent.value.post_data or "")
    assert (body["temperature"], body["top_k"], body["messages"][0]["content"]) == (
        0.3,
        5,
        "be brief",
    )
    expect(page.locator("#hint")).to_be_hidden()
    send(page, "/regenerate")
    expect(last(page).get_by_role("button", name="Regenerate")).to_be_visible()
    send(page, "/new")
    expect(page.locator("article")).to_have_count(0)
    send(page, "/settings")
    expect(page.get_by_label("System prompt of new chats")).to_have_value("")


def test_full_server_shows_the_queue(browser: Browser, tmp_path: Path) -> None:
    context = browser.new_context(
        viewport={"width": 960, "height": 600}, color_scheme="light", locale="en"
    )
    first, second = context.new_page(), context.new_page()
    with serving(
        engine(reply, sequence_len=1024, pause=0.02), max_batch=1, max_tokens=800, temperature=0.0
    ) as (url, _):
        for page in (first, second):
            page.goto(url)
        send(first, "long story")
        expect(last(first)).to_contain_text("word")
        send(second, "hello")
        expect(last(second).locator(".waiting")).to_contain_text(
            "In the queue, 1 reply before this one"
        )
        shot(second, "desktop-light-en-queued", tmp_path)
        second.set_viewport_size({"width": 360, "height": 640})
        second.emulate_media(color_scheme="dark")
        shot(second, "phone-dark-en-queued", tmp_path)
        first.get_by_role("button", name="Stop").click()
        expect(last(second)).to_contain_text("You said: hello")
    context.close()


def test_refusal_is_shown_and_can_be_retried(page: Page) -> None:
    send(page, "x" * 1100)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("more than the context of 1024")
    alert.get_by_role("button", name="Try again").click()
    expect(alert).to_contain_text("more than the context of 1024")
    expect(page.locator("article")).to_have_count(2)


def test_api_key_is_entered_in_the_settings(browser: Browser) -> None:
    context = browser.new_context()
    page = context.new_page()
    with serving(engine(reply), api_key="s3cret") as (url, _):
        page.goto(url)
        send(page, "hello")
        expect(page.get_by_role("alert")).to_contain_text("API key")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key of this server").fill("s3cret")
        page.get_by_role("button", name="Done").click()
        page.get_by_role("button", name="Try again").click()
        expect(last(page)).to_contain_text("You said: hello")
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_layout_fits_and_has_a_chat_drawer(
    browser: Browser, server: tuple[str, Any], scheme: Any
) -> None:
    context = browser.new_context(
        viewport={"width": 360, "height": 700}, is_mobile=True, has_touch=True, color_scheme=scheme
    )
    page = context.new_page()
    page.goto(server[0])
    ask(page, "markdown " + "unbreakable" * 12)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    expect(page.get_by_role("button", name="New chat")).to_be_hidden()
    page.get_by_role("button", name="Chats").tap()
    page.get_by_role("button", name="New chat").tap()
    expect(page.locator("article")).to_have_count(0)
    box = page.get_by_role("button", name="Send").bounding_box()
    assert box is not None and box["y"] + box["height"] <= 700
    context.close()


def shot(page: Page, name: str, folder: Path) -> None:
    """Save a screenshot in the folder SCREENSHOTS, if that is set, else in `folder`.

    SCREENSHOTS=dev/screenshots renews those of the repository.
    """
    width = page.evaluate("window.innerWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    kept = os.environ.get("SCREENSHOTS")
    path = Path(kept or folder) / f"{name}.png"
    page.screenshot(path=path)
    if kept:
        from PIL import Image

        # half the bytes
        Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
            path, optimize=True
        )


def say(page: Page, text: str) -> None:
    """In any language."""
    page.locator("#input").fill(text)
    page.locator("#send").click()


def answered(page: Page, text: str) -> None:
    say(page, text)
    expect(last(page).locator(".actions button")).to_have_count(2)


def new_chat(page: Page) -> None:
    page.locator("#menu").tap() if page.locator("#menu").is_visible() else None
    page.locator("#new").click()


@pytest.mark.parametrize(
    ("device", "scheme", "language"),
    [
        ("desktop", "light", "en"),
        ("desktop", "dark", "en"),
        ("phone", "light", "en"),
        ("phone", "dark", "en"),
        ("desktop", "dark", "zh"),
        ("phone", "light", "zh"),
    ],
)
def test_every_state_fits_the_screen(
    browser: Browser,
    server: tuple[str, Any],
    tmp_path: Path,
    device: str,
    scheme: Any,
    language: str,
) -> None:
    phone = device == "phone"
    context = browser.new_context(
        viewport={"width": 360, "height": 640} if phone else {"width": 960, "height": 600},
        is_mobile=phone,
        has_touch=phone,
        color_scheme=scheme,
        locale=language,
    )
    page = context.new_page()
    page.goto(server[0])

    def state(name: str) -> None:
        shot(page, f"{device}-{scheme}-{language}-{name}", tmp_path)

    state("welcome")
    show_replies(page, state)
    show_dialogs(page, state)
    context.close()


def show_replies(page: Page, state: Callable[[str], None]) -> None:
    page.route("**/chat/completions", lambda route: None)
    say(page, "hello")
    expect(last(page).locator(".waiting")).to_be_visible()
    state("waiting")
    page.locator("#send").click()
    page.unroute("**/chat/completions")
    new_chat(page)
    say(page, "long story")
    expect(last(page)).to_contain_text("word word")
    state("streaming")
    page.locator("#send").click()
    expect(last(page).locator(".note")).to_be_visible()
    state("stopped")
    new_chat(page)
    answered(page, "markdown, please")
    last(page).locator(".actions button").last.click()
    expect(last(page).locator(".versions")).to_be_visible()
    state("markdown")
    answered(page, "calculate 12 * 34")
    answered(page, "pretend")
    state("tool-calls")


def show_dialogs(page: Page, state: Callable[[str], None]) -> None:
    page.locator("article.user").last.hover()
    page.locator("article.user").last.locator(".actions button").first.click()
    state("editing")
    page.locator("#unedit").click()
    say(page, "/help")
    state("help")
    page.locator("#input").fill("")
    say(page, "Tell me everything. " * 60)
    expect(page.get_by_role("alert")).to_be_visible()
    state("error")
    for name, opener in (("settings", "#configure"), ("chat", "#options")):
        page.locator(opener).click()
        state(name)
        page.locator(f"#{name} .primary").click()
    if page.locator("#menu").is_visible():
        page.locator("#menu").tap()
        page.wait_for_timeout(400)  # the drawer slides in
    page.locator("#search").fill("story")
    expect(page.locator("#chats li")).to_have_count(1)
    state("chats")
