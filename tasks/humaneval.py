"""HumanEval: write a Python function from its signature and docstring (arXiv:2107.03374). Answers
and tests run in the sandbox, apart.
"""

import re
from typing import Any

from tasks.common import Content, Conversation, RowsTask, chat, visible_text
from zangchat.errors import UserError
from zangchat.execution import SandboxLevel, execute_tests

OPENING = re.compile(  # each part ends where the next begins, so a failing match takes no time
    r"^(?P<indent>[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*)(?![ \t>])(?:(?!~{3})[^`])*"
    r"(?P<fence>`{3,}(?!`)|~{3,}(?!~))[ \t]*(?P<language>[^\s`{]*)(?:[\s{][^`]*)?$"
)
TIMEOUT = 5.0  # seconds a program, tests included


def extract_code(text: str, entry_point: str = "") -> str:
    """The code of an answer: the fenced block that defines `entry_point`, else the first in Python,
    else the first, else all of it.

    Fences are those of CommonMark, with any name of the language; the last may lack its end.
    """
    blocks = fenced_blocks(text)
    if not blocks:
        return text
    defining = [code for _, code in blocks if defines(code, entry_point)]
    python = [code for language, code in blocks if language.lower().startswith("py")]
    return [*defining, *python, blocks[0][1]][0]


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of each fenced block, without the indentation or the quote marks that it
    shares with its fence.
    """
    blocks: list[tuple[str, list[str], int]] = []  # language, lines, indentation of the fence
    opening: re.Match[str] | None = None
    # splitlines would also split inside strings
    for line in text.replace("\r\n", "\n").removesuffix("\n").split("\n"):
        if opening is None:
            if opening := OPENING.match(line):
                quoted = ">" in opening["indent"]
                blocks.append((opening["language"], [], 0 if quoted else len(opening["indent"])))
            continue
        line = re.sub(r"^[ \t]*> ?", "", line) if quoted else line
        if re.fullmatch(rf"[ \t]*{opening['fence']}{opening['fence'][0]}*[ \t]*", line):
            opening = None
        else:
            blocks[-1][1].append(line)
    return [(language, _shifted(lines, indent)) for language, lines, indent in blocks]


def _shifted(lines: list[str], indent: int) -> str:
    """The lines further to the left, by as much as all of them have in common and no more than
    `indent`.
    """
    indent = min([indent, *(len(line) - len(line.lstrip()) for line in lines if line.strip())])
    return "".join(line[indent:] + "\n" for line in lines)


def defines(code: str, name: str) -> bool:
    return (
        bool(name)
        and re.search(rf"^(async )?def {re.escape(name)}\b", code, re.MULTILINE) is not None
    )


class HumanEval(RowsTask):
    """Rows: task_id, prompt, canonical_solution, test, entry_point. There is a test split only:
    nothing to train on.
    """

    folder, hub, fields = (
        "openai_humaneval",
        "openai/openai_humaneval",
        ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
    )

    def __init__(
        self, split: str = "test", minimum_level: SandboxLevel = SandboxLevel.FILTERED, **view: int
    ) -> None:
        self.minimum_level = minimum_level  # of the sandbox; below it nothing is run
        if split == "train":
            raise UserError("HumanEval has no training data: leave humaneval out of the mixture")
        super().__init__("", split, **view)

    def conversation(self, row: dict[str, Any]) -> Conversation:
        solution = f"```python\n{row['prompt']}{row['canonical_solution']}\n```"
        return chat(
            row["prompt"],
            solution,
            prompt=row["prompt"],
            test=row["test"],
            entry_point=row["entry_point"],
            task_id=row["task_id"],
        )

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:
        """Whether the tests pass. Running out of time or memory is a failure like any other."""
        code, tests = self.programs(
            conversation, extract_code(visible_text(completion), conversation["entry_point"])
        )
        return execute_tests(
            code,
            tests,
            conversation["entry_point"],
            timeout=TIMEOUT,
            minimum_level=self.minimum_level,
        ).success

    def programs(self, conversation: Conversation, code: str) -> tuple[str, str]:
        """(the answer, its tests). The prompt comes first in both: it has imports and helpers that
        either may call.
        """
        prompt, entry_point = conversation["prompt"], conversation["entry_point"]
        stub = f"{prompt}\n    pass\n\n"
        whole = defines(code, entry_point)
        tests = f"{stub}{entry_point} = candidate\n{conversation['test']}\n\ncheck(candidate)\n"
        return stub + code if whole else prompt + code, tests
