"""What people type and what the model says is not lost: tabs, closed pages, full storage, files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.support import MARKS, ask, awaited, last, reply, send, storage
from tests.talker import engine, eventually, serving
from zangchat.server import guard

pytestmark = MARKS

OLD_CHAT = {
    "id": "old1",
    "title": "from before",
    "messages": [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "",
            "parts": [
                {"type": "text", "text": "**hello**", "html": "<img src=x onerror=alert(1)>"}
            ],
            "note": "Stopped.",
        },
    ],
}


def titles(page: Page) -> list[str]:
    return page.locator("#chats .open").all_inner_texts()


def rows(page: Page) -> Any:
    return page.locator("#chats li")


def test_two_tabs_keep_each_others_chats(page: Page, server: tuple[str, Any]) -> None:
    other = page.context.new_page()
    other.goto(server[0])
    ask(page, "from the first tab")
    ask(other, "from the second tab")
    ask(page, "again from the first")
    for tab in (page, other):
        expect(rows(tab)).to_have_count(2)
    # a chat that both look at: what one adds, the other shows and continues
    other.get_by_role("button", name="from the first tab", exact=True).click()
    expect(last(other)).to_contain_text("You said: again from the first")
    ask(other, "and from the second")
    expect(page.locator("article")).to_have_count(6)
    ask(page, "back in the first")
    expect(other.locator("article")).to_have_count(8)
    page.reload()
    assert sorted(titles(page)) == ["from the first tab", "from the second tab"]
    # deleted in one, deleted in both
    rows(other).filter(has_text="from the second tab").hover()
    other.get_by_role("button", name="Delete from the second tab").click()
    expect(rows(page)).to_have_count(1)


def test_two_tabs_keep_each_others_settings(page: Page, server: tuple[str, Any]) -> None:
    other = page.context.new_page()
    other.goto(server[0])
    send(page, "/temperature 0.3")
    send(other, "/topk 5")
    page.reload()
    kept = storage(page, "zangchat.settings")
    assert (kept["temperature"], kept["top_k"]) == (0.3, 5)


def test_a_chat_written_by_two_tabs_at_once_is_kept_twice(page: Page) -> None:
    """The second writer has not seen the first one's chat yet."""
    ask(page, "shared")
    page.evaluate(
        """() => {
            const chat = JSON.parse(JSON.stringify(current));
            chat.messages.push({role: "user", content: "unseen"});
            localStorage.setItem(CHAT + chat.id, JSON.stringify(chat));
        }"""
    )
    ask(page, "mine")
    page.reload()
    expect(rows(page)).to_have_count(2)
    texts = page.evaluate("chats.map((chat) => chat.messages.map(textOf).join(' '))")
    assert any("unseen" in text for text in texts) and any("mine" in text for text in texts)


def test_a_reply_is_kept_if_the_tab_closes_while_it_streams(
    page: Page, server: tuple[str, Any]
) -> None:
    send(page, "long story")
    expect(last(page)).to_contain_text("word word")
    fresh = page.context.new_page()
    page.close()
    fresh.goto(server[0])
    fresh.get_by_role("button", name="long story", exact=True).click()
    expect(last(fresh)).to_contain_text("word word")
    expect(last(fresh).locator(".note")).to_have_text(
        "The page was closed while this reply arrived."
    )
    with fresh.expect_request("**/chat/completions") as sent:
        ask(fresh, "go on")
    roles = [one["role"] for one in json.loads(sent.value.post_data or "")["messages"]]
    assert roles == ["user", "assistant", "user"]
    fresh.close()


def test_a_killed_tab_loses_a_second_at_most(page: Page, server: tuple[str, Any]) -> None:
    """Nothing runs in it at its end: what was saved while the reply streamed is there."""
    page.evaluate("addEventListener('pagehide', (event) => event.stopImmediatePropagation(), true)")
    send(page, "long story")
    saved = "Object.keys(localStorage).some((key) => localStorage[key].includes('word word'))"
    assert awaited(page, saved)
    fresh = page.context.new_page()
    fresh.goto(server[0])
    fresh.get_by_role("button", name="long story", exact=True).click()
    # a second tab sees the reply grow, and does not write into the same chat
    expect(last(fresh)).to_contain_text("A reply is being written in another tab.")
    fresh.get_by_label("Message", exact=True).fill("me too")
    expect(fresh.get_by_role("button", name="Send")).to_be_disabled()
    page.evaluate("put = () => true")  # the first tab writes no more, as if it were gone
    fresh.evaluate("Date.now = ((now) => () => now() + 60_000)(Date.now)")
    expect(last(fresh).locator(".note")).to_have_text(
        "The page was closed while this reply arrived."
    )
    fresh.close()


