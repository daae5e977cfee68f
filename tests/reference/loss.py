"""The loss with all logits at once, by autograd; the twin of zangchat/nn/loss.py."""

import torch
import torch.nn.functional as F
from torch import Tensor


def softcapped_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    cap: float,
    reduction: str = "mean",
    weights: Tensor | None = None,
) -> Tensor:
    logits = cap * torch.tanh((x @ weight[:vocab_size].T) / cap)
    losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    if weights is not None:
        losses = losses * weights
    if reduction == "none":
        return losses
    return losses.sum() / (max(int((targets != -1).sum()), 1) if reduction == "mean" else 1)
