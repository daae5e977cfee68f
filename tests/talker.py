"""A model with scripted replies, for tests of the server, the terminal chat and the page."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.util import ByteTokenizer
from zangchat.config import GPTConfig
from zangchat.engine import Engine
from zangchat.server.app import create_app
from zangchat.server.connections import http_server
from zangchat.server.protocol import Settings

TOKENIZER = ByteTokenizer()
VOCAB = TOKENIZER.get_vocab_size()
QUESTION, QUESTION_END, ANSWER, ANSWER_END = (
    TOKENIZER.encode_special(f"<|{name}|>")
    for name in ("user_start", "user_end", "assistant_start", "assistant_end")
)


class Talker:
    """Stands in for GPT: `reply(question)` is the reply to the last user message.

    The question of a bare prompt is "". Special tokens in a reply are written by name. The cache
    holds the tokens themselves, so a reply depends only on its own row. `pause` is the time per
    forward pass, in seconds.
    """

    compute_dtype = torch.float32

    def __init__(
        self, reply: Callable[[str], str], sequence_len: int = 512, pause: float = 0.0
    ) -> None:
        self.reply, self.pause = reply, pause
        self.config = GPTConfig(
            sequence_len=sequence_len, vocab_size=VOCAB, n_layer=1, n_head=1, n_kv_head=1, n_embd=2
        )

    def get_device(self) -> torch.device:
        return torch.device("cpu")

    def __call__(
        self, idx: torch.Tensor, kv_cache: Any, logits_at: torch.Tensor | None = None
    ) -> torch.Tensor:
        time.sleep(self.pause)
        B, T = idx.shape
        k = idx[:, None, :, None].float().expand(B, 1, T, 2)
        stored, _, _ = kv_cache.update(0, k, k)
        before = kv_cache.positions.tolist()
        kv_cache.advance(T)
        logits = torch.full((B, T if logits_at is None else 1, VOCAB), -10.0)
        for row in range(B):
            for i, t in enumerate(range(T) if logits_at is None else [int(logits_at[row])]):
                logits[
                    row, i, self._next(stored[row, 0, : before[row] + t + 1, 0].int().tolist())
                ] = 10.0
        return logits

    def _next(self, tokens: list[int]) -> int:
        before, question = 1, ""  # the default: a bare prompt, assumed to be only <|bos|>
        if ANSWER in tokens:
            before = _last(tokens, ANSWER) + 1
            question = TOKENIZER.decode(
                tokens[_last(tokens, QUESTION) + 1 : _last(tokens, QUESTION_END)]
            )
        answer = [*encode(self.reply(question)), ANSWER_END]
        return answer[min(len(tokens) - before, len(answer) - 1)]


def _last(tokens: list[int], token: int) -> int:
    return len(tokens) - 1 - tokens[::-1].index(token)


def encode(text: str) -> list[int]:
    """Encode text, with special tokens written as <|...|>."""
    tokens: list[int] = []
    for i, piece in enumerate(text.replace("|>", "<|").split("<|")):
        tokens += [TOKENIZER.encode_special(f"<|{piece}|>")] if i % 2 else TOKENIZER.encode(piece)
    return tokens


def engine(reply: Callable[[str], str], **kw: Any) -> Engine:
    return Engine(Talker(reply, **kw), TOKENIZER)  # type: ignore[arg-type]


@contextmanager
def serving(
    *engines: Engine, settings: Settings | None = None, **fields: Any
) -> Iterator[tuple[str, Any]]:
    """A real server on a loopback port: (its address, its pool of workers)."""
    app = create_app(engines, settings or Settings(**fields))
    server = http_server(app, grace=1, host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", app.state.service.pool
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server did not stop"


def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    """Wait until a condition holds, for at most `seconds`; return whether it did."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
