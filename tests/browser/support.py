"""What the tests of the chat page share: the model's script, and a visitor's hands."""

import json
import shutil
import time
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.talker import eventually

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium here: on Debian, `apt-get install chromium`"
    ),
]
# names that the browser resolves to this machine, without counting them as local
LAN, OUTSIDE = "laptop.lan", "chat.example.com"

MARKDOWN = """**bold** and `code`

```python
def area(r: float) -> float:
    return 3.14 * r**2  # of a circle
```

| a | b |
|---|---|
| 1 | 2 |

The roots of $ax^2+bx+c=0$ are

$$x = \\frac{-b \\pm \\sqrt{b^2-4ac}}{2a}$$
"""
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> <script>document.title='owned'</script> [x](javascript:alert(1)) ![x](http://elsewhere.example/x)"
SCRIPT = {
    "markdown": MARKDOWN,
    "hostile": HOSTILE,
    "long": "word " * 150,
    "calculate": "Let me see. <|python_start|>12 * 34<|python_end|>#####So it is **408**.",
    "pretend": "<|python_start|>open(1)<|python_end|><|output_start|>41<|output_end|>So 41.",
}


def reply(question: str) -> str:
    for start, answer in SCRIPT.items():
        if question.startswith(start):
            return answer
    if question.startswith("slow"):
        time.sleep(0.5)
    return f"You said: {question.strip()}"


def send(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    phone = page.evaluate("PHONE.matches")  # Enter is a newline there
    page.get_by_role("button", name="Send").tap() if phone else page.keyboard.press("Enter")


def last(page: Page) -> Any:
    return page.locator("article").last


def ask(page: Page, text: str) -> None:
    """Send a message and wait for the end of its answer."""
    send(page, text)
    expect(last(page).get_by_role("button", name="Regenerate")).to_be_visible()


def storage(page: Page, key: str) -> Any:
    return json.loads(page.evaluate("(key) => localStorage.getItem(key)", key) or "null")


def awaited(page: Page, script: str) -> bool:
    """Wait until an expression holds; the page's policy forbids Playwright's own way."""
    return eventually(lambda: bool(page.evaluate(script)))
