"""A GPT as the engine runs it: the same function, laid out for short passes.

Weights are stored in the compute dtype (fp32 masters would be cast at every token) or as int8 with
one scale per output; q, k and v are one product; a block is as few operations as possible, on 2-d
tensors (rows, features), since a small model with few rows spends its time on calls. The slow twin
is gpt.GPT.

Shapes: B rows, T tokens, N = B x T, C width, H query heads, G key/value heads, D head dimension, V
vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from zangchat.engine import native
from zangchat.gpt import GPT, rotary_tables
from zangchat.nn.attention import Attended, attend, keys_and_values, offset_keys
from zangchat.nn.functional import rms_norm
from zangchat.nn.loss import IGNORE


class Product:
    """x W^T for x (N, in) and a weight W (out, in), in the dtype of W."""

    def __init__(self, weight: Tensor) -> None:
        self.weight: Any = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def added(self, to: Tensor, x: Tensor) -> Tensor:
        """to + x W^T"""
        return torch.addmm(to, x, self.weight.t())

    def arrays(self) -> Any:
        """What the native step reads."""
        return native.as_array(self.weight)

    def refresh(self, weight: Tensor) -> None:
        """Take over another weight, in the same memory: CUDA graphs and the native step read it."""
        for name, new in vars(type(self)(weight)).items():
            getattr(self, name).copy_(new)


class OwnKernel(Product):
    """By a kernel that cannot add."""

    def added(self, to: Tensor, x: Tensor) -> Tensor:
        return self(x).add_(to)


class HalfProduct(OwnKernel):
    """x W^T with W stored as fp16 (11 bits of precision, bf16 has 8): half the bytes of fp32."""

    def __init__(self, weight: Tensor) -> None:
        if weight.dtype != torch.float32:
            raise ValueError("fp16 weights are for fp32: choose int8, or none")
        self.weight = weight.half()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Int8Product(OwnKernel):
    """x W^T with W as int8 times one scale per output, rounded to nearest: a quarter of fp32."""

    def __init__(self, weight: Tensor) -> None:
        self.scales = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
        self.weight = (weight.float() / self.scales[:, None]).round().to(torch.int8)

    def arrays(self) -> Any:
        return native.as_array(self.weight), native.as_array(self.scales)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scales.to(x.dtype)


PRODUCTS = {"": Product, "fp16": HalfProduct, "int8": Int8Product}


class Layer(NamedTuple):
    """The products of a block."""

    qkv: Product
    out: Product
    up: Product
    down: Product


def value_tables(model: GPT) -> dict[int, Tensor]:
    """The value embeddings, by layer."""
    tables = [block.attn.value_embed for block in cast(Any, model.transformer["h"])]
    return {i: table.weight.data for i, table in enumerate(tables) if table is not None}


class InferenceGPT:
    """A snapshot of a GPT for decoding, until `refresh`.

    It shares unchanged weights, except on a CPU with the native step.

    `quantize` ("", "fp16", "int8") is the storage of the weights of the products; activations stay
    as they are. Raises ValueError for an unknown one, and for one without a kernel here.
    """

    def __init__(self, model: GPT, quantize: str = "") -> None:
        if quantize not in PRODUCTS:
            known = ", ".join(filter(None, PRODUCTS))
            raise ValueError(f"unknown quantization {quantize!r}: {known}, or none")
        self.config, self.compute_dtype = model.config, model.compute_dtype
        self.attention_backend = model.options.attention
        self.device, dtype = model.get_device(), model.compute_dtype
        self.embedding = model.wte.weight.data.to(dtype)
        self.values = {i: table.to(dtype) for i, table in value_tables(model).items()}
        self.products = [PRODUCTS[quantize](weight) for weight in self._weights(model)]
        *blocks, self.head = self.products
        self.layers = [Layer(*blocks[i : i + 4]) for i in range(0, len(blocks), 4)]
        # a cache may be longer than the context, by less than its block
        cos, sin = rotary_tables(self.config, self.config.sequence_len + 64, self.device)
        self.rotary = torch.complex(cos, -sin).unsqueeze(1)  # (positions, 1, D/2)
        self.native = native.native_step(self)

    def refresh(self, model: GPT) -> None:
        """Take over the weights of the model as they are now. Captured CUDA graphs stay valid."""
        self.embedding.copy_(model.wte.weight.data)
        for i, table in value_tables(model).items():
            self.values[i].copy_(table)
        for mine, weight in zip(self.products, self._weights(model), strict=True):
            mine.refresh(weight)

    def _weights(self, model: GPT) -> Iterator[Tensor]:
        """Of the products: of the layers in turn, and the head."""
        for block in cast(Any, model.transformer["h"]):
            q, k, v = (c.weight.data for c in (block.attn.c_q, block.attn.c_k, block.attn.c_v))
            yield torch.cat([self._paired(q), self._paired(k), v]).to(self.compute_dtype)
            for c in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                yield c.weight.data.to(self.compute_dtype)
        yield model.lm_head.weight.data.to(self.compute_dtype)

    def _paired(self, weight: Tensor) -> Tensor:
        """Queries or keys with the channels of a pair side by side, so that a rotation is one
        complex product. Norm and scores do not depend on the order."""
        halves = 2 if self.config.key_offset else 1  # that turn apart, see gpt.Attention._turned
        pairs = weight.unflatten(0, (-1, 2, self.config.head_dim // 2 // halves)).transpose(1, 2)
        return pairs.reshape(weight.shape)

    def get_device(self) -> torch.device:
        return self.device

    def __call__(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: Any = None,
        loss_reduction: str = "none",
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """As GPT.forward, with a cache that has the method `store` of kv_cache.CacheRows.

        Logits (B, T, V), fp32, capped; with logits_at (B,) of one position per row, (B, 1, V).
        Given targets, the loss of each token (B, T); no other reduction.
        """
        if loss_reduction != "none":
            raise ValueError(f"losses come per token, not by loss_reduction={loss_reduction!r}")
        if targets is None and self.native is not None and self.native.takes(idx, kv_cache):
            return self.native(idx, kv_cache)
        (B, T), config, eps = idx.shape, self.config, self.config.rms_norm_eps
        H, G, D = config.n_head, config.n_kv_head, config.head_dim
        angles = self._angles(B, T, kv_cache)
        x = rms_norm(F.embedding(idx.reshape(-1), self.embedding), eps)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(rms_norm(x, eps))
            heads = qkv.view(B * T, -1, D)
            if i in self.values:
                heads[:, H + G :] += F.embedding(idx.reshape(-1), self.values[i]).view(-1, G, D)
            turned = heads[:, : H + G]
            self._rotate(turned, angles)
            turned.copy_(rms_norm(turned, eps))
            k, v, mask = self._store(i, heads[:, H:], B, kv_cache)
            q = heads[:, :H].view(B, T, H, D).transpose(1, 2)
            y = attend(q, k, v, mask, self.attention_backend).transpose(1, 2).reshape(B * T, -1)
            if logits_at is not None and i == len(self.layers) - 1:  # the only rows to be read
                at = torch.arange(0, B * T, T, device=x.device) + logits_at
                x, y = x[at], y[at]
            x = layer.out.added(x, y)
            hidden = layer.up(rms_norm(x, eps)).relu_()
            x = layer.down.added(x, hidden.mul_(hidden))
        if kv_cache is not None:
            kv_cache.advance(T)
        logits = self.head(rms_norm(x, eps))[:, : config.vocab_size].float()
        logits = logits.div_(config.logit_cap).tanh_().mul_(config.logit_cap)
        if targets is not None:
            loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none")
            return loss.view(B, T)
        return logits.view(B, -1, config.vocab_size)

    def _store(self, layer: int, new: Tensor, B: int, kv_cache: Any) -> Attended:
        """What the rows attend to, for new keys and values (N, 2 x G, D)."""
        if kv_cache is not None:
            return cast(Attended, kv_cache.store(layer, new))
        k, v = keys_and_values(new, B)
        return offset_keys(k) if self.config.key_offset else k, v, None

    def _angles(self, B: int, T: int, kv_cache: Any) -> Tensor:
        """Numbers (N, 1, D/2) on the unit circle, by the tokens' positions."""
        if kv_cache is not None and T == 1:
            return self.rotary.index_select(0, kv_cache.positions)
        steps = torch.arange(T, device=self.device)
        starts = 0 if kv_cache is None else kv_cache.positions[:, None]
        return self.rotary.index_select(0, (starts + steps).expand(B, T).reshape(-1))

    def _rotate(self, x: Tensor, angles: Tensor) -> None:
        """functional.rotate on x (N, heads, D), in place and fp32, neighbours as pairs."""
        precise = x.float()
        precise.view(torch.complex64).mul_(angles)
        if precise is not x:
            x.copy_(precise)
