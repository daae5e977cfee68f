"""Sampling parameters, and the batched sampler on the device that holds the logits.

Shapes: B rows, V vocabulary, K candidates of a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zangchat.config import MIN_TEMPERATURE, SAMPLING_LIMITS
from zangchat.engine.cuda import to_device


@dataclass(frozen=True)
class Request:
    """One continuation to generate. Raises ValueError for settings out of SAMPLING_LIMITS.

    top_p: arXiv:1904.09751, min_p: arXiv:2407.01082, repetition_penalty: arXiv:1909.05858.
    """

    tokens: Sequence[int]  # the prompt
    max_tokens: int | None = None  # including tool output; None: as many as the context holds
    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int | None = None  # draw among the k most likely; None or 0: all
    top_p: float | None = None  # among the most likely that reach this probability together
    seed: int = 42
    sample_index: int = 0  # tells apart the samples of one prompt under one seed
    min_p: float | None = None  # among those at least this times as likely as the likeliest
    repetition_penalty: float = 1.0  # > 1 makes tokens that are in the row already less likely
    stop: tuple[str, ...] = ()  # the continuation ends if its text has one of these
    logprobs: int | None = None  # report log-probabilities of new tokens, and of n likely ones
    prompt_logprobs: bool = False  # the same for the prompt

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("a prompt needs at least one token, <|bos|> for example")
        for name, limits in SAMPLING_LIMITS.items():
            value = getattr(self, name)
            if value is not None and not limits.allow(value):
                raise ValueError(f"{name} must be {limits}, not {value}")
        if not all(self.stop):
            raise ValueError("a stop string must not be empty")
        if self.prompt_logprobs and self.logprobs is None:
            raise ValueError("prompt_logprobs needs logprobs, 0 for example")

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE


class Logprob(NamedTuple):
    """log p of a token under the model itself: temperature 1, all tokens."""

    value: float
    top: list[tuple[int, float]]  # the most likely (token, log p), best first

    def cut(self, n: int) -> "Logprob":
        return Logprob(self.value, self.top[:n])


class Sampler:
    """Draws one token per row for fixed requests; their settings are vectors on the device.

    Inverse-CDF sampling in the order of the vocabulary: other rows of the batch change a result
    only if the draw is within rounding of a boundary. `histories` are the rows' tokens so far, for
    the repetition penalty.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        vocab_size: int,
        device: torch.device | str,
        histories: Sequence[Sequence[int]] = (),
    ) -> None:
        self.device = torch.device(device)
        self.precise = torch.float32 if self.device.type == "mps" else torch.float64
        self.greedy = all(request.greedy for request in requests)
        self.seen: Tensor | None = None  # (B, V): the tokens that are in a row already
        if any(request.repetition_penalty != 1 for request in requests):
            self.penalty = self._column([request.repetition_penalty for request in requests])
            self.seen = torch.zeros(len(requests), vocab_size, dtype=torch.bool)
            for row, history in enumerate(histories):
                self.seen[row, torch.tensor(history)] = True
            self.seen = self.seen.to(self.device)
        if self.greedy:
            return
        greedy = [request.greedy for request in requests]
        self.is_greedy = self._column(greedy, torch.bool) if any(greedy) else None
        plain = Request([0])  # in the place of a greedy one, whose draw is not used
        rows = [plain if request.greedy else request for request in requests]
        top_k = [min(row.top_k or vocab_size, vocab_size) for row in rows]
        top_p = [row.top_p or 1.0 for row in rows]
        limited = [k < vocab_size for k in top_k]
        self.limited = self._column(limited, torch.bool) if any(limited) else None
        self.candidates = max((k for k in top_k if k < vocab_size), default=0)
        # some row draws from its whole vocabulary, or from the part that top_p leaves of it
        self.unlimited = not all(a or b for a, b in zip(limited, greedy, strict=True))
        self.nucleus = any(p < 1 and k == vocab_size for k, p in zip(top_k, top_p, strict=True))
        self.has_top_p, self.has_min_p = min(top_p) < 1, any(row.min_p for row in rows)
        self.temperature = self._column([row.temperature for row in rows])
        self.min_p = self._column([row.min_p or 0.0 for row in rows])
        self.top_k = self._column(top_k, torch.int64)
        self.top_p = self._column([p if p < 1 else 2.0 for p in top_p], self.precise)  # never: 2

    def _column(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return to_device(values, dtype, self.device)[:, None]

    def mark_seen(self, tokens: Tensor) -> None:
        """Tokens (B, 1) that were appended to the rows since."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens, True)

    def __call__(self, logits: Tensor, uniforms: Sequence[float]) -> Tensor:
        """Logits (B, V) and the rows' draws from [0, 1) -> one token per row, (B,) int64."""
        if self.seen is not None:
            penalised = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
            logits = torch.where(self.seen, penalised, logits)
        if self.greedy:
            return _best(logits)
        scores = logits / self.temperature
        targets = to_device(uniforms, self.precise, self.device)[:, None]
        drawn: Tensor | None = None  # (B, 1)
        if self.unlimited:
            likely = scores
            if self.nucleus:  # with all tokens as likely as the last one that top_p takes
                best = _descending(scores)
                last = best.gather(1, self._last_likely(best))
                likely = scores.masked_fill(scores < last, -math.inf)
            drawn = self._drawn(likely, targets)
        if self.limited is not None:
            best, ids = scores.topk(self.candidates, dim=-1)  # descending
            places = torch.arange(self.candidates, device=self.device)
            best = best.masked_fill(places >= self.top_k, -math.inf)
            if self.has_top_p:
                best = best.masked_fill(places > self._last_likely(best), -math.inf)
            ids, order = ids.sort(dim=-1)
            among = ids.gather(1, self._drawn(best.gather(1, order), targets))
            drawn = among if drawn is None else torch.where(self.limited, among, drawn)
        assert drawn is not None  # else all rows are greedy
        if self.is_greedy is not None:
            drawn = torch.where(self.is_greedy, _best(logits)[:, None], drawn)
        return drawn.squeeze(1)

    def _drawn(self, scores: Tensor, uniforms: Tensor) -> Tensor:
        """Index into `scores` (B, K) of each row's draw from its probabilities: (B, 1)."""
        p = scores.softmax(dim=-1)
        if self.has_min_p:
            p = p.masked_fill(p < self.min_p * p.amax(dim=-1, keepdim=True), 0.0)
        cdf = p.to(self.precise).cumsum(dim=-1)  # on a CPU four times as fast as cumsum(dtype=...)
        drawn = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)
        return drawn.clamp_(max=cdf.size(-1) - 1)

    def _last_likely(self, best: Tensor) -> Tensor:
        """Index of the last score that top_p takes, in scores (B, K), best first: (B, 1)."""
        reached = best.softmax(dim=-1).to(self.precise).cumsum(dim=-1)
        return torch.searchsorted(reached, self.top_p).clamp_(max=best.size(-1) - 1)


def _descending(scores: Tensor) -> Tensor:
    """Each row (B, V) sorted, largest first. On a CPU numpy sorts twenty times as fast as torch."""
    if scores.is_cpu:
        return torch.from_numpy(-np.sort(-scores.numpy(), axis=-1))
    return scores.sort(dim=-1, descending=True).values


def _best(logits: Tensor) -> Tensor:
    """Argmax of each row (B, V): (B,). On a CPU numpy finds it ten times as fast as torch."""
    if logits.is_cpu:
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


class LogprobTensors(NamedTuple):
    """Log-probabilities at N positions: values (N,), top values and top ids (N, n)."""

    values: Tensor
    top_values: Tensor
    top_ids: Tensor

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor, n: int) -> "LogprobTensors":
        """From logits (N, V) and the tokens (N,) at these positions."""
        logprobs = logits.log_softmax(dim=-1)
        values = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
        return cls(values, *logprobs.topk(min(n, logits.size(-1)), dim=-1))

    def on_host(self) -> list[Logprob]:
        columns = (self.values, self.top_ids, self.top_values)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [Logprob(value, list(zip(ids, top, strict=True))) for value, ids, top in rows]
