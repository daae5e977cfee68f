from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.browser.support import CHROMIUM, LAN, OUTSIDE, reply
from tests.talker import engine, serving


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=20_000)  # a busy machine streams slowly
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        options.append(f"--host-resolver-rules=MAP {LAN} 127.0.0.1, MAP {OUTSIDE} 127.0.0.1")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def server() -> Iterator[tuple[str, Any]]:
    with serving(
        engine(reply, sequence_len=1024, pause=0.003),
        max_tokens=800,
        model_name="zangchat-test",
        temperature=0.0,
        top_p=0.9,
    ) as served:
        yield served


@pytest.fixture
def context(browser: Browser, server: tuple[str, Any]) -> Iterator[BrowserContext]:
    """A new visitor. A message in the console or a request to another host fails the test."""
    context = browser.new_context(
        viewport={"width": 1100, "height": 760}, color_scheme="light", locale="en-US"
    )
    context.set_default_timeout(20_000)
    complaints: list[str] = []

    def watch(page: Page) -> None:
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                complaints.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.on(
            "request",
            lambda request: (
                complaints.append(request.url)
                if not request.url.startswith((server[0] + "/", "blob:"))
                else None
            ),
        )

    context.on("page", watch)
    yield context
    context.close()
    # some tests provoke refusals
    assert [complaint for complaint in complaints if "status of 4" not in complaint] == []


@pytest.fixture
def page(context: BrowserContext, server: tuple[str, Any]) -> Page:
    page = context.new_page()
    page.goto(server[0])
    return page
