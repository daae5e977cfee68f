"""The model: maths and initialisation only.

    wte -> norm -> n_layer x [ x += attn(norm(x)); x += mlp(norm(x)) ]
        -> norm -> lm_head -> cap * tanh(z / cap)

No weights in the norms, no biases, rotary positions, QK-norm, grouped-query attention, relu^2,
embedding and head untied: the architecture of nanochat at the end of 2025, NanoChatForCausalLM in
transformers. Master weights are fp32; the products run in `compute_dtype`, which is a value of the
model, never of the process.

Shapes: B batch, T tokens, C width (n_embd), H query heads, G key/value heads, D head dimension, V
vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zangchat.config import GPTConfig
from zangchat.nn.attention import AttentionContext, WithinDocuments, attend, offset_keys
from zangchat.nn.functional import relu_squared, rms_norm, rotate
from zangchat.nn.linear import Linear
from zangchat.nn.loss import softcap, softcapped_cross_entropy
from zangchat.runtime.compiler import compiled

__all__ = ["GPT", "AttentionContext", "ForwardOptions", "GPTConfig"]

Rotary = tuple[Tensor, Tensor]  # cos, sin


@dataclass(frozen=True)
class ForwardOptions:
    """How a model's passes run. Except for `document_start`, they change results by rounding only.

    Compiling: the blocks, which share one compilation that torch keeps on disk for the next launch,
    and the loss between its products. Passes with a key/value cache are never compiled.
    """

    attention: str = "sdpa"  # see attention.choose_backend
    grad_checkpoint: bool = False  # True: keep each block's input only, recompute the rest
    # a token (<|bos|>) that begins a document; a document does not attend to those before it
    document_start: int | None = None
    compile_backend: Any = None  # of torch.compile; None: run eagerly


def empty_embedding(config: GPTConfig, width: int) -> nn.Embedding:
    """A row for each token, to be filled."""
    rows = config.padded_vocab_size
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim, self.n_kv_head = config.head_dim, config.n_kv_head
        self.eps, self.key_offset = config.rms_norm_eps, config.key_offset
        self.c_q = Linear(config.n_embd, config.n_head * config.head_dim)
        self.c_k = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_v = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        has_table, width = config.has_value_embed(layer_idx), config.n_kv_head * config.head_dim
        self.value_embed = empty_embedding(config, width) if has_table else None

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        context: AttentionContext | None,
        backend: str,
        idx: Tensor | None = None,  # for value embeddings
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = (c(x).view(B, T, -1, self.head_dim) for c in (self.c_q, self.c_k, self.c_v))
        if self.value_embed is not None:
            v = v + self.value_embed(idx).to(x.dtype).view(v.shape)
        q, k = (rms_norm(self._turned(part, rotary), self.eps) for part in (q, k))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # views, as kernels expect them
        mask = None
        if context is not None:
            k, v, mask = context.update(self.layer_idx, k, v)
        elif self.key_offset:
            k = offset_keys(k)
        y = attend(q, k, v, mask, backend)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

    def _turned(self, x: Tensor, rotary: Rotary) -> Tensor:
        """x (B, T, heads, D) by its positions. With `key_offset` in two halves, each of pairs i and
        i + D/4, so that the second has the slow frequencies."""
        if not self.key_offset:
            return rotate(x, *rotary)
        halves = (part.unflatten(-1, (2, -1)) for part in (x, *rotary))
        return rotate(*halves).flatten(-2)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(relu_squared(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.attn = Attention(config, layer_idx)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        """`others`: what Attention.forward takes besides x."""
        x = x + self.attn(rms_norm(x, self.eps), *others)
        return x + self.mlp(rms_norm(x, self.eps))


def train_block(block: nn.Module, *inputs: Any) -> Tensor:
    return block(*inputs)


def read_block(block: nn.Module, *inputs: Any) -> Tensor:
    """The same without gradients: torch counts shapes by function, and these are others."""
    return block(*inputs)


def rotary_tables(config: GPTConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin (length, D/2), fp32, of positions 0..length-1 (arXiv:2104.09864)."""
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / config.rope_theta ** (channels / config.head_dim)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def is_embedding(name: str) -> bool:
    """Whether the parameter of this name is a table of which passes look up rows."""
    return name.endswith(("wte.weight", "value_embed.weight"))


