"""The conversations that midtraining and finetuning see: a mixture of registered tasks, and perhaps a file of the user's own."""

from __future__ import annotations

from typing import Any

from tasks.common import TaskMixture, build_mixture


def training_conversations(spec: str, own_file: str | None = None, own_epochs: int = 1, *, tokenizer: Any, seed: int) -> TaskMixture:
    """What `--mixture` and `--identity_data` describe. Raises UserError for an unknown task, or one whose data is missing."""
    if own_file:
        spec = f"{spec},{own_file}:{own_epochs}"
    return build_mixture(spec, "train", tokenizer=tokenizer, seed=seed)


def held_out_conversations(spec: str, *, tokenizer: Any, seed: int) -> TaskMixture | None:
    """The held-out split of the same mixture. Files of one's own have none; None if nothing else is in it."""
    rest = ",".join(item for item in spec.split(",") if ".jsonl" not in item)
    return build_mixture(rest, "val", tokenizer=tokenizer, seed=seed) if rest.strip() else None
