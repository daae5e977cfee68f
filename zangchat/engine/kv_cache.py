"""Keys and values of many rows, each at its own position; the decoding step as CUDA graphs.

Shapes: B rows, T new tokens, N = B x T, S stored tokens, L layers, G key/value heads, D head
dimension.
"""

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zangchat.config import GPTConfig
from zangchat.engine.sampling import to_device

CACHE_BLOCK = 64  # the length of a cache is a multiple of this
# Split rows into another attention call only if that saves reading at least this many bytes of a
# layer. Sorting the rows is part of the price.
MIN_SAVED_BYTES = 2**21


def storage_dtype(compute_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The fastest dtype for keys and values.

    On a CPU fp32: torch's attention of one token takes up to seven times as long over bf16 (8 rows
    of 288 tokens, 6 heads of 64: 0.8 ms, in fp32 0.11).
    """
    return torch.float32 if device.type == "cpu" else compute_dtype


class KVCache:
    """Keys and values of many rows, preallocated, grown by doubling; every row has its own length.

    `storage` (L, 2 x G, rows, S, D): first the heads of the keys, then those of the values, so that
    a head reads one piece of memory per row.
    """

    def __init__(
        self,
        config: GPTConfig,
        num_rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.max_capacity = _rounded(config.sequence_len)
        self.lengths = [0] * num_rows  # tokens stored, per row
        shape = (
            config.n_layer,
            2 * config.n_kv_head,
            num_rows,
            _rounded(capacity),
            config.head_dim,
        )
        # zeros, not empty: a masked position enters the sum as 0 x value, NaN if the memory held
        # one
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
        """Bytes that a layer reads per row and stored token."""
        return self.storage.size(1) * self.storage.size(4) * self.storage.element_size()

    def reserve(self, num_rows: int, capacity: int) -> None:
        """Make room and keep the contents. Storage at least doubles: growing costs little over
        time.
        """
        if num_rows > self.num_rows:
            num_rows = max(num_rows, 2 * self.num_rows)
            self.lengths += [0] * (num_rows - self.num_rows)
        if capacity > self.capacity:
            capacity = max(_rounded(capacity), min(2 * self.capacity, self.max_capacity))
        rows, length, old = self.num_rows, self.capacity, self.storage
        if num_rows > rows or capacity > length:
            size = (max(num_rows, rows), max(capacity, length), old.size(4))
            new = old.new_zeros(*old.shape[:2], *size)
            new[:, :, :rows, :length] = old
            self._keep(new)

    def copy_rows(self, sources: Mapping[int, int]) -> None:
        """Copy into each row (key) the contents of another one (value), all at once."""
        stored = {
            row: self.storage[:, :, source, : self.lengths[source]]
            for row, source in sorted(sources.items())
        }
        for row, source in sources.items():
            if source < row and source in sources:  # will be written before it is read
                stored[row] = stored[row].clone()
        for row, part in stored.items():
            self.lengths[row] = part.size(2)
            self.storage[:, :, row, : part.size(2)] = part

    def rows(self, start: int, stop: int, groups: Sequence[int] = ()) -> "CacheRows":
        """The rows start..stop-1 as the context of one forward pass."""
        return self.some_rows(range(start, stop), groups)

    def some_rows(self, rows: Sequence[int], groups: Sequence[int] = ()) -> "CacheRows":
        """Any rows for one forward pass; they must be consecutive unless all are empty.

        `groups`: sizes of groups of rows that attend together, each as far as its longest row; by
        default one group.
        """
        if not (rows and all(0 <= row < self.num_rows for row in rows)):
            raise ValueError(f"rows {list(rows)} of a cache that has {self.num_rows}")
        lengths = [self.lengths[row] for row in rows]
        spans, done = [], 0
        for size in groups or [len(rows)]:
            part, done = lengths[done : done + size], done + size
            spans.append(_Span(size, max(part), min(part) == max(part)))
        return CacheRows(self, rows, to_device(lengths, torch.int64, self.storage.device), spans)

    def fixed_rows(self, positions: Tensor, end: int) -> "CacheRows":
        """The rows 0..B-1 for a step of one token each, as a CUDA graph needs them.

        They attend to the first `end` positions. The values of `positions` (B,) may change on the
        device from call to call. The caller updates `lengths`.
        """
        B = positions.numel()
        return CacheRows(
            self, range(B), positions, [_Span(B, end - 1, aligned=False)], counts=False
        )


class _Span(NamedTuple):
    """Consecutive rows that attend together."""

    size: int
    longest: int  # tokens stored in the longest row
    aligned: bool  # all rows have that length


class CacheRows:
    """Some rows of a cache for one forward pass: a gpt.AttentionContext.

    Room for the new tokens must have been reserved.
    """

    def __init__(
        self,
        cache: KVCache,
        rows: Sequence[int],
        positions: Tensor,
        spans: Sequence[_Span],
        counts: bool = True,
    ) -> None:
        self.cache, self.rows, self.positions = cache, rows, positions
        self.spans, self.counts = spans, counts
        self.longest = max(span.longest for span in spans)
        self._where: Any = None  # (N,) positions of the new tokens, in (rows, S) as one dimension
        self._stored: list[Any] = []  # the results of store(), by layer

    def update(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append k, v (B, G, T, D) to the rows.

        Returns keys and values (B, G, S, D) and a mask (B, 1, T, S) to add. The mask is None for
        plain causal attention: among the T new tokens, or of one token to rows of one length.
        """
        if len(self.spans) > 1:
            self.spans = [_Span(len(self.rows), self.longest, aligned=False)]
        new = torch.stack((k, v)).permute(1, 3, 0, 2, 4)  # (B, T, 2, G, D)
        (everything,) = self.store(
            layer_idx, new.reshape(new.size(0) * new.size(1), -1, new.size(4))
        )
        return everything

    def store(self, layer_idx: int, new: Tensor) -> Sequence[tuple[Tensor, Tensor, Tensor | None]]:
        """The same for keys and values side by side, (N, 2 x G, D), per group of rows."""
        if self._where is None:
            self._prepare(new)
        new_first = new.transpose(0, 1).to(self.cache.storage.dtype)
        self.cache.layers[layer_idx].index_copy_(1, self._where, new_first)
        if self.longest == 0:
            k, v = new.view(len(self.rows), -1, *new.shape[1:]).transpose(1, 2).chunk(2, dim=1)
            return [(k, v, None)]
        return self._stored[layer_idx]

    def _prepare(self, new: Tensor) -> None:
        """Positions, views and masks, which all layers share."""
        B, cache, device = len(self.rows), self.cache, new.device
        T, first = new.size(0) // B, self.rows[0]
        fits = new.size(0) == T * B and new.size(1) == cache.storage.size(1)
        if not fits or self.longest + T > cache.capacity:
            raise ValueError(
                f"no room for {tuple(new.shape)} after {self.longest} tokens in {B} rows"
            )
        where = self.positions[:, None] + torch.arange(T, device=device)  # (B, T)
        self._where = (self._row_numbers(device)[:, None] * cache.capacity + where).flatten()
        if self.longest == 0:
            return
        groups, done = [], 0
        for size, longest, aligned in self.spans:
            end, start, done = longest + T, done, done + size
            span = slice(first + start, first + done)
            stored = cache.storage[:, :, span, :end].transpose(1, 2)  # (L, size, 2 x G, S, D)
            mask = None
            if T > 1 or not aligned:
                hidden = torch.arange(end, device=device) > where[start:done, :, None]
                mask = torch.zeros(hidden.shape, dtype=stored.dtype, device=device)
                mask = mask.masked_fill_(hidden, float("-inf"))[:, None]
            k, v = (part.unbind(0) for part in stored.chunk(2, dim=2))
            groups.append(zip(k, v, repeat(mask), strict=False))
        self._stored = list(zip(*groups, strict=True))

    def _row_numbers(self, device: torch.device) -> Tensor:
        if isinstance(self.rows, range):  # made on the device, as a CUDA graph requires
            return torch.arange(self.rows.start, self.rows.stop, device=device)
        return to_device(self.rows, torch.int64, device)

    def advance(self, num_tokens: int) -> None:
        if self.counts:
            for row in self.rows:
                self.cache.lengths[row] += num_tokens


