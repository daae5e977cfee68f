"""Measure the cost of the sandbox for a program, one at a time and many at once. JSON.

    python -m dev.bench_sandbox
    python -m dev.bench_sandbox --programs=400 --layers

Times are those of a program that does nothing, from the call to the verdict. `cpu_ms` is the
processor time of the program and the caller, without bubblewrap, which waits for its own child.
--layers also measures single layers, to show the cost of each.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from dev.bench_common import machine
from zangchat import configurator
from zangchat.execution import ExecutionResult, Jail, find_sandbox, run_in_jail


@dataclass
class Config:
    programs: int = 200  # of each kind
    at_once: int = 4  # programs running at the same time
    layers: bool = False  # also measure single layers
    busy: bool = False  # measure even if the machine is busy; the output records it


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, bench, argv)


def bench(config: Config) -> None:
    if config.programs < 10 or config.at_once < 1:
        raise configurator.UserError("--programs must be at least 10, --at_once at least 1")
    figures: dict[str, Any] = {"machine": machine(config.busy)}
    sandbox = find_sandbox()
    figures |= {"sandbox": str(sandbox), "programs": config.programs}
    kinds: dict[str, Callable[[], ExecutionResult]] = {
        "program": lambda: run_in_jail("pass", sandbox.jail, 5.0, 256 * 2**20),
        "program with tests": lambda: run_in_jail(
            "def f(x):\n    return x",
            sandbox.jail,
            5.0,
            256 * 2**20,
            ("assert candidate(1) == 1", "f"),
        ),
    }
    if config.layers:
        jails = {"limits": Jail(), "landlock": Jail(landlock=True), "seccomp": Jail(seccomp=True)}
        jails |= {world: Jail(world) for world in ("bubblewrap", "namespaces")}
        jails |= {
            f"all, {world}": Jail(world, landlock=True, seccomp=True, drop=True)
            for world in ("bubblewrap", "namespaces")
        }
        kinds |= {
            name: partial(run_in_jail, "pass", jail, 5.0, 256 * 2**20)
            for name, jail in jails.items()
        }
    for name, run in kinds.items():
        figures[name] = {
            "one_at_a_time": measure(run, config.programs, 1),
            "at_once": measure(run, config.programs, config.at_once),
        }
    print(json.dumps(figures, indent=2))


def measure(run: Callable[[], ExecutionResult], programs: int, at_once: int) -> dict[str, float]:
    """Milliseconds per program and programs per second, after a few warm-up runs."""

    def one(_: int) -> float:
        start = time.perf_counter()
        result = run()
        if not result.success:
            raise RuntimeError(f"a program that does nothing failed: {result.error}")
        return (time.perf_counter() - start) * 1e3

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, range(2 * at_once)))
        start, cpu = time.perf_counter(), cpu_seconds()
        times = sorted(pool.map(one, range(programs)))
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    return {
        "threads": at_once,
        "p50_ms": round(times[programs // 2], 1),
        "p99_ms": round(times[min(programs - 1, programs * 99 // 100)], 1),
        "programs_per_second": round(programs / seconds, 1),
        "cpu_ms": round(cpu / programs * 1e3, 1),
    }


def cpu_seconds() -> float:
    """Processor seconds of this process and its finished children, independent of other load."""
    return sum(
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


if __name__ == "__main__":
    sys.exit(main())
