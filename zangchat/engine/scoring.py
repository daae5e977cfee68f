"""The probability of given continuations: CORE, multiple choice by letters, log-likelihoods.

Tokens that neighbouring prompts share go through the model once, and so does the rest of each row:
its last prompt tokens and its continuation. Works with gpt.GPT and model.InferenceGPT.

Shapes: P prefixes, B rows, T tokens of a row after its prefix, N = B x T, S tokens of a prefix,
G key/value heads, D head dimension, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zangchat.nn.loss import IGNORE

TOKENS_PER_BATCH = {"cuda": 16_384, "cpu": 1_024}  # positions of a forward pass, with padding
LOGITS_PER_BATCH = 2**27  # numbers in the logits of a forward pass, 512 MiB in fp32


@dataclass
class Row:
    """A prompt with one continuation, and its score so far."""

    tokens: list[int]
    start: int  # of the continuation
    score: float = 0.0

    def inputs(self, read: int) -> list[int]:
        """The tokens to read after the first `read` ones."""
        return self.tokens[read:-1]

    def targets(self, read: int) -> list[int]:
        """For each of the inputs the token after it, if that belongs to the continuation."""
        return [IGNORE] * (self.start - 1 - read) + self.tokens[max(self.start, read + 1) :]


@torch.inference_mode()
def score(
    model: Any,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    greedy: bool = False,
) -> list[float]:
    """The log-probability, in nats, of each continuation after the prompt of the same index.

    With `greedy`, that under greedy decoding: 0.0 if it gives the continuation, else -inf.
    """
    pairs = zip(prompts, continuations, strict=True)
    rows = [Row([*prompt, *continuation], len(prompt)) for prompt, continuation in pairs]
    if not all(0 < row.start < len(row.tokens) for row in rows):
        raise ValueError("a prompt and a continuation need at least one token each")
    limit = TOKENS_PER_BATCH.get(model.get_device().type, TOKENS_PER_BATCH["cpu"])
    prefixes = shared_prefixes(prompts)
    for batch in batches_of([len(prefix.tokens) for prefix in prefixes], limit):
        group = [prefixes[i] for i in batch]
        owned = [(owner, rows[i]) for owner, prefix in enumerate(group) for i in prefix.rows]
        context = _read_prefixes(model, group, owned, greedy)
        if context is not None:
            _read_rows(model, context, owned, limit, greedy)
    return [row.score for row in rows]


def _read_prefixes(model: Any, prefixes: list["Prefix"], owned: list[tuple[int, Row]], greedy: bool) -> "SharedPrefixes | None":
    """Read prefixes, and score the first token of each (owner, row) whose prompt is the prefix.

    Returns the context for the rest of the rows, None if all have been read.
    """
    device, lengths = model.get_device(), [len(prefix.tokens) for prefix in prefixes]
    unread = any(row.inputs(lengths[owner]) for owner, row in owned)
    context = SharedPrefixes(lengths, device) if unread else None
    idx = _padded([prefix.tokens for prefix in prefixes], 0, device)
    last = torch.tensor(lengths, device=device) - 1
    logits = model(idx, kv_cache=context, logits_at=last)[:, 0]
    whole = [(owner, row) for owner, row in owned if row.start == lengths[owner]]
    if whole:
        owners = torch.tensor([owner for owner, _ in whole], device=device)
        tokens = torch.tensor([row.tokens[row.start] for _, row in whole], device=device)
        logprobs = _greedy_logprobs(logits) if greedy else logits.log_softmax(dim=-1)
        values = logprobs[owners, tokens]
        for (_, row), value in zip(whole, values.tolist(), strict=True):
            row.score += value
    return context


def _read_rows(model: Any, context: "SharedPrefixes", owned: list[tuple[int, Row]], limit: int, greedy: bool) -> None:
    """Read the rest of each (owner, row) after its prefix, and score it."""
    device, lengths = model.get_device(), context.lengths.tolist()
    owned = [(owner, row) for owner, row in owned if row.inputs(lengths[owner])]
    sizes = [len(row.tokens) - 1 - lengths[owner] for owner, row in owned]
    widest = max(sizes)
    logits_limit = LOGITS_PER_BATCH // model.config.padded_vocab_size
    copies_limit = 4 * limit * widest // (max(lengths) + widest)  # of prefixes, one per row
    for part in batches_of(sizes, min(limit, logits_limit, copies_limit)):
        some = [owned[i] for i in part]
        idx = _padded([row.inputs(lengths[owner]) for owner, row in some], 0, device)
        targets = _padded([row.targets(lengths[owner]) for owner, row in some], IGNORE, device)
        context.serve([owner for owner, _ in some])
        if greedy:
            right = model(idx, kv_cache=context).argmax(dim=-1) == targets
            values = (right | (targets == IGNORE)).all(dim=1).float().log()  # 0 or -inf
        else:
            losses = model(idx, targets, kv_cache=context, loss_reduction="none")
            values = -losses.cpu().double().sum(dim=1)
        for (_, row), value in zip(some, values.tolist(), strict=True):
            row.score += value


def _greedy_logprobs(logits: Tensor) -> Tensor:
    """log p (P, V) of a choice of the largest logit: 0 or -inf."""
    logprobs = torch.full_like(logits, -math.inf)
    return logprobs.scatter_(1, logits.argmax(dim=-1, keepdim=True), 0.0)


class SharedPrefixes:
    """Keys and values of prefixes, and the rows that continue them: a gpt.AttentionContext.

    The first pass, over the prefixes, stores. After `serve`, each pass reads.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = torch.tensor(lengths, device=device)
        self.positions, self.longest = torch.zeros_like(self.lengths), 0
        self._layers: list[tuple[Tensor, Tensor]] = []  # (P, G, S, D) each
        self._owners: Tensor | None = None  # (B,) the prefix of each row
        self._mask: Tensor | None = None

    def serve(self, owners: Sequence[int]) -> None:
        """From now on row i of the batch continues prefix owners[i]."""
        self._owners = torch.tensor(owners, device=self.lengths.device)
        self.positions, self._mask = self.lengths[self._owners], None
        self.longest = self._layers[0][0].size(2)

    def update(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if self._owners is None:
            self._layers.append((k, v))
            return k, v, None
        if self._mask is None:
            T, device = k.size(2), k.device
            # (B, S), without the padding of the prefix
            before = torch.arange(self.longest, device=device) < self.positions[:, None]
            new = torch.ones(T, T, dtype=torch.bool, device=device).tril().expand(len(k), -1, -1)
            self._mask = torch.cat([before[:, None].expand(-1, T, -1), new], dim=2)[:, None]
        keys, values = (part[self._owners] for part in self._layers[layer_idx])
        return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), self._mask

    def store(self, layer_idx: int, new: Tensor) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """The same for keys and values side by side, (N, 2 x G, D)."""
        rows = new.view(self.positions.numel(), -1, *new.shape[1:]).transpose(1, 2)
        k, v = rows.chunk(2, dim=1)
        return [self.update(layer_idx, k, v)]

    def advance(self, num_tokens: int) -> None:
        """Does nothing: the rows' own tokens are not kept."""


