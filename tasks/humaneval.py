"""HumanEval: write a Python function from its signature and docstring (arXiv:2107.03374). Answers and tests run in the sandbox, apart."""

import re
from typing import Any

from tasks.common import Content, Conversation, RowsTask, chat, visible_text
from zangchat.configurator import UserError
from zangchat.execution import SandboxLevel, execute_tests

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
TIMEOUT = 5.0  # seconds a program, tests included


def extract_code(text: str) -> str:
    """The first fenced block of an answer, or the whole of it where nothing is fenced."""
    found = FENCED.search(text)
    return found[1] if found else text


class HumanEval(RowsTask):
    """Rows: task_id, prompt, canonical_solution, test, entry_point. There is a test split only: nothing to train on."""

    folder, hub, fields = "openai_humaneval", "openai/openai_humaneval", ("task_id", "prompt", "canonical_solution", "test", "entry_point")

    def __init__(self, split: str = "test", minimum_level: SandboxLevel = SandboxLevel.FILTERED, **view: int) -> None:
        self.minimum_level = minimum_level  # of the sandbox; below it nothing is run
        if split == "train":
            raise UserError("HumanEval has no training data: leave humaneval out of the mixture")
        super().__init__("", split, **view)

    def conversation(self, row: dict[str, Any]) -> Conversation:
        solution = f"```python\n{row['prompt']}{row['canonical_solution']}\n```"
        return chat(row["prompt"], solution, prompt=row["prompt"], test=row["test"], entry_point=row["entry_point"], task_id=row["task_id"])

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:
        """Whether the tests pass. Running out of time or memory is a failure like any other."""
        code, tests = self.programs(conversation, extract_code(visible_text(completion)))
        return execute_tests(code, tests, conversation["entry_point"], timeout=TIMEOUT, minimum_level=self.minimum_level).success

    def programs(self, conversation: Conversation, code: str) -> tuple[str, str]:
        """(the answer, its tests). The prompt comes first in both: it has imports and helpers that either may call."""
        prompt, entry_point = conversation["prompt"], conversation["entry_point"]
        stub = f"{prompt}\n    pass\n\n"
        whole = re.search(rf"^(async )?def {re.escape(entry_point)}\b", code, re.MULTILINE)
        tests = f"{stub}{entry_point} = candidate\n{conversation['test']}\n\ncheck(candidate)\n"
        return stub + code if whole else prompt + code, tests
