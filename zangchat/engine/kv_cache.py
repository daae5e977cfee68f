"""Keys and values of many rows, each at its own position.

Shapes: B rows, T new tokens, N = B x T, S stored tokens, L layers, G key/value heads, D head
dimension.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zangchat.config import GPTConfig
from zangchat.engine.cuda import POSITIONS, row_class, to_device
from zangchat.errors import UserError
from zangchat.nn.attention import Attended, keys_and_values, offset_keys

CACHE_BLOCK = 64  # the length of a cache is a multiple of this


class KVCache:
    """Keys and values of many rows, preallocated, grown on demand; every row has its own length.

    `storage` (L, 2 x G, rows, S, D): first the heads of the keys, then those of the values, so that
    a head reads one piece of memory per row. `budget`: bytes that it may take, while it grows too.
    """

    def __init__(
        self,
        config: GPTConfig,
        num_rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.budget = math.inf
        self.longest = _rounded(config.sequence_len)
        self.lengths = [0] * num_rows  # tokens stored, per row; 0 for a row that is not in use
        # positions more than tokens: the newest token's half of the next key, see offset_keys
        self.ahead = int(config.key_offset)
        size = (num_rows, _rounded(capacity + self.ahead), config.head_dim)
        # zeros, not empty: a masked position adds 0 x value, NaN if the memory held one
        heads = 2 * config.n_kv_head
        self._keep(torch.zeros(config.n_layer, heads, *size, dtype=dtype, device=device))

    def _keep(self, storage: Tensor) -> None:
        _, heads, self.num_rows, self.capacity, head_dim = storage.shape
        self.storage = storage
        self.layers = storage.flatten(2, 3).unbind(0)  # (2 x G, rows x S, D) each
        self.bytes_per_token = heads * head_dim * storage.element_size()  # for one layer to read

    def too_small(self, capacity: int) -> UserError:
        """The error for a row of this many tokens."""
        need = capacity * self.bytes_per_token * len(self.storage) / 2**20
        problem = f"{capacity} tokens need {need:,.0f} MiB of memory for keys and values"
        free = f"{self.budget / 2**20:,.0f} MiB are free for them"
        return UserError(f"{problem}, and {free}: ask for fewer new tokens, or shorten the prompt")

    def reserve(self, num_rows: int, capacity: int) -> bool:
        """Make room for rows of `capacity` tokens. Whether the storage has moved.

        Keeps the tokens stored in these rows; without any, the old memory is freed first. Raises
        UserError if the budget is too small.
        """
        size, old = self.size_for(num_rows, capacity), self.storage
        if size == (self.num_rows, self.capacity):
            return False
        if size is None:
            raise self.too_small(capacity)
        rows, length = min(size[0], self.num_rows), max(self.lengths, default=0)
        if length:
            length += self.ahead
        else:
            self._keep(old[:, :, :0].clone())
            old = self.storage
        new = old.new_zeros(*old.shape[:2], *size, old.size(4))
        if length:
            new[:, :, :rows, :length] = old[:, :, :rows, :length]
        self._keep(new)
        self.lengths = self.lengths[:rows] + [0] * (size[0] - rows)
        return True

    def size_for(self, num_rows: int, capacity: int) -> tuple[int, int] | None:
        """(rows, capacity) to have: as now, grown by a class or tightly; None beyond the budget."""
        now, capacity = (self.num_rows, self.capacity), capacity + self.ahead
        if num_rows <= now[0] and capacity <= now[1]:
            return now
        rows, tight = row_class(num_rows), _rounded(capacity)
        length = max(tight, min(_rounded(capacity, POSITIONS), self.longest))
        kept = math.prod(now) if any(self.lengths) else 0
        most = self.budget / (self.bytes_per_token * len(self.storage)) - kept
        sizes = ((max(rows, now[0]), max(length, now[1])), (rows, length), (num_rows, tight))
        return next((size for size in sizes if math.prod(size) <= most), None)

    def copy_rows(self, sources: Mapping[int, int]) -> None:
        """Copy into each row (key) the contents of another one (value), all at once."""
        stored = {}
        for row, source in sorted(sources.items()):
            stored[row] = self.storage[:, :, source, : self.lengths[source] + self.ahead]
            if source < row and source in sources:  # will be written before it is read
                stored[row] = stored[row].clone()
        for row, part in stored.items():
            self.lengths[row] = part.size(2) - self.ahead
            self.storage[:, :, row, : part.size(2)] = part

    def rows(self, rows: Sequence[int]) -> "CacheRows":
        """Rows as the context of one forward pass; consecutive ones unless all are empty."""
        if not (rows and all(0 <= row < self.num_rows for row in rows)):
            raise ValueError(f"rows {list(rows)} of a cache that has {self.num_rows}")
        lengths = [self.lengths[row] for row in rows]
        positions = to_device(lengths, torch.int64, self.storage.device)
        return CacheRows(self, rows, positions, max(lengths), min(lengths) == max(lengths))

    def fixed_rows(self, positions: Tensor, end: int) -> "CacheRows":
        """The rows 0..B-1 for a step of one token each, as a CUDA graph needs them.

        They attend to the first `end` positions. The values of `positions` (B,) may change on the
        device from call to call. The caller updates `lengths`.
        """
        return CacheRows(self, range(positions.numel()), positions, end - 1, False, counts=False)


@dataclass(eq=False)
class CacheRows:
    """Rows of a cache for a forward pass, with room reserved for it: a gpt.AttentionContext."""

    cache: KVCache
    rows: Sequence[int]
    positions: Tensor
    longest: int  # tokens stored in the longest row
    aligned: bool  # all rows have that length
    counts: bool = True  # in the cache's `lengths`

    def __post_init__(self) -> None:
        # (N,) positions of the new tokens in (rows, S) as one dimension, and those after them
        self._where: Any = None
        self._after: Any = None
        self._mask: Tensor | None = None

    def update(self, layer_idx: int, k: Tensor, v: Tensor) -> Attended:
        """Append k, v (B, G, T, D) to the rows.

        Returns keys and values (B, G, S, D) and a mask (B, 1, T, S) to add. The mask is None for
        plain causal attention: among the T new tokens, or of one token to rows of one length.
        """
        new = torch.stack((k, v)).permute(1, 3, 0, 2, 4)  # (B, T, 2, G, D)
        return self.store(layer_idx, new.flatten(0, 1).flatten(1, 2))

    def store(self, layer_idx: int, new: Tensor) -> Attended:
        """The same for keys and values side by side, (N, 2 x G, D)."""
        if self._where is None:
            self._prepare(new)
        cache, B, first = self.cache, len(self.rows), self.rows[0]
        self._write(cache.layers[layer_idx], new.transpose(0, 1).to(cache.storage.dtype))
        if self.longest == 0:
            k, v = keys_and_values(new, B)
            return offset_keys(k) if cache.ahead else k, v, None
        end = self.longest + new.size(0) // B
        stored = cache.storage[layer_idx, :, first : first + B, :end].transpose(0, 1)
        k, v = stored.chunk(2, dim=1)  # (B, G, S, D)
        return k, v, self._mask

    def _write(self, layer: Tensor, new: Tensor) -> None:
        """`new` (2 x G, N, D) into a layer (2 x G, rows x S, D)."""
        if not self.cache.ahead:
            layer.index_copy_(1, self._where, new)
            return
        G, half = new.size(0) // 2, new.size(-1) // 2
        (own, moved), (to_own, to_moved) = (x[:G].split(half, dim=-1) for x in (new, layer))
        layer[G:].index_copy_(1, self._where, new[G:])
        to_own.index_copy_(1, self._where, own)
        if self.longest == 0:  # the first token keeps its own
            to_moved.index_copy_(1, self._where, moved)
        to_moved.index_copy_(1, self._after, moved)

    def _prepare(self, new: Tensor) -> None:
        """Positions and mask, which all layers share."""
        B, cache, device = len(self.rows), self.cache, new.device
        T, first = new.size(0) // B, self.rows[0]
        fits = new.size(0) == T * B and new.size(1) == cache.storage.size(1)
        if not fits or self.longest + T + cache.ahead > cache.capacity:
            problem = f"no room for {tuple(new.shape)} after {self.longest} tokens"
            raise ValueError(f"{problem} in {B} rows")
        where = self.positions[:, None] + torch.arange(T, device=device)  # (B, T)
        if isinstance(self.rows, range):  # made on the device, as a CUDA graph requires
            numbers = torch.arange(first, first + B, device=device)
        else:
            numbers = to_device(self.rows, torch.int64, device)
        self._where = (numbers[:, None] * cache.capacity + where).flatten()
        self._after = self._where + 1 if cache.ahead else None
        if self.longest and (T > 1 or not self.aligned):
            hidden = torch.arange(self.longest + T, device=device) > where[:, :, None]
            mask = torch.zeros(hidden.shape, dtype=cache.storage.dtype, device=device)
            self._mask = mask.masked_fill_(hidden, float("-inf"))[:, None]

    def advance(self, num_tokens: int) -> None:
        if self.counts:
            for row in self.rows:
                self.cache.lengths[row] += num_tokens


def _rounded(length: int, multiple: int = CACHE_BLOCK) -> int:
    return -(-length // multiple) * multiple
