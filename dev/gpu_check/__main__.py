"""Check and measure zangchat on a GPU: one command, at most eight minutes, JSON lines and a table.

    python -m dev.gpu_check
    python -m dev.gpu_check --only=decode,graphs
    python -m dev.gpu_check --report        the last run as text for an issue
    python -m dev.gpu_check --rehearse      tiny sizes, also on a CPU

It needs torch (2.9 or later), numpy and the small wheels tyro and rich, no network, no data, and
neither the Rust crate nor an installation: start it in the checkout. Each part runs in a process of
its own, so that one that crashes or hangs costs only its own rows.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dev.gpu_check.table import issue, table
from zangchat import configurator
from zangchat.errors import UserError


@dataclass
class Config:
    only: str = ""  # parts with commas between; default: all
    minutes: float = 8.0  # after these, no part begins, and the one that runs is stopped
    out: str = "gpu_check.jsonl"  # the file that the rows go to, and that --report reads
    report: bool = False  # print the rows of the last run as text for an issue
    rehearse: bool = False  # tiny sizes
    device_type: str = ""  # cuda | mps | cpu; default: the best one present
    part: str = ""  # internal: the part that this process runs


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, check, argv)


def check(config: Config) -> int:
    if config.part:
        return run_part(config)
    if config.report:
        print(issue(read(Path(config.out))))
        return 0
    limits = chosen_parts(config)
    deadline = time.monotonic() + 60 * config.minutes
    rows: list[dict[str, Any]] = []
    with open(config.out, "w", encoding="utf-8") as file:
        for name, limit in limits.items():
            left = deadline - time.monotonic()
            if config.rehearse:
                limit = 600
            for row in measured(config, name, min(limit, left)) if left > 1 else not_begun(name):
                rows.append(row)
                print(json.dumps(row), flush=True)
                print(json.dumps(row), file=file, flush=True)
    print(f"\n{table(rows)}\n\nin {config.out}; for an issue: `python -m dev.gpu_check --report`")
    return 1 if any(row.get("ok") is False for row in rows) else 0


def chosen_parts(config: Config) -> dict[str, int]:
    """name -> seconds. Raises UserError for an unknown part, or without a GPU."""
    from dev.gpu_check.parts import PARTS
    from zangchat.runtime.devices import autodetect_device_type

    names = [name.strip() for name in config.only.split(",")] if config.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"--only={unknown[0]} is not known: choose among {', '.join(PARTS)}")
    if (config.device_type or autodetect_device_type()) != "cuda" and not config.rehearse:
        raise UserError("there is no CUDA device to check: --rehearse goes through it on a CPU")
    return {name: PARTS[name][1] for name in names}


def read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"there is no {path}: run `python -m dev.gpu_check` first") from None
    return [json.loads(line) for line in lines]


def not_begun(name: str) -> Iterator[dict[str, Any]]:
    yield {"part": name, "name": "problem", "ok": False, "note": "the time was up before it began"}


def measured(config: Config, name: str, limit: float) -> Iterator[dict[str, Any]]:
    """The rows of a part, and one about a problem if its process did not end well."""
    flags = [f"--part={name}", f"--device_type={config.device_type}"]
    command = [sys.executable, "-m", "dev.gpu_check", *flags, f"--rehearse={config.rehearse}"]
    start, problem = time.monotonic(), ""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        running = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = running.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            output, _ = running.communicate()
            problem = f"stopped after {limit:.0f} s"
        finally:
            if running.poll() is None:  # Ctrl-C here does not reach it
                os.killpg(running.pid, signal.SIGKILL)
        errors.seek(0)
        complaint = [line for line in errors.read().splitlines() if line.strip()]
    for line in output.splitlines():
        if line.startswith("{"):
            yield {"part": name, **json.loads(line)}
    if not problem and running.returncode:
        problem = complaint[-1] if complaint else f"exit code {running.returncode}"
    if problem:
        yield {"part": name, "name": "problem", "ok": False, "note": problem}
    yield {"part": name, "name": "took", "value": time.monotonic() - start, "unit": "s"}


def run_part(config: Config) -> int:
    """In the process of a part: print its rows."""
    from dev.gpu_check.parts import PARTS, RANKS, TINY, Sizes
    from zangchat.runtime.devices import compute_init

    device = compute_init(config.device_type, deterministic=config.part == "resume")[-1]
    part = RANKS[config.part] if config.part in RANKS else PARTS[config.part][0]
    for row in part(TINY if config.rehearse else Sizes(), device):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