@dataclass
class Prefix:
    """Tokens that go through the model once, for all the rows (by index) that continue them."""

    tokens: Sequence[int]
    rows: list[int]
    longest: int  # tokens of the longest prompt among the rows


def shared_prefixes(prompts: Sequence[Sequence[int]]) -> list[Prefix]:
    """Prefixes of neighbouring prompts.

    A prompt joins the one before it if they share more than half of each, and if that saves more
    tokens than the rows so far have to read again.
    """
    prefixes: list[Prefix] = []
    for row, prompt in enumerate(prompts):
        last = prefixes[-1] if prefixes else Prefix([], [], 0)
        common, longest = _common(last.tokens, prompt), max(last.longest, len(prompt))
        if 2 * common > longest and len(last.rows) * (len(last.tokens) - common) < common:
            last.tokens, last.longest = last.tokens[:common], longest
            last.rows.append(row)
        else:
            prefixes.append(Prefix(prompt, [row], len(prompt)))
    return prefixes


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens that both begin with."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def batches_of(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices in groups of similar length, each at most `limit` positions with its padding.

    A single one may exceed it.
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and (len(group) + 1) * lengths[i] > limit:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _padded(sequences: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    """(B, T) int64, padded on the right."""
    rows = [torch.tensor(tokens, dtype=torch.int64) for tokens in sequences]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    return padded.to(device)
