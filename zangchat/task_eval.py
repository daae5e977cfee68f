"""Tasks scored with a chat model: letters by their logits, other answers by generating them
(pass@k).

The ranks share the problems. An answer only depends on (seed, task, problem, sample), so neither
the batch nor the number of ranks changes a verdict, up to rounding in the logits. This module knows
the protocol of tasks, not their names.
"""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zangchat.engine import Engine, Request
from zangchat.engine.replies import ReplyDecoder
from zangchat.runtime import collectives
from zangchat.runtime.files import atomic_write
from zangchat.runtime.progress import Progress
from zangchat.runtime.seeds import derive_seed

MAX_ROWS = 32  # prompts at a time
CHUNK = 8  # x MAX_ROWS requests between two looks at the clock
VERDICT_THREADS = 4


@dataclass
class Item:
    """A problem with its completions and verdicts."""

    index: int  # in the task
    prompt: str
    expected: Any  # the content of the task's own answer
    # as the model wrote them, special tokens visible
    completions: list[str] = field(default_factory=list)
    verdicts: list[bool] = field(default_factory=list)
    note: str = ""  # the reason if there are no completions

    @property
    def passed(self) -> bool:
        return any(self.verdicts)


@dataclass
class TaskResult:
    """`accuracy` is pass@k: the share of problems of which at least one of k samples is right."""

    name: str
    k: int
    items: list[Item]

    @property
    def accuracy(self) -> float:
        return sum(item.passed for item in self.items) / max(len(self.items), 1)

    def pass_at(self, k: int) -> float:
        """The probability that one of k random samples is correct, unbiased (arXiv:2107.03374)."""
        if not 1 <= k <= self.k:
            raise ValueError(f"pass@{k} of {self.k} samples")
        ways = math.comb(self.k, k)
        return sum(
            1 - math.comb(self.k - sum(item.verdicts), k) / ways for item in self.items
        ) / max(len(self.items), 1)

    def write(self, path: Path) -> None:
        """One JSON line per problem, for people to read. Only rank 0 writes."""
        if collectives.world()[0] == 0:
            lines = (
                json.dumps({**asdict(item), "passed": item.passed}, ensure_ascii=False) + "\n"
                for item in self.items
            )
            atomic_write(path, "".join(lines))


