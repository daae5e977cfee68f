"""Bits per byte of a model on training and validation text, and samples of what it writes.

python -m scripts.base_loss
python -m scripts.base_loss --source=mid --model_tag=d12 --step=1000
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zangchat import configurator
from zangchat.config import CheckpointConfig, SourceFlag
from zangchat.dataset import find_dataset
from zangchat.report import get_report
from zangchat.runtime.logs import print0
from zangchat.streams import TextStream

if TYPE_CHECKING:
    from zangchat.dataset import Dataset
    from zangchat.gpt import GPT
    from zangchat.tokenizer import RustBPETokenizer

UNPROMPTED = 4  # samples that begin with nothing


@dataclass
class Config(CheckpointConfig):
    source: SourceFlag = "base"  # base | mid | sft | rl
    dataset: str | None = None
    """the text; default: what the model was trained on, else the only one there"""
    data_path: str | None = None
    skip_bad_rows: bool = False  # leave out rows of own files that cannot be read, and count them
    split_tokens: int = 20 * 524288  # tokens of each split at most
    device_batch_size: int = 32  # rows in one pass


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, evaluate, argv)


def evaluate(config: Config) -> None:
    from zangchat import checkpoint_manager
    from zangchat.runtime.devices import compute_init

    configurator.check_range(1, config, "split_tokens", "device_batch_size")
    _, rank, _, world_size, device = compute_init(config.device_type)
    model, tokenizer, meta = checkpoint_manager.load_model(
        config.source, device, "eval", config.model_tag, config.step, config.dtype
    )
    trained_on = meta["user_config"] if not (config.dataset or config.data_path) else {}
    dataset = find_dataset(
        config.dataset or trained_on.get("dataset"),
        config.data_path or trained_on.get("data_path"),
        config.skip_bad_rows or trained_on.get("skip_bad_rows", False),
    )
    bpb = bits_per_byte(config, model, tokenizer, dataset, rank, world_size)
    samples = sample(model, tokenizer)
    measured = {"step": meta["step"], "text": dataset.name, **bpb}
    get_report().log(f"{config.source.capitalize()} model loss", [measured, *samples])


def bits_per_byte(
    config: Config,
    model: "GPT",
    tokenizer: "RustBPETokenizer",
    dataset: "Dataset",
    rank: int,
    world_size: int,
) -> dict[str, float]:
    """{"train bpb", "validation bpb"} over the first `split_tokens` of each; prints them."""
    from zangchat import dataloader, loss_eval
    from zangchat.training import hooks

    T, rows, bos = model.config.sequence_len, config.device_batch_size, tokenizer.get_bos_token_id()
    ranks: dict[str, Any] = {"rank": rank, "world_size": world_size}
    text = TextStream(dataset, tokenizer, seed=0)
    packed = dataloader.packed_batches(
        text, rows_per_step=rows * world_size, sequence_len=T, bos=bos, **ranks
    )
    validation = dataloader.validation_batches(
        dataset, tokenizer, T, eval_tokens=config.split_tokens, rows_per_batch=rows, **ranks
    )
    bpb = {}
    for name, batches in (
        ("train", hooks.first_tokens(packed, config.split_tokens, world_size)),
        ("validation", validation),
    ):
        bpb[f"{name} bpb"] = loss_eval.evaluate_bpb(model, batches, tokenizer.token_bytes())
        print0(f"{name} bits per byte: {bpb[f'{name} bpb']:.4f}")
    return bpb


def sample(model: "GPT", tokenizer: "RustBPETokenizer") -> list[dict[str, str]]:
    """Greedy continuations of a few prompts, and texts drawn from no prompt; prints them."""
    from zangchat.training import hooks

    pairs = hooks.complete(model, tokenizer, hooks.PROMPTS)
    for seed in range(UNPROMPTED):
        pairs += hooks.complete(model, tokenizer, [""], max_tokens=96, temperature=1.0, seed=seed)[
            :1
        ]
    for prompt, completion in pairs:
        print0(hooks.one_line(prompt, completion))
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


if __name__ == "__main__":
    sys.exit(main())
