"""Periodic evaluation during training: validation loss, CORE, samples of text. Each function makes
the hooks (`Every`) of one kind for a Stage."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from zangchat.core_eval import evaluate_core, find_bundle
from zangchat.engine import Engine, Request
from zangchat.errors import UserError
from zangchat.loss_eval import evaluate_bpb, evaluate_loss
from zangchat.runtime.logs import print0
from zangchat.task_eval import evaluate_task
from zangchat.training.metrics import finite
from zangchat.training.trainer import Every, Trainer

if TYPE_CHECKING:
    from zangchat.dataloader import Batch
    from zangchat.gpt import GPT

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
    "A list in Python is",
)
SAMPLE_TOKENS = 24

logger = logging.getLogger(__name__)


def validation_bpb(n: int, batches: Callable[[], Iterable["Batch"]]) -> Every:
    """Bits per byte on `batches()`, the same ones each time, and once before the first step."""

    def evaluate(trainer: Trainer) -> None:
        token_bytes = torch.from_numpy(trainer.tokenizer.token_bytes())
        record_validation(trainer, evaluate_bpb(trainer.model, batches(), token_bytes))

    return Every(n, evaluate, at_start=True)


def record_validation(trainer: Trainer, bpb: float) -> None:
    """Log a validation result, and keep it in the run's state if it is finite."""
    stage, state = trainer.stage.name, trainer.state
    trainer.log({"val_bpb": bpb, "tokens": state.tokens})
    if not math.isfinite(bpb):
        reasons = "the text may be empty, or the weights are not finite any more"
        logger.warning(f"step {state.step}: validation gave {bpb}: {reasons}")
        return
    state.last_val_bpb = bpb
    state.min_val_bpb = bpb if state.min_val_bpb is None else min(bpb, state.min_val_bpb)
    best = f"(best {state.min_val_bpb:.4f})"
    print0(f"{stage} step {state.step}: validation {bpb:.4f} bits per byte {best}")


def validation_loss(n: int, batches: Callable[[], Iterable["Batch"]]) -> Every:
    """Mean loss of the supervised tokens of `batches()`: for chats, where few bytes carry loss."""

    def evaluate(trainer: Trainer) -> None:
        state = trainer.state
        loss = evaluate_loss(trainer.model, batches())
        trainer.log({"val_loss": loss, "tokens": state.tokens})
        state.results["validation"] = finite({"validation loss": loss})
        print0(f"{trainer.stage.name} step {state.step}: validation loss {loss:.4f}")

    return Every(n, evaluate, at_start=True)


def core_metric(n: int, max_per_task: int) -> list[Every]:
    """The CORE metric of DCLM (arXiv:2406.11794); no hook, with a message, if its data is
    missing.
    """
    try:
        bundle = find_bundle(download=False)
    except UserError as error:
        print0(f"training goes without CORE evaluations: {error}")
        return []

    def evaluate(trainer: Trainer) -> None:
        state = trainer.state
        result = evaluate_core(
            trainer.model, trainer.tokenizer, max_per_task=max_per_task, bundle=bundle
        )
        name, value = result["name"], result["core_metric"]  # the name says which tasks are missing
        trainer.log({name: value, "tokens": state.tokens})
        state.results["core"] = {name: value}
        print0(f"{trainer.stage.name} step {state.step}: {name} {value:.4f}")

    return [Every(n, evaluate)]


def rewards() -> Every:
    """The rewards of each step of RL, logged and printed."""

    def log(trainer: Trainer) -> None:
        metrics, step = trainer.state.batch_metrics, trainer.state.step
        if not metrics:  # before the first step
            return
        trainer.log(metrics)
        solved = f"{metrics['solved']:.0%} of the prompts solved"
        length = f"{metrics['sample_tokens']:.0f} tokens a sample"
        print0(
            f"{trainer.stage.name} step {step}: reward {metrics['reward']:.3f}, {solved}, {length}"
        )

    return Every(1, log)


def pass_at_k(n: int, task: Any, num_samples: int, **options: Any) -> Every:
    """pass@1 and pass@num_samples on a held-out task; `options` as in task_eval.evaluate_task."""

    def evaluate(trainer: Trainer) -> None:
        state = trainer.state
        engine = Engine(trainer.model, trainer.tokenizer)
        result = evaluate_task(engine, task, num_samples=num_samples, **options)
        scores = {f"pass@{k}": result.pass_at(k) for k in sorted({1, num_samples})}
        first = {f"first {name}": value for name, value in scores.items()}
        seen = state.results.setdefault("held_out", {**first})
        seen.update({f"last {name}": value for name, value in scores.items()})
        trainer.log({**scores, "tokens": state.tokens})
        listed = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        examples = f"{len(result.items)} examples"
        print0(
            f"{trainer.stage.name} step {state.step}: held-out {task.name}: {listed} ({examples})"
        )

    return Every(n, evaluate, at_start=True)


def samples(n: int) -> Every:
    """Greedy continuations of PROMPTS, printed."""

    def show(trainer: Trainer) -> None:
        for prompt, continuation in complete(trainer.model, trainer.tokenizer, PROMPTS):
            print0(one_line(prompt, continuation))

    return Every(n, show)


def one_line(prompt: str, continuation: str) -> str:
    return f"  {prompt}|{continuation}".replace("\n", "\\n")


def complete(
    model: "GPT",
    tokenizer: Any,
    prompts: Sequence[str],
    max_tokens: int = SAMPLE_TOKENS,
    temperature: float = 0.0,
    seed: int = 42,
) -> list[tuple[str, str]]:
    """(prompt, continuation) pairs. Every rank computes them all, so that no rank waits for
    another.

    Of a prompt that is longer than half the context, the end is used.
    """
    bos, room = tokenizer.get_bos_token_id(), model.config.sequence_len // 2
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    requests = [Request([bos, *tokenizer.encode(prompt)[-room:]], **options) for prompt in prompts]
    results = Engine(model, tokenizer).generate_many(requests)
    texts = [tokenizer.decode(result.tokens) for result in results]
    return list(zip(prompts, texts, strict=True))


def first_tokens(batches: Iterator["Batch"], limit: int, world_size: int = 1) -> Iterator["Batch"]:
    """Batches until all ranks together have had `limit` input positions, equally many on each."""
    seen = 0
    for batch in batches:
        yield batch
        seen += batch.inputs.numel() * world_size
        if seen >= limit:
            break
    if (close := getattr(batches, "close", None)) is not None:
        close()
