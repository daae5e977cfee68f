"""Giving up the user, resources and files, in the process that will run the code."""

from __future__ import annotations

import os
import struct
import sys

from zangchat.execution.jail.seccomp import filter_system_calls
from zangchat.execution.jail.system import (
    PR_SET_DUMPABLE,
    PR_SET_KEEPCAPS,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    SIGKILL,
    call,
    libc,
    long,
    prctl,
)

TYPE_CHECKING = False  # typing takes longer to import than everything else here
if TYPE_CHECKING:
    from typing import Any

SYS_LANDLOCK = 444  # create_ruleset; then add_rule and restrict_self, on all machines
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
M_ARENA_MAX = -8
NOBODY = 65534


def confine(request: dict[str, Any], role: int) -> None:
    """Give up all that the request names. Raises OSError or ValueError if that is impossible.

    The order matters: the seccomp filter is last because it forbids the other steps.
    """
    if request["drop"]:
        drop_privileges(request["uid"] + role, request["keep_search"])
    if hasattr(libc(), "mallopt"):
        libc().mallopt(M_ARENA_MAX, 1)  # else each thread takes 64 MiB of address space
    os.umask(0o077)
    set_limits(request["limits"])
    if sys.platform == "linux":
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_DUMPABLE, 0)  # other processes cannot trace it or open its memory
    if request["landlock"]:
        restrict_files(request["visible"], request["writable"])
    if request["seccomp"]:
        filter_system_calls(bool(request["writable"]))


def drop_privileges(uid: int, keep_search: bool = False) -> None:
    """As root become `uid`, or NOBODY if that is impossible; else drop all capabilities.

    keep_search: keep one of root's rights, to read files closed to other users. For an interpreter
    within root's home, when Landlock limits the files.
    """
    if os.getuid() == 0:
        if keep_search:
            prctl(PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        try:
            os.setresgid(uid, uid, uid)
        except OSError:
            uid = NOBODY
            os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if sys.platform == "linux":
        if not keep_search:
            keep_capability()
        else:
            try:
                keep_capability(CAP_DAC_READ_SEARCH)
            except OSError:  # Docker grants only the wider capability
                keep_capability(CAP_DAC_OVERRIDE)
        prctl(PR_SET_PDEATHSIG, SIGKILL)  # a change of user clears it


def keep_capability(*kept: int) -> None:
    mask = sum(1 << number for number in kept)
    version = struct.pack("Ii", 0x20080522, 0)
    call("capset", version, struct.pack("6I", mask, mask, 0, 0, 0, 0))


def set_limits(limits: dict[str, int]) -> None:
    """{name of a limit: its value}, as soft and hard limit; never above the present hard limit."""
    import resource  # not on Windows

    for name, value in limits.items():
        if not hasattr(resource, name) or (sys.platform == "darwin" and name == "RLIMIT_AS"):
            continue  # macOS refuses RLIMIT_AS; the sandbox's level is then NONE
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def restrict_files(visible: tuple[str, ...], writable: tuple[str, ...]) -> None:
    """Landlock: read files below `visible`, change those below `writable`, open no others.

    No program can be started. Newer kernels also refuse TCP, abstract sockets and signals to the
    outside. Needs no privilege.
    """
    execute, write_file, read_file, read_dir = 1, 2, 4, 8
    version = call("syscall", long(SYS_LANDLOCK), None, long(0), long(1))
    every = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    # make a device, a socket, a pipe; control a device
    devices = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 15
    ruleset = struct.pack("3Q", every, 3 * (version >= 4), 3 * (version >= 6))
    ruleset = ruleset[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = call("syscall", long(SYS_LANDLOCK), ruleset, long(len(ruleset)), long(0))
    rights = dict.fromkeys(visible, read_file | read_dir)
    rights |= dict.fromkeys(writable, every & ~execute & ~devices)
    rights |= {"/dev/null": read_file | write_file}
    for path, allowed in rights.items():
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            allowed &= read_file | write_file
        rule = struct.pack("=Qi", allowed, fd)
        call("syscall", long(SYS_LANDLOCK + 1), rules, long(1), rule, long(0))
        os.close(fd)
    call("syscall", long(SYS_LANDLOCK + 2), rules, long(0))
    os.close(rules)
