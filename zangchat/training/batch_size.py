"""--device_batch_size: the rows of a pass, chosen by the available memory, and advice if it does
not suffice."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from zangchat import configurator, flops
from zangchat.config import GPTConfig
from zangchat.errors import UserError
from zangchat.runtime import collectives
from zangchat.runtime.logs import print0
from zangchat.runtime.memory import free_memory, is_out_of_memory
from zangchat.training.flags import RunConfig
from zangchat.training.settings import memory_settings

C = TypeVar("C", bound=RunConfig)


def choose_batch(
    stage: str,
    config: C,
    model_config: GPTConfig,
    device: torch.device,
    rows: int,
    even: bool,
) -> C:
    """The configuration with --device_batch_size=auto replaced by the rows that fit the device, out
    of a step's `rows` on all ranks; `even` as in flops.fitting_batch.

    The rank with the least memory decides. Raises UserError if not even one row fits.
    """
    options: Any = config
    if options.device_batch_size != "auto":
        configurator.check_range(1, config, "device_batch_size")
        return config
    memory = -collectives.max_over_ranks([-free_memory(device)])[0]
    world_size = collectives.world()[1]
    settings = memory_settings(options, world_size, device.type, options.dtype)
    settings["grad_checkpoint"] = getattr(options, "grad_checkpoint", False)
    gpt = dataclasses.replace(model_config, sequence_len=options.max_seq_len)
    per_rank = max(rows // world_size, 1)
    size = flops.fitting_batch(gpt, per_rank, memory, even=even, **settings)
    if not size:
        needed = flops.memory_estimate(gpt, 1, **settings)["total"]
        raise UserError(
            f"--device_batch_size=auto: one row takes about {needed / flops.GIB:.1f} GiB, {device} "
            f"has {memory / flops.GIB:.1f} free: {', or '.join(_savings(stage, config))}",
        )
    needed = flops.memory_estimate(gpt, size, **settings)["total"]
    print0(
        f"{stage}: --device_batch_size={size}, so {-(-per_rank // size)} passes a step: about "
        f"{needed / flops.GIB:.1f} GiB of the {memory / flops.GIB:.1f} that {device} has free",
    )
    return dataclasses.replace(config, device_batch_size=size)  # type: ignore[call-arg]


@contextlib.contextmanager
def explain_memory(stage: str, config: Any, device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error into a UserError with the flags that lower the need."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        size = config.device_batch_size
        fewer = f"lower --device_batch_size={size} (more passes, the same result)"
        fewer += "" if size == "auto" else " or let it be chosen by =auto"
        reason = str(error).partition("\n")[0][:200]
        advice = ", or ".join([fewer, *_savings(stage, config)])
        problem = f"{stage}: the memory of {device} does not suffice ({reason})"
        raise UserError(f"{problem}: {advice}") from error


def _savings(stage: str, config: Any) -> list[str]:
    """How to make a pass of one row take less memory."""
    savings = [] if getattr(config, "grad_checkpoint", True) else ["give --grad_checkpoint=1"]
    sizes = "--depth or --max_seq_len" if stage == "base" else "--max_seq_len"
    return [*savings, f"choose a smaller {sizes}"]
