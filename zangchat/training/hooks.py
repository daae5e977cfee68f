"""What training looks at from time to time: validation loss, CORE, samples of text. Each function makes one `Every` for a Stage."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from zangchat.errors import UserError
from zangchat.runtime.logs import print0
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
    """Bits per byte on `batches()`, the same ones each time; before the first step too, so that the curve has its beginning."""

    def evaluate(trainer: Trainer) -> None:
        import torch

        from zangchat.loss_eval import evaluate_bpb

        token_bytes = torch.from_numpy(trainer.tokenizer.token_bytes())
        trainer.record_validation(evaluate_bpb(trainer.model, batches(), token_bytes))

    return Every(n, evaluate, at_start=True, name="validation")


def validation_loss(n: int, batches: Callable[[], Iterable["Batch"]]) -> Every:
    """Mean loss of the supervised tokens of `batches()`: for chats, where few bytes carry loss."""

    def evaluate(trainer: Trainer) -> None:
        from zangchat.loss_eval import evaluate_loss

        loss = evaluate_loss(trainer.model, batches())
        trainer.state.extra["val_loss"] = loss if math.isfinite(loss) else None  # a meta holds numbers alone
        trainer.log({"val_loss": loss, "tokens": trainer.state.tokens})
        print0(f"{trainer.stage.name} step {trainer.state.step}: validation loss {loss:.4f}")

    return Every(n, evaluate, at_start=True, name="validation")


def core_metric(n: int, max_per_task: int) -> list[Every]:
    """The CORE metric of DCLM (arXiv:2406.11794); no hook where its data is not at hand, which is said."""
    from zangchat.core_eval import evaluate_core, find_bundle

    try:
        bundle = find_bundle(download=False)
    except UserError as error:
        print0(f"training goes without CORE evaluations: {error}")
        return []

    def evaluate(trainer: Trainer) -> None:
        result = evaluate_core(trainer.model, trainer.tokenizer, max_per_task=max_per_task, bundle=bundle)
        named = {result["name"]: result["core_metric"]}  # with tasks missing it is another figure, and is called so
        trainer.state.extra["core"] = named
        trainer.log({**named, "tokens": trainer.state.tokens})
        print0(f"{trainer.stage.name} step {trainer.state.step}: {result['name']} {result['core_metric']:.4f}")

    return [Every(n, evaluate, name="CORE")]


def samples(n: int) -> Every:
    """Greedy continuations of PROMPTS, printed."""

    def show(trainer: Trainer) -> None:
        for prompt, continuation in complete(trainer.model, trainer.tokenizer, PROMPTS):
            print0(one_line(prompt, continuation))

    return Every(n, show, name="samples")


def one_line(prompt: str, continuation: str) -> str:
    return f"  {prompt}|{continuation}".replace("\n", "\\n")


def complete(
    model: "GPT", tokenizer: Any, prompts: Sequence[str], max_tokens: int = SAMPLE_TOKENS, temperature: float = 0.0, seed: int = 42
) -> list[tuple[str, str]]:
    """(prompt, continuation) pairs; every rank computes them, so that no rank waits for another."""
    from zangchat.engine import Engine, Request

    bos, room = tokenizer.get_bos_token_id(), model.config.sequence_len // 2  # of a prompt that is too long for the model, its end
    requests = [
        Request([bos, *tokenizer.encode(prompt)[-room:]], max_tokens=max_tokens, temperature=temperature, seed=seed) for prompt in prompts
    ]
    results = Engine(model, tokenizer).generate_many(requests)
    return [(prompt, tokenizer.decode(result.tokens)) for prompt, result in zip(prompts, results, strict=True)]


def first_tokens(batches: Iterator["Batch"], limit: int, world_size: int = 1) -> Iterator["Batch"]:
    """Batches until all ranks together have had `limit` input positions: equally many on each rank."""
    seen = 0
    for batch in batches:
        yield batch
        seen += batch.inputs.numel() * world_size
        if seen >= limit:
            break
    if (close := getattr(batches, "close", None)) is not None:
        close()
