"""Print the number of GPUs that torch can use; fail if nvidia-smi finds one that torch cannot use.

    python -m dev.gpus

speedrun.sh asks before it downloads any data. For several GPUs in a container with little shared
memory, a warning goes to stderr.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zangchat import configurator
from zangchat.runtime.devices import autodetect_device_type

SHARED = Path("/dev/shm")
ENOUGH = 2**30  # NCCL takes up to some 10 MB for each pair of GPUs and direction; Docker gives 64


@dataclass
class Config:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, count, argv)


def count(_: Config) -> int:
    import torch

    gpus = torch.cuda.device_count() if autodetect_device_type() == "cuda" else 0
    if gpus > 1 and SHARED.is_dir() and (size := shutil.disk_usage(SHARED).total) < ENOUGH:
        print(
            f"warning: {SHARED} has {size / 2**20:.0f} MiB, and NCCL may need more: if a run ends "
            "with `unhandled system error`, start the container with --shm-size=1g or --ipc=host",
            file=sys.stderr,
        )
    print(gpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
