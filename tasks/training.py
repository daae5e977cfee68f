"""The conversations that midtraining and finetuning see: a mixture of registered tasks, and perhaps a file of the user's own."""

from __future__ import annotations

from typing import Any

from tasks.common import TaskMixture, build_mixture, parse_mixture
from zangchat.configurator import UserError

# 460k general conversations, 100k questions of multiple choice, 8k sums with the calculator (each once); who the model is (twice);
# 280k generated exercises in spelling and counting letters. About 850k conversations.
MID_MIXTURE = "smoltalk:1,mmlu:1,gsm8k:1,identity:2,simplespelling:200000,spellingbee:80000"
# Few but good: 3.4k questions of multiple choice, 8k sums with the calculator, 10k of the 460k general conversations, who the model is, and
# a reminder of spelling and counting. About 23k conversations.
SFT_MIXTURE = "arc-easy:1,arc-challenge:1,gsm8k:1,smoltalk:0.0217,identity:1,simplespelling:300,spellingbee:300"


def training_conversations(spec: str, own_file: str | None = None, own_epochs: int = 1, *, tokenizer: Any, seed: int) -> TaskMixture:
    """What `--mixture` and `--identity_data` describe. Raises UserError for an unknown task, or one whose data is missing."""
    if own_file and not own_file.endswith(".jsonl"):
        raise UserError(f"--identity_data={own_file} is no .jsonl file of conversations")
    own = [(own_file, float(own_epochs))] if own_file else []
    return build_mixture([*parse_mixture(spec), *own], "train", tokenizer=tokenizer, seed=seed)


def held_out_conversations(spec: str, *, tokenizer: Any, seed: int) -> TaskMixture | None:
    """The held-out split of the same mixture. Files of one's own have none; None if nothing else is in it."""
    rest = [(name, amount) for name, amount in parse_mixture(spec) if not name.endswith(".jsonl")]
    return build_mixture(rest, "val", tokenizer=tokenizer, seed=seed) if rest else None
