"""SmolTalk: general conversations (arXiv:2502.02737), the small-model selection of the set.
Training data, nothing to score.
"""

from typing import Any

from tasks.common import Conversation, RowsTask, check_conversation, training_messages


class SmolTalk(RowsTask):
    """Rows: messages [{role, content}]; <base>/tasks/smoltalk/{train,test}.parquet|jsonl."""

    folder, hub, fields = "smoltalk", "HuggingFaceTB/smol-smoltalk", ("messages",)

    def __init__(self, split: str = "train", **view: int) -> None:
        super().__init__("", split, **view)

    def conversation(self, row: dict[str, Any]) -> Conversation:
        messages = row.get("messages", ())
        check_conversation(messages, f"tasks/{self.folder} ({self.file_split})")
        return {"messages": training_messages(messages)}
