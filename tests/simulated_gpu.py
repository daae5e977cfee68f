"""A simulated GPU that tracks memory and operations but computes no values.

torch's FakeTensorMode gives every tensor a shape, a dtype and a device, but no values. A step on a
simulated GPU therefore reveals mistakes of device and dtype, counts the bytes that it allocates,
and fails whenever the host would have to wait for a value. It says nothing about kernels (speed,
rounding, workspaces) or about the allocator's overhead.
"""

import collections
import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zangchat.engine import kv_cache, sampling
from zangchat.nn import attention

DEVICE = torch.device("cuda", 0)
PAGE = 512  # bytes: torch's CUDA allocator rounds up to a multiple


class Usage(TorchDispatchMode):
    """Bytes of simulated tensors on the GPU (now, and at their peak), and calls by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.calls: collections.Counter[str] = collections.Counter()
        self._seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls[function.overloadpacket.__name__] += 1
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = -(-storage.nbytes() // PAGE) * PAGE

        def freed() -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.finalize(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextlib.contextmanager
def simulated_gpu() -> Iterator[Usage]:
    """Give tensors no values, and count those on DEVICE.

    Attention is torch's flash kernel. Copies from pinned memory complete at once.
    """

    def sent(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(len(values), dtype=dtype, device=device)

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        return out

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), Usage() as usage:
        for module in (sampling, kv_cache):
            patch.setattr(module, "to_device", sent)
        patch.setitem(attention._KERNELS, "sdpa", flash)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))  # Hopper
        # the key of a recomputed block during a backward pass
        patch.setattr(torch._C, "_current_graph_task_id", lambda: 1)
        yield usage


@torch.no_grad()
def backward(losses: list[Tensor]) -> None:
    """losses.pop().backward() without torch's engine, which needs a real device.

    Each node is freed as soon as it is done.
    """
    ready: list[Any] = [losses.pop().grad_fn]
    missing = _uses(ready[0])
    grads: dict[Any, dict[int, Tensor]] = {ready[0]: {0: torch.ones((), device=DEVICE)}}
    while ready:
        node = ready.pop()
        inputs = grads.pop(node, {})
        step = getattr(node, "apply", node)  # a node written in Python cannot be called
        results = step(*[inputs.pop(i, None) for i in range(len(node._input_metadata))])
        edges = node.next_functions
        del node, step
        results = list(results) if isinstance(results, tuple) else [results]
        for (user, place), grad in zip(edges, _emptied(results), strict=False):
            if user is None:
                continue
            if grad is not None:
                sums = grads.setdefault(user, {})
                sums[place] = sums[place] + grad if place in sums else grad
            missing[user] -= 1
            if not missing[user]:
                del missing[user]
                ready.append(user)
            del grad
        user = edges = None


def _uses(root: Any) -> collections.Counter[Any]:
    """The number of nodes that pass a gradient to each node."""
    uses: collections.Counter[Any] = collections.Counter()
    seen, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                uses[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    return uses


def _emptied(items: list[Any]) -> Iterator[Any]:
    """Yield the items, keeping no reference to those already yielded."""
    items.reverse()
    while items:
        yield items.pop()
