"""What may be asked of a continuation, and how its tokens are drawn, on the device that holds the logits.

Shapes: B rows, V vocabulary, K candidates of a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

COLDEST = 1e-5  # temperatures below are taken as 0, before logits / temperature overflows
MAX_LOGPROBS = 20  # most likely tokens that a request may ask to see at each place


@dataclass(frozen=True)
class Request:
    """One continuation to generate. Raises ValueError for settings that mean nothing."""

    tokens: Sequence[int]  # the prompt
    max_tokens: int | None = None  # new tokens at most, forced tool output included; None: as many as the context holds
    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int | None = None  # draw among the k most likely; None or 0: all
    top_p: float | None = None  # draw among the most likely that reach this probability together (arXiv:1904.09751); None or 1: all
    seed: int = 42
    sample_index: int = 0  # tells apart the samples of one prompt under one seed
    min_p: float | None = None  # draw among those at least this times as likely as the likeliest (arXiv:2407.01082); None or 0: all
    repetition_penalty: float = 1.0  # > 1 makes tokens that stand before less likely (arXiv:1909.05858)
    stop: tuple[str, ...] = ()  # the continuation ends where its text has one of these
    logprobs: int | None = None  # record the log-probability of each new token and of this many most likely ones
    prompt_logprobs: bool = False  # the same for the prompt

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("a prompt needs at least one token, <|bos|> for example")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ValueError(f"max_tokens must not be negative, not {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie between 0 (off) and 1, not {self.min_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty must be above 0 (1 = off), not {self.repetition_penalty}")
        if not all(self.stop):
            raise ValueError("a stop string must not be empty")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs must lie between 0 and {MAX_LOGPROBS}, not {self.logprobs}")
        if self.prompt_logprobs and self.logprobs is None:
            raise ValueError("prompt_logprobs needs logprobs, 0 for example")

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST


class Logprob(NamedTuple):
    """log p of a token under the model itself (temperature 1, nothing left out), and the most likely (token, log p), best first."""

    value: float
    top: list[tuple[int, float]]


class Sampler:
    """Draws one token per row for a fixed list of requests, whose settings lie on the device as vectors.

    Inverse-CDF sampling in the order of the vocabulary: the result moves only if a draw falls within rounding of a boundary, whatever
    else is in the batch. `histories` are the rows' tokens so far, for the repetition penalty.
    """

    def __init__(
        self, requests: Sequence[Request], vocab_size: int, device: torch.device | str, histories: Sequence[Sequence[int]] = ()
    ) -> None:
        self.device = torch.device(device)
        self.precise = torch.float32 if self.device.type == "mps" else torch.float64
        self.greedy = all(request.greedy for request in requests)
        self.seen: Tensor | None = None  # (B, V): which tokens stand in a row already
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
        self.temperature = self._column([1.0 if request.greedy else request.temperature for request in requests])
        top_k = [vocab_size if request.greedy else min(request.top_k or vocab_size, vocab_size) for request in requests]
        top_p = [1.0 if request.greedy else request.top_p or 1.0 for request in requests]
        limited = [k < vocab_size for k in top_k]
        self.limited = self._column(limited, torch.bool) if any(limited) else None
        self.candidates = max((k for k in top_k if k < vocab_size), default=0)
        self.unlimited = not all(a or b for a, b in zip(limited, greedy, strict=True))  # some row draws from its whole vocabulary,
        self.nucleus = any(p < 1 and k == vocab_size for k, p in zip(top_k, top_p, strict=True))  # or from what top_p leaves of it
        self.top_k = self._column(top_k, torch.int64)
        self.top_p = self._column([p if p < 1 else 2.0 for p in top_p], self.precise)  # 2: no sum reaches it
        self.has_top_p, self.has_min_p = min(top_p) < 1, any(request.min_p for request in requests if not request.greedy)
        self.min_p = self._column([request.min_p or 0.0 for request in requests])

    def _column(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return to_device(values, dtype, self.device)[:, None]

    def saw(self, tokens: Tensor) -> None:
        """Tokens (B, 1) that were put behind the rows since."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens, True)

    def __call__(self, logits: Tensor, uniforms: Sequence[float]) -> Tensor:
        """One token per row from logits (B, V): (B,) int64. `uniforms` are the rows' draws from [0, 1)."""
        if self.seen is not None:
            punished = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
            logits = torch.where(self.seen, punished, logits)
        if self.greedy:
            return _best(logits)
        scores = logits / self.temperature
        targets = to_device(uniforms, self.precise, self.device)[:, None]
        drawn: Tensor | None = None  # (B, 1)
        if self.unlimited:
            likely = scores
            if self.nucleus:  # a token as likely as the last one that top_p takes is taken, too
                best = _descending(scores)
                likely = scores.masked_fill(scores < best.gather(1, self._last_likely(best)), -math.inf)
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
        return (drawn if self.is_greedy is None else torch.where(self.is_greedy, _best(logits)[:, None], drawn)).squeeze(1)

    def _drawn(self, scores: Tensor, uniforms: Tensor) -> Tensor:
        """Where in `scores` (B, K) each row's draw from its probabilities falls: (B, 1)."""
        probabilities = scores.softmax(dim=-1)
        if self.has_min_p:
            probabilities = probabilities.masked_fill(probabilities < self.min_p * probabilities.amax(dim=-1, keepdim=True), 0.0)
        cdf = self._summed(probabilities)
        return torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True).clamp_(max=cdf.size(-1) - 1)

    def _summed(self, probabilities: Tensor) -> Tensor:
        """The sum of each (B, K) and those before it; one pass more than cumsum(dtype=...), and on a CPU a quarter of its time."""
        return probabilities.to(self.precise).cumsum(dim=-1)

    def _last_likely(self, best: Tensor) -> Tensor:
        """In scores (B, K), best first: where those end that reach top_p together, (B, 1)."""
        reached = self._summed(best.softmax(dim=-1))
        return torch.searchsorted(reached, self.top_p).clamp_(max=best.size(-1) - 1)


def _descending(scores: Tensor) -> Tensor:
    """Each row (B, V) in order, largest first. On a CPU numpy sorts twenty times as fast as torch."""
    return torch.from_numpy(-np.sort(-scores.numpy(), axis=-1)) if scores.is_cpu else scores.sort(dim=-1, descending=True).values


def _best(logits: Tensor) -> Tensor:
    """Where the largest of each row (B, V) is: (B,). On a CPU numpy finds it ten times as fast as torch."""
    return torch.from_numpy(logits.numpy().argmax(axis=-1)) if logits.is_cpu else logits.argmax(dim=-1)


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor on the device without waiting for what the device is doing."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class LogprobTensors(NamedTuple):
    """Log-probabilities of N places: values (N,), top values and top ids (N, n)."""

    values: Tensor
    top_values: Tensor
    top_ids: Tensor

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor, n: int) -> "LogprobTensors":
        """From logits (N, V) and the tokens (N,) that stand there."""
        logprobs = logits.log_softmax(dim=-1)
        return cls(logprobs.gather(-1, tokens[:, None]).squeeze(-1), *logprobs.topk(min(n, logits.size(-1)), dim=-1))

    def on_host(self, n: int) -> list[Logprob]:
        rows = zip(self.values.tolist(), self.top_ids[:, :n].tolist(), self.top_values[:, :n].tolist(), strict=True)
        return [Logprob(value, list(zip(ids, values, strict=True))) for value, ids, values in rows]
