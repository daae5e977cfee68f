"""The page for people: languages, typing, phones, copying, keys, formulas, code."""

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.support import LAN, MARKS, ask, awaited, last, reply, send
from tests.talker import engine, serving

pytestmark = MARKS


# ---- languages -----------------------------------------------------------------------------------


def visible_text(page: Page) -> str:
    """All that a reader sees or hears: text, labels, placeholders."""
    return page.evaluate(
        """() => [document.body.innerText, ...[...document.querySelectorAll("*")].flatMap(
            (node) => [node.ariaLabel, node.placeholder])].filter(Boolean).join("\\n")"""
    )


# names of things, which are the same in all languages
SAME = re.compile(
    r"zangchat(-test)?|token|Top-[kp]|API key|Language|English|JSON|Markdown|Esc|/\w+"
)


def test_the_page_speaks_the_browsers_language(browser: Browser, server: tuple[str, Any]) -> None:
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    page.goto(server[0])
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.get_by_role("button", name="你是谁？").click()
    expect(last(page).get_by_role("button", name="重新生成")).to_be_visible()
    expect(last(page)).to_contain_text("You said: 你是谁？")
    page.get_by_role("button", name="设置").click()
    page.get_by_role("button", name="完成").click()
    page.get_by_role("button", name="本对话").click()
    page.locator("#chat").get_by_role("button", name="完成").click()
    page.get_by_label("消息", exact=True).fill("/help")
    page.keyboard.press("Enter")
    expect(page.locator("#hint")).to_contain_text("开始新对话")
    left = re.sub(SAME, "", visible_text(page).replace("You said:", ""))
    assert re.findall(r"[A-Za-z]{2,}.*", left) == []
    page.get_by_label("消息", exact=True).fill("x" * 1100)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("消息超出了模型的上下文长度")
    # what was kept in one language is shown in the other
    page.get_by_role("button", name="设置").click()
    page.get_by_label("语言").select_option("English")
    page.get_by_role("button", name="Done").click()
    expect(page.get_by_role("alert")).to_contain_text("more than the context of 1024")
    page.reload()
    expect(page.get_by_role("button", name="New chat")).to_be_visible()
    assert page.evaluate("document.documentElement.lang") == "en"
    context.close()


@pytest.mark.parametrize(
    ("locale", "heading"), [("de-DE", "What is on your mind?"), ("zh-TW", "想聊点什么？")]
)
def test_other_languages_get_the_nearest(
    browser: Browser, server: tuple[str, Any], locale: str, heading: str
) -> None:
    context = browser.new_context(locale=locale)
    page = context.new_page()
    page.goto(server[0])
    expect(page.get_by_role("heading", name=heading)).to_be_visible()
    context.close()


def test_every_language_has_every_word(page: Page) -> None:
    keys = page.evaluate(
        "Object.fromEntries(Object.entries(STRINGS).map(([name, block]) => [name, Object.keys(block)]))"
    )
    assert len(keys) > 1 and all(sorted(found) == sorted(keys["en"]) for found in keys.values())
    holes = "(text) => (typeof text === 'string' ? text.match(/\\{\\w+\\}/g) ?? [] : []).sort()"
    for key in keys["en"]:
        values = page.evaluate(
            f"(key) => Object.values(STRINGS).map((block) => ({holes})(block[key]))", key
        )
        assert all(value == values[0] for value in values), key
    commands = page.evaluate("Object.values(STRINGS).map((block) => Object.keys(block.commands))")
    assert all(found == commands[0] for found in commands)
    assert page.evaluate("Object.keys(COMMANDS)") == commands[0]
    used = set(re.findall(r"\bt\(\"(\w+)\"", script(page)))
    used |= set(re.findall(r'data-(?:text|label|hint)="(\w+)"', page.content()))
    assert used and used <= set(keys["en"])


def script(page: Page) -> str:
    return str(page.evaluate("document.scripts[0].textContent"))


# ---- typing --------------------------------------------------------------------------------------


