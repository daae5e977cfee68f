"""Print the plan of a pretraining run, its memory and its hours, without touching anything.

    python -m dev.plan --vocab_size=32768 --memory_gb=24 --depth=14 --device_batch_size=auto

The other flags are those of scripts.base_train: `DRY_RUN=1 bash speedrun.sh` passes the flags of
the real run.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from scripts import base_train
from zangchat import configurator, flops
from zangchat.training import planning
from zangchat.training.settings import check_batch, memory_settings

CARDS = ("RTX 3090", "RTX 4090", "L40S", "A100", "H100")
UTILISATION = 0.4


@dataclass
class Config(base_train.Config):
    vocab_size: int = 65536
    world_size: int = 1  # GPUs
    memory_gb: int = 80  # of each GPU


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, show, argv)


def show(config: Config) -> int:
    configurator.check_range(1, config, "vocab_size", "world_size", "memory_gb")
    base_train.check(config)
    gpt, plan = base_train.make_plan(config, config.vocab_size)
    check_batch(
        plan.total_batch_size, gpt.sequence_len, config.device_batch_size, config.world_size
    )
    rows = plan.total_batch_size // (gpt.sequence_len * config.world_size)
    where = config.device_type or "cuda", config.dtype or "bfloat16"
    settings = memory_settings(config, config.world_size, *where)
    settings["grad_checkpoint"] = config.grad_checkpoint
    if config.device_batch_size == "auto":
        fitting = flops.fitting_batch(gpt, rows, config.memory_gb * flops.GIB, **settings)
        if not fitting:
            raise configurator.UserError(
                f"not even one row of this model fits into {config.memory_gb} GB: choose a smaller "
                "DEPTH"
            )
    else:
        fitting = min(config.device_batch_size, rows)
    planning.print_plan(
        dataclasses.replace(config, device_batch_size=fitting), gpt, plan, config.world_size
    )
    memory = flops.memory_estimate(gpt, fitting, **settings)["total"] / flops.GIB
    print(f"memory         {memory:.1f} GiB on each GPU with {fitting} rows in a pass, estimated")
    work = flops.flops_per_token(gpt) * plan.tokens
    for name in CARDS:
        hours = work / (config.world_size * UTILISATION * 1e12 * flops.DEVICES[name].half) / 3600
        card = f"{config.world_size} x {name}"
        print(f"{card:<14} {hours:.1f} h of pretraining, predicted: {UTILISATION:.0%} of its peak")
    return 0


if __name__ == "__main__":
    sys.exit(main())
