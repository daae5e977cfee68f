"""Bits per byte: how well a model predicts text, comparable between vocabularies."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from zangchat.runtime import collectives

if TYPE_CHECKING:
    from zangchat.dataloader import Batch
    from zangchat.gpt import GPT


@torch.inference_mode()
def evaluate_bpb(
    model: "GPT", batches: Iterable["Batch"], token_bytes: torch.Tensor | np.ndarray
) -> float:
    """The loss of the supervised targets, in bits, per byte of the text that they stand for.

    `token_bytes` (V,) has the length in bytes of each token; targets of length 0 (special tokens)
    count on neither side. Sums run over all batches of all ranks, so that neither the batch size
    nor the number of ranks matters. Without a single byte: inf.
    """
    device = model.get_device()
    token_bytes = torch.as_tensor(token_bytes).cpu()
    nats, num_bytes = 0.0, 0
    with model.cast_once():
        for batch in batches:
            inputs, targets = batch.inputs.to(device), batch.targets.to(device)
            losses = model(inputs, targets, loss_reduction="none").cpu().double()
            targets = batch.targets.cpu()
            lengths = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
            nats += float(losses[lengths > 0].sum())
            num_bytes += int(lengths.sum())
    nats, total = collectives.sum_over_ranks([nats, num_bytes])
    return nats / math.log(2) / total if total else math.inf


@torch.inference_mode()
def evaluate_loss(model: "GPT", batches: Iterable["Batch"]) -> float:
    """Mean loss (nats) of the supervised targets of all batches of all ranks; nan without any."""
    device = model.get_device()
    loss, count = 0.0, 0
    with model.cast_once():
        for batch in batches:
            inputs, targets = batch.inputs.to(device), batch.targets.to(device)
            loss += float(model(inputs, targets, loss_reduction="sum"))
            count += int((batch.targets >= 0).sum())
    loss, total = collectives.sum_over_ranks([loss, count])
    return loss / total if total else math.nan
