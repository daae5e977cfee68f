"""Fault injection: stop a training process by a signal, an exception or a full disk.

A moment is a number of calls made from this project's own code, in any thread: a profile function
counts them and strikes at the n-th. Any line of a save, of the loader and of the loop may therefore
be the last one to run. The processes run the command's own `main`, forked from a server that has
already imported torch.
"""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts import base_train, chat_rl, chat_sft, mid_train
from tasks import registry
from tests.unit.test_chat_rl import Vowels
from tests.unit.test_train_scripts import base_flags, final, folder, mid_flags, sft_flags
from zangchat import checkpoint_manager
from zangchat.training import trainer

ROOT = Path(__file__).resolve().parents[1]
SAVE_EVERY = 3
# the files whose code writes a checkpoint
SAVING = (
    "checkpoint_manager.py",
    "checkpoint_files.py",
    "saves.py",
    "files.py",
)
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "base": base_train.main,
    "mid": mid_train.main,
    "sft": chat_sft.main,
    "rl": chat_rl.main,
}
EXIT_CODES = {  # of a process that was struck; 0 if the fault came too late to matter
    "kill": {-9},
    "SIGTERM": {143, -15, 0},
    "SIGINT": {130, 0},
    "exception": {1, 0},
    "full disk": {2, 1, 0},  # 2: the last save failed, in one sentence; 1: a later step failed
}


class Injected(Exception):
    """An unexpected bug."""


@dataclass(frozen=True)
class Fault:
    kind: str  # a key of EXIT_CODES, or "" for none
    moment: int  # strikes at this call
    saving: bool = False  # count only calls made by SAVING
    lasts: int = 1 << 60  # a full disk has room again after this many further calls
    room: int = 0  # maximum size of a file on a full disk, in bytes


def flags(stage: str, root: Path) -> list[str]:
    """Flags of a run of 10 steps that evaluates, saves midway and resumes from its last save."""
    rl = "--task=vowels --task_size=40 --examples_per_step=4 --num_samples=3 --max_new_tokens=6 --num_iterations=10 --eval_every=5".split()
    rl += "--eval_examples=3 --eval_samples=2 --optimizer=adamw --matrix_lr=0.05 --init_lr_frac=1 --device_type=cpu".split()
    own = {"base": base_flags(root), "mid": mid_flags(root), "sft": sft_flags(root), "rl": rl}[
        stage
    ]
    return [*own, f"--save_every={SAVE_EVERY}", "--keep_last=2", "--resume=latest"]