def test_a_question_without_an_answer_leaves_no_empty_turn(page: Page) -> None:
    page.route("**/chat/completions", lambda route: None)
    send(page, "question")
    expect(last(page).locator(".waiting")).to_be_visible()
    page.reload()
    page.unroute("**/chat/completions")
    page.get_by_role("button", name="question", exact=True).click()
    expect(last(page).locator(".note")).to_contain_text("The page was closed")
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "and this?")
    assert json.loads(sent.value.post_data or "")["messages"] == [
        {"role": "user", "content": "question\n\nand this?"}
    ]
    # a refused question is not sent again with the next one
    send(page, "x" * 1100)
    expect(page.get_by_role("alert").filter(has_text="context")).to_be_visible()
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "shorter")
    assert "xxx" not in (sent.value.post_data or "")


@pytest.mark.parametrize(("turns", "characters", "most"), [(300, 1, 500), (40, 3000, 30)])
def test_a_chat_may_outgrow_what_a_request_may_hold(
    page: Page, turns: int, characters: int, most: int
) -> None:
    page.evaluate(
        """([turns, text]) => {
            for (let i = 0; i < turns; i++) current.messages.push(
                { role: "user", content: i + text },
                { role: "assistant", replies: [{ parts: [{ type: "text", text }] }], shown: 0 });
            current.system = "be brief";
        }""",
        [turns, "长" * characters],
    )
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "and this?")
    body = (sent.value.post_data_buffer or b"").decode()
    system, *messages = json.loads(body)["messages"]
    assert system == {"role": "system", "content": "be brief"}
    assert most - 20 < len(messages) < most and len(body.encode()) <= guard.MAX_BODY
    pairs = len(messages) // 2
    assert [one["role"] for one in messages] == ["user", *["assistant", "user"] * pairs]
    note = last(page).locator(".note").inner_text()
    left_out = int(note.partition("oldest ")[2].partition(" messages")[0])
    assert left_out >= 2 * turns + 1 - len(messages) > 0
    expect(last(page)).to_contain_text("and this?")


def test_other_chats_can_ask_while_a_reply_runs(page: Page) -> None:
    send(page, "long story")
    expect(last(page)).to_contain_text("word word")
    page.get_by_role("button", name="New chat").click()
    ask(page, "meanwhile")
    expect(last(page)).to_contain_text("You said: meanwhile")
    page.get_by_role("button", name="long story", exact=True).click()
    page.get_by_role("button", name="Stop").click()
    expect(last(page).locator(".note")).to_have_text("Stopped.")
    page.get_by_role("button", name="meanwhile", exact=True).click()
    expect(last(page)).to_contain_text("You said: meanwhile")
    # a reply arrives in a chat that is not on the screen
    send(page, "long again")
    page.get_by_role("button", name="New chat").click()
    expect(rows(page).first.get_by_role("img", name="A reply is being written")).to_be_visible()
    expect(page.locator("#chats .busy")).to_have_count(0)
    page.get_by_role("button", name="meanwhile", exact=True).click()
    assert last(page).locator(".said").inner_text().count("word") == 150


def test_versions_of_a_reply_are_kept(page: Page) -> None:
    ask(page, "count please")
    first = last(page).locator(".md").inner_text()
    page.evaluate("saveSettings({max_tokens: 9})")
    last(page).get_by_role("button", name="Regenerate").click()
    expect(last(page).locator(".versions")).to_contain_text("2 of 2")
    second = last(page).locator(".md").inner_text()
    assert first != second
    last(page).get_by_role("button", name="Earlier version").click()
    expect(last(page).locator(".md")).to_have_text(first)
    page.reload()
    page.get_by_role("button", name="count please", exact=True).click()
    expect(last(page).locator(".md")).to_have_text(first)
    last(page).get_by_role("button", name="Later version").click()
    expect(last(page).locator(".md")).to_have_text(second)
    last(page).get_by_role("button", name="Earlier version").click()
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "thanks")
    (part,) = json.loads(sent.value.post_data or "")["messages"][1]["content"]
    assert part["text"] == first  # the version on the screen is the conversation
    # stopped before the first word: what there was stays
    page.route("**/chat/completions", lambda route: None)
    last(page).get_by_role("button", name="Regenerate").click()
    page.get_by_role("button", name="Stop").click()
    last(page).get_by_role("button", name="Earlier version").click()
    expect(last(page).locator(".md")).to_have_text("You said:")


