"""The chat page in a real Chromium, under a path of a reverse proxy that has another host name."""

import pytest
from playwright.sync_api import Browser, expect

from scripts.chat_web import Config, make_settings
from tests.browser.support import MARKS, OUTSIDE
from tests.proxy import proxied
from tests.talker import engine, serving

pytestmark = MARKS


@pytest.mark.parametrize("strips", [True, False])
def test_a_question_is_answered_through_a_proxy(browser: Browser, strips: bool) -> None:
    flags = Config(
        temperature=0.0, allowed_hosts=OUTSIDE, root_path="" if strips else "/apps/zangchat"
    )
    talker = engine(lambda question: f"You said: {question}")
    with (
        serving(talker, settings=make_settings(flags)) as (url, _),
        # it passes a Host header of its own, so that only the Origin has the outside name
        proxied(url, "/apps/zangchat", strips, host="localhost:8000") as outside,
        browser.new_context(locale="en-US") as context,
    ):
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.goto(outside.replace("127.0.0.1", OUTSIDE) + "/")
        assert page.locator(".brand img").evaluate("image => image.naturalWidth") > 0
        page.get_by_label("Message", exact=True).fill("hi")
        page.get_by_label("Send").click()
        expect(page.locator(".message.assistant")).to_contain_text("You said: hi")