def evaluate_task(
    engine: Engine,
    task: Any,
    *,
    num_samples: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int | None = None,
    batch_size: int = MAX_ROWS,
    max_problems: int | None = None,
    seed: int = 42,
    show_progress: bool = False,
) -> TaskResult:
    """Score `task` (the first `max_problems` of it); the same result, whole, on every rank.

    A categorical task has one answer per problem, for any num_samples. A prompt that leaves no room
    in the context counts as not solved.
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(
            f"num_samples and batch_size must be at least 1, not {num_samples} and {batch_size}"
        )
    rank, world_size = collectives.world()
    count = len(task) if max_problems is None else min(len(task), max_problems)
    mine = list(range(rank, count, world_size))
    name = task.name or type(task).__name__
    categorical = task.eval_type == "categorical"
    with Progress(name, len(mine), shown=show_progress and rank == 0) as progress:
        if categorical:
            items = _categorical(engine, task, mine, batch_size, progress)
        else:
            sampling = {"max_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
            items = _generative(
                engine, task, mine, name, num_samples, sampling, batch_size, seed, progress
            )
    items = [item for part in collectives.gather(items) for item in part]
    return TaskResult(
        name, 1 if categorical else num_samples, sorted(items, key=lambda item: item.index)
    )


# ---- categorical ---------------------------------------------------------------------------------


def _categorical(
    engine: Engine, task: Any, indices: list[int], batch_size: int, progress: Progress
) -> list[Item]:
    items: list[Item] = []
    for start in range(0, len(indices), batch_size):
        conversations = [task[i] for i in indices[start : start + batch_size]]
        letters = letter_choices(
            engine,
            [engine.tokenizer.render_for_completion(c) for c in conversations],
            [c["letters"] for c in conversations],
        )
        for i, conversation, letter in zip(indices[start:], conversations, letters, strict=False):
            items.append(_item(i, conversation))
            items[-1].completions.append(letter)
            items[-1].verdicts.append(bool(task.evaluate(conversation, letter)))
        progress.update(len(items), f"{sum(item.passed for item in items)} right")
    return items


def letter_choices(
    engine: Engine, prompts: Sequence[Sequence[int]], letters: Sequence[Sequence[str]]
) -> list[str]:
    """For each prompt the letter that is the most likely next token.

    Of a prompt that is longer than the context, the first token and the end are read.
    """
    tokenizer, context = engine.tokenizer, engine.model.config.sequence_len
    rows: list[list[int]] = []
    for prompt, options in zip(prompts, letters, strict=True):
        end = max(1, len(prompt) - context + 1)
        rows += [[*prompt[:1], *prompt[end:]] for _ in options]
    ids = [[_letter_id(tokenizer, letter)] for options in letters for letter in options]
    scores = iter(engine.score(rows, ids))
    chosen = []
    for options in letters:
        found = [next(scores) for _ in options]
        chosen.append(options[found.index(max(found))])
    return chosen


def _letter_id(tokenizer: Any, letter: str) -> int:
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise ValueError(f"the choice {letter!r} is {len(ids)} tokens of this tokenizer, not one")
    return ids[0]


# ---- generative ----------------------------------------------------------------------------------


def sample_answers(
    engine: Engine,
    conversations: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    num_samples: int,
    max_rows: int,
    **sampling: Any,
) -> list[tuple[list[int], list[Any]]]:
    """(prompt, `num_samples` answers, as engine.Sequence) for the question of each conversation.

    No answers if the prompt fills the context.
    `sampling`: max_tokens, temperature, top_k of engine.Request.
    """
    prompts = [
        engine.tokenizer.render_for_completion(conversation) for conversation in conversations
    ]
    requests = [
        [
            Request(prompt, **sampling, seed=seed, sample_index=sample)
            for sample in range(num_samples)
        ]
        if len(prompt) < engine.model.config.sequence_len
        else []
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    results = iter(
        engine.generate_many(
            [request for group in requests for request in group], max_rows=max_rows
        )
    )
    return [
        (prompt, [next(results) for _ in group])
        for prompt, group in zip(prompts, requests, strict=True)
    ]


def _generative(
    engine: Engine,
    task: Any,
    indices: list[int],
    name: str,
    num_samples: int,
    sampling: dict[str, Any],
    batch_size: int,
    seed: int,
    progress: Progress,
) -> list[Item]:
    tokenizer = engine.tokenizer
    items: list[Item] = []
    per_chunk = max(1, CHUNK * batch_size // num_samples)

    def judge(pair: tuple[dict[str, Any], Any]) -> bool:
        conversation, result = pair
        return bool(
            task.evaluate(conversation, completion_parts(tokenizer, result.tokens, result.mask))
        )

    with ThreadPoolExecutor(VERDICT_THREADS) as judges:  # some verdicts run programs
        for start in range(0, len(indices), per_chunk):
            chunk = indices[start : start + per_chunk]
            conversations = [task[i] for i in chunk]
            seeds = [derive_seed(seed, "eval", name, i) for i in chunk]
            answers = [
                results
                for _, results in sample_answers(
                    engine, conversations, seeds, num_samples, batch_size, **sampling
                )
            ]
            verdicts = judges.map(
                judge,
                [
                    (c, result)
                    for c, results in zip(conversations, answers, strict=True)
                    for result in results
                ],
            )
            for i, conversation, results in zip(chunk, conversations, answers, strict=True):
                item = _item(i, conversation)
                item.completions = [tokenizer.decode(result.tokens) for result in results]
                item.verdicts = [next(verdicts) for _ in results] or [False] * num_samples
                item.note = "" if results else "the prompt fills the context"
                items.append(item)
            progress.update(len(items), f"{sum(item.passed for item in items)} right")
    return items


def completion_parts(
    tokenizer: Any, tokens: Sequence[int], mask: Sequence[int]
) -> list[dict[str, str]]:
    """Generated tokens and their mask -> the content of an assistant message.

    Only tool output that the engine inserted (mask 0) counts. Output that the model made up is left
    out, so that it passes neither for a tool call nor for an answer.
    """
    decoder = ReplyDecoder(tokenizer)
    for token, chosen in zip(tokens, mask, strict=True):
        made_up = chosen and decoder.kind == "python_output" and token not in decoder.kinds
        if not made_up:
            decoder.feed(token)
    decoder.flush()
    return [part for part in decoder.parts if part["text"]]


def _item(index: int, conversation: dict[str, Any]) -> Item:
    messages = conversation["messages"]
    return Item(
        index,
        "\n".join(
            message["content"] for message in messages[:-1] if isinstance(message["content"], str)
        ),
        messages[-1]["content"],
    )
