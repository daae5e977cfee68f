"""Attack the sandbox inside a pid, network and mount namespace.

An attack that succeeds cannot hurt the machine.

`Guard` starts this file in the namespace and asks it, one JSON line at a time, to run programs. The
server is process 1 there, which signals from inside cannot kill. A canary process next to it shows
whether a signal escaped the sandbox, and the process list shows whether a program left a process.
"""

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zangchat import execution
from zangchat.execution import ExecutionResult, Jail
from zangchat.execution.probe import attack

UNSHARE = [
    "unshare",
    "--pid",
    "--net",
    "--ipc",
    "--mount",
    "--fork",
    "--kill-child",
    "--mount-proc",
]
MEMORY = 256 * 2**20


class GuardError(RuntimeError):
    """Something escaped from the sandbox and was caught by this guard."""


class Guard:
    """The outer side. Raises OSError if the kernel forbids such namespaces."""

    def __init__(self, home: Path) -> None:
        user = [] if os.getuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
        environment = {**os.environ, "HOME": str(home), "SECRET_TOKEN": "hf_secret"}
        command = [*UNSHARE, *user, sys.executable, "-m", "tests.sandbox_guard"]
        self.server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self.server.stdout is not None and self.server.stderr is not None
        hello = self.server.stdout.readline()
        if not hello:
            raise OSError(self.server.stderr.read().strip()[-300:])
        self.level = execution.SandboxLevel(json.loads(hello)["level"])
        self.owner, self.canary = json.loads(hello)["owner"], json.loads(hello)["canary"]

    def ask(self, **request: Any) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        if answer.get("escaped"):
            raise GuardError(answer["escaped"])
        if "broken" in answer:
            raise execution.SandboxError(answer["broken"])
        return answer["answer"]

    def run(
        self,
        code: str,
        timeout: float = 5.0,
        memory: int = MEMORY,
        tests: tuple[str, str] | None = None,
        jail: Jail | None = None,
    ) -> ExecutionResult:
        """Run the program in `jail`, by default the strongest one.

        Raises GuardError if it leaves a process or kills the canary.
        """
        fields = asdict(jail) if jail else None
        return ExecutionResult(
            **self.ask(
                do="run", codes=[code], timeout=timeout, memory=memory, tests=tests, jail=fields
            )[0]
        )

    def run_many(self, codes: list[str]) -> list[ExecutionResult]:
        return [
            ExecutionResult(**one)
            for one in self.ask(
                do="run", codes=codes, timeout=10.0, memory=MEMORY, tests=None, jail=None
            )
        ]

    def attack(self, jail: Jail) -> dict[str, bool]:
        return dict(self.ask(do="attack", jail=asdict(jail)))

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.kill()
        self.server.wait()


# ---- the inner side ------------------------------------------------------------------------------


def serve() -> None:
    raise_loopback()
    for _ in range(32):  # a process in a jail has such a pid, too: the canary's must differ
        canary = subprocess.Popen(["sleep", "1000"])
        if canary.pid >= 32:
            break
        canary.kill()
        canary.wait()
    sandbox = execution.find_sandbox()
    usual = processes()
    print(
        json.dumps({"level": sandbox.level, "owner": os.getpid(), "canary": canary.pid}), flush=True
    )
    for line in sys.stdin:
        request = json.loads(line)
        jail = Jail(**request["jail"]) if request["jail"] else sandbox.jail
        answer: dict[str, Any] = {}
        try:
            answer["answer"] = attack(jail) if request["do"] == "attack" else run(request, jail)
        except (execution.SandboxError, OSError) as error:
            answer["broken"] = str(error)
        if canary.poll() is not None:
            answer["escaped"] = (
                f"a signal of the program killed another process ({canary.returncode})"
            )
        # all are killed by now, but the kernel may list them a little longer
        deadline = time.monotonic() + 3.0
        while (remaining := processes() - usual) and time.monotonic() < deadline:
            time.sleep(0.005)
        if remaining:
            answer["escaped"] = f"processes of the program are left: {remaining}"
        print(json.dumps(answer), flush=True)


def run(request: dict[str, Any], jail: Jail) -> list[dict[str, Any]]:
    tests = tuple(request["tests"]) if request["tests"] else None
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(
            lambda code: execution.run_in_jail(
                code, jail, request["timeout"], request["memory"], tests
            ),
            request["codes"],
        )
        return [asdict(result) for result in results]


def raise_loopback() -> None:
    """Bring up the loopback device, so that an attack on the network has a target."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP


def processes() -> set[str]:
    """The pids of all live processes in this namespace."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:  # it ended in the meantime
            continue
        if text.rsplit(") ", 1)[1][0] not in "ZX":
            found.add(text.split(" ", 1)[0])
    return found


if __name__ == "__main__":
    serve()
