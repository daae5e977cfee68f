"""Keys and values of many rows, each at its own position, as the engine stores them and the model reads them.

Shapes: B rows, T new tokens, N = B x T, S stored tokens, L layers, G key/value heads, D head dimension.
"""

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zangchat.config import GPTConfig
from zangchat.engine.sampling import to_device

CACHE_BLOCK = 64  # a cache is as long as a multiple of this
WORTH_A_CALL = 2**21  # bytes of a layer's keys and values that are worth one more call of the attention kernel, and keeping rows in order


def storage_dtype(compute_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What keys and values had best be stored in. On a CPU fp32: there torch's attention of one token takes up to seven times as long
    over bf16 (8 rows of 288 tokens, 6 heads of 64: 0.8 ms where fp32 takes 0.11)."""
    return torch.float32 if device.type == "cpu" else compute_dtype


class KVCache:
    """Keys and values of many rows, preallocated and grown by doubling; every row has its own length.

    `storage` (L, 2 x G, rows, S, D), first the heads of the keys, then those of the values: what a head reads of a row is one piece.
    """

    def __init__(self, config: GPTConfig, num_rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.max_capacity = _rounded(config.sequence_len)
        self.lengths = [0] * num_rows  # tokens stored, per row
        shape = (config.n_layer, 2 * config.n_kv_head, num_rows, _rounded(capacity), config.head_dim)
        # zeros, not empty: a masked position still enters the sum as 0 x value, which is NaN where the memory held one
        self._keep(torch.zeros(shape, dtype=dtype, device=device))

    def _keep(self, storage: Tensor) -> None:
        self.storage = storage
        self.layers = storage.flatten(2, 3).unbind(0)  # (2 x G, rows x S, D) each

    @property
    def num_rows(self) -> int:
        return self.storage.size(2)

    @property
    def capacity(self) -> int:
        return self.storage.size(3)

    @property
    def bytes_per_token(self) -> int:
        """That a layer reads of a row for each token stored."""
        return self.storage.size(1) * self.storage.size(4) * self.storage.element_size()

    def reserve(self, num_rows: int, capacity: int) -> None:
        """Make room, keeping what is stored. Storage at least doubles, so that growing costs little over time."""
        if num_rows > self.num_rows:
            num_rows = max(num_rows, 2 * self.num_rows)
            self.lengths += [0] * (num_rows - self.num_rows)
        if capacity > self.capacity:
            capacity = max(_rounded(capacity), min(2 * self.capacity, self.max_capacity))
        rows, length, old = self.num_rows, self.capacity, self.storage
        if num_rows > rows or capacity > length:
            new = old.new_zeros(*old.shape[:2], max(num_rows, rows), max(capacity, length), old.size(4))
            new[:, :, :rows, :length] = old
            self._keep(new)

    def copy_rows(self, sources: Mapping[int, int]) -> None:
        """Put into each row (key) what was in another one (value), all at once."""
        stored = {row: self.storage[:, :, source, : self.lengths[source]] for row, source in sorted(sources.items())}
        for row, source in sources.items():
            if source < row and source in sources:  # will be written before it is read
                stored[row] = stored[row].clone()
        for row, part in stored.items():
            self.lengths[row] = part.size(2)
            self.storage[:, :, row, : part.size(2)] = part

    def rows(self, start: int, stop: int, groups: Sequence[int] = ()) -> "CacheRows":
        """The rows start..stop-1 as the model's forward takes them, for one call."""
        return self.some_rows(range(start, stop), groups)

    def some_rows(self, rows: Sequence[int], groups: Sequence[int] = ()) -> "CacheRows":
        """Any rows for one call; unless nothing is stored in them yet they must be consecutive. `groups`: how many of them in turn attend
        together, as far as the longest of these; by default all."""
        if not (rows and all(0 <= row < self.num_rows for row in rows)):
            raise ValueError(f"rows {list(rows)} of a cache that has {self.num_rows}")
        lengths = [self.lengths[row] for row in rows]
        spans, done = [], 0
        for size in groups or [len(rows)]:
            part, done = lengths[done : done + size], done + size
            spans.append(_Span(size, max(part), min(part) == max(part)))
        return CacheRows(self, rows, to_device(lengths, torch.int64, self.storage.device), spans)

    def fixed_rows(self, positions: Tensor, end: int) -> "CacheRows":
        """The rows 0..B-1 for a step of one token each, attending to the first `end` places, whose `positions` (B,) may change on the
        device from call to call: what a CUDA graph needs. `lengths` is left to the caller."""
        B = positions.numel()
        return CacheRows(self, range(B), positions, [_Span(B, end - 1, aligned=False)], counts=False)


class _Span(NamedTuple):
    """Consecutive rows that attend together."""

    size: int
    longest: int  # tokens stored in the longest row
    aligned: bool  # and in all the others


class CacheRows:
    """Some rows of a cache for one forward pass: gpt.KVCacheLike. Room for the new tokens must have been reserved."""

    def __init__(self, cache: KVCache, rows: Sequence[int], positions: Tensor, spans: Sequence[_Span], counts: bool = True) -> None:
        self.cache, self.rows, self.positions, self.spans, self.counts = cache, rows, positions, spans, counts
        self.longest = max(span.longest for span in spans)
        self._where: Any = None  # (N,) places of the new tokens, in (rows, S) taken as one dimension
        self._stored: list[Any] = []  # of each layer, what store() returns

    def update(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store k, v (B, G, T, D) behind each row's tokens; returns keys and values (B, G, S, D) and a mask (B, 1, T, S) to be added.

        The mask is None where plain causal attention is meant: to the T new tokens alone, or of one token to rows of one length.
        """
        if len(self.spans) > 1:
            self.spans = [_Span(len(self.rows), self.longest, aligned=False)]
        new = torch.stack((k, v)).permute(1, 3, 0, 2, 4)  # (B, T, 2, G, D)
        (everything,) = self.store(layer_idx, new.reshape(new.size(0) * new.size(1), -1, new.size(4)))
        return everything

    def store(self, layer_idx: int, new: Tensor) -> Sequence[tuple[Tensor, Tensor, Tensor | None]]:
        """The same for keys and values side by side, (N, 2 x G, D), and for each group of rows in turn."""
        if self._where is None:
            self._prepare(new)
        self.cache.layers[layer_idx].index_copy_(1, self._where, new.transpose(0, 1).to(self.cache.storage.dtype))
        if self.longest == 0:
            k, v = new.view(len(self.rows), -1, *new.shape[1:]).transpose(1, 2).chunk(2, dim=1)
            return [(k, v, None)]
        return self._stored[layer_idx]

    def _prepare(self, new: Tensor) -> None:
        """What all layers share."""
        B, cache, device = len(self.rows), self.cache, new.device
        T, first = new.size(0) // B, self.rows[0]
        if self.longest + T > cache.capacity or new.size(0) != T * B or new.size(1) != cache.storage.size(1):
            raise ValueError(f"no room for {tuple(new.shape)} behind {self.longest} tokens in {B} rows")
        where = self.positions[:, None] + torch.arange(T, device=device)  # (B, T)
        together = list(self.rows) == list(range(first, first + B))
        rows = torch.arange(first, first + B, device=device) if together else to_device(self.rows, torch.int64, device)
        self._where = (rows[:, None] * cache.capacity + where).flatten()
        if self.longest == 0:
            return
        groups, done = [], 0
        for size, longest, aligned in self.spans:
            end, start, done = longest + T, done, done + size
            stored = cache.storage[:, :, first + start : first + done, :end].transpose(1, 2)  # (L, size, 2 x G, S, D)
            mask = None
            if T > 1 or not aligned:
                hidden = torch.arange(end, device=device) > where[start:done, :, None]
                mask = torch.zeros(hidden.shape, dtype=cache.storage.dtype, device=device).masked_fill_(hidden, float("-inf"))[:, None]
            groups.append(zip(*(part.unbind(0) for part in stored.chunk(2, dim=2)), repeat(mask), strict=False))
        self._stored = list(zip(*groups, strict=True))

    def advance(self, num_tokens: int) -> None:
        if self.counts:
            for row in self.rows:
                self.cache.lengths[row] += num_tokens


def groups_by_length(lengths: Sequence[int], bytes_per_token: int) -> list[int]:
    """Sizes of groups of rows, given their lengths, longest first: cut in two, and the parts again, where what is read less that way is
    worth one more call."""
    saved = [(len(lengths) - i) * (lengths[0] - length) for i, length in enumerate(lengths)]
    if max(saved, default=0) * bytes_per_token <= WORTH_A_CALL:
        return [len(lengths)] if lengths else []
    cut = saved.index(max(saved))
    return groups_by_length(lengths[:cut], bytes_per_token) + groups_by_length(lengths[cut:], bytes_per_token)


def _rounded(length: int) -> int:
    return -(-length // CACHE_BLOCK) * CACHE_BLOCK
