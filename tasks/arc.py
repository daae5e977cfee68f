"""ARC: multiple-choice science questions for pupils (arXiv:1803.05457)."""

from typing import Any

from tasks.common import Conversation, RowsTask, chat, render_mc
from zangchat.errors import UserError

SUBSETS = ("ARC-Easy", "ARC-Challenge")


class ARC(RowsTask):
    """Rows: question, choices {text, label}, answerKey. A few questions have three or five choices,
    or digits for letters.
    """

    eval_type = "categorical"
    folder, hub, fields = "ai2_arc", "allenai/ai2_arc", ("question", "choices", "answerKey")

    def __init__(self, subset: str = "ARC-Easy", split: str = "train", **view: int) -> None:
        if subset not in SUBSETS:
            raise ValueError(f"unknown ARC subset {subset!r}: one of {', '.join(SUBSETS)}")
        super().__init__(subset, split, **view)

    def conversation(self, row: dict[str, Any]) -> Conversation:
        letters, answer = list(row["choices"]["label"]), row["answerKey"]
        if answer not in letters:
            raise UserError(
                f"tasks/{self.folder}/{self.config}/{self.file_split}: answerKey {answer!r} is "
                f"none of {letters}: copy the data again"
            )
        return chat(
            render_mc(row["question"], letters, row["choices"]["text"]), answer, letters=letters
        )
