"""Print the number of GPUs that torch can use; fail if nvidia-smi finds one that torch cannot use.

    python -m dev.gpus

speedrun.sh asks before it downloads any data.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from zangchat import configurator
from zangchat.runtime.devices import autodetect_device_type


@dataclass
class Config:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, count, argv)


def count(_: Config) -> int:
    import torch

    print(torch.cuda.device_count() if autodetect_device_type() == "cuda" else 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