def test_full_storage_is_said_and_loses_nothing(page: Page) -> None:
    ask(page, "kept one")
    page.evaluate(
        """() => {
            let text = "x".repeat(1 << 20);
            for (let i = 0; text.length; i++)
                try { localStorage.setItem("filler" + i, text); } catch { text = text.slice(text.length / 2 + 1); }
        }"""
    )
    page.get_by_role("button", name="New chat").click()
    ask(page, "no room for " + "this " * 100)
    trouble = page.get_by_role("alert").filter(has_text="storage is full")
    expect(trouble).to_be_visible()
    assert titles(page)[1] == "kept one"  # nothing made room
    expect(last(page)).to_contain_text("You said: no room")
    with page.expect_download() as saved:
        trouble.get_by_role("button", name="Export").click()
    assert "no room for" in saved.value.path().read_text(encoding="utf-8")
    page.evaluate("localStorage.removeItem('filler0')")
    ask(page, "more")  # there is room again
    expect(trouble).to_be_hidden()
    page.reload()
    expect(rows(page)).to_have_count(2)


def test_a_browser_that_keeps_nothing_still_chats(
    browser: Browser, server: tuple[str, Any]
) -> None:
    context = browser.new_context()
    context.add_init_script(
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    )
    page = context.new_page()
    page.goto(server[0])
    ask(page, "hello")
    expect(page.get_by_text("This browser keeps no chats")).to_be_visible()
    expect(last(page)).to_contain_text("You said: hello")
    context.close()


def test_old_chats_move_and_corrupt_ones_do_no_harm(page: Page) -> None:
    other = {**OLD_CHAT, "id": "old2", "title": "plain", "messages": OLD_CHAT["messages"][:1]}
    strange = {"id": 7, "messages": "none"}
    page.evaluate(
        "(old) => localStorage.setItem('zangchat.chats', JSON.stringify(old))",
        [OLD_CHAT, None, other, strange],
    )
    page.evaluate("localStorage.setItem('zangchat.chat.bad', '{half')")
    page.evaluate(
        """localStorage.setItem('zangchat.settings', '{"temperature": "hot", "top_k": 7}')"""
    )
    page.reload()
    assert titles(page) == ["from before", "plain"]
    page.get_by_role("button", name="from before", exact=True).click()
    expect(last(page).locator("strong")).to_have_text(
        "hello"
    )  # rendered anew, not as it was stored
    expect(last(page).locator(".note")).to_have_text("Stopped.")
    assert page.evaluate("settings.temperature") == 0 and page.evaluate("settings.top_k") == 7
    # what cannot be read stays, for a version that can
    assert storage(page, "zangchat.chats") == [None, strange]
    assert page.evaluate("localStorage['zangchat.chat.bad']") == "{half"
    page.reload()
    assert titles(page) == ["from before", "plain"]
    ask(page, "still works")
    # an older page, open in another tab, keeps writing its list
    page.evaluate(
        """(old) => {
            localStorage.setItem('zangchat.chats', JSON.stringify(old));
            dispatchEvent(new StorageEvent('storage', {key: 'zangchat.chats'}));
        }""",
        [{**OLD_CHAT, "id": "old3", "title": "late"}],
    )
    expect(page.get_by_role("button", name="late", exact=True)).to_be_visible()


def test_chats_are_exported_and_imported(
    page: Page, browser: Browser, server: tuple[str, Any], tmp_path: Path
) -> None:
    ask(page, "calculate 12 * 34")
    send(page, "/system be brief")
    ask(page, "count please")
    last(page).get_by_role("button", name="Regenerate").click()
    expect(last(page).locator(".versions")).to_contain_text("2 of 2")
    page.get_by_role("button", name="New chat").click()
    ask(page, "second")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export", exact=True).click()
    exported = json.loads(saved.value.path().read_text(encoding="utf-8"))
    assert [chat["title"] for chat in exported] == ["second", "calculate 12 * 34"]
    assert [one["role"] for one in exported[1]["messages"]][:3] == ["system", "user", "assistant"]
    assert "html" not in json.dumps(exported)

    # into another browser, and into this one again
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(exported), encoding="utf-8")
    context = browser.new_context()
    fresh = context.new_page()
    fresh.goto(server[0])
    fresh.locator("#file").set_input_files(path)
    expect(fresh.locator("#hint")).to_have_text("2 chats imported.")
    fresh.get_by_role("button", name="calculate 12 * 34", exact=True).click()
    expect(fresh.locator(".tool")).to_have_text("calculator12 * 34408")
    expect(fresh.locator("article").nth(1).locator("strong")).to_have_text("408")
    expect(last(fresh).locator(".versions")).to_contain_text("2 of 2")
    fresh.get_by_role("button", name="This chat").click()
    expect(fresh.get_by_label("System prompt", exact=True)).to_have_value("be brief")
    context.close()
    page.locator("#file").set_input_files(path)
    expect(page.locator("#hint")).to_have_text("0 chats imported, 2 here already.")

    # a file that others were put together to: one chat twice, and as it went on
    later = {**exported[1], "id": "one"}
    earlier = {**later, "messages": later["messages"][:3]}
    path.write_text(json.dumps([earlier, earlier, later]), encoding="utf-8")
    page.locator("#file").set_input_files(path)
    expect(page.locator("#hint")).to_have_text("2 chats imported, 1 here already.")
    page.reload()
    expect(rows(page)).to_have_count(4)

    # what chat_cli saves, a hostile file, and no chats at all
    lines = tmp_path / "cli.jsonl"
    hostile = {"role": "assistant", "content": "<img src=x onerror=\"document.title='owned'\">"}
    talk = [{"role": "user", "content": "from the terminal"}, hostile]
    lines.write_text(json.dumps({"messages": talk}) + "\n{broken\n", encoding="utf-8")
    page.locator("#file").set_input_files(lines)
    expect(page.locator("#hint")).to_have_text("1 chat imported, 1 not understood.")
    page.get_by_role("button", name="from the terminal", exact=True).click()
    expect(last(page)).to_contain_text("<img src=x")
    assert page.title() == "zangchat"
    lines.write_text("my shopping list", encoding="utf-8")
    page.locator("#file").set_input_files(lines)
    expect(page.locator("#hint")).to_contain_text("cli.jsonl holds no chats")


