"""The one linear layer of the model: a weight, no bias, the product in the dtype of its input."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Linear(nn.Module):
    """x W^T in the dtype of x. The weight keeps its own dtype (fp32 master in training)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        # In the compute dtype, between hold and release. Always of the instance: a compiled block
        # is compiled again if an attribute appears.
        self.cast: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight if self.cast is None else self.cast).to(x.dtype))

    def hold(self, dtype: torch.dtype) -> None:
        """Cast the weight, which must not change, for all passes until `release`; not if it is
        spread over ranks, as each pass gathers it."""
        if self.weight.dtype != dtype and not hasattr(self.weight, "to_local"):
            self.cast = self.weight.to(dtype)

    def release(self) -> None:
        self.cast = None
