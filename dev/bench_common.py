"""What benchmarks share: a machine that is busy with something else is refused, and every figure says where it was taken."""

import os
import platform
import time
from pathlib import Path
from typing import Any

from zangchat.configurator import UserError


def busy_cores(seconds: float = 1.0) -> float:
    """How many cores others keep busy, measured now; the load average where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return os.getloadavg()[0]

    def idle() -> int:
        fields = stat.read_text().split("\n", 1)[0].split()
        return int(fields[4]) + int(fields[5])  # idle, waiting for a disk

    before, start = idle(), time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - start
    return max(0.0, (os.cpu_count() or 1) - (idle() - before) / os.sysconf("SC_CLK_TCK") / passed)


def machine(allowed: bool) -> dict[str, Any]:
    """Where a figure is taken. Raises UserError on a machine that is busy, unless that is allowed."""
    busy = busy_cores()
    if busy > 0.2 and not allowed:
        raise UserError(f"{busy:.1f} cores are busy with something else: wait, or add --busy and do not quote the figures")
    return {
        "cores": os.cpu_count(),
        "busy_cores_before": round(busy, 2),
        "load_average": round(os.getloadavg()[0], 2),
        "processor": next(
            (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor()
        ),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
