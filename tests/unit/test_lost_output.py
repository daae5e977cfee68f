"""Real training processes that lose their output or have a limited file system, and their saves."""

import errno
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.test_train_scripts import base_flags, text
from zangchat import checkpoint_manager
from zangchat.tokenizer import RustBPETokenizer
from zangchat.training.settings import FORWARDED

ROOT = Path(__file__).parents[2]
LONG = ["--num_iterations=100000", "--eval_every=-1", "--model_tag=d1"]
# Runs a command as on a file system that cannot sync folders or cannot lock files.
LIMITED = """
import errno, fcntl, os, stat, sys
sync = os.fsync

def refuse(fd):
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        raise OSError(errno.EINVAL, "Invalid argument")
    return sync(fd)

def no_locks(fd, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

if sys.argv[1] == "sync":
    os.fsync = refuse
else:
    fcntl.flock = no_locks
from scripts import base_train
sys.exit(base_train.main(sys.argv[2:]))
"""


@pytest.fixture
def root(base_dir: Path) -> Path:
    documents = [text(index) for index in range(300)]
    RustBPETokenizer.train_from_iterator(iter(documents), 300).save(base_dir / "tokenizer")
    (base_dir / "text.jsonl").write_text(
        "".join(f'{{"text": "{document}"}}\n' for document in documents), encoding="utf-8"
    )
    return base_dir


def command(root: Path, *more: str) -> list[str]:
    return [sys.executable, "-u", "-m", "scripts.base_train", *base_flags(root, *more)]


def saved_steps(root: Path) -> list[int]:
    return sorted(checkpoint_manager.steps(root / "base_checkpoints" / "d1"))


def lines_until(stream: "Callable[[], bytes]", mark: bytes) -> Iterator[bytes]:
    output = b""
    while mark not in output:
        output += stream()
        yield output


def test_ctrl_c_saves_after_tee_has_died(root: Path) -> None:
    with subprocess.Popen(
        command(root, *LONG), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for output in lines_until(process.stdout.readline, b"tok/s"):
            assert process.poll() is None, output
        process.stdout.close()  # the reader of the pipe has exited
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    (step,) = saved_steps(root)
    assert step > 0


def test_full_disk_loses_only_the_log(root: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(root, "--model_tag=d1"), cwd=ROOT, stdout=full, stderr=full, timeout=300
        )
    assert done.returncode == 0 and saved_steps(root) == [10]


@pytest.mark.parametrize("ignored", [False, True], ids=["closed", "nohup"])
def test_closed_terminal_stops_the_run_unless_under_nohup(root: Path, ignored: bool) -> None:
    terminal, child_end = pty.openpty()
    action = signal.SIG_IGN if ignored else signal.SIG_DFL  # the tests may run under nohup
    process = subprocess.Popen(
        command(root, *LONG),
        cwd=ROOT,
        stdin=child_end,
        stdout=child_end,
        stderr=child_end,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, action) and None,
    )
    os.close(child_end)
    for output in lines_until(lambda: os.read(terminal, 4096), b"tok/s"):
        assert process.poll() is None, output
    os.close(terminal)
    process.send_signal(signal.SIGHUP)  # as the kernel does for a closed terminal
    if ignored:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        process.terminate()
    assert process.wait(120) == 128 + (signal.SIGTERM if ignored else signal.SIGHUP)
    (step,) = saved_steps(root)
    assert step > 0


def test_sigusr1_to_torchrun_saves(root: Path) -> None:
    _, *arguments = command(root, *LONG)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", FORWARDED]
    module = arguments[arguments.index("-m") :]
    with subprocess.Popen(
        [*launcher, "--nproc_per_node=2", *module],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        for output in lines_until(process.stdout.readline, b"tok/s"):
            assert process.poll() is None, output
        process.send_signal(signal.SIGUSR1)
        rest = process.communicate(timeout=120)[0]
    (step,) = saved_steps(root)
    assert step > 0 and f"stopped by SIGUSR1 after step {step}, saved".encode() in rest


def test_missing_sync_is_a_warning_and_missing_locks_an_error(root: Path) -> None:
    def run(limit: str) -> "subprocess.CompletedProcess[str]":
        flags = base_flags(root, "--model_tag=d1")
        return subprocess.run(
            [sys.executable, "-c", LIMITED, limit, *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = run("locks")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        f"cannot be locked ({os.strerror(errno.ENOLCK)}): set ZANGCHAT_BASE_DIR to a folder on a "
        "disk with locks" in done.stderr
    )
    done = run("sync")
    assert done.returncode == 0 and saved_steps(root) == [10], done.stderr
    assert done.stderr.count("cannot sync folders") >= 1