def start(
    stage: str, root: Path, log: Path, fault: Fault | None = None
) -> tuple[int, dict[str, Any]]:
    """Run a stage in a process of its own: (exit code, {"calls": ..., "struck": where, if it
    was}).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults"])
    log.unlink(missing_ok=True)
    process = context.Process(target=_victim, args=(stage, str(root), str(log), fault))
    process.start()
    process.join(180)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(
            f"{stage} with {fault} hangs: {log.read_text(encoding='utf-8')[-2000:]}"
        )
    record_path = log.with_suffix(".json")
    record = json.loads(record_path.read_text(encoding="utf-8")) if record_path.exists() else {}
    record_path.unlink(missing_ok=True)
    return process.exitcode, record


def _victim(stage: str, root: str, log: str, fault: Fault | None) -> None:
    os.environ.update(ZANGCHAT_BASE_DIR=root, WANDB_RUN="dummy", WANDB_MODE="offline")
    torch.set_num_threads(1)
    full = fault is not None and fault.kind == "full disk"
    # a full disk limits the log file as well
    sink = os.open("/dev/null" if full else log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    module = types.ModuleType("tasks.vowels")
    module.Vowels = Vowels  # type: ignore[attr-defined]
    sys.modules["tasks.vowels"] = module
    registry.REGISTRY["Vowels"] = registry.Entry("tasks.vowels", "Vowels")
    counter = _arm(fault, Path(log).with_suffix(".json")) if fault is not None else None
    code = COMMANDS[stage](flags(stage, Path(root)))
    if counter is not None:
        sys.setprofile(None)
        if fault is not None and fault.kind == "":
            Path(log).with_suffix(".json").write_text(
                json.dumps({"calls": next(counter)}), encoding="utf-8"
            )
    sys.exit(code)


def _arm(fault: Fault, record_path: Path) -> "itertools.count[int]":
    """Count the calls from this project's code, in this thread and all that start later, and
    strike.
    """
    counter = itertools.count()
    ours: dict[str, bool] = {}

    def counts(file: str) -> bool:
        if file not in ours:
            inside = Path(file).is_relative_to(ROOT) and "tests" not in Path(file).parts[:-1]
            ours[file] = inside and (not fault.saving or Path(file).name in SAVING)
        return ours[file]

    def profile(frame: types.FrameType, event: str, argument: Any) -> None:
        if not event.endswith("call") or not counts(frame.f_code.co_filename):
            return
        now = next(counter)
        if now == fault.moment and fault.kind:
            where = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name} in {threading.current_thread().name}"
            record_path.write_text(json.dumps({"struck": where}), encoding="utf-8")
            _strike(fault)
        elif now == fault.moment + fault.lasts:
            _limit_files(-1)

    threading.setprofile(profile)
    sys.setprofile(profile)
    return counter


def _strike(fault: Fault) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind in ("SIGTERM", "SIGINT"):
        os.kill(os.getpid(), signal.Signals[fault.kind])
    elif fault.kind == "exception":
        raise Injected
    else:
        _limit_files(fault.room)


def _limit_files(size: int) -> None:
    """Simulate a full disk: this process can write no file beyond `size` bytes (-1: no limit)."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def result_of(root: Path, stage: str) -> dict[str, Any]:
    """Weights, optimizer, run state and metrics of a run, without its times."""
    lines = (folder(root, stage) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [
        {key: value for key, value in json.loads(line).items() if key not in trainer.TIMES}
        for line in lines
    ]
    return {**final(root, stage), "metrics": metrics}


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Names of the tensors and other parts in which two runs differ."""
    names = [name for name in ("state", "metrics") if one[name] != two[name]]
    tensors = [
        name for name in one["tensors"].keys() | two["tensors"].keys() if not _same(one, two, name)
    ]
    return [*names, *sorted(tensors)]


def _same(one: dict[str, Any], two: dict[str, Any], name: str) -> bool:
    left, right = one["tensors"].get(name), two["tensors"].get(name)
    return left is not None and right is not None and torch.equal(left, right)


def newest_step(root: Path, stage: str) -> int:
    """The step from which --resume=latest would continue; 0 if there is none."""
    return checkpoint_manager.find_verified_step(folder(root, stage)) or 0


def steps_done(root: Path, stage: str) -> int:
    """The last step in the metrics, ignoring an incomplete last line."""
    path = folder(root, stage) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


class Range:
    """A stage to inject faults into: the base directory before it and its uninterrupted result."""

    def __init__(self, trained: Path, place: Path, stage: str) -> None:
        self.stage, self.place, self.before = stage, place, place / "before"
        shutil.copytree(trained, self.before)
        shutil.rmtree(folder(self.before, stage), ignore_errors=True)
        self.expected = self._uninterrupted("expected")
        self.calls = {saving: self._count(saving) for saving in (False, True)}

    def _fresh(self, name: str) -> Path:
        shutil.rmtree(self.place / name, ignore_errors=True)
        return shutil.copytree(self.before, self.place / name)

    def _uninterrupted(self, name: str) -> dict[str, Any]:
        root = self._fresh(name)
        code, _ = start(self.stage, root, self.place / "log")
        assert code == 0, (self.place / "log").read_text(encoding="utf-8")
        return result_of(root, self.stage)

    def _count(self, saving: bool) -> int:
        code, record = start(
            self.stage, self._fresh("count"), self.place / "log", Fault("", 0, saving)
        )
        assert code == 0
        return record["calls"]

    def shoot(self, fault: Fault, *more: Fault) -> list[str]:
        """Run with a fault, resume with each further fault, finish without faults, and compare.

        Returns where the faults struck.
        """
        root, log, struck = self._fresh("run"), self.place / "log", []
        for each in (fault, *more):
            saved_before = newest_step(root, self.stage)
            code, record = start(self.stage, root, log, each)
            message = f"{each} at {record.get('struck')}: exit code {code}, {log.read_text(encoding='utf-8')[-2000:] if log.exists() else ''}"
            assert code in EXIT_CODES[each.kind] | (set() if "struck" in record else {0}), message
            if "struck" in record:
                struck.append(f"{each.kind}, {record['struck']}")
            saved, done = newest_step(root, self.stage), steps_done(root, self.stage)
            assert saved >= saved_before, message  # no save is lost
            if each.kind != "full disk":  # one save may have been in progress
                assert saved >= (done - 1) // SAVE_EVERY * SAVE_EVERY - SAVE_EVERY, message
        code, _ = start(self.stage, root, log)
        assert code == 0, f"{(fault, *more)}, resumed: {log.read_text(encoding='utf-8')[-3000:]}"
        assert differences(self.expected, result_of(root, self.stage)) == [], (
            f"{(fault, *more)} at {struck}"
        )
        return struck

    def random_fault(self, rng: random.Random) -> Fault:
        saving = rng.random() < 0.5
        kind = rng.choice([*EXIT_CODES])
        lasts = rng.choice([1 << 60, self.calls[saving] // 4])
        return Fault(
            kind,
            rng.randrange(self.calls[saving]),
            saving,
            lasts,
            room=rng.choice([0, 500, 5000, 30_000]),
        )
