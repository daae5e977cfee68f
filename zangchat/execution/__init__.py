"""Runs model-written Python where it can do no harm: `execute_code(code)`, `execute_tests(code, tests, entry_point)`.

The code runs in a fresh interpreter (`python -I -S -B`: no environment, no site-packages) that first gives up, in jail.py:
  the user         as root it becomes a user that owns nothing
  the world        namespaces of its own, or bubblewrap's where only that may make them: no network, no other process, no file
                   but the interpreter's (read-only) and an empty /tmp in memory; without either there is no place to write
  resources        memory, CPU time, file sizes, descriptors, processes; the wall clock and the output are watched from here
  files            Landlock: the same files, by another part of the kernel, and no program started
  system calls     a seccomp filter: no socket, no new process or program, no tracing, no signal to others; without a /tmp no writing

What a machine allows differs (containers often forbid namespaces, macOS has neither), so `find_sandbox` attacks every layer by itself and
then all together, once, and reports what held; code below `minimum_level` is not run.

`execute_code` believes the interpreter that runs the code: `success` means that it said, by a random word on a private pipe, that the code
ran to its end. Code that searches the frames of its own process can forge that. A verdict that counts comes from `execute_tests`: the tests
run in another process of the jail, call the code through a pipe of literals, and the code's own process cannot write the verdict.
"""

import contextlib
import enum
import functools
import json
import marshal
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from zangchat.errors import UserError
from zangchat.execution import jail as inside

STARTUP_SECONDS = 30.0  # for the interpreter and the jail, on a machine that is busy; the code's own time starts after that
OUTPUT_BYTES = 64 * 1024  # each of stdout and stderr; more ends the program
TMP_BYTES = 16 * 2**20
FILE_BYTES = 2**20
PROCESSES = 64  # and threads, of the user that the code runs as
UID_BASE, UID_RANGE = 1_900_000_000, 100_000_000  # users for root to become: one each, so that each has its own RLIMIT_NPROC
ENDINGS = {"broken", "finished", "failed"}  # the words of a jail after which nothing more is to come
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/dev/null", "/dev/urandom")


@dataclass
class ExecutionResult:
    success: bool  # the code ran to its end
    stdout: str
    stderr: str
    error: str | None = None  # why not, in one line
    timeout: bool = False
    memory_exceeded: bool = False


class SandboxLevel(enum.IntEnum):
    """What the sandbox was seen to hold, each level with all before it."""

    NONE = 0  # nothing: not even a memory limit
    LIMITS = 1  # resources are limited, the program ends with its time
    FILTERED = 2  # no network, no new processes, no signals, no harm to the files of whoever runs it; but it reads what is readable
    ISOLATED = 3  # no file of this machine either

    def __str__(self) -> str:
        return self.name.lower()


class SandboxRefused(UserError):
    """This machine cannot hold the code as well as was asked for."""


class SandboxError(RuntimeError):
    """The sandbox itself failed; says nothing about the code."""


@dataclass(frozen=True)
class Jail:
    """Which layers to use. The tests take single ones away, to see that each holds by itself."""

    world: str = "none"  # namespaces | bubblewrap | none
    landlock: bool = False
    seccomp: bool = False
    drop: bool = False  # root's rights, or those of the user namespace


@dataclass(frozen=True)
class Sandbox:
    jail: Jail
    level: SandboxLevel

    def __str__(self) -> str:
        layers = [self.jail.world] if self.jail.world != "none" else []
        layers += ["another user"] if self.jail.drop and os.getuid() == 0 else []
        layers += [name for name in ("landlock", "seccomp") if getattr(self.jail, name)]
        return f"{self.level} ({', '.join([*layers, 'resource limits'])})"


def execute_code(
    code: str,
    timeout: float = 5.0,
    maximum_memory_bytes: int = 256 * 2**20,
    *,
    minimum_level: SandboxLevel = SandboxLevel.FILTERED,
) -> ExecutionResult:
    """Run a Python program in the sandbox; standard library only. Safe to call from many threads at once.

    timeout: seconds of wall-clock time for the code itself. maximum_memory_bytes: of address space, the interpreter's ~30 MB included.
    Raises SandboxRefused where the sandbox of this machine is below `minimum_level`, SandboxError where the sandbox itself broke.
    """
    return run_in_jail(code, require_sandbox(minimum_level).jail, timeout, maximum_memory_bytes)


