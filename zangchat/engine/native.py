"""One token more in each of some rows, on a CPU: one call of the crate ruststep.

torch takes a hundred calls for such a step, and each does little. The slow twin is InferenceGPT's
own way, which prompts and GPUs take, and many rows in bf16; so do x86 machines without AVX2, and
all without the crate.
"""

import contextlib
import functools
import itertools
import logging
import mmap
import sys
from typing import Any

import torch
from torch import Tensor

from zangchat.engine.kv_cache import CacheRows
from zangchat.runtime.devices import cpu_has_bf16

try:
    import ruststep
except ImportError:  # or else the import finds the folder of its source, which has no Step
    ruststep = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
VERSION = 1  # of the crate, as in its py.rs: an older build may take other arguments
MOST_ROWS = 64  # in bf16, if the CPU multiplies it: with more torch is faster
# Of weights, keys, values. NumPy has no bf16, and the crate no fp16 buffers: bits as integers.
DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.int16, torch.float16: torch.uint16}


@functools.cache
def is_available() -> bool:
    if getattr(ruststep, "VERSION", None) == VERSION:
        return ruststep.IS_FAST
    if hasattr(ruststep, "Step"):
        logger.warning("ruststep is out of date, torch decodes (slower): run `bash dev/setup.sh`")
    return False


def storage_dtype(compute_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The fastest dtype for keys and values. On a CPU bf16 is for the native step: torch's own
    attention of one token over it takes up to seven times as long as over fp32."""
    if device.type == "cpu" and not (compute_dtype == torch.bfloat16 and is_available()):
        return torch.float32
    return compute_dtype


def native_step(model: Any) -> "NativeStep | None":
    """The step of an InferenceGPT, or None if this machine, its device or its dtypes have none.

    The weights of its products move into one piece of memory.
    """
    fits = model.config.head_dim % 8 == 0 and model.embedding.dtype in DTYPES
    if not (is_available() and model.device.type == "cpu" and fits):
        return None
    weights = [product.weight for product in model.products]
    for product, weight in zip(model.products, side_by_side(weights), strict=True):
        product.weight = weight
    return NativeStep(model)


def side_by_side(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in one piece of memory, of huge pages if the kernel has them: a step reads all of it,
    and the machine looks up the address of each page."""
    ends = list(itertools.accumulate(-(-tensor.nbytes // 64) * 64 for tensor in tensors))
    flat, copies = torch.empty(ends[-1], dtype=torch.uint8), []
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or one built without them
        memory = mmap.mmap(-1, ends[-1], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
    for tensor, start in zip(tensors, [0, *ends], strict=False):
        copy = flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(copy.copy_(tensor))
    return copies


class NativeStep:
    def __init__(self, model: Any) -> None:
        *layers, head = [product.arrays() for product in model.products]
        config, tables = model.config, model.values
        torch_is_faster = model.compute_dtype == torch.bfloat16 and cpu_has_bf16()
        self.most_rows = MOST_ROWS if torch_is_faster else sys.maxsize
        self.vocab_size = config.vocab_size
        self.step = ruststep.Step(
            heads=config.n_head,
            kv_heads=config.n_kv_head,
            head_dim=config.head_dim,
            hidden=4 * config.n_embd,
            vocab_size=config.vocab_size,
            outputs=config.padded_vocab_size,
            eps=config.rms_norm_eps,
            cap=config.logit_cap,
            key_offset=config.key_offset,
            embedding=as_array(model.embedding),
            layers=[layers[i : i + 4] for i in range(0, len(layers), 4)],
            values=[as_array(tables[i]) if i in tables else None for i in range(config.n_layer)],
            head=head,
            rotary=as_array(torch.view_as_real(model.rotary).squeeze(1)),
        )

    def takes(self, idx: Tensor, context: Any) -> bool:
        """Not the rows of a graph, whose lengths only the device knows."""
        few = idx.size(1) == 1 and idx.size(0) <= self.most_rows
        return few and isinstance(context, CacheRows) and context.counts

    def __call__(self, idx: Tensor, context: CacheRows) -> Tensor:
        """idx (B, 1) -> logits (B, 1, V), fp32, capped; the rows get a token more."""
        cache = context.cache
        logits = torch.empty(len(context.rows), self.vocab_size)
        lengths = [cache.lengths[row] for row in context.rows]
        where = list(context.rows), lengths, as_array(cache.storage)
        self.step(idx[:, 0].tolist(), *where, logits.numpy(), torch.get_num_threads())
        context.advance(1)
        return logits.unsqueeze(1)


def as_array(tensor: Tensor) -> Any:
    """A view by NumPy."""
    return tensor.view(DTYPES.get(tensor.dtype, tensor.dtype)).numpy()
