"""What every test starts from: an empty base folder of its own, one thread, no torchrun, no wandb, nothing of the user's."""

import logging
import os

# Before torch is imported anywhere: tiny models on few cores are fastest with one thread, and sums then have one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

pytest_plugins = ["tests.listener"]
FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "WANDB_RUN", "NO_COLOR")


@pytest.fixture(autouse=True)
def base_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base folder of this test, which child processes see as well."""
    base = tmp_path_factory.mktemp("base folder")  # with a space: what is printed must be quoted
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(base))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    for name in ("zangchat", "scripts", "tasks", "__main__"):  # a test that ran a command as rank 1 has made them quiet
        logging.getLogger(name).setLevel(logging.NOTSET)
    return base


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a CUDA device; without one they are skipped, visibly."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