def execute_tests(
    code: str,
    tests: str,
    entry_point: str,
    timeout: float = 5.0,
    maximum_memory_bytes: int = 256 * 2**20,
    *,
    minimum_level: SandboxLevel = SandboxLevel.FILTERED,
) -> ExecutionResult:
    """Run `tests`, in which the name `candidate` stands for the function `entry_point` of `code`; they share nothing but its calls.

    Arguments and values are literals (numbers with inf and nan, text, bytes, None, and lists, tuples, sets and dicts of them) and travel by
    value; an exception of the function is raised in the tests. `success`: the tests ran to their end, whatever the code says of itself.
    """
    return run_in_jail(code, require_sandbox(minimum_level).jail, timeout, maximum_memory_bytes, (tests, entry_point))


def require_sandbox(minimum_level: SandboxLevel) -> Sandbox:
    """The sandbox of this machine; SandboxRefused where it is below `minimum_level`."""
    sandbox = find_sandbox()
    if sandbox.level < minimum_level:
        remedy = "on Linux allow user namespaces or install bubblewrap (apt-get install bubblewrap)"
        if sys.platform != "linux":
            remedy = f"{sys.platform} has no such sandbox: run this on Linux, or in a Linux container or virtual machine"
        raise SandboxRefused(
            f"model-written code is not run here: the sandbox of this machine reaches level '{sandbox.level}', "
            f"below '{minimum_level}'; {remedy}"
        )
    return sandbox


# -- one program -------------------------------------------------------------------------------------------------------


