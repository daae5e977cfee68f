"""A GPT as the engine runs it: the same function, laid out for short passes.

Weights are stored in the compute dtype (fp32 masters would be cast at every token) or as int8 with one scale per output; q, k and v
are one product; a block is as few operations as possible, on (rows, features) alone, since with a small model and few rows it is the
calls that cost time. The slow twin is gpt.GPT itself.

Shapes: B rows, T tokens, N = B x T, C width, H query heads, G key/value heads, D head dimension, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from zangchat.gpt import GPT, rotary_tables
from zangchat.nn.attention import attend

PACKED_FOR = 64  # rows that MKL lays weights out for: as fast as any with fewer, and no slower than unpacked with more
FEW_INT8_ROWS = 8  # up to here the int8 kernel for CPUs is faster than a product with the weights spelled out


class CacheForInference(Protocol):
    """What the model asks of a key/value cache beside gpt.KVCacheLike: kv_cache.CacheRows."""

    positions: Tensor
    longest: int

    def store(self, layer_idx: int, new: Tensor) -> Sequence[tuple[Tensor, Tensor, Tensor | None]]:
        """Store keys and values (N, 2 x G, D) of the new tokens; return what update() does, for each group of rows in turn."""

    def advance(self, num_tokens: int) -> None: ...


class Product:
    """x W^T for x (N, in) and a weight W (out, in), in the dtype of W."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def added(self, to: Tensor, x: Tensor) -> Tensor:
        """to + x W^T"""
        return torch.addmm(to, x, self.weight.t())


class PackedProduct:
    """The same in fp32 on x86 CPUs, with W laid out once for MKL: with 8 rows twice as fast as a plain product, close to what reading
    the weights takes."""

    def __init__(self, weight: Tensor) -> None:
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, PACKED_FOR)
        self.shape = weight.new_empty(()).expand(weight.shape)  # the kernel wants to see the weight, and looks at its shape alone
        self.product = torch.ops.mkl._mkl_linear.default

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x, self.packed, self.shape, None, x.size(0))

    def added(self, to: Tensor, x: Tensor) -> Tensor:
        return self(x).add_(to)


def product(weight: Tensor) -> Product | PackedProduct:
    packs = weight.is_cpu and weight.dtype == torch.float32 and torch.backends.mkl.is_available()
    return PackedProduct(weight) if packs else Product(weight)


class HalfProduct:
    """x W^T in fp32 with W stored as fp16 (11 bits of precision where bf16 has 8), by FBGEMM: half the bytes to read, for CPUs that do
    not multiply bf16."""

    def __init__(self, weight: Tensor) -> None:
        if not (weight.is_cpu and weight.dtype == torch.float32 and "fbgemm" in torch.backends.quantized.supported_engines):
            raise ValueError("fp16 weights are for fp32 on x86 CPUs: choose int8, or none")
        self.weight = torch.ops.quantized.linear_prepack_fp16(weight, None)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.weight)

    def added(self, to: Tensor, x: Tensor) -> Tensor:
        return self(x).add_(to)


class Int8Product:
    """x W^T with W stored as int8 times one scale per output, rounded to nearest: a quarter of fp32's bytes."""

    def __init__(self, weight: Tensor) -> None:
        self.scales = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
        self.weight = (weight.float() / self.scales[:, None]).round().to(torch.int8)

    def __call__(self, x: Tensor) -> Tensor:
        if x.is_cpu and x.size(0) <= FEW_INT8_ROWS:  # the kernel is fast for bf16 activations alone
            return torch._weight_int8pack_mm(x.bfloat16(), self.weight, self.scales.bfloat16()).to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype)) * self.scales.to(x.dtype)

    def added(self, to: Tensor, x: Tensor) -> Tensor:
        return self(x).add_(to)


PRODUCTS: dict[str, Any] = {"": product, "fp16": HalfProduct, "int8": Int8Product}


@dataclass
class Layer:
    """The products of a block."""

    qkv: Any  # each one of PRODUCTS
    out: Any
    up: Any
    down: Any