def test_enter_of_an_input_method_does_not_send(page: Page) -> None:
    """WebKit ends the composition first, and marks its Enter by keyCode 229 only."""
    field = page.get_by_label("Message", exact=True)
    field.fill("你好")
    press = """(node, init) => {
        node.dispatchEvent(new CompositionEvent("compositionstart", {bubbles: true}));
        if (!init.isComposing) node.dispatchEvent(new CompositionEvent("compositionend", {bubbles: true, data: "你好"}));
        node.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true, cancelable: true, ...init}));
    }"""
    for init in ({"keyCode": 229}, {"isComposing": True, "keyCode": 13}):
        field.evaluate(press, init)
        expect(page.locator("article")).to_have_count(0)
        expect(field).to_have_value("你好")
    field.evaluate(press, {"keyCode": 13})  # the Enter after it is meant
    expect(last(page)).to_contain_text("You said: 你好")
    expect(last(page).get_by_role("button", name="Regenerate")).to_be_visible()
    # Escape closes the method's list of candidates, it does not stop a reply
    send(page, "long story")
    expect(last(page)).to_contain_text("word")
    field.evaluate(
        "(node) => node.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true, keyCode: 229}))"
    )
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.get_by_role("button", name="Stop").click()


@pytest.mark.parametrize(
    "question",
    [
        "/usr is what?",
        "/new is a directory?",
        "/help me",
        "/a b",
        "/USR",
        "/etc/hosts",
        "/ 2",
        "//",
    ],
)
def test_a_question_may_begin_with_a_slash(page: Page, question: str) -> None:
    ask(page, question)
    expect(page.locator("article.user .said")).to_have_text(question)


def test_an_unknown_command_deletes_nothing(page: Page) -> None:
    field = page.get_by_label("Message", exact=True)
    send(page, "/usr")
    expect(page.locator("#hint")).to_contain_text("There is no command /usr")
    expect(field).to_have_value("/usr")
    page.keyboard.press("Enter")  # meant as it is
    expect(last(page)).to_contain_text("You said: /usr")
    expect(page.locator("#hint")).to_be_hidden()


def test_enter_breaks_the_line_on_a_phone(browser: Browser, server: tuple[str, Any]) -> None:
    context = browser.new_context(
        viewport={"width": 360, "height": 700}, is_mobile=True, has_touch=True, locale="en-US"
    )
    page = context.new_page()
    page.goto(server[0])
    field = page.get_by_label("Message", exact=True)
    field.tap()
    page.keyboard.type("one")
    page.keyboard.press("Enter")
    page.keyboard.type("two")
    expect(field).to_have_value("one\ntwo")
    page.get_by_role("button", name="Send").tap()
    expect(page.locator("article.user .said")).to_have_text(re.compile(r"one\s*two"))
    context.close()


# ---- access --------------------------------------------------------------------------------------


def test_copy_works_over_plain_http(browser: Browser) -> None:
    context = browser.new_context(locale="en-US")
    page = context.new_page()
    with serving(engine(reply, sequence_len=1024), hosts=frozenset({LAN}), temperature=0.0) as (
        url,
        _,
    ):
        page.goto(url.replace("127.0.0.1", LAN))
        assert page.evaluate("isSecureContext") is False
        ask(page, "markdown please")
        page.locator(".code").get_by_role("button", name="Copy").click()
        expect(page.locator(".code").get_by_role("button", name="Copied")).to_be_visible()
        field = page.get_by_label("Message", exact=True)
        field.focus()
        page.keyboard.press("Control+V")
        expect(field).to_have_value(re.compile(r"^def area\(r: float\)[^<]*# of a circle\n$"))
        field.fill("")
        last(page).locator(".actions").get_by_role("button", name="Copy").click()
        field.focus()
        page.keyboard.press("Control+V")
        expect(field).to_have_value(re.compile(r"^\*\*bold\*\* and `code`"))
    context.close()


