"""Finetune an exported model with LoRA (arXiv:2106.09685), by the libraries transformers and peft.

    pip install -e ".[examples]"
    python -m scripts.export_hf -i sft -g d20 -o d20-sft
    python -m dev.examples.lora --model=d20-sft --data=conversations.jsonl --output=d20-lora
    python -m scripts.import_model --path=d20-lora --source=sft --model_tag=d20-lora

A line of the data is {"messages": [{"role": "user", "content": ...}, {"role": "assistant",
"content": ...}]}. Only the adapters are trained; at the end they are merged into the weights, so
the output is a complete model again.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zangchat import configurator
from zangchat.runtime.devices import autodetect_device_type
from zangchat.runtime.files import read_jsonl

IGNORED = -100  # a label that the loss leaves out


@dataclass
class Config:
    model: Path  # directory that scripts.export_hf wrote
    data: Path  # .jsonl of conversations
    output: Path  # directory to make
    rank: int = 16  # of the adapters
    lr: float = 1e-3
    epochs: int = 3
    batch_size: int = 8  # conversations in a step
    seed: int = 42


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, finetune, argv)


def finetune(config: Config) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(config.seed)
    device = autodetect_device_type()
    tokenizer = AutoTokenizer.from_pretrained(config.model, padding_side="right")
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    adapters = LoraConfig(
        r=config.rank, lora_alpha=2 * config.rank, target_modules=projections, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, adapters).to(device)
    model.print_trainable_parameters()
    model.train()
    examples = [encode(tokenizer, row["messages"]) for _, row in read_jsonl(config.data)]
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=config.lr, weight_decay=0.0
    )
    order = random.Random(config.seed)
    for epoch in range(config.epochs):
        order.shuffle(examples)
        for start in range(0, len(examples), config.batch_size):
            ids, labels = zip(*examples[start : start + config.batch_size], strict=True)
            padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
            padded["labels"] = pad_sequence(
                [torch.tensor(row) for row in labels], batch_first=True, padding_value=IGNORED
            )
            loss = model(**padded.to(device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
    model.merge_and_unload().save_pretrained(config.output)
    tokenizer.save_pretrained(config.output)


def encode(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """(ids, labels): the chat template says by its generation marks which tokens are the
    assistant's to learn.
    """
    found = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = found["input_ids"][: tokenizer.model_max_length]
    return ids, [
        token if learn else IGNORED
        for token, learn in zip(ids, found["assistant_masks"], strict=False)
    ]


if __name__ == "__main__":
    sys.exit(main())
