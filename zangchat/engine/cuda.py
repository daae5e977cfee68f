"""CUDA: the decoding step as graphs, and copies that do not wait.

Every stream, event, graph and pinned buffer is made on the device of its tensors: the current
device of a thread is GPU 0 unless the thread says otherwise.

Shapes: B rows, V vocabulary.
"""

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Numbers of rows for which a graph is captured, and to which the cache grows.
ROW_CLASSES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
POSITIONS = 256  # attended and stored lengths are multiples of this
_capturing = threading.Lock()  # workers of several GPUs: one capture at a time
# Streams whose graphs are gone. torch has 32, handed out in turn, and the end of a graph frees the
# cuBLAS workspace of its stream, which other graphs of that stream still use (pytorch#193402).
_unused: dict[torch.device, list[torch.cuda.Stream]] = {}
# A graph, its inputs (tokens and positions) and its output (logits).
Captured = tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]


def row_class(rows: int) -> int:
    return next((n for n in ROW_CLASSES if n >= rows), -(-rows // 64) * 64)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current device; does nothing for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor on the device, without waiting for the device."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    with on_device(device):
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def padded(
    rows: Sequence[Sequence[int]], device: torch.device, size: int = 0, fill: int = 0
) -> Tensor:
    """Rows of tokens as (B, T) int64 on the device, padded on the right, to `size` at least."""
    size = max(size, *map(len, rows))
    flat = [token for row in rows for token in (*row, *[fill] * (size - len(row)))]
    return to_device(flat, torch.int64, device).view(len(rows), size)


def to_host(tensor: Tensor) -> tuple[Tensor, Any]:
    """(the tensor on the host, the event to wait for before reading it; None on a CPU)."""
    if tensor.device.type != "cuda":
        return tensor, None
    with on_device(tensor.device):
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        arrived = torch.cuda.Event()
        host.copy_(tensor, non_blocking=True)
        arrived.record(torch.cuda.current_stream(tensor.device))
    return host, arrived


class DecodeGraphs:
    """CUDA graphs of a model's decoding step over a cache: one launch instead of hundreds.

    One graph per size class (rows, positions), kept until `clear`; changes of the weights and of
    the cache in place leave them valid. They share a stream, which is theirs alone, and a memory
    pool. Not yet measured on a GPU.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache, self.device = model, cache, model.get_device()
        self._unused = _unused.setdefault(self.device, [])
        with _capturing, on_device(self.device):
            self.stream = self._unused.pop() if self._unused else torch.cuda.Stream(self.device)
        self.clear()

    def __del__(self) -> None:
        self.graphs.clear()
        self._unused.append(self.stream)

    def clear(self) -> None:
        """Forget the graphs, before the cache moves to other memory."""
        self.graphs: dict[tuple[int, int], Captured] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, idx: Tensor) -> Tensor:
        """Next tokens idx (B, 1) of rows 0..B-1 -> logits (B, V), valid until the next call.

        A row from B on stores a token in the place of its next one, which is written again before
        it is read. So the graph must reach beyond all its rows: one may hold a prompt half read.
        """
        B, lengths = idx.size(0), self.cache.lengths
        rows = min(row_class(B), self.cache.num_rows)
        end = -(-(max(lengths[:rows]) + 1) // POSITIONS) * POSITIONS
        end = min(end, self.cache.capacity - self.cache.ahead)
        places = to_device(lengths[:rows], torch.int64, self.device)
        with on_device(self.device):
            if (rows, end) not in self.graphs:
                self.graphs[rows, end] = self._capture(places, end)
            graph, static_idx, positions, logits = self.graphs[rows, end]
            static_idx[:B].copy_(idx)
            positions.copy_(places)
            graph.replay()
        lengths[:B] = [length + 1 for length in lengths[:B]]
        return logits[:B]

    def _capture(self, places: Tensor, end: int) -> Captured:
        positions = places.clone()
        idx = torch.zeros_like(positions)[:, None]

        def step() -> Tensor:
            return self.model(idx, kv_cache=self.cache.fixed_rows(positions, end))[:, 0]

        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        with _capturing, contextlib.ExitStack() as failed:
            failed.callback(self.clear)  # the end of this graph would free the others' memory
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):  # not yet captured: libraries allocate at first
                step()
            current.wait_stream(self.stream)
            # in the mode "global" a call of another thread to its own GPU would end the capture
            with torch.cuda.graph(graph, self.pool, self.stream, "thread_local"):
                logits = step()
            failed.pop_all()
        return graph, idx, positions, logits
