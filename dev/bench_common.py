"""Shared by the benchmarks: refuse a busy machine, describe it, repeat in new processes, take
medians.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from zangchat.configurator import as_flags
from zangchat.errors import UserError
from zangchat.report import cpu_name
from zangchat.runtime.processes import restore_threads

BUSY = 0.2  # cores used by others, above which a timing is worthless
# of psutil.cpu_times, as far as the system has them
BUSY_TIMES = (
    "user",
    "nice",
    "system",
    "irq",
    "softirq",
    "steal",
)


def taken_meanwhile(work: Callable[[], Any]) -> tuple[float, Any]:
    """(cores that others used while `work` ran, its result).

    Others are all processes except this one and its finished children, and other virtual machines
    on the same hardware.
    """

    def seconds() -> float:
        times = psutil.cpu_times()._asdict()
        return sum(times.get(name, 0.0) for name in BUSY_TIMES) - sum(
            psutil.Process().cpu_times()[:4]
        )

    before, started = seconds(), time.perf_counter()
    result = work()
    return max(0.0, (seconds() - before) / (time.perf_counter() - started)), result


def machine(allowed: bool) -> dict[str, Any]:
    """The machine, for the output. Raises UserError if it is busy and that is not `allowed`."""
    busy, _ = taken_meanwhile(lambda: time.sleep(1))
    if busy > BUSY and not allowed:
        raise UserError(
            f"{busy:.1f} cores are busy with something else: wait, or add --busy and do not quote "
            "the figures"
        )
    return {
        "cores": os.cpu_count(),
        "busy_cores_before": round(busy, 2),
        "load_average": round(psutil.getloadavg()[0], 2),
        "processor": cpu_name(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def check_peer(config: Any) -> None:
    """Raises UserError if the peer does not know the architecture that is to be measured."""
    if config.peer and config.arch != "nanochat":
        raise UserError(f"--arch={config.arch} is not {config.peer}'s: leave out --arch or --peer")


def environment(side: str) -> dict[str, str]:
    """Of a process that measures "zangchat", or a peer, whose threads wait as its authors like."""
    env = dict(os.environ)
    if side != "zangchat":
        restore_threads(env)
    return env


def repetition(module: str, config: Any) -> Any:
    """Run `python -m MODULE` with the flags of `config`; return the JSON of its last output
    line.
    """
    command = [sys.executable, "-m", module, *as_flags(config)]
    done = subprocess.run(
        command,
        env=environment(config.worker),
        capture_output=True,
        encoding="utf-8",
        cwd=Path(__file__).parents[1],
    )
    if done.returncode:
        raise UserError(f"{config.worker} could not be measured:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def middle(runs: list[Any]) -> Any:
    """The median of every number in equal structures."""
    if isinstance(runs[0], dict):
        return {key: middle([run[key] for run in runs]) for key in runs[0]}
    if isinstance(runs[0], list):
        return [middle(list(items)) for items in zip(*runs, strict=True)]
    return statistics.median(runs) if isinstance(runs[0], (int, float)) else runs[0]
