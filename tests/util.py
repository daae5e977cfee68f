"""Shared helpers: a tokenizer of single bytes, small models and datasets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zangchat.config import GPTConfig
from zangchat.dataset import Dataset
from zangchat.dataset.manifest import write_dataset
from zangchat.gpt import GPT
from zangchat.tokenizer import RustBPETokenizer


class ByteTokenizer(RustBPETokenizer):
    """Token i < 256 is the byte i, followed by the special tokens; no training needed."""

    fingerprint = "bytes"

    def __init__(self) -> None:
        super().__init__([bytes([i]) for i in range(256)])


def lively_model(
    vocab_size: int,
    sequence_len: int,
    n_layer: int,
    n_embd: int,
    seed: int,
    std: float = 0.3,
    **architecture: bool,
) -> GPT:
    """A random model with two heads and weights large enough to affect the logits."""
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(
            sequence_len=sequence_len,
            vocab_size=vocab_size,
            n_layer=n_layer,
            n_head=2,
            n_kv_head=2,
            n_embd=n_embd,
            **architecture,
        )
    )
    model.init_weights()
    for parameter in model.parameters():
        parameter.data.normal_(0, std)
    return model


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def make_dataset(
    folder: Path, train: Sequence[str], validation: Sequence[str] = ("held out",)
) -> Dataset:
    return write_dataset(folder, folder.name, list(train), list(validation))
