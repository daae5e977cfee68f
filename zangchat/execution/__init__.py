"""Runs model-written Python in a sandbox: `execute_code(code)`, `execute_tests(code, tests, name)`.

The code runs in a fresh interpreter (`python -I -S -B`: no environment, no site-packages) that
first gives up, in jail/:
  the user         root becomes a user that owns nothing
  the world        by namespaces of its own, or by bubblewrap if only that may make them: no
                   network, no other process, no files except the interpreter's (read-only) and an
                   empty /tmp in memory; without either, nothing can be written
  resources        memory, CPU time, file sizes, descriptors, processes; the supervisor limits the
                   wall-clock time and the output
  files            Landlock: the same files, by another part of the kernel; no program is started
  system calls     a seccomp filter: no socket, no new process or program, no tracing, no signal to
                   others and no memory shared with them; without a /tmp no writing

Machines allow different layers (containers often forbid namespaces, macOS has neither), so
`find_sandbox` attacks each layer and then all together, once, and reports what held. Below
`minimum_level` code is not run.

`execute_code` trusts the interpreter that runs the code: `success` means that it wrote a random
word to a private pipe at the end. Code that searches the frames of its own process can forge that.
A verdict that counts comes from `execute_tests`: the tests run in another process of the jail and
call the code through a pipe of literals, and the code's own process cannot write the verdict.
"""

import sys

from zangchat.execution.probe import find_sandbox
from zangchat.execution.sandbox import (
    MEMORY_BYTES,
    ExecutionResult,
    Jail,
    Sandbox,
    SandboxError,
    SandboxLevel,
    SandboxRefused,
)
from zangchat.execution.supervisor import run_in_jail

__all__ = [
    "ExecutionResult",
    "Jail",
    "Sandbox",
    "SandboxError",
    "SandboxLevel",
    "SandboxRefused",
    "execute_code",
    "execute_tests",
    "find_sandbox",
    "require_sandbox",
    "run_in_jail",
]


def execute_code(
    code: str,
    timeout: float = 5.0,
    maximum_memory_bytes: int = MEMORY_BYTES,
    *,
    minimum_level: SandboxLevel = SandboxLevel.FILTERED,
) -> ExecutionResult:
    """Run a Python program; standard library only. May be called from many threads at once.

    timeout: seconds of wall-clock time for the code itself. maximum_memory_bytes: of address space,
    the interpreter's ~30 MB included. Raises SandboxRefused if the sandbox of this machine is below
    `minimum_level`, SandboxError if the sandbox itself fails.
    """
    return run_in_jail(code, require_sandbox(minimum_level).jail, timeout, maximum_memory_bytes)


def execute_tests(
    code: str,
    tests: str,
    entry_point: str,
    timeout: float = 5.0,
    *,
    minimum_level: SandboxLevel = SandboxLevel.FILTERED,
) -> ExecutionResult:
    """Run `tests`, in which `candidate` is the function `entry_point` of `code`.

    They share nothing but its calls. Arguments and values are literals (numbers with inf and nan,
    text, bytes, None, and lists, tuples, sets and dicts of them) and are passed by value; an
    exception of the function is raised in the tests. `success`: the tests ran to their end,
    independently of any claim of the code. Raises as `execute_code`.
    """
    jail = require_sandbox(minimum_level).jail
    return run_in_jail(code, jail, timeout, MEMORY_BYTES, (tests, entry_point))


def require_sandbox(minimum_level: SandboxLevel) -> Sandbox:
    """The sandbox of this machine. Raises SandboxRefused if it is below `minimum_level`."""
    sandbox = find_sandbox()
    if sandbox.level < minimum_level:
        remedy = "on Linux allow user namespaces or install bubblewrap"
        remedy += " (apt-get install bubblewrap)"
        if sys.platform != "linux":
            remedy = f"{sys.platform} has no such sandbox: run this on Linux,"
            remedy += " or in a Linux container or virtual machine"
        raise SandboxRefused(
            f"model-written code is not run here: the sandbox of this machine reaches level "
            f"'{sandbox.level}', below '{minimum_level}'; {remedy}"
        )
    return sandbox