class InferenceGPT:
    """A snapshot of a GPT for decoding. Weights that need no change are shared with it; make a new one after training.

    `quantize` ("", "fp16", "int8") is how the weights of the products are stored; activations stay as they are. Raises ValueError for an
    unknown one, and for one that has no kernel here.
    """

    def __init__(self, model: GPT, quantize: str = "") -> None:
        if quantize not in PRODUCTS:
            raise ValueError(f"unknown quantization {quantize!r}: {', '.join(filter(None, PRODUCTS))}, or none")
        self.config, self.compute_dtype, self.attention_backend = model.config, model.compute_dtype, model.attention_backend
        self.device, dtype, make = model.get_device(), model.compute_dtype, PRODUCTS[quantize]
        self.embedding = model.wte.weight.data.to(dtype)
        self.layers = [
            Layer(
                make(torch.cat([self._paired(block.attn.c_q), self._paired(block.attn.c_k), block.attn.c_v.weight.data]).to(dtype)),
                make(block.attn.c_proj.weight.data.to(dtype)),
                make(block.mlp.c_fc.weight.data.to(dtype)),
                make(block.mlp.c_proj.weight.data.to(dtype)),
            )
            for block in cast(Any, model.transformer["h"])
        ]
        self.head = make(model.lm_head.weight.data.to(dtype))
        cos, sin = rotary_tables(self.config, self.config.sequence_len + 64, self.device)  # a cache may be that much longer
        self._rotary = torch.complex(cos, -sin).unsqueeze(1)  # (positions, 1, D/2)
        self._plain_cpu = self.device.type == "cpu" and dtype == torch.float32
        # as tensors: a Python number costs an operation more each time
        self._cap = torch.full((), self.config.logit_cap, device=self.device)
        self._floors = {
            width: (torch.tensor((width * self.config.rms_norm_eps) ** 0.5), torch.tensor(width**-0.5))
            for width in (self.config.n_embd, self.config.head_dim)
        }

    def _paired(self, projection: Any) -> Tensor:
        """The weight of queries or keys with channel i of a head beside channel i + D/2, so that a rotation is one complex product. All
        that is done with the two together, norm and scores, does not depend on the order."""
        weight: Tensor = projection.weight.data
        return weight.unflatten(0, (-1, 2, self.config.head_dim // 2)).transpose(1, 2).reshape(weight.shape)

    def get_device(self) -> torch.device:
        return self.device

    def __call__(self, idx: Tensor, kv_cache: CacheForInference | None = None, logits_at: Tensor | None = None) -> Tensor:
        """As GPT.forward: logits (B, T, V), fp32, capped; with logits_at (B,) those of one position of each row, (B, 1, V)."""
        (B, T), config = idx.shape, self.config
        H, G, D = config.n_head, config.n_kv_head, config.head_dim
        angles = self._angles(B, T, kv_cache)
        x = self._norm(F.embedding(idx.reshape(-1), self.embedding))
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(self._norm(x))
            heads = qkv.view(B * T, -1, D)
            turned = heads[:, : H + G]
            self._rotate(turned, angles)
            self._norm(turned, out=turned)
            if kv_cache is None:
                k, v = (part.transpose(1, 2) for part in heads[:, H:].view(B, T, 2, G, D).unbind(2))
                groups: Sequence[tuple[Tensor, Tensor, Tensor | None]] = [(k, v, None)]
            else:
                groups = kv_cache.store(i, heads[:, H:])
            q = heads[:, :H].view(B, T, H, D).transpose(1, 2)
            y = self._attend(q, groups).transpose(1, 2).reshape(B * T, -1)
            if logits_at is not None and i == len(self.layers) - 1:  # what the last layer adds elsewhere is read by nobody
                at = torch.arange(0, B * T, T, device=x.device) + logits_at
                x, y = x[at], y[at]
            x = layer.out.added(x, y)
            hidden = layer.up(self._norm(x)).relu_()
            x = layer.down.added(x, hidden.mul_(hidden))
        if kv_cache is not None:
            kv_cache.advance(T)
        logits = self.head(self._norm(x))[:, : config.vocab_size].float()
        return logits.div_(self._cap).tanh_().mul_(self._cap).view(B, -1, config.vocab_size)

    def _attend(self, q: Tensor, groups: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
        """Attention of q (B, H, T, D), whose rows are those of the groups one after the other."""
        if len(groups) == 1:
            return attend(q, *groups[0], self.attention_backend)
        parts = q.split([k.size(0) for k, _, _ in groups])
        return torch.cat([attend(part, *group, self.attention_backend) for part, group in zip(parts, groups, strict=True)])

    def _norm(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """functional.rms_norm, in half its operations."""
        width = x.size(-1)
        if self._plain_cpu:
            floor, scale = self._floors[width]
            return torch.div(x, torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor).mul_(scale), out=out)
        normed = F.rms_norm(x, (width,), eps=self.config.rms_norm_eps)
        return normed if out is None else out.copy_(normed)

    def _angles(self, B: int, T: int, kv_cache: CacheForInference | None) -> Tensor:
        """Numbers (N, 1, D/2) on the unit circle, by the tokens' positions."""
        positions = None if kv_cache is None else kv_cache.positions
        if T > 1 or positions is None:
            steps = torch.arange(T, device=self.device)
            positions = (steps.expand(B, T) if positions is None else positions[:, None] + steps).reshape(-1)
        return self._rotary.index_select(0, positions)

    def _rotate(self, x: Tensor, angles: Tensor) -> None:
        """functional.rotate on x (N, heads, D), in place, with neighbouring channels as pairs; in fp32."""
        precise = x.float()
        precise.view(torch.complex64).mul_(angles)
        if precise is not x:
            x.copy_(precise)


class DecodeGraphs:
    """CUDA graphs of a decoding step: one launch where an eager step has hundreds. One graph per (rows, positions) size class.

    Not yet measured on a GPU.
    """

    ROW_CLASSES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    POSITIONS = 256  # the attended length is rounded up to a multiple of this

    def __init__(self, model: InferenceGPT) -> None:
        self.model = model
        self.storage = 0  # address of the cache that the graphs were made for
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    def __call__(self, cache: Any, idx: Tensor) -> Tensor:
        """Logits (B, V) for the next tokens idx (B, 1) of rows 0..B-1; they are valid until the next call."""
        from zangchat.engine.sampling import to_device

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
        # Rows beyond B store their token where their next one will go, so that nobody ever sees it.
        positions.copy_(to_device([min(length, end - 1) for length in cache.lengths[:rows]], torch.int64, positions.device))
        graph.replay()
        for row in range(B):
            cache.lengths[row] += 1
        return logits[:B]

    def _capture(self, cache: Any, rows: int, end: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        device = cache.storage.device
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
