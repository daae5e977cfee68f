"""Common setup of all tests: an empty base folder for each, one thread, no torchrun, no wandb.

Settings in the user's environment do not reach the tests.
"""

import logging
import os

# Set before torch is imported anywhere: tiny models run fastest on one thread, and one thread gives
# sums a fixed order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

pytest_plugins = ["tests.listener"]
FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "WANDB_RUN", "NO_COLOR")


@pytest.fixture(autouse=True)
def base_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base folder of this test; child processes inherit it."""
    base = tmp_path_factory.mktemp("base folder")  # the space tests that printed paths are quoted
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(base))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    # a test that ran a command as rank 1 has silenced them
    for name in ("zangchat", "scripts", "tasks", "__main__"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    return base


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu`, with a reason, if there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
