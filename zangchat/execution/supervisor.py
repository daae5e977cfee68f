"""Runs one program in a jail, from outside: starts it, watches its time and output, ends it."""

import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from typing import IO, Any, NamedTuple

from zangchat.execution.command import TMP_BYTES, command, interpreter_is_public, visible_paths
from zangchat.execution.jail import program
from zangchat.execution.jail.wire import encode
from zangchat.execution.sandbox import ExecutionResult, Jail, SandboxError, SandboxRefused

# For the interpreter and the jail on a busy machine; the code's own time starts after that.
STARTUP_SECONDS = 30.0
OUTPUT_BYTES = 64 * 1024  # each of stdout and stderr; more ends the program
FILE_BYTES = 2**20
PROCESSES = 64  # and threads, of the user that the code runs as
# Users for root to become: each program has its own, and so its own RLIMIT_NPROC.
UID_BASE, UID_RANGE = 1_900_000_000, 100_000_000
ENDINGS = {"broken", "finished", "failed"}  # the last messages of a jail


def run_in_jail(
    code: str,
    jail: Jail,
    timeout: float,
    memory_bytes: int,
    tests: tuple[str, str] | None = None,
) -> ExecutionResult:
    """execute_code, or execute_tests with (tests, entry_point), with the given layers only."""
    if os.name != "posix":
        remedy = f"{sys.platform} has no sandbox; use Linux, or WSL on Windows"
        raise SandboxRefused(f"model-written code is not run here: {remedy}")
    request = make_request(code, jail, timeout, memory_bytes, tests)
    with (
        tempfile.TemporaryDirectory(prefix="zangchat-jail-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as tests_file,
    ):
        request["folder"] = folder
        if jail.drop and jail.world == "none" and os.getuid() == 0:
            os.chmod(folder, 0o755)
        stdin.write(program() + encode(request))
        stdin.seek(0)
        tests_file.write(tests[0].encode("utf-8", "surrogatepass") if tests else b"")
        tests_file.seek(0)
        tests_fd = tests_file.fileno() if tests else -1
        process, result = start(jail, folder, stdin, tests_fd)
        with process, result:
            return Watch(process, result, request["nonce"], timeout).run()


def make_request(
    code: str, jail: Jail, timeout: float, memory_bytes: int, tests: tuple[str, str] | None
) -> dict[str, Any]:
    """The request that the jail's program reads, but for the folder to work in."""
    limits = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": int(timeout) + 2,
        "RLIMIT_FSIZE": 0 if jail.world == "none" else FILE_BYTES,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_AS": memory_bytes,
    }
    if jail.drop and os.getuid() == 0:  # else the limit would count all processes of this user
        limits["RLIMIT_NPROC"] = PROCESSES
    return {
        "code": code,
        "entry_point": tests[1] if tests else "",
        "nonce": secrets.token_hex(16),
        "namespaces": jail.world == "namespaces",
        "landlock": jail.landlock,
        "seccomp": jail.seccomp,
        "drop": jail.drop,
        "keep_search": jail.world == "none" and jail.landlock and not interpreter_is_public(),
        # and the next ones: each process of the jail is a user of its own
        "uid": UID_BASE + secrets.randbelow(UID_RANGE // 4) * 4,
        "visible": visible_paths(),
        "writable": () if jail.world == "none" else ("/tmp",),
        "tmp_bytes": TMP_BYTES,
        "limits": limits,
    }


def start(
    jail: Jail, folder: str, stdin: IO[bytes], tests_fd: int
) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """(the jail's first process, the pipe of its messages)."""
    result_read, result_write = os.pipe()
    try:
        process = subprocess.Popen(
            command(jail, result_write, tests_fd),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd=folder,
            close_fds=True,
            pass_fds=[fd for fd in (result_write, tests_fd) if fd >= 0],
            start_new_session=True,
        )
    except BaseException:
        os.close(result_read)
        raise
    finally:
        os.close(result_write)
    return process, os.fdopen(result_read, "rb")


@dataclass
class Output:
    data: bytes = b""

    @property
    def text(self) -> str:
        return self.data[:OUTPUT_BYTES].decode("utf-8", errors="replace")


class Message(NamedTuple):
    text: str
    memory_exceeded: bool


def read_messages(report: bytes, nonce: str) -> dict[str, Message]:
    """{word: message} of the complete lines; lines without the nonce are the program's own."""
    messages = {}
    for line in report.split(b"\n")[:-1]:
        parts = line.split(b" ", 3)
        if len(parts) == 4 and parts[0] == nonce.encode():
            text = parts[3].decode("unicode_escape", "replace")
            messages[parts[1].decode("ascii", "replace")] = Message(text, parts[2] == b"1")
    return messages


class Watch:
    """Collects a program's output and messages until its verdict, or until it exceeds a limit."""

    def __init__(
        self, process: subprocess.Popen[bytes], result: IO[bytes], nonce: str, timeout: float
    ) -> None:
        self.process, self.result, self.nonce, self.timeout = process, result, nonce, timeout
        self.stdout, self.stderr, self.report = Output(), Output(), Output()
        self.deadline = time.monotonic() + STARTUP_SECONDS
        self.timed_out = self.flooded = False
        self.messages: dict[str, Message] = {}

    def run(self) -> ExecutionResult:
        """Watch to the end, then end all of the program. Raises SandboxError."""
        self._collect()
        if not (self.timed_out or self.flooded or self._has_verdict()):
            try:  # all pipes are closed: usually at its end, but a program may close them itself
                self.process.wait(max(0.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.timed_out = True
        kill(self.process)
        return self._result()

    def _has_verdict(self) -> bool:
        return bool(self.messages.keys() & ENDINGS)

    def _collect(self) -> None:
        assert self.process.stdout is not None and self.process.stderr is not None
        pipes = {self.result: self.report, self.process.stdout: self.stdout}
        pipes[self.process.stderr] = self.stderr
        with selectors.DefaultSelector() as selector:
            for pipe, output in pipes.items():
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ, output)
            while selector.get_map() and not self.flooded:
                # checked before the last look at the pipes
                ended = self._has_verdict() or self.process.poll() is not None
                wait = 0.0 if ended else min(0.05, self.deadline - time.monotonic())
                ready = selector.select(max(0.0, wait))
                for key, _ in ready:
                    self._read(selector, key)
                had_started = "started" in self.messages
                self.messages = read_messages(self.report.data, self.nonce)
                if "started" in self.messages and not had_started:
                    self.deadline = time.monotonic() + self.timeout
                if ended and not ready:
                    break
                if not ended and time.monotonic() >= self.deadline:
                    self.timed_out = True
                    break

    def _read(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        data = os.read(key.fd, 65536)
        if not data:
            selector.unregister(key.fileobj)
        key.data.data += data
        self.flooded = self.flooded or len(key.data.data) > OUTPUT_BYTES

    def _result(self) -> ExecutionResult:
        messages = self.messages
        if "broken" in messages or "started" not in messages:
            detail = self.stderr.text.strip() or f"no answer within {STARTUP_SECONDS:.0f} s"
            if "broken" in messages:
                detail = messages["broken"].text
            raise SandboxError(f"the sandbox did not start: {detail}")
        ending = ExecutionResult(False, self.stdout.text, self.stderr.text)
        if self.timed_out:
            return replace(ending, error=f"timed out after {self.timeout:g} s", timeout=True)
        if self.flooded:
            return replace(ending, error=f"more than {OUTPUT_BYTES // 1024} KiB of output")
        if failed := messages.get("failed"):
            return replace(ending, error=failed.text, memory_exceeded=failed.memory_exceeded)
        if "finished" in messages:
            return replace(ending, success=True)
        cause = exit_text(self.process.returncode)
        return replace(ending, error=f"ended before its last line ({cause})")


def kill(process: subprocess.Popen[bytes]) -> None:
    """End the whole session; a pid namespace ends with its first process."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of it has ended
    except PermissionError:
        process.kill()  # macOS raises this for a group of zombies
    process.wait()


def exit_text(code: int) -> str:
    # the jail and bubblewrap pass a signal on as 128 + number
    number = -code if code < 0 else code - 128
    names = {int(s): s.name for s in signal.Signals}
    return f"killed by {names[number]}" if number in names else f"exit code {code}"
