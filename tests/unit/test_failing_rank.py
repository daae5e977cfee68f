"""One rank of several fails: the job ends at once, and its output ends with that rank's traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from scripts import base_eval, base_loss, base_train, chat_eval
from tests.documents import ROOT
from zangchat import configurator
from zangchat.errors import UserError
from zangchat.training import run

SECONDS = 120  # far less than a collective waits (devices.COLLECTIVE_TIMEOUT)


def torchrun(folder: Path, ranks: int, *flags: str) -> tuple[int | None, str]:
    """(exit code, None if it did not end in time; output)"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", "-m", "tests.failing_rank", "--"]
    running = subprocess.Popen(
        [*command, *flags, f"--directory={folder}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        return running.wait(SECONDS), running.communicate()[0]
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGINT)  # torchrun then ends its processes
        return None, running.communicate()[0]


@pytest.mark.parametrize(
    ("where", "failing", "ranks"),
    [("forward", 1, 3), ("backward", 1, 3), ("optimizer", 5, 8), ("save", 1, 3)],
)
def test_one_failing_rank_ends_the_job_with_its_traceback(where, failing, ranks, tmp_path):
    code, output = torchrun(tmp_path, ranks, f"--where={where}", f"--failing={failing}")
    assert code == 1
    last = output[output.rindex("Traceback (most recent call last)") :]
    assert "ZeroDivisionError: the root of it all" in last and f"(local_rank: {failing})" in output
    assert set(last.splitlines()[-1]) == {"="}  # the frame of torchrun's summary
    assert "Connection closed" not in last


def test_ranks_that_succeed_leave_together(tmp_path):
    assert torchrun(tmp_path, 2)[0] == 0


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls of destroy_process_group, and a group that is there."""
    calls: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", dist.HashStore)
    return calls


@pytest.mark.parametrize("error", [ZeroDivisionError, UserError, KeyboardInterrupt, None])
def test_only_a_command_that_succeeded_leaves_the_group(group, error):
    def command(_: object) -> None:
        if error is not None:
            raise error("a failure")

    if error is ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            configurator.run(base_eval.Config, command, [])
    else:
        configurator.run(base_eval.Config, command, [])
    assert group == ([] if error else ["destroyed"])


@pytest.mark.parametrize(
    ("main", "place"),
    [
        (base_loss.main, "zangchat.checkpoint_manager.load_model"),
        (base_eval.main, "zangchat.engine.load_for_chat"),
        (chat_eval.main, "zangchat.engine.load_for_chat"),
        (base_train.main, "zangchat.training.run.resolve"),
    ],
)
def test_a_command_that_fails_leaves_no_group(main, place, group, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(place, fail)
    monkeypatch.setattr(run, "exclusive", lambda directory: run.steady_streams())
    with pytest.raises(ZeroDivisionError):
        main(["--device_type=cpu"])
    assert group == []