def groups_by_length(lengths: Sequence[int], bytes_per_token: int) -> list[int]:
    """Sizes of groups of rows, given their lengths, longest first.

    Cuts in two, and the parts again, if that saves MIN_SAVED_BYTES of reading.
    """
    saved = [(len(lengths) - i) * (lengths[0] - length) for i, length in enumerate(lengths)]
    if max(saved, default=0) * bytes_per_token <= MIN_SAVED_BYTES:
        return [len(lengths)] if lengths else []
    cut = saved.index(max(saved))
    parts = (lengths[:cut], lengths[cut:])
    return [size for part in parts for size in groups_by_length(part, bytes_per_token)]


def _rounded(length: int) -> int:
    return -(-length // CACHE_BLOCK) * CACHE_BLOCK


class _Captured(NamedTuple):
    """A graph, its inputs (tokens and positions) and its output (logits)."""

    graph: torch.cuda.CUDAGraph
    idx: Tensor
    positions: Tensor
    logits: Tensor


class DecodeGraphs:
    """CUDA graphs of a decoding step: one launch instead of hundreds.

    One graph per (rows, positions) size class. Not yet measured on a GPU.
    """

    ROW_CLASSES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    POSITIONS = 256  # the attended length is rounded up to a multiple of this

    def __init__(self, model: Any) -> None:
        self.model = model
        self.storage = 0  # address of the cache that the graphs were captured for
        self.graphs: dict[tuple[int, int], _Captured] = {}

    def __call__(self, cache: KVCache, idx: Tensor) -> Tensor:
        """Next tokens idx (B, 1) of rows 0..B-1 -> logits (B, V), valid until the next call."""
        B = idx.size(0)
        rows = next((n for n in self.ROW_CLASSES if n >= B), B)
        end = -(-(max(cache.lengths[:B]) + 1) // self.POSITIONS) * self.POSITIONS
        cache.reserve(rows, end)
        end = min(end, cache.capacity)
        if cache.storage.data_ptr() != self.storage:
            self.storage, self.graphs = cache.storage.data_ptr(), {}
        if (rows, end) not in self.graphs:
            self.graphs[rows, end] = self._capture(cache, rows, end)
        graph, static_idx, positions, logits = self.graphs[rows, end]
        static_idx[:B].copy_(idx)
        # Rows from B on store their token in the place of their next one: no step ever reads it.
        places = [min(length, end - 1) for length in cache.lengths[:rows]]
        positions.copy_(to_device(places, torch.int64, positions.device))
        graph.replay()
        for row in range(B):
            cache.lengths[row] += 1
        return logits[:B]

    def _capture(self, cache: KVCache, rows: int, end: int) -> "_Captured":
        device = cache.storage.device
        idx = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        positions = torch.zeros(rows, dtype=torch.int64, device=device)
        positions.copy_(torch.tensor([min(length, end - 1) for length in cache.lengths[:rows]]))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # once outside of a graph: libraries allocate at first
            self.model(idx, kv_cache=cache.fixed_rows(positions, end))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.model(idx, kv_cache=cache.fixed_rows(positions, end))[:, 0]
        return _Captured(graph, idx, positions, logits)
