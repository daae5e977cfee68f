"""The ranks that torchrun started."""

from __future__ import annotations

import os
import sys


def is_ddp() -> bool:
    """Whether torchrun started this process. Only RANK, as some clusters set it, does not count."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def get_dist_info() -> tuple[bool, int, int, int]:
    """(ddp, rank, local_rank, world_size); (False, 0, 0, 1) without torchrun."""
    if not is_ddp():
        return False, 0, 0, 1
    return True, int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])


def compute_cleanup() -> None:
    """Leave the process group, if there is one.

    Does not import torch: an interrupted import cannot be retried.
    """
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
