"""A GPT as the engine runs it: the same function and the same code, with its weights laid out for short passes.

Weights are stored in the compute dtype (fp32 masters would be cast at every token) or as int8 with one scale per output, q, k and v
are one product, and on a CPU the products of a few rows run in the layout that costs little more for eight rows than for one.
The slow twin is gpt.GPT itself.

Shapes: B rows, T tokens, N = B x T, C width, H query heads, G key/value heads, D head dimension.
"""

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zangchat.attention import attend
from zangchat.functional import rms_norm
from zangchat.gpt import GPT, Attention, KVCacheLike, Linear

FEW_ROWS = 32  # up to here W x^T beats x W^T on a CPU
QUANTIZATIONS = ("", "int8")


def for_inference(model: GPT, quantize: str = "") -> GPT:
    """A snapshot of `model` for decoding: weights that need no change are shared, the others are copies. Make a new one after training.

    Raises ValueError for an unknown `quantize`: "" or "int8" (the products of the blocks and the head; activations stay as they are).
    """
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"unknown quantization {quantize!r}: int8, or none")
    twin = _copied(model)
    twin.__class__ = _InferenceGPT
    make = Int8Linear if quantize else StoredLinear
    dtype = model.compute_dtype
    for module in list(twin.modules()):
        if isinstance(module, Attention):
            module.__class__ = _FusedAttention
            parts = [cast(Linear, module._modules.pop(name)) for name in ("c_q", "c_k", "c_v")]
            module.c_qkv = make(torch.cat([part.weight.data for part in parts]).to(dtype))
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, make(child.weight.data.to(dtype)))
    twin.init_rotary()
    return twin.eval()


def _copied(module: Any) -> Any:
    """The module with modules and tables of its own, but the same tensors."""
    twin = copy.copy(module)
    children = {name: _copied(child) for name, child in module._modules.items()}
    twin.__dict__.update(_modules=children, _parameters=dict(module._parameters), _buffers=dict(module._buffers))
    return twin


class _InferenceGPT(GPT):
    def init_rotary(self, length: int | None = None) -> None:
        """Tables (length, D) that rotate in one multiplication and one fused multiply-add: see _FusedAttention."""
        super().init_rotary(length)
        self.cos, self.sin = torch.cat((self.cos, self.cos), dim=-1), torch.cat((self.sin, -self.sin), dim=-1)


class _FusedAttention(Attention):
    c_qkv: nn.Module

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], kv_cache: KVCacheLike | None, backend: str) -> Tensor:
        B, T, C = x.shape
        G = self.n_kv_head
        heads = self.c_qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2G, T, D)
        cos, sin = rotary
        turned = heads[:, :-G]
        turned = rms_norm(torch.addcmul(turned * cos, turned.roll(self.head_dim // 2, -1), sin), self.eps)
        q, k, v = turned[:, :-G], turned[:, -G:], heads[:, -G:]
        mask = None
        if kv_cache is not None:
            k, v, mask = kv_cache.update(self.layer_idx, k, v)
        return self.c_proj(attend(q, k, v, mask, backend).transpose(1, 2).reshape(B, T, C))


class StoredLinear(nn.Module):
    """x W^T with W (out, in) in the dtype of x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        N = x.numel() // x.size(-1)
        if x.is_cpu and 1 < N <= FEW_ROWS and x.dtype == torch.float32:
            y = torch.mm(self.weight, x.reshape(N, -1).t().contiguous())
            return y.t().contiguous().view(*x.shape[:-1], -1)
        return F.linear(x, self.weight)


class Int8Linear(nn.Module):
    """x W^T with W (out, in) stored as int8 times one scale per output, rounded to nearest: a quarter of fp32's bytes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scales = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight.float() / scales[:, None]).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        N, weight, scales = x.numel() // x.size(-1), cast(Tensor, self.weight), cast(Tensor, self.scales)
        if x.is_cpu and N <= FEW_ROWS:  # the kernel is fast for bf16 activations alone
            y = torch._weight_int8pack_mm(x.reshape(N, -1).bfloat16(), weight, scales.bfloat16())
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        return F.linear(x, weight.to(x.dtype)) * scales.to(x.dtype)


class DecodeGraphs:
    """CUDA graphs of a decoding step: one launch where an eager step has hundreds. One graph per (rows, positions) size class.

    Not yet measured on a GPU.
    """

    ROW_CLASSES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    POSITIONS = 256  # the attended length is rounded up to a multiple of this

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.storage = 0  # address of the cache that the graphs were made for
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    def __call__(self, cache: Any, idx: Tensor) -> Tensor:
        """Logits (B, V) for the next tokens idx (B, 1) of rows 0..B-1; they are valid until the next call."""
        from zangchat.sampling import to_device

        B = idx.size(0)
        rows = next((n for n in self.ROW_CLASSES if n >= B), B)
        end = -(-(max(cache.lengths[:B]) + 1) // self.POSITIONS) * self.POSITIONS
        cache.reserve(rows, end)
        end = min(end, cache.capacity)
        if cache.keys.data_ptr() != self.storage:
            self.storage, self.graphs = cache.keys.data_ptr(), {}
        if (rows, end) not in self.graphs:
            self.graphs[rows, end] = self._capture(cache, rows, end)
        graph, static_idx, positions, logits = self.graphs[rows, end]
        static_idx[:B].copy_(idx)
        # Rows beyond B store their token where their next one will go, so that nobody ever sees it.
        positions.copy_(to_device([min(length, end - 1) for length in cache.lengths[:rows]], torch.int64, positions.device))
        graph.replay()
        for row in range(B):
            cache.lengths[row] += 1
        return logits[:B]

    def _capture(self, cache: Any, rows: int, end: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        device = cache.keys.device
        idx = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        positions = torch.zeros(rows, dtype=torch.int64, device=device)
        positions.copy_(torch.tensor([min(length, end - 1) for length in cache.lengths[:rows]]))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # once outside of a graph: libraries allocate at their first call
            self.model(idx, kv_cache=cache.fixed_rows(positions, end))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.model(idx, kv_cache=cache.fixed_rows(positions, end))[:, 0]
        return graph, idx, positions, logits