def test_the_key_is_asked_for_in_place(browser: Browser) -> None:
    context = browser.new_context(locale="en-US")
    page = context.new_page()
    with serving(engine(reply, sequence_len=1024), api_key="s3cret") as (url, _):
        page.goto(url)
        send(page, "markdown please")
        expect(page.get_by_role("alert")).to_contain_text("This server requires an API key.")
        for wrong in ("wrong", "ｓ3cret"):  # the second cannot even be sent
            page.get_by_role("alert").get_by_label("API key").fill(wrong)
            page.keyboard.press("Enter")
            expect(page.get_by_role("alert")).to_contain_text("does not accept this API key")
            assert page.evaluate("settings.key") == wrong
        page.get_by_role("alert").get_by_label("API key").fill("s3cret")
        page.get_by_role("button", name="Use this key").click()
        expect(last(page).locator("strong")).to_have_text("bold")
        expect(page.locator("article")).to_have_count(2)
        page.reload()
        page.get_by_role("button", name="markdown please", exact=True).click()
        expect(last(page).locator("strong")).to_have_text("bold")
    context.close()


@pytest.mark.parametrize("address", ["/llm/", "/llm", "/a/b/"])
def test_page_works_below_a_path(browser: Browser, server: tuple[str, Any], address: str) -> None:
    """As behind nginx's `location /llm/ { proxy_pass http://127.0.0.1:8000/; }`."""
    prefix = address.rstrip("/")
    context = browser.new_context(locale="en-US")
    page = context.new_page()
    asked: list[str] = []

    def proxy(route: Any) -> None:
        path = "/" + route.request.url.removeprefix(server[0]).removeprefix(prefix).lstrip("/")
        asked.append(path)
        route.fulfill(response=route.fetch(url=server[0] + path))

    context.route(re.compile(re.escape(server[0]) + "/.*"), lambda route: route.abort())
    context.route(re.compile(re.escape(server[0] + prefix) + r"(/.*)?$"), proxy)
    page.goto(server[0] + address)
    ask(page, "markdown please")
    page.reload()
    page.get_by_role("button", name="markdown please", exact=True).click()
    expect(last(page).locator("strong")).to_have_text("bold")
    logo = "document.querySelector('img.logo')"
    assert awaited(page, f"{logo}.complete && {logo}.naturalWidth > 0")
    assert {"/", "/logo.svg", "/chat/completions", "/render"} <= set(asked)
    context.close()


# ---- replies -------------------------------------------------------------------------------------


def test_code_is_highlighted_and_formulas_are_typeset(page: Page) -> None:
    ask(page, "markdown please")
    answer = last(page).locator(".said")
    expect(answer.locator("pre code")).to_have_text(re.compile(r"^def area\(r: float\) -> float:"))
    colours = answer.locator("pre code span").evaluate_all(
        "(nodes) => [...new Set(nodes.map((node) => getComputedStyle(node).color))]"
    )
    assert len(colours) > 3
    for formula, is_block in (
        (answer.locator("math").first, False),
        (answer.locator("math").last, True),
    ):
        box = formula.bounding_box()
        assert box is not None and box["width"] > 20
        assert (
            formula.evaluate("(node) => getComputedStyle(node).display") == "block math"
        ) is is_block
    fraction = answer.locator("mfrac").bounding_box()
    line = answer.locator("math").first.bounding_box()
    assert fraction is not None and line is not None and fraction["height"] > 1.5 * line["height"]


def test_tokens_per_second_are_shown(page: Page) -> None:
    ask(page, "long story")
    expect(last(page).locator(".pace")).to_have_text(re.compile(r"^750 tokens · [\d.]+ tokens/s$"))
    page.reload()
    page.get_by_role("button", name="long story", exact=True).click()
    expect(last(page).locator(".pace")).to_contain_text("750 tokens")


def test_a_result_that_the_model_made_up_is_not_the_calculators(page: Page) -> None:
    ask(page, "pretend")
    blocks = last(page).locator(".tool")
    expect(blocks).to_have_text(["calculatoropen(1)", "not calculated: the model made this up41"])
    assert last(page).locator(".result").count() == 0
    page.reload()
    page.get_by_role("button", name="pretend", exact=True).click()
    expect(blocks.last).to_contain_text("the model made this up")
    # its tokens go back as they were
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "calculate")
    parts = json.loads(sent.value.post_data or "")["messages"][1]["content"]
    assert [part["type"] for part in parts] == ["python", "python_output", "text"]
    expect(last(page).locator(".tool")).to_have_text("calculator12 * 34408")