class GPT(nn.Module):
    """A decoder-only language model; `init_weights` or a checkpoint fills its parameters."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: GPTConfig,
        compute_dtype: torch.dtype = torch.float32,
        options: ForwardOptions | None = None,
    ) -> None:
        super().__init__()
        self.config, self.options = config, options or ForwardOptions()
        blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.transformer = nn.ModuleDict(
            {"wte": empty_embedding(config, config.n_embd), "h": blocks}
        )
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size)
        self.init_rotary()
        self.set_compute_dtype(compute_dtype)

    @property
    def wte(self) -> nn.Embedding:
        return cast(nn.Embedding, self.transformer["wte"])

    def set_compute_dtype(self, dtype: torch.dtype, keep_masters: bool = True) -> None:
        """Run the products in `dtype`.

        The embedding is stored in bf16 when computing in bf16 (it is only looked up), else in fp32.
        `keep_masters=False` stores every weight in `dtype`: for inference, in which casting fp32
        masters at each token costs more than the products.
        """
        self.compute_dtype = dtype
        for name, parameter in self.named_parameters():
            is_bf16_embedding = is_embedding(name) and dtype == torch.bfloat16
            stored = dtype if is_bf16_embedding or not keep_masters else torch.float32
            parameter.data = parameter.data.to(stored)

    @contextlib.contextmanager
    def cast_once(self) -> Iterator[None]:
        """Cast each weight once and reuse it for all forward passes in the block.

        Weights must not change there. Gradients still accumulate in the fp32 masters.
        """
        layers = [layer for layer in self.modules() if isinstance(layer, Linear)]
        try:
            for layer in layers:
                layer.hold(self.compute_dtype)
            yield
        finally:
            for layer in layers:
                layer.release()

    @torch.no_grad()
    def init_weights(
        self, head_init_scale: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        """Fill every parameter and the rotary tables, on any device. Drawn in fp32, then rounded.

        Matrices that read the residual stream, value embeddings: uniform with standard deviation
        1/sqrt(n_embd), c_fc with 0.4 of it (dev/LOG.md). Matrices that write to it: zero, so that
        each block starts as the identity. Embedding: normal(0, 1). Head: normal(0, 0.001), or
        `head_init_scale` (> 0) times the embedding, which relates the output row of a token to its
        input row: small models learn to copy far earlier.
        """
        bound = math.sqrt(3.0 / self.config.n_embd)
        embedding = torch.empty(self.wte.weight.shape, device=self.get_device())
        self.wte.weight.copy_(embedding.normal_(generator=generator))
        for name, parameter in self.transformer["h"].named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.zero_()
            else:
                limit = 0.4 * bound if name.endswith("c_fc.weight") else bound
                parameter.copy_(parameter.float().uniform_(-limit, limit, generator=generator))
        if head_init_scale > 0:
            self.lm_head.weight.copy_(embedding.mul_(head_init_scale))
        else:
            self.lm_head.weight.copy_(embedding.normal_(std=0.001, generator=generator))
        self.init_rotary()

    def init_rotary(self, length: int | None = None) -> None:
        """(Re)compute the rotary tables for positions 0..length-1 (default: sequence_len).

        A checkpoint does not hold them: call this after loading one into a model made on "meta".
        """
        length = length or self.config.sequence_len
        # a table made under inference_mode (sampling) must remain usable by autograd (training)
        with torch.inference_mode(False), torch.no_grad():
            cos, sin = rotary_tables(self.config, length, self.get_device())
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def get_device(self) -> torch.device:
        return self.wte.weight.device

    def estimate_flops(self) -> int:
        """Training FLOPs per token (forward and backward)."""
        from zangchat.flops import flops_per_token

        return flops_per_token(self.config)

    def setup_optimizers(self, **settings: Any) -> Any:
        """See optim.build_optimizer."""
        from zangchat.optim import build_optimizer

        return build_optimizer(self, **settings)

    def _rotary(self, T: int, context: AttentionContext | None) -> Rotary:
        """cos, sin in the compute dtype, (T, 1, D/2), or (B, T, 1, D/2) at the rows' positions."""
        needed = T if context is None else context.longest + T
        if needed > self.cos.size(0):
            self.init_rotary(max(needed, 2 * self.cos.size(0)))
        if context is None:
            cos, sin = self.cos[:T, None], self.sin[:T, None]
        else:
            positions = context.positions[:, None] + torch.arange(T, device=self.get_device())
            cos, sin = self.cos[positions, None], self.sin[positions, None]
        return cos.to(self.compute_dtype), sin.to(self.compute_dtype)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: AttentionContext | None = None,
        loss_reduction: str = "mean",
        loss_weights: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, vocab_size), capped, or the loss, given targets (B, T; -1 = ignored); fp32.

        loss_reduction: "mean" over supervised tokens, "sum", or "none" -> (B, T) with 0 for ignored
        ones; loss_weights (B, T) are factors on each token's loss. logits_at (B,) selects one
        position per row -> (B, 1, vocab_size), all that a prefill needs.
        """
        (B, T), config, options, context = idx.shape, self.config, self.options, kv_cache
        if context is None and options.document_start is not None:
            context = WithinDocuments(idx, options.document_start, config.key_offset)
        rotary = self._rotary(T, context)
        x = rms_norm(self.wte(idx).to(self.compute_dtype), config.rms_norm_eps)
        tokens = (idx,) if config.value_embeds else ()
        records = torch.is_grad_enabled()
        run: Callable[..., Any] = train_block if records else read_block
        if options.compile_backend is not None and kv_cache is None:
            run = compiled(run, options.compile_backend)
        if records and options.grad_checkpoint:
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        for block in cast(nn.ModuleList, self.transformer["h"]):
            x = run(block, x, rotary, context, options.attention, *tokens)
        x = rms_norm(x, config.rms_norm_eps)
        if context is not None:
            context.advance(T)
        if targets is None:
            if logits_at is not None:
                x = x[torch.arange(B, device=x.device), logits_at].unsqueeze(1)
            return softcap(self.lm_head(x)[..., : config.vocab_size], config.logit_cap)
        loss = softcapped_cross_entropy(
            x.view(B * T, -1),
            self.lm_head.weight,
            targets.reshape(-1),
            config.vocab_size,
            config.logit_cap,
            loss_reduction,
            None if loss_weights is None else loss_weights.reshape(-1),
            cast=self.lm_head.cast,
            compile_backend=options.compile_backend,
        )
        return loss.view(B, T) if loss_reduction == "none" else loss
