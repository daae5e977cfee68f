"""Runs model-written Python where it can do no harm: `execute_code(code) -> ExecutionResult`.

The code runs in a fresh interpreter (`python -I -S -B`: no environment, no site-packages) that first gives up, in jail.py:
  the user         as root it becomes a user that owns nothing
  the world        bubblewrap where installed, else namespaces of its own: no network, no other process, no file but the
                   interpreter's (read-only) and an empty /tmp in memory
  resources        memory, CPU time, file sizes, descriptors, processes; the wall clock and the output are watched from here
  system calls     a seccomp filter: no socket, no new process or program, no tracing, no signal to others

What a machine allows differs (containers often forbid namespaces, macOS has neither), so `sandbox_level` attacks the
sandbox once and reports what held; execute_code refuses to run below `minimum_level`.

`success` means that the code ran to its end: a random word, written on a private pipe after the last statement, says so.
`os._exit(0)`, `sys.exit()` and a crash are failures. The word is known to the interpreter that runs the code, though: code
that searches the frames of its own process can forge a success. It cannot reach anything else.
"""

import enum
import functools
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from zangchat.configurator import UserError

STARTUP_SECONDS = 30.0  # for the interpreter and the jail, on a machine that is busy; the code's own time starts after that
OUTPUT_BYTES = 64 * 1024  # each of stdout and stderr; more ends the program
TMP_BYTES = 16 * 2**20
FILE_BYTES = 2**20
PROCESSES = 64  # and threads, of the user that the code runs as
UID_BASE, UID_RANGE = 1_900_000_000, 100_000_000  # users for root to become: one each, so that each has its own RLIMIT_NPROC
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


class SandboxError(RuntimeError):
    """The sandbox itself failed; says nothing about the code."""


@dataclass(frozen=True)
class Jail:
    """Which layers to use. The tests take single ones away, to see that each holds by itself."""

    world: str = "none"  # bubblewrap | namespaces | none
    seccomp: bool = False
    drop: bool = False  # root's rights, or those of the user namespace


@dataclass(frozen=True)
class Sandbox:
    jail: Jail
    level: SandboxLevel

    def __str__(self) -> str:
        layers = [self.jail.world] if self.jail.world != "none" else []
        layers += ["seccomp"] if self.jail.seccomp else []
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
    Raises UserError where the sandbox of this machine is below `minimum_level`, SandboxError where the sandbox itself broke.
    """
    sandbox = find_sandbox()
    if sandbox.level < minimum_level:
        raise UserError(
            f"model-written code is not run here: the sandbox of this machine reaches level '{sandbox.level}', below '{minimum_level}'; "
            "on Linux install bubblewrap (apt-get install bubblewrap) or allow user namespaces"
        )
    return run_in_jail(code, sandbox.jail, timeout, maximum_memory_bytes)


def sandbox_level() -> SandboxLevel:
    """The level that execute_code works at on this machine, found once by attacking the sandbox."""
    return find_sandbox().level


# -- one program -------------------------------------------------------------------------------------------------------


def run_in_jail(code: str, jail: Jail, timeout: float, memory_bytes: int) -> ExecutionResult:
    """execute_code with given layers, whatever they are worth."""
    nonce = secrets.token_hex(16)
    request = {
        "code": code,
        "nonce": nonce,
        "namespaces": jail.world == "namespaces",
        "seccomp": jail.seccomp,
        "drop": jail.drop,
        "uid": UID_BASE + secrets.randbelow(UID_RANGE),
        "visible": _visible_paths(),
        "tmp_bytes": TMP_BYTES,
        "memory_bytes": memory_bytes,
        "cpu_seconds": int(timeout) + 2,
        "file_bytes": FILE_BYTES,
        # without a user of its own the limit would count all processes of the person who runs this
        "processes": PROCESSES if jail.drop and os.getuid() == 0 else None,
    }
    with (
        tempfile.TemporaryDirectory(prefix="zangchat-jail-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdin,
    ):
        request["folder"] = folder
        if jail.drop and jail.world == "none" and os.getuid() == 0:
            os.chmod(folder, 0o777)
        stdin.write(json.dumps(request).encode())
        stdin.seek(0)
        result_read, result_write = os.pipe()
        try:
            process = subprocess.Popen(
                _command(jail, result_write),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                cwd=folder,
                close_fds=True,
                pass_fds=(result_write,),
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
    """Collect what the program says until it ends, its time is over or it says too much; then end all of it."""
    assert process.stdout is not None and process.stderr is not None
    stdout, stderr, report = _Output(), _Output(), _Output()
    deadline = time.monotonic() + STARTUP_SECONDS
    started = timed_out = flooded = False
    with selectors.DefaultSelector() as selector:
        for pipe, output in ((process.stdout, stdout), (process.stderr, stderr), (result, report)):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, output)
        while selector.get_map() and not flooded:
            ended = process.poll() is not None  # asked before the last look at the pipes, which a stray child may hold open
            ready = selector.select(0 if ended else max(0.0, min(0.05, deadline - time.monotonic())))
            for key, _ in ready:
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                key.data.data += data
                flooded = flooded or len(key.data.data) > OUTPUT_BYTES
            if not started and any(word["word"] == "started" for word in _words(report.data, nonce)):
                started, deadline = True, time.monotonic() + timeout
            if ended and not ready:
                break
            if not ended and time.monotonic() >= deadline:
                timed_out = True
                break
    if not (timed_out or flooded):
        try:  # all pipes are closed: at its end, as a rule, but a program may close them itself
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            timed_out = True
    _kill(process)
    words = {word["word"]: word for word in _words(report.data, nonce)}
    if "broken" in words or "started" not in words:
        detail = words["broken"]["text"] if "broken" in words else stderr.text.strip() or f"no answer within {STARTUP_SECONDS:.0f} s"
        raise SandboxError(f"the sandbox did not start: {detail}")
    ending = ExecutionResult(False, stdout.text, stderr.text)
    if timed_out:
        return replace(ending, error=f"timed out after {timeout:g} s", timeout=True)
    if flooded:
        return replace(ending, error=f"more than {OUTPUT_BYTES // 1024} KiB of output")
    if "failed" in words:
        return replace(ending, error=str(words["failed"]["text"]), memory_exceeded=bool(words["failed"]["memory"]))
    if "finished" in words and process.returncode == 0:
        return replace(ending, success=True)
    return replace(ending, error=f"ended before its last line ({_exit_text(process.returncode)})")


def _words(report: bytes, nonce: str) -> list[dict[str, Any]]:
    """The complete lines that the jail wrote; lines without the nonce are the program's own and count for nothing."""
    words = []
    for line in report.split(b"\n")[:-1]:
        try:
            word = json.loads(line)
        except ValueError:
            continue
        if isinstance(word, dict) and word.get("nonce") == nonce:
            words.append(word)
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


