"""What several tests share: a byte-level tokenizer with the interface of RustBPETokenizer, and small datasets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zangchat.config import GPTConfig
from zangchat.dataset import Dataset, write_dataset
from zangchat.gpt import GPT

SPECIAL_TOKENS = [
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
]


class ByteTokenizer:
    """Token i < 256 is the byte i, then come the special tokens: nothing to train, and everything about it is obvious."""

    fingerprint = "bytes"

    def get_vocab_size(self) -> int:
        return 256 + len(SPECIAL_TOKENS)

    def get_special_tokens(self) -> set[str]:
        return set(SPECIAL_TOKENS)

    def encode_special(self, text: str) -> int:
        return 256 + SPECIAL_TOKENS.index(text)

    def get_bos_token_id(self) -> int:
        return self.encode_special("<|bos|>")

    def id_to_token(self, id: int) -> str:
        return SPECIAL_TOKENS[id - 256] if id >= 256 else bytes([id]).decode("latin-1")

    def encode(self, text: Any, prepend: Any = None, append: Any = None, num_threads: int = 8) -> Any:
        if isinstance(text, list):
            return [self.encode(item, prepend, append) for item in text]
        ids = list(text.encode("utf-8"))
        if prepend is not None:
            ids.insert(0, prepend if isinstance(prepend, int) else self.encode_special(prepend))
        if append is not None:
            ids.append(append if isinstance(append, int) else self.encode_special(append))
        return ids

    __call__ = encode

    def encode_documents(self, texts: Sequence[str], num_threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Texts without any special token: (ids (N,) uint32, offsets (len + 1,) int64)."""
        encoded = [text.encode("utf-8") for text in texts]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return np.frombuffer(b"".join(encoded), dtype=np.uint8).astype(np.uint32), offsets

    def decode(self, ids: Sequence[int]) -> str:
        parts = [SPECIAL_TOKENS[i - 256].encode() if i >= 256 else bytes([i]) for i in ids]
        return b"".join(parts).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(SPECIAL_TOKENS[i - 256].encode() if i >= 256 else bytes([i]) for i in ids)

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) bytes of each token, 0 for special tokens."""
        return np.array([1] * 256 + [0] * len(SPECIAL_TOKENS), dtype=np.int32)

    def render_conversation(self, conversation: dict[str, Any], max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """(ids, mask): 1 where the assistant writes."""
        ids, mask = [self.get_bos_token_id()], [0]

        def add(tokens: Sequence[int], learn: int) -> None:
            ids.extend(tokens)
            mask.extend([learn] * len(tokens))

        for message in conversation["messages"]:
            role, content = message["role"], message["content"]
            if role == "assistant":
                add([self.encode_special("<|assistant_start|>")], 0)
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                for part in parts:
                    if part["type"] == "text":
                        add(self.encode(part["text"]), 1)
                    else:
                        name, learn = ("python", 1) if part["type"] == "python" else ("output", 0)
                        start, end = self.encode_special(f"<|{name}_start|>"), self.encode_special(f"<|{name}_end|>")
                        add([start, *self.encode(part["text"]), end], learn)
                add([self.encode_special("<|assistant_end|>")], 1)
            else:
                add([self.encode_special("<|user_start|>"), *self.encode(content), self.encode_special("<|user_end|>")], 0)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict[str, Any]) -> list[int]:
        """The conversation without its last answer, ready for the assistant to write one."""
        messages = list(conversation["messages"])
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        ids, _ = self.render_conversation({"messages": messages}, max_tokens=1 << 30)
        return [*ids, self.encode_special("<|assistant_start|>")]


def lively_model(vocab_size: int, sequence_len: int, n_layer: int, n_embd: int, seed: int, std: float = 0.3) -> GPT:
    """Random, two heads, and loud: every weight matters to the logits."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, n_layer=n_layer, n_head=2, n_kv_head=2, n_embd=n_embd))
    model.init_weights()
    for parameter in model.parameters():
        parameter.data.normal_(0, std)
    return model


class ListTask:
    """Conversations from a list, with the part of a Task's interface that data loading uses."""

    def __init__(self, conversations: Sequence[dict[str, Any]]) -> None:
        self.conversations = list(conversations)

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.conversations[index]


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def make_dataset(folder: Path, train: Sequence[str], validation: Sequence[str] = ("held out",)) -> Dataset:
    return write_dataset(folder, folder.name, list(train), list(validation))