def test_an_export_is_training_data(page: Page, tmp_path: Path) -> None:
    from tasks.customjson import CustomJSON
    from zangchat.conversation import turns

    ask(page, "calculate 12 * 34")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export", exact=True).click()
    path = tmp_path / "chats.json"
    path.write_bytes(saved.value.path().read_bytes())
    (conversation,) = list(CustomJSON(str(path)))
    question, answer = turns(conversation)
    assert question.parts == [("text", "calculate 12 * 34")]
    assert ("python_output", "408") in answer.parts


def test_a_chat_is_exported_as_markdown(page: Page) -> None:
    ask(page, "calculate 12 * 34")
    page.get_by_role("button", name="This chat").click()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export as Markdown").click()
    assert saved.value.suggested_filename == "calculate-12-34.md"
    assert saved.value.path().read_text(encoding="utf-8") == (
        "# calculate 12 * 34\n\n## You\n\ncalculate 12 * 34\n\n## zangchat\n\nLet me see.\n\n"
        "*calculator:* `12 * 34 = 408`\n\nSo it is **408**.\n"
    )


def test_chats_are_renamed_and_searched(page: Page) -> None:
    ask(page, "about apples")
    page.get_by_role("button", name="New chat").click()
    ask(page, "about pears")
    rows(page).first.hover()
    page.get_by_role("button", name="Rename about pears").click()
    page.get_by_label("Title").fill("Fruit")
    page.get_by_role("button", name="Done").click()
    expect(page.locator("header h1")).to_have_text("Fruit")
    search = page.get_by_label("Search chats")
    search.fill("PEARS")  # in the messages, if not in the title
    assert titles(page) == ["Fruit"]
    search.fill("grapes")
    expect(page.get_by_text("No chat holds these words.")).to_be_visible()
    search.fill("")
    page.reload()
    assert titles(page) == ["Fruit", "about apples"]


def test_the_system_prompt_is_the_chats_own(page: Page) -> None:
    page.get_by_role("button", name="This chat").click()
    page.get_by_label("System prompt", exact=True).fill("be a pirate")
    page.get_by_role("button", name="Done").click()
    for question, system in (("hello", "be a pirate"), ("again", "be a pirate")):
        with page.expect_request("**/chat/completions") as sent:
            ask(page, question)
        first = json.loads(sent.value.post_data or "")["messages"][0]
        assert first == {"role": "system", "content": system}
    page.get_by_role("button", name="New chat").click()
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "who are you")
    assert json.loads(sent.value.post_data or "")["messages"][0]["role"] == "user"
    page.reload()
    page.get_by_role("button", name="hello", exact=True).click()
    page.get_by_role("button", name="This chat").click()
    expect(page.get_by_label("System prompt", exact=True)).to_have_value("be a pirate")


def test_stopped_server_is_an_error_and_the_chat_survives(browser: Browser) -> None:
    context = browser.new_context()
    page = context.new_page()
    with serving(engine(reply)) as (url, _):
        page.goto(url)
        ask(page, "hello **there**")
    send(page, "anyone?")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    expect(page.locator("article")).to_have_count(4)
    page.get_by_role("button", name="New chat").click()
    page.get_by_role("button", name=re.compile("^hello")).click()
    expect(page.locator("article").nth(1)).to_contain_text("You said: hello")
    context.close()


def test_a_deleted_chat_stops_its_reply(page: Page, server: tuple[str, Any]) -> None:
    send(page, "long story")
    expect(last(page)).to_contain_text("word")
    rows(page).first.hover()
    page.get_by_role("button", name="Delete long story").click()
    assert eventually(lambda: server[1].load == 0)
    expect(page.locator("article")).to_have_count(0)
    page.reload()
    expect(rows(page)).to_have_count(0)
