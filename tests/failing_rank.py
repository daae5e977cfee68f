"""A training command of several processes, one of which raises: tests start it with torchrun.

As with NCCL, a process that leaves the process group waits for the others.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.unit.test_trainer import make_trainer
from zangchat import checkpoint_files, configurator
from zangchat.runtime import collectives
from zangchat.runtime.devices import compute_init
from zangchat.training.step import sum_loss
from zangchat.training.trainer import Trainer

destroy_process_group = dist.destroy_process_group


@dataclass
class Config:
    where: str = ""  # forward | backward | optimizer | save; empty: no rank fails
    failing: int = 0  # the rank
    directory: Path = Path()


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, train, argv)


def train(config: Config) -> int:
    compute_init("cpu")
    dist.destroy_process_group = leave_together  # type: ignore[assignment]
    trainer = make_trainer(config.directory / "run", device_batch_size=1)
    if collectives.world()[0] == config.failing and config.where:
        SABOTAGES[config.where](trainer)
    trainer.fit()
    return trainer.exit_code


def leave_together() -> None:
    dist.barrier()
    destroy_process_group()


def fail(*_: Any) -> Any:
    raise ZeroDivisionError("the root of it all")


def in_forward(trainer: Trainer) -> None:
    trainer.stage.loss = lambda model, batch: (
        fail() if trainer.state.step == 2 else sum_loss(model, batch)
    )


def in_backward(trainer: Trainer) -> None:
    p = next(iter(trainer.optimizer.names))
    p.register_hook(lambda gradient: fail() if trainer.state.step == 2 else gradient)


def in_optimizer(trainer: Trainer) -> None:
    last = trainer.optimizer.optimizers[-1]
    update = last.update
    last.update = lambda params, group: (  # type: ignore[method-assign]
        fail() if trainer.state.step == 2 else update(params, group)
    )


def in_save(_: Trainer) -> None:
    checkpoint_files.write_tensors = fail  # type: ignore[assignment]


SABOTAGES = {
    "forward": in_forward,
    "backward": in_backward,
    "optimizer": in_optimizer,
    "save": in_save,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
