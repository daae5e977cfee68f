"""System calls, processes and descriptors for the other parts of the jail."""

from __future__ import annotations

import ctypes
import os
import sys

TYPE_CHECKING = False  # typing takes longer to import than everything else here
if TYPE_CHECKING:
    from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NAME, PR_GET_NAME = 1, 4, 8, 15, 16
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
PR_SET_VMA = 0x53564D41  # libc names its memory with it
EPERM, ENOSYS, SIGKILL = 1, 38, 9  # the modules errno and signal take milliseconds to import

OPEN = {0, 1, 2}  # descriptors; the parent passes only those named on the command line


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> int:
    """The value of a libc function that sets errno. Raises OSError naming the function."""
    value = getattr(libc(), name)(*arguments)
    if value < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return value


def long(value: int) -> ctypes.c_ulong:
    return ctypes.c_ulong(value)  # variadic C functions need full registers


def prctl(option: int, value: int) -> None:
    call("prctl", option, long(value), long(0), long(0), long(0))


def fork() -> int:
    """os.fork; the child ends with its parent."""
    child = os.fork()
    if child == 0 and sys.platform == "linux":
        prctl(PR_SET_PDEATHSIG, SIGKILL)
    return child


def wait_and_end(child: int) -> NoReturn:
    """Wait for a child without holding any descriptor, and end as it ended."""
    close_all_but()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def opened(*fds: int) -> tuple[int, ...]:
    OPEN.update(fds)
    return fds


def close_all_but(*kept: int) -> None:
    for fd in sorted(OPEN - set(kept), reverse=True):
        os.close(fd)
    OPEN.intersection_update(kept)