def _command(jail: Jail, result_fd: int) -> list[str]:
    source = Path(__file__).with_name("jail.py").read_text(encoding="utf-8")
    python = [_interpreter(), "-I", "-S", "-B", "-c", source, str(result_fd)]
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
import json, os, socket, sys
port, secret, target, owner = {port!r}, {secret!r}, {target!r}, {owner!r}
def succeeds(attack):
    try:
        attack()
    except Exception:
        return False
    return True
def write():
    with open(target, "w") as file:
        file.write("x")
def fork():
    if os.fork() == 0:
        os._exit(0)
print(json.dumps({{
    "network": succeeds(lambda: socket.create_connection(("127.0.0.1", port), 1)),
    "process": succeeds(fork),
    "signal": owner != os.getpid() and succeeds(lambda: os.kill(owner, 0)),
    "root": succeeds(lambda: os.setuid(0)),
    "write": succeeds(write),
    "read": succeeds(lambda: open(secret).read()),
    "memory": succeeds(lambda: bytearray(2**30)),
}}))
"""


@functools.cache
def find_sandbox() -> Sandbox:
    """The strongest jail that works here, and what it holds. Tries each kind with an attack on this very process."""
    if os.name != "posix":
        return Sandbox(Jail(), SandboxLevel.NONE)
    best = Sandbox(Jail(), SandboxLevel.NONE)
    for world in ("bubblewrap", "namespaces", "none"):
        for filtered in (True, False):
            jail = Jail(world, seccomp=filtered, drop=world != "none" or _interpreter_is_public())
            try:
                sandbox = Sandbox(jail, _level(attack(jail)))
            except (SandboxError, OSError):  # this kind is not to be had: not installed, forbidden, unknown to the kernel
                continue
            if sandbox.level > best.level:
                best = sandbox
        if best.level == SandboxLevel.ISOLATED:
            break
    return best


def _interpreter_is_public() -> bool:
    """Whether another user can read the interpreter's files; else root must not step down where these are all it sees."""
    folder = Path(os.path.realpath(sys.base_prefix))
    return all(path.stat().st_mode & 0o005 == 0o005 for path in (folder, *folder.parents))


def attack(jail: Jail) -> dict[str, bool]:
    """Run the attacks above in a jail; {name: whether it got through}. Raises SandboxError where the jail does not work."""
    with tempfile.TemporaryDirectory(prefix="zangchat-probe-") as folder, socket.create_server(("127.0.0.1", 0)) as server:
        secret, target = Path(folder, "secret"), Path(folder, "target")
        for path, mode in ((secret, 0o644), (target, 0o600), (Path(folder), 0o755)):
            path.touch()
            path.chmod(mode)  # the secret is for everyone's eyes: only a world of its own hides it
        program = ATTACK.format(port=server.getsockname()[1], secret=str(secret), target=str(target), owner=os.getpid())
        result = run_in_jail(program, jail, timeout=20.0, memory_bytes=256 * 2**20)
    if not result.success:
        raise SandboxError(f"the probe failed: {result.error}; {result.stderr[-300:]}")
    return dict(json.loads(result.stdout))


def _level(through: dict[str, bool]) -> SandboxLevel:
    if through["memory"]:
        return SandboxLevel.NONE
    if any(through[name] for name in ("root", "network", "process", "signal", "write")):
        return SandboxLevel.LIMITS
    return SandboxLevel.FILTERED if through["read"] else SandboxLevel.ISOLATED
