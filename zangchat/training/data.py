"""The batches of a run: packed text and conversations, whole conversations, validation rows."""

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from zangchat.dataloader import Batch, example_batches, packed_batches, validation_batches
from zangchat.dataset import Dataset, find_dataset
from zangchat.errors import UserError
from zangchat.streams import ConversationStream, DocumentStream, MixedStream, TextStream
from zangchat.training.resolve import Resolved

logger = logging.getLogger(__name__)


def pretraining_text(run: Resolved) -> Dataset:
    """The pretraining text of --dataset or --data_path. Raises UserError if it is not the text that
    the run began with."""
    config = run.config
    dataset = find_dataset(config.dataset, config.data_path, config.skip_bad_rows)
    if run.state.dataset not in (None, dataset.fingerprint):
        changed = f"dataset {dataset.name} has other shards than when this run began"
        if not dataset.arrives_in_order:
            raise UserError(
                f"{changed}, so its text would continue in another order: restore the old ones, or "
                "start over with --overwrite",
            )
        logger.warning(f"{changed}: the order of its text changes after the first pass")
    run.state.dataset = run.state.dataset or dataset.fingerprint
    if skipped := dataset.count_left_out():
        run.state.skipped_rows[dataset.name] = skipped
    return dataset


def conversations(run: Resolved, task: Any) -> Any:
    """The task to train on. Raises UserError if its conversations are not those with which the run
    began, naming the parts that differ."""
    found, before = task.fingerprints(), run.state.tasks
    changed = [name for name in found if before.get(name, found[name]) != found[name]]
    if changed:
        raise UserError(
            f"{', '.join(changed)} has other conversations than when this run began, so a resumed "
            "run would learn from some twice and from others never: restore them, or start over "
            "with --overwrite",
        )
    run.state.tasks = found
    run.state.skipped_rows |= task.skipped_rows()
    return task


def packed(
    run: Resolved,
    task: Any,
    task_ratio: float,
    dataset: Dataset | None,
) -> Callable[[dict[str, Any] | None], Iterator[Batch]]:
    """Stage.batches: packed rows of text, with `task_ratio` of the tokens from conversations."""
    sequence_len, seed, tokenizer = run.config.max_seq_len, run.config.seed, run.tokenizer
    width = sequence_len + 1

    def stream() -> DocumentStream:
        parts: list[tuple[DocumentStream, float]] = []
        if task_ratio < 1:
            assert dataset is not None
            # A mixture takes text in grains of a row: a long document would shut out
            # conversations for many rows.
            grain = width if task_ratio > 0 else None
            text = TextStream(dataset, tokenizer, seed, max_tokens=grain)
            parts.append((text, 1 - task_ratio))
        if task_ratio > 0:
            chats = ConversationStream(task, tokenizer, seed, max_tokens=width)
            parts.append((chats, task_ratio))
        return parts[0][0] if len(parts) == 1 else MixedStream(parts)

    def batches(cursor: dict[str, Any] | None) -> Iterator[Batch]:
        return packed_batches(
            stream(),
            rows_per_step=run.plan.total_batch_size // sequence_len,
            sequence_len=sequence_len,
            rank=run.rank,
            world_size=run.world_size,
            bos=tokenizer.get_bos_token_id(),
            cursor=cursor,
        )

    return batches


def examples(run: Resolved, task: Any, examples_per_step: int, **options: Any) -> Iterator[Batch]:
    """Steps of whole conversations; `options` (seed, cursor, num_epochs) as in example_batches."""
    return example_batches(
        task,
        run.tokenizer,
        examples_per_step=examples_per_step,
        sequence_len=run.config.max_seq_len,
        rank=run.rank,
        world_size=run.world_size,
        **options,
    )


def held_out(run: Resolved, task: Any, per_step: int, steps: int) -> Iterator[Batch]:
    """The first `steps` times `per_step` conversations of a held-out task, the same for any batch
    and any number of ranks, in passes of --device_batch_size rows."""
    size = run.config.device_batch_size
    batches: Any = examples(run, task, per_step, seed=0, num_epochs=1)  # closing ends its thread
    with contextlib.closing(batches):
        for batch in itertools.islice(batches, steps):
            for start in range(0, batch.inputs.size(0), size):
                rows = slice(start, start + size)
                yield replace(batch, inputs=batch.inputs[rows], targets=batch.targets[rows])


def validation(run: Resolved, dataset: Dataset) -> Callable[[], Iterator[Batch]]:
    """The validation rows of a dataset, again at each call; at most --eval_tokens of them."""
    return functools.partial(
        validation_batches,
        dataset,
        run.tokenizer,
        run.config.max_seq_len,
        eval_tokens=run.config.eval_tokens,
        rows_per_batch=run.config.device_batch_size,
        rank=run.rank,
        world_size=run.world_size,
    )
