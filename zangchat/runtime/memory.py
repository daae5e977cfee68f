"""How much memory there is, how much was used, and whether it ran out."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

import psutil
import torch

from zangchat.runtime.processes import ranks_here

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def keep_freed_memory() -> None:
    """On a CPU with glibc: memory that is freed stays with the process, for the next tensor.

    By default each tensor of some megabytes is fetched from the system and given back, page by
    page: some hundredths of a training step.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing apart from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back its end


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: torch's CUDA error, Python's, or a
    RuntimeError of torch's allocators and the libraries below it.
    """
    message = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and any(
            words in message
            for words in (
                *("can't allocate memory", "not enough memory", "bad_alloc"),
                *("out of memory", "STATUS_ALLOC_FAILED"),  # CUDA and MPS; cuBLAS and cuDNN
            )
        )
    )


def device_memory(device: torch.device | str) -> int:
    """Bytes that this process can use: on CUDA and MPS those of the device.

    On a CPU its share, among the ranks of this machine, of the free memory, plus its own.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return available_memory() // ranks_here() + psutil.Process().memory_info().rss


def free_memory(device: torch.device | str) -> int:
    """Bytes that new tensors of this process can take: what is left of `device_memory`."""
    device = torch.device(device)
    if device.type == "cuda":
        return device_memory(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return device_memory(device) - torch.mps.current_allocated_memory()
    return available_memory() // ranks_here()


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that can still be taken: of the machine or, if that is less, of the
    container or job (Linux's cgroups).
    """
    available = float(psutil.virtual_memory().available)
    try:
        memberships = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return int(available)
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers == "":  # version 2
            home, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            home, names = (
                root / "sys/fs/cgroup/memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        inside = home / path.lstrip("/")
        for group in (inside, *inside.parents):  # a limit holds for all groups below it
            if not group.is_relative_to(home):
                break
            available = min(available, _left_in(group, *names))
    return int(available)


def _left_in(group: Path, limit: str, usage: str, cached: str) -> float:
    """Bytes that a cgroup has left, its file cache included, which is given up on demand; infinity
    if it has no limit.
    """
    try:
        limit_bytes = float(
            (group / limit).read_text(encoding="utf-8").strip().replace("max", "inf")
        )
        used = int((group / usage).read_text(encoding="utf-8"))
        stat = dict(
            line.split()
            for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines()
        )
    except (OSError, ValueError):
        # the root has no such files, and a container may not see those above it
        return float("inf")
    return max(0.0, limit_bytes - used + int(stat.get(cached, 0)))


def peak_memory_bytes(device: torch.device | str) -> int:
    """The most memory used so far: of the device by tensors on CUDA, of the driver on MPS (now), of
    this process on a CPU.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    if resource is None:
        # only in the class of Windows
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
