"""Finds the sandbox of this machine, by attacks on each layer and on all together."""

import contextlib
import ctypes
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from zangchat.execution.command import interpreter_is_public
from zangchat.execution.sandbox import MEMORY_BYTES, Jail, Sandbox, SandboxError, SandboxLevel
from zangchat.execution.supervisor import run_in_jail

ATTACK = """
import ctypes, fcntl, json, os, socket
port, secret, target, victim, segment = {port!r}, {secret!r}, {target!r}, {victim!r}, {segment!r}
def succeeds(attack):
    try:
        return attack() is not False
    except Exception:
        return False
def fork():
    if os.fork() == 0:
        os._exit(0)
print(json.dumps({{
    "network": succeeds(lambda: socket.create_connection(("127.0.0.1", port), 1)),
    "process": succeeds(fork),
    "signal": succeeds(lambda: os.kill(victim, 0))
        or succeeds(lambda: fcntl.fcntl(1, fcntl.F_SETOWN, victim)),
    "trace": succeeds(lambda: ctypes.CDLL(None).ptrace(0x4206, victim, 0, 0) == 0),  # PTRACE_SEIZE
    "share": succeeds(lambda: ctypes.CDLL(None).shmat(segment, None, 0o10000) != -1)
        or succeeds(lambda: os.sched_setaffinity(victim, os.sched_getaffinity(victim))),
    "root": succeeds(lambda: os.setuid(0)),
    "write": succeeds(lambda: os.close(os.open(target, os.O_WRONLY))),
    "change": succeeds(lambda: os.chmod(target, 0o644)),
    "read": succeeds(lambda: open(secret).read()),
    "environment": succeeds(lambda: open(f"/proc/{{victim}}/environ").read()),
    "memory": succeeds(lambda: bytearray(2**30)),
}}))
"""
WORLD = ("network", "signal", "trace", "share", "write", "change", "read", "environment")
# {layer: attacks that it blocks by itself}; the reported level is what all layers block together.
BLOCKED_BY = {
    "bubblewrap": WORLD,
    "namespaces": WORLD,
    "landlock": ("write", "read", "environment"),
    "seccomp": ("network", "process", "signal", "trace", "share", "write", "change"),
}


@functools.cache
def find_sandbox() -> Sandbox:
    """The strongest jail that works here, and its level.

    Each layer is attacked by itself, then all of them together.
    """
    if os.name != "posix":
        return Sandbox(Jail(), SandboxLevel.NONE)
    candidates = [Jail()]
    if sys.platform == "linux":  # elsewhere the system calls of the layers have other numbers
        worlds = (world for world in ("namespaces", "bubblewrap") if _holds(Jail(world), world))
        world = next(worlds, "none")
        landlock = _holds(Jail(landlock=True), "landlock")
        seccomp = _holds(Jail(seccomp=True), "seccomp")
        drop = world != "none" or landlock or interpreter_is_public()
        jail = Jail(world, landlock, seccomp, drop)
        candidates = [jail, replace(jail, drop=False), Jail()]
    for chosen in candidates:
        try:
            return Sandbox(chosen, _level(attack(chosen)))
        except (SandboxError, OSError):  # the layers do not work together, or nothing can run
            continue
    return Sandbox(Jail(), SandboxLevel.NONE)


def _holds(jail: Jail, layer: str) -> bool:
    try:
        through = attack(jail)
    except (SandboxError, OSError):  # not installed, forbidden or unknown to the kernel
        return False
    return not any(through[name] for name in BLOCKED_BY[layer])


def attack(jail: Jail) -> dict[str, bool]:
    """{attack: whether it got through} in a jail. Raises SandboxError if the jail does not work."""
    with (
        tempfile.TemporaryDirectory(prefix="zangchat-probe-") as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        secret, target = Path(folder, "secret"), Path(folder, "target")
        for path, mode in ((secret, 0o644), (target, 0o600), (Path(folder), 0o755)):
            path.touch()
            path.chmod(mode)  # all users may read the secret: only a world or Landlock hides it
        paths = {"secret": str(secret), "target": str(target)}
        with _victim() as victim, _shared_memory() as segment:
            port = server.getsockname()[1]
            program = ATTACK.format(port=port, victim=victim, segment=segment, **paths)
            result = run_in_jail(program, jail, timeout=20.0, memory_bytes=MEMORY_BYTES)
    if not result.success:
        raise SandboxError(f"the probe failed: {result.error}; {result.stderr[-300:]}")
    return dict(json.loads(result.stdout))


@contextlib.contextmanager
def _victim() -> Iterator[int]:
    """The pid of a process to attack; not a low one, which a process in the jail could have too."""
    sleepers: list[subprocess.Popen[bytes]] = []
    try:
        while not sleepers or sleepers[-1].pid < 32:
            sleepers.append(subprocess.Popen(["sleep", "60"], env={}))
        yield sleepers[-1].pid
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()


@contextlib.contextmanager
def _shared_memory() -> Iterator[int]:
    """The id of a System V segment that all users may read; -1 where there are none."""
    segment = ctypes.CDLL(None).shmget(0, 1, 0o644)  # IPC_PRIVATE
    try:
        yield segment
    finally:
        ctypes.CDLL(None).shmctl(segment, 0, None)  # IPC_RMID


def _level(through: dict[str, bool]) -> SandboxLevel:
    if through["memory"]:
        return SandboxLevel.NONE
    harm = ("root", "network", "process", "signal", "trace", "share", "write", "change")
    if any(through[name] for name in harm):
        return SandboxLevel.LIMITS
    reads = through["read"] or through["environment"]
    return SandboxLevel.FILTERED if reads else SandboxLevel.ISOLATED
