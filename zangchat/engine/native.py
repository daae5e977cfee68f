"""One token more in each of a few rows, on a CPU: one call of the crate ruststep.

torch takes a hundred calls for such a step, and each does little. The slow twin is InferenceGPT's
own way, which larger batches, prompts and GPUs take; so do machines without AVX2, or without the
crate.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from zangchat.engine.kv_cache import CacheRows

try:
    import ruststep
except ImportError:  # dev/setup.sh says so if it cannot be compiled
    ruststep = None  # type: ignore[assignment]

# With more rows torch is faster; sooner if it has AVX-512, which the crate does not use.
MOST_ROWS, MOST_ROWS_AVX512 = 64, 16
# Of weights. NumPy has no bf16, and the crate's buffers no fp16: their bits as integers.
DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.int16, torch.float16: torch.uint16}


def is_available() -> bool:
    return ruststep is not None and ruststep.IS_FAST


def native_step(model: Any) -> "NativeStep | None":
    """The step of an InferenceGPT, or None if this machine, its device or its dtype has none."""
    products = [*itertools.chain.from_iterable(model.layers), model.head]
    arrays = [product.arrays() for product in products]
    plain = model.embedding.dtype in (torch.float32, torch.bfloat16) and all(
        found is not None for found in arrays
    )
    fits = model.config.head_dim % 8 == 0
    if not (is_available() and model.device.type == "cpu" and plain and fits):
        return None
    return NativeStep(model, arrays)


class NativeStep:
    def __init__(self, model: Any, arrays: list[Any]) -> None:
        *layers, head = arrays
        config = model.config
        self.vocab_size = config.vocab_size
        widest = torch.backends.cpu.get_cpu_capability()
        self.most_rows = MOST_ROWS_AVX512 if "AVX512" in widest else MOST_ROWS
        self.step = ruststep.Step(
            heads=config.n_head,
            kv_heads=config.n_kv_head,
            head_dim=config.head_dim,
            hidden=4 * config.n_embd,
            vocab_size=config.vocab_size,
            outputs=config.padded_vocab_size,
            eps=config.rms_norm_eps,
            cap=config.logit_cap,
            embedding=as_array(model.embedding),
            layers=[layers[i : i + 4] for i in range(0, len(layers), 4)],
            head=head,
            rotary=as_array(torch.view_as_real(model.rotary).squeeze(1)),
        )

    def takes(self, idx: Tensor, context: Any) -> bool:
        return idx.size(1) == 1 and idx.size(0) <= self.most_rows and isinstance(context, CacheRows)

    def __call__(self, idx: Tensor, context: CacheRows) -> Tensor:
        """idx (B, 1) -> logits (B, 1, V), fp32, capped; the rows get a token more."""
        cache = context.cache
        logits = torch.empty(len(context.rows), self.vocab_size)
        lengths = [cache.lengths[row] for row in context.rows]
        rows, threads = list(context.rows), torch.get_num_threads()
        self.step(idx[:, 0].tolist(), rows, lengths, cache.storage.numpy(), logits.numpy(), threads)
        context.advance(1)
        return logits.unsqueeze(1)


def as_array(tensor: Tensor) -> Any:
    """A view by NumPy."""
    return tensor.view(DTYPES.get(tensor.dtype, tensor.dtype)).numpy()
