"""The one linear layer of the model: a weight, no bias, the product in the dtype of its input."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Linear(nn.Module):
    """x W^T in the dtype of x. The weight keeps its own dtype (fp32 master in training)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.cast: Tensor | None = None  # inside cast_once

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight if self.cast is None else self.cast).to(x.dtype))

    @contextlib.contextmanager
    def cast_once(self, dtype: torch.dtype) -> Iterator[None]:
        """Reuse one cast of the weight, which must not change, for all passes in the block.

        Not of a weight that is spread over ranks: each pass gathers it.
        """
        if self.weight.dtype != dtype and not hasattr(self.weight, "to_local"):
            self.cast = self.weight.to(dtype)
        try:
            yield
        finally:
            self.cast = None
