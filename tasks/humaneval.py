"""HumanEval: write a Python function from its signature and docstring (arXiv:2107.03374). Answers run in the sandbox, with the tests."""

import re
from typing import Any

from tasks.common import Content, Conversation, RowsTask, chat, visible_text
from zangchat.configurator import UserError
from zangchat.execution import execute_code

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
TIMEOUT = 5.0  # seconds a program, tests included


def extract_code(text: str) -> str:
    """The first fenced block of an answer, or the whole of it where nothing is fenced."""
    found = FENCED.search(text)
    return found[1] if found else text


class HumanEval(RowsTask):
    """Rows: task_id, prompt, canonical_solution, test, entry_point. There is a test split only: nothing to train on."""

    folder, hub, fields = "openai_humaneval", "openai/openai_humaneval", ("task_id", "prompt", "canonical_solution", "test", "entry_point")

    def __init__(self, split: str = "test", **view: int) -> None:
        if split == "train":
            raise UserError("HumanEval has no training data: leave humaneval out of the mixture")
        super().__init__("", split, hub_config=None, **view)

    def conversation(self, row: dict[str, Any]) -> Conversation:
        solution = f"```python\n{row['prompt']}{row['canonical_solution']}\n```"
        return chat(row["prompt"], solution, prompt=row["prompt"], test=row["test"], entry_point=row["entry_point"], task_id=row["task_id"])

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:
        """Whether the tests pass. Running out of time or memory is a failure like any other."""
        return execute_code(self.program(conversation, extract_code(visible_text(completion))), timeout=TIMEOUT).success

    def program(self, conversation: Conversation, code: str) -> str:
        """Prompt, answer, tests. The prompt always comes first: it has imports and helpers that answer and tests may call."""
        prompt, entry_point = conversation["prompt"], conversation["entry_point"]
        whole = re.search(rf"^(async )?def {re.escape(entry_point)}\b", code, re.MULTILINE)
        answer = f"{prompt}\n    pass\n\n{code}" if whole else prompt + code
        return f"{answer}\n\n{conversation['test']}\n\ncheck({entry_point})\n"
