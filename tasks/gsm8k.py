"""GSM8K: grade-school word problems (arXiv:2110.14168), their calculator annotations turned into
tool calls.
"""

import re
import unicodedata
from typing import Any

from tasks.common import Content, Conversation, RowsTask, chat, text_part, tool_parts, visible_text

MARK = re.compile(r"<<([^<>=]*)=([^<>]*)>>")  # <<48/2=24>>
NUMBER = re.compile(
    r"[-+]?(?:[0-9]{1,3}(?: [0-9]{3})+(?![0-9])|[0-9][0-9,]*)(?:\.[0-9]+)?|[-+]?\.[0-9]+"
)
MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"))
# of Markdown and LaTeX, and of money
MARKUP = re.compile(r"\\(?:boxed|text|mathbf|textbf|[(\[])|[\\{}*_`~$€£¥]")


def final_number(text: str) -> float | None:
    """The number directly after the last `####` that has one. $1,000. and **1 000** and a boxed
    1000.0 are all 1000.
    """
    for part in reversed(text.split("####")[1:]):
        plain = MARKUP.sub("", unicodedata.normalize("NFKC", part[:200]).translate(MINUS)).lstrip()
        if found := NUMBER.match(plain):
            return float(found[0].replace(",", "").replace(" ", ""))
    return None


def answer_parts(answer: str) -> list[dict[str, str]]:
    """`48/2 = <<48/2=24>>24` -> text, python 48/2, python_output 24, text."""
    parts: list[dict[str, str]] = []
    end = 0
    for match in MARK.finditer(answer):
        if match.start() > end:
            parts.append(text_part(answer[end : match.start()]))
        parts += tool_parts(match[1], match[2])
        end = match.end()
    return [*parts, text_part(answer[end:])]


class GSM8K(RowsTask):
    """Rows: question, answer."""

    rewarded = True
    folder, hub, fields = "gsm8k", "openai/gsm8k", ("question", "answer")

    def __init__(self, subset: str = "main", split: str = "train", **view: int) -> None:
        super().__init__(subset, split, **view)

    def conversation(self, row: dict[str, Any]) -> Conversation:
        return chat(row["question"], answer_parts(row["answer"]))

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:
        """Whether the number after #### equals the right one. An answer needs a ####."""
        expected = final_number(visible_text(conversation["messages"][-1]["content"]))
        return expected is not None and final_number(visible_text(completion)) == expected
