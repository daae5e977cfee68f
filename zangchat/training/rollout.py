"""Prompts -> samples -> rewards -> Batch: reinforcement learning on the one training loop.

GRPO (arXiv:2402.03300) reduced to REINFORCE with a baseline: samples come from the very weights
that the step updates, so there is no importance ratio to clip, and no KL term. The advantage of a
sample is its reward minus the mean reward of its prompt's samples (not divided by their standard
deviation). A step's loss is the sum over sampled tokens of advantage x (-log p), divided by their
number over all ranks. Tokens that a tool put in carry no loss.

nanochat has the same loss, but divides each pass by its own tokens, gives no loss to the token that
ends an answer, draws one first token for all answers of a prompt, and neither clips gradients nor
shuffles prompts.

Step s takes the prompts [s*E, (s+1)*E) of an endless, seeded order of the task's examples, whatever
the clock or the ranks do; every draw is seeded by (seed, step, prompt, sample). So the cursor is
the step, and a resumed run continues exactly.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zangchat.dataloader import IGNORED, Batch
from zangchat.engine import Engine
from zangchat.runtime import collectives
from zangchat.runtime.seeds import derive_seed
from zangchat.streams import permutation
from zangchat.task_eval import completion_parts, sample_answers

if TYPE_CHECKING:
    from zangchat.gpt import GPT

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn."""

    num_samples: int = 16  # per prompt
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = 50
    max_rows: int = 64  # at a time


@dataclass
class Sample:
    """A prompt with one continuation, to learn from."""

    tokens: list[int]  # prompt, continuation, and the special token with which the model ended
    sampled: list[int]  # 1 if the model chose the token
    reward: float
    advantage: float = 0.0


def rollout(
    model: "GPT",
    tokenizer: Any,
    task: Any,
    examples: Sequence[int],
    prompt_seeds: Sequence[int],
    sampling: Sampling,
    engine: Engine | None = None,
) -> list[list[Sample]]:
    """The samples of each example of `task`, with rewards and advantages; none for a prompt that
    fills the context. `engine`: an up-to-date one of the model, else a new one."""
    conversations = [task[i] for i in examples]
    model.eval()
    answers = sample_answers(
        engine or Engine(model, tokenizer),
        conversations,
        prompt_seeds,
        sampling.num_samples,
        sampling.max_rows,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
    )
    groups: list[list[Sample]] = []
    for conversation, (prompt, results) in zip(conversations, answers, strict=True):
        group: list[Sample] = []
        for result in results:
            reward = float(
                task.reward(conversation, completion_parts(tokenizer, result.tokens, result.mask))
            )
            ending = [] if result.stop_token is None else [result.stop_token]  # chosen by the model
            mask = [0] * len(prompt) + list(result.mask) + [1] * len(ending)
            group.append(Sample([*prompt, *result.tokens, *ending], mask, reward))
        baseline = sum(sample.reward for sample in group) / max(len(group), 1)
        for sample in group:
            sample.advantage = sample.reward - baseline
        groups.append(group)
    return groups


def to_batch(
    samples: Sequence[Sample],
    cursor: dict[str, Any],
    metrics: dict[str, float] | None = None,
) -> Batch:
    """One row per sample, padded on the right: targets are the sampled tokens, loss weights the
    advantages. At least one row, which without samples is all padding."""
    longest = max((len(sample.tokens) - 1 for sample in samples), default=1)
    inputs = torch.zeros(max(len(samples), 1), longest, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    weights = torch.zeros(inputs.shape, dtype=torch.float32)
    for row, sample in enumerate(samples):
        tokens, sampled = torch.tensor(sample.tokens), torch.tensor(sample.sampled)
        length = len(tokens) - 1
        inputs[row, :length] = tokens[:-1]
        targets[row, :length] = torch.where(sampled[1:] == 1, tokens[1:], IGNORED)
        weights[row, :length] = sample.advantage
    return Batch(inputs, targets, cursor, loss_weights=weights, metrics=metrics or {})


def prompt_order(num_examples: int, seed: int, first: int, count: int) -> list[int]:
    """Places first..first+count-1 of the endless order: every example once an epoch, each epoch in
    its own order.
    """
    places = []
    for place in range(first, first + count):
        epoch, index = divmod(place, num_examples)
        places.append(int(permutation(num_examples, seed, "rollout", epoch)[index]))
    return places


def rollout_batches(
    model: "GPT",
    tokenizer: Any,
    task: Any,
    *,
    examples_per_step: int,
    sampling: Sampling,
    seed: int,
    cursor: dict[str, Any] | None = None,
) -> Iterator[Batch]:
    """Endless steps, each sampled when it is requested, from the weights of that moment. The ranks
    share the prompts of a step equally.

    The metrics of a batch are reward (mean of the step's samples), sample_tokens (mean length) and
    solved (share of prompts with a reward), over all ranks.
    """
    rank, world_size = collectives.world()
    if examples_per_step % world_size:
        raise ValueError(
            f"{examples_per_step} prompts a step cannot be shared equally by {world_size} ranks"
        )
    share = examples_per_step // world_size
    step = cursor["step"] if cursor else 0
    engine = Engine(model, tokenizer)  # its cache and CUDA graphs serve all steps
    while True:
        engine.refresh(model)
        places = range(rank * share, (rank + 1) * share)
        examples = prompt_order(len(task), seed, step * examples_per_step + places.start, share)
        seeds = [derive_seed(seed, "rollout", step, place) for place in places]
        groups = rollout(model, tokenizer, task, examples, seeds, sampling, engine)
        samples = [sample for group in groups for sample in group]
        count, reward, tokens, solved, prompts = collectives.sum_over_ranks(
            [
                len(samples),
                sum(sample.reward for sample in samples),
                sum(map(sum, (sample.sampled for sample in samples))),
                sum(any(sample.reward > 0 for sample in group) for group in groups),
                sum(bool(group) for group in groups),
            ]
        )
        if not count:
            logger.warning(f"step {step + 1}: no prompt of this step leaves room for an answer")
        step += 1
        metrics = {
            "reward": reward / max(count, 1),
            "sample_tokens": tokens / max(count, 1),
            "solved": solved / max(prompts, 1),
        }
        yield to_batch(samples, {"step": step}, metrics)