def run_in_jail(code: str, jail: Jail, timeout: float, memory_bytes: int, tests: tuple[str, str] | None = None) -> ExecutionResult:
    """execute_code, or execute_tests with (tests, entry_point), with given layers, whatever they are worth."""
    if os.name != "posix":
        raise SandboxRefused(f"model-written code is not run here: {sys.platform} has no sandbox; use Linux, or WSL on Windows")
    nonce = secrets.token_hex(16)
    limits = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": int(timeout) + 2,
        "RLIMIT_FSIZE": 0 if jail.world == "none" else FILE_BYTES,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_AS": memory_bytes,
    }
    if jail.drop and os.getuid() == 0:  # else the limit would count all processes of the person who runs this
        limits["RLIMIT_NPROC"] = PROCESSES
    request = {
        "code": code,
        "entry_point": tests[1] if tests else "",
        "nonce": nonce,
        "namespaces": jail.world == "namespaces",
        "landlock": jail.landlock,
        "seccomp": jail.seccomp,
        "drop": jail.drop,
        "keep_search": jail.world == "none" and jail.landlock and not _interpreter_is_public(),
        "uid": UID_BASE + secrets.randbelow(UID_RANGE // 4) * 4,  # and the next ones: each process is a user of its own
        "visible": _visible_paths(),
        "writable": () if jail.world == "none" else ("/tmp",),
        "tmp_bytes": TMP_BYTES,
        "limits": limits,
    }
    with (
        tempfile.TemporaryDirectory(prefix="zangchat-jail-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as tests_file,
    ):
        request["folder"] = folder
        if jail.drop and jail.world == "none" and os.getuid() == 0:
            os.chmod(folder, 0o755)
        stdin.write(_program() + inside.encode(request))
        stdin.seek(0)
        tests_file.write(tests[0].encode("utf-8", "surrogatepass") if tests else b"")
        tests_file.seek(0)
        result_read, result_write = os.pipe()
        passed = (result_write, tests_file.fileno()) if tests else (result_write,)
        try:
            process = subprocess.Popen(
                _command(jail, result_write, tests_file.fileno() if tests else -1),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                cwd=folder,
                close_fds=True,
                pass_fds=passed,
                start_new_session=True,
            )
        except BaseException:
            os.close(result_read)
            raise
        finally:
            os.close(result_write)
        with process, os.fdopen(result_read, "rb") as result:
            return _watch(process, result, nonce, timeout)


@dataclass
class _Output:
    data: bytes = b""

    @property
    def text(self) -> str:
        return self.data[:OUTPUT_BYTES].decode("utf-8", errors="replace")


def _watch(process: subprocess.Popen[bytes], result: IO[bytes], nonce: str, timeout: float) -> ExecutionResult:
    """Collect what the program says until there is a verdict, its time is over or it says too much; then end all of it."""
    assert process.stdout is not None and process.stderr is not None
    stdout, stderr, report = _Output(), _Output(), _Output()
    deadline = time.monotonic() + STARTUP_SECONDS
    timed_out = flooded = False
    words: dict[str, tuple[str, bool]] = {}
    with selectors.DefaultSelector() as selector:
        for pipe, output in ((result, report), (process.stdout, stdout), (process.stderr, stderr)):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, output)
        while selector.get_map() and not flooded:
            ended = bool(words.keys() & ENDINGS) or process.poll() is not None  # asked before the last look at the pipes
            ready = selector.select(0 if ended else max(0.0, min(0.05, deadline - time.monotonic())))
            for key, _ in ready:
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                key.data.data += data
                flooded = flooded or len(key.data.data) > OUTPUT_BYTES
            had_started, words = "started" in words, _words(report.data, nonce)
            if "started" in words and not had_started:
                deadline = time.monotonic() + timeout
            if ended and not ready:
                break
            if not ended and time.monotonic() >= deadline:
                timed_out = True
                break
    if not (timed_out or flooded or words.keys() & ENDINGS):
        try:  # all pipes are closed: at its end, as a rule, but a program may close them itself
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            timed_out = True
    _kill(process)
    if "broken" in words or "started" not in words:
        detail = words["broken"][0] if "broken" in words else stderr.text.strip() or f"no answer within {STARTUP_SECONDS:.0f} s"
        raise SandboxError(f"the sandbox did not start: {detail}")
    ending = ExecutionResult(False, stdout.text, stderr.text)
    if timed_out:
        return replace(ending, error=f"timed out after {timeout:g} s", timeout=True)
    if flooded:
        return replace(ending, error=f"more than {OUTPUT_BYTES // 1024} KiB of output")
    if "failed" in words:
        return replace(ending, error=words["failed"][0], memory_exceeded=words["failed"][1])
    if "finished" in words:
        return replace(ending, success=True)
    return replace(ending, error=f"ended before its last line ({_exit_text(process.returncode)})")


def _words(report: bytes, nonce: str) -> dict[str, tuple[str, bool]]:
    """{word: (text, whether memory ran out)} of the complete lines; lines without the nonce are the program's own and count for nothing."""
    words = {}
    for line in report.split(b"\n")[:-1]:
        parts = line.split(b" ", 3)
        if len(parts) == 4 and parts[0] == nonce.encode():
            words[parts[1].decode("ascii", "replace")] = (parts[3].decode("unicode_escape", "replace"), parts[2] == b"1")
    return words


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the whole session; with its first process ends a pid namespace, wherever else its members are."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of it has ended
    except PermissionError:
        process.kill()  # macOS says so of a group of zombies
    process.wait()


def _exit_text(code: int) -> str:
    number = -code if code < 0 else code - 128  # the jail and bubblewrap pass a signal on as 128 + number
    names = {int(s): s.name for s in signal.Signals}
    return f"killed by {names[number]}" if number in names else f"exit code {code}"


# -- how it is started -------------------------------------------------------------------------------------------------


@functools.cache
def _interpreter() -> str:
    """The interpreter itself, not the virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.cache
def _visible_paths() -> tuple[str, ...]:
    """What the interpreter needs to see: its own installation and the system's libraries, none within another."""
    paths: list[str] = []
    for path in (os.path.realpath(sys.base_prefix), _interpreter(), *LIBRARIES):
        if os.path.lexists(path) and not any(path == seen or path.startswith(seen + "/") for seen in paths):
            paths.append(path)
    return tuple(paths)


@functools.cache
def _program() -> bytes:
    """jail.py for the very interpreter that runs this, compiled once: reading it anew would take each program some milliseconds."""
    path = Path(inside.__file__)
    return marshal.dumps(compile(path.read_text(encoding="utf-8"), path.name, "exec"))


def _command(jail: Jail, result_fd: int, tests_fd: int) -> list[str]:
    start = "import marshal, sys; exec(marshal.load(sys.stdin.buffer))"
    python = [_interpreter(), "-I", "-S", "-B", "-c", start, str(result_fd), str(tests_fd)]
    if jail.world != "bubblewrap":
        return python
    command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--die-with-parent"]
    command += ["--cap-drop", "ALL"]
    if os.getuid() == 0:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # to become another user, which puts them down
    else:
        command += ["--unshare-user"]
    visible = _visible_paths()
    for folder in sorted({str(parent) for path in visible for parent in Path(path).parents} - {"/"}):
        command += ["--perms", "0755", "--dir", folder]  # bubblewrap would copy the mode of a private home
    for path in visible:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    command += ["--size", str(TMP_BYTES), "--perms", "1777", "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--"]
    return command + python


# -- what holds here ---------------------------------------------------------------------------------------------------

ATTACK = """
import ctypes, fcntl, json, os, socket
port, secret, target, victim = {port!r}, {secret!r}, {target!r}, {victim!r}
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
    "signal": succeeds(lambda: os.kill(victim, 0)) or succeeds(lambda: fcntl.fcntl(1, fcntl.F_SETOWN, victim)),
    "trace": succeeds(lambda: ctypes.CDLL(None).ptrace(0x4206, victim, 0, 0) == 0),  # PTRACE_SEIZE
    "root": succeeds(lambda: os.setuid(0)),
    "write": succeeds(lambda: os.close(os.open(target, os.O_WRONLY))),
    "change": succeeds(lambda: os.chmod(target, 0o644)),
    "read": succeeds(lambda: open(secret).read()),
    "environment": succeeds(lambda: open(f"/proc/{{victim}}/environ").read()),
    "memory": succeeds(lambda: bytearray(2**30)),
}}))
"""
# What each layer holds back by itself; the reported level is what all of them hold together.
HOLDS = {
    "bubblewrap": ("network", "signal", "trace", "write", "change", "read", "environment"),
    "namespaces": ("network", "signal", "trace", "write", "change", "read", "environment"),
    "landlock": ("write", "read", "environment"),
    "seccomp": ("network", "process", "signal", "trace", "write", "change"),
}


@functools.cache
def find_sandbox() -> Sandbox:
    """The strongest jail that works here, and what it holds: each layer is attacked by itself, then all of them together."""
    if os.name != "posix":
        return Sandbox(Jail(), SandboxLevel.NONE)
    candidates = [Jail()]
    if sys.platform == "linux":  # elsewhere the system calls of the layers have other numbers
        world = next((world for world in ("namespaces", "bubblewrap") if _holds(Jail(world), world)), "none")
        landlock, seccomp = _holds(Jail(landlock=True), "landlock"), _holds(Jail(seccomp=True), "seccomp")
        jail = Jail(world, landlock, seccomp, drop=world != "none" or landlock or _interpreter_is_public())
        candidates = [jail, replace(jail, drop=False), Jail()]
    for chosen in candidates:
        try:
            return Sandbox(chosen, _level(attack(chosen)))
        except (SandboxError, OSError):  # the layers do not go together; or nothing can be run at all
            continue
    return Sandbox(Jail(), SandboxLevel.NONE)


def _holds(jail: Jail, layer: str) -> bool:
    try:
        through = attack(jail)
    except (SandboxError, OSError):  # this layer is not to be had: not installed, forbidden, unknown to the kernel
        return False
    return not any(through[name] for name in HOLDS[layer])


@functools.cache
def _interpreter_is_public() -> bool:
    """Whether another user can read the interpreter's files; where these are all that root sees, it cannot just step down."""
    folder = Path(os.path.realpath(sys.base_prefix))
    return all(path.stat().st_mode & 0o005 == 0o005 for path in (folder, *folder.parents))


def attack(jail: Jail) -> dict[str, bool]:
    """Run the attacks above in a jail; {name: whether it got through}. Raises SandboxError where the jail does not work."""
    with tempfile.TemporaryDirectory(prefix="zangchat-probe-") as folder, socket.create_server(("127.0.0.1", 0)) as server:
        secret, target = Path(folder, "secret"), Path(folder, "target")
        for path, mode in ((secret, 0o644), (target, 0o600), (Path(folder), 0o755)):
            path.touch()
            path.chmod(mode)  # the secret is for everyone's eyes: only a world of its own, or Landlock, hides it
        with _victim() as victim:
            program = ATTACK.format(port=server.getsockname()[1], secret=str(secret), target=str(target), victim=victim)
            result = run_in_jail(program, jail, timeout=20.0, memory_bytes=256 * 2**20)
    if not result.success:
        raise SandboxError(f"the probe failed: {result.error}; {result.stderr[-300:]}")
    return dict(json.loads(result.stdout))


@contextlib.contextmanager
def _victim() -> Iterator[int]:
    """The number of a process to attack, which is none of those in a jail: in a container the caller's own may well be."""
    sleepers: list[subprocess.Popen[bytes]] = []
    try:
        while not sleepers or sleepers[-1].pid < 32:
            sleepers.append(subprocess.Popen(["sleep", "60"], env={}))
        yield sleepers[-1].pid
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()


def _level(through: dict[str, bool]) -> SandboxLevel:
    if through["memory"]:
        return SandboxLevel.NONE
    if any(through[name] for name in ("root", "network", "process", "signal", "trace", "write", "change")):
        return SandboxLevel.LIMITS
    return SandboxLevel.FILTERED if through["read"] or through["environment"] else SandboxLevel.ISOLATED
