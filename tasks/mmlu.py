"""MMLU: multiple-choice questions of 57 subjects (arXiv:2009.03300)."""

from typing import Any

from tasks.common import Conversation, RowsTask, chat, render_mc

LETTERS = ["A", "B", "C", "D"]


class MMLU(RowsTask):
    """Rows: question, subject, choices (4), answer (0-3). Its training split is named
    `auxiliary_train`.
    """

    eval_type = "categorical"
    folder, hub, fields = "mmlu", "cais/mmlu", ("question", "subject", "choices", "answer")

    def __init__(self, subset: str = "all", split: str = "train", **view: int) -> None:
        super().__init__(subset, split, **view)

    @property
    def file_split(self) -> str:
        return "auxiliary_train" if self.split == "train" else "test"

    def conversation(self, row: dict[str, Any]) -> Conversation:
        return chat(
            render_mc(row["question"], LETTERS, row["choices"]),
            LETTERS[row["answer"]],
            letters=LETTERS,
            subject=row["subject"],
        )
