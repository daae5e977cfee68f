"""The probability of given continuations: for CORE, multiple choice by letters, log-likelihoods.

A prompt goes through the model once for all its continuations, and each continuation once after it.
Works with gpt.GPT and model.InferenceGPT.

Shapes: P prompts, S tokens of a prompt, B rows (a continuation each), T tokens of a row, N = B x T,
G key/value heads, D head dimension, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zangchat.engine.cuda import padded
from zangchat.nn.attention import Attended, AttentionContext, keys_and_values, offset_keys
from zangchat.nn.loss import IGNORE

TOKENS_PER_BATCH = {"cuda": 16_384, "cpu": 1_024}  # positions of a forward pass, with padding
LOGITS_PER_BATCH = 2**27  # numbers in the logits of a forward pass, 512 MiB in fp32


@torch.inference_mode()
def score(
    model: Any,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    greedy: bool = False,
) -> list[float]:
    """The log-probability, in nats, of each continuation after the prompt of the same index.

    With `greedy`, that under greedy decoding: 0.0 if it gives the continuation, else -inf. Equal
    prompts next to each other are read once.
    """
    if len(prompts) != len(continuations) or not all(map(len, (*prompts, *continuations))):
        raise ValueError("each prompt needs a continuation, and each of them at least one token")
    device, scores = model.get_device(), [0.0] * len(prompts)
    limit = TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cpu"])
    same = itertools.groupby(range(len(prompts)), key=lambda row: list(prompts[row]))
    shared = [(prompt, list(rows)) for prompt, rows in same]
    for batch in batches_of([len(prompt) for prompt, _ in shared], limit):
        owned = [(owner, row) for owner, i in enumerate(batch) for row in shared[i][1]]
        lengths = [len(shared[i][0]) for i in batch]
        longer = [(owner, row) for owner, row in owned if len(continuations[row]) > 1]
        context = SharedPrompts(lengths, device, model.config.key_offset) if longer else None
        idx = padded([shared[i][0] for i in batch], device)
        last = torch.tensor(lengths, device=device) - 1
        logits = model(idx, kv_cache=context, logits_at=last)[:, 0]
        if greedy:  # log p of a choice of the largest logit
            likeliest = logits.argmax(dim=-1, keepdim=True)
            logprobs = torch.full_like(logits, -math.inf).scatter_(1, likeliest, 0.0)
        else:
            logprobs = logits.log_softmax(dim=-1)
        firsts = [(owner, continuations[row][0]) for owner, row in owned]
        values = logprobs[tuple(torch.tensor(firsts, device=device).unbind(1))].tolist()
        for (_, row), value in zip(owned, values, strict=True):
            scores[row] = value
        if context is not None:
            for row, value in _score_rest(model, context, longer, continuations, limit, greedy):
                scores[row] += value
    return scores


def _score_rest(
    model: Any,
    context: "SharedPrompts",
    owned: list[tuple[int, int]],
    continuations: Sequence[Sequence[int]],
    limit: int,
    greedy: bool,
) -> Iterator[tuple[int, float]]:
    """For each (owner, row) of a prompt: (row, score of the tokens after the first)."""
    device, longest = context.lengths.device, int(context.lengths.max())
    sizes = [len(continuations[row]) - 1 for _, row in owned]
    logits_limit = LOGITS_PER_BATCH // model.config.padded_vocab_size
    copies_limit = 4 * limit * max(sizes) // (longest + max(sizes))  # a row copies its prompt
    for part in batches_of(sizes, min(limit, logits_limit, copies_limit)):
        rows = [owned[i][1] for i in part]
        idx = padded([continuations[row][:-1] for row in rows], device)
        targets = padded([continuations[row][1:] for row in rows], device, fill=IGNORE)
        context.serve([owned[i][0] for i in part])
        if greedy:
            right = model(idx, kv_cache=context).argmax(dim=-1) == targets
            values = (right | (targets == IGNORE)).all(dim=1).float().log()  # 0 or -inf
        else:
            losses = model(idx, targets, kv_cache=context, loss_reduction="none")
            values = -losses.cpu().double().sum(dim=1)
        yield from zip(rows, values.tolist(), strict=True)


class SharedPrompts(AttentionContext):
    """Keys and values of prompts, and the rows that continue them: a gpt.AttentionContext.

    The first pass, over the prompts, stores. After `serve`, each pass reads.
    """

    def __init__(
        self, lengths: Sequence[int], device: torch.device, key_offset: bool = False
    ) -> None:
        self.key_offset = key_offset
        self.lengths = torch.tensor(lengths, device=device)
        self.positions, self.longest = torch.zeros_like(self.lengths), 0
        self._layers: list[tuple[Tensor, Tensor]] = []  # (P, G, S, D) each
        self._owners: Tensor | None = None  # (B,) the prompt of each row
        self._mask: Tensor | None = None

    def serve(self, owners: Sequence[int]) -> None:
        """From now on row i of the batch continues prompt owners[i]."""
        self._owners = torch.tensor(owners, device=self.lengths.device)
        self.positions, self._mask = self.lengths[self._owners], None
        self.longest = self._layers[0][0].size(2)

    def update(self, layer_idx: int, k: Tensor, v: Tensor) -> Attended:
        if self._owners is None:
            self._layers.append((k, v))
            return offset_keys(k) if self.key_offset else k, v, None
        if self._mask is None:
            T, device = k.size(2), k.device
            # (B, S), without the padding of the prompt
            before = torch.arange(self.longest, device=device) < self.positions[:, None]
            new = torch.ones(T, T, dtype=torch.bool, device=device).tril().expand(len(k), -1, -1)
            self._mask = torch.cat([before[:, None].expand(-1, T, -1), new], dim=2)[:, None]
        keys, values = (part[self._owners] for part in self._layers[layer_idx])
        if self.key_offset:
            rows = torch.arange(len(keys), device=k.device)
            last = keys[rows, :, self.positions - 1, keys.size(-1) // 2 :].unsqueeze(2)
            keys, k = offset_keys(keys), offset_keys(k, last)
        return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), self._mask

    def store(self, layer_idx: int, new: Tensor) -> Attended:
        """The same for keys and values side by side, (N, 2 x G, D)."""
        return self.update(layer_idx, *keys_and_values(new, self.positions.numel()))


def batches_of(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices by length in groups of at most `limit` positions with padding, or of one index."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and (len(group) + 1) * lengths[i] > limit:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
