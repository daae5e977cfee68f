"""The program in the jail: reads one request, forks the processes that run code, reports.

Before it runs anything, each process gives up the rights that the request names:

    runner     runs the program and, if there are tests, then answers their calls; it never holds
               the descriptor of the verdict
    tests      calls the program through a pipe of literals, trusts nothing that comes back, and is
               the only one to write the verdict
"""

from __future__ import annotations

import builtins
import os
import sys

from zangchat.execution.jail.confine import confine, drop_privileges
from zangchat.execution.jail.namespaces import enter_namespaces
from zangchat.execution.jail.system import (
    OPEN,
    PR_SET_PDEATHSIG,
    SIGKILL,
    close_all_but,
    fork,
    opened,
    prctl,
    wait_and_end,
)
from zangchat.execution.jail.wire import decode, receive, send

TYPE_CHECKING = False  # typing takes longer to import than everything else here
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any, NoReturn


def main() -> NoReturn:
    request = decode(sys.stdin.buffer.read())
    result, tests = int(sys.argv[1]), int(sys.argv[2])  # descriptors; -1: without tests
    opened(*{result, tests} - {-1})
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    verdict = Verdict(result, request.pop("nonce"))
    calls = replies = -1
    try:
        code, calls, replies = start_processes(request, verdict, tests)
        confine(request, 0)
        trouble = receive(replies) if tests >= 0 else ""  # of the runner, before the program runs
    except (OSError, ValueError, EOFError) as error:
        trouble = describe(error)
    if trouble:
        verdict.write("broken", trouble)
        os._exit(1)
    verdict.write("started")
    _removed, module = new_main()
    ending = None
    if tests >= 0:
        ending = program_ending(replies)
        module.__dict__["candidate"] = remote(calls, replies)
    if ending is None:
        ending = run(code, module)
    flush()
    if ending is None:
        verdict.write("finished")
    else:
        verdict.write("failed", ending[1], ending[2])
    os._exit(ending is not None)


class Verdict:
    """Writes lines to the supervisor: nonce, word, whether memory ran out, text."""

    def __init__(self, fd: int, nonce: str) -> None:
        self.fd, self.nonce = fd, nonce

    def write(self, word: str, text: str = "", memory: bool = False) -> None:
        line = f"{self.nonce} {word} {memory:d} ".encode()
        os.write(self.fd, line + text.encode("unicode_escape") + b"\n")


def start_processes(
    request: dict[str, Any], verdict: Verdict, tests: int
) -> tuple[str | bytes, int, int]:
    """Enter the namespaces and fork.

    Returns in the process that gives the verdict: (the code to run here, the descriptor to send
    calls to, the one to receive replies from).
    """
    calls: tuple[int, ...] = (-1, -1)
    replies = calls
    if sys.platform == "linux":
        prctl(PR_SET_PDEATHSIG, SIGKILL)
    if request["namespaces"]:
        enter_namespaces(request["folder"], request["visible"], request["tmp_bytes"])
    if tests >= 0:
        calls, replies = opened(*os.pipe()), opened(*os.pipe())
        if not fork():
            verdict.nonce = ""
            close_all_but(0, 1, 2, calls[0], replies[1])
            run_beside_tests(request, calls[0], replies[1])
    child = fork()
    if child:
        if request["drop"]:
            drop_privileges(request["uid"] + 2)
        wait_and_end(child)
    close_all_but(*{0, 1, 2, verdict.fd, tests, calls[1], replies[0]} - {-1})
    code = request.pop("code")
    if tests >= 0:
        with os.fdopen(tests, "rb") as file:
            code = file.read()
        OPEN.remove(tests)
    return code, calls[1], replies[0]


def new_main() -> tuple[list[ModuleType], ModuleType]:
    """(the jail's modules, out of the program's reach but still needed; a fresh __main__)."""
    own = [name for name in sys.modules if name == "__main__" or name.startswith("zangchat.")]
    removed, module = [sys.modules.pop(name) for name in own], type(sys)("__main__")
    sys.modules["__main__"], sys.argv = module, ["main.py"]
    return removed, module


# -- running the code ------------------------------------------------------------------------------


def describe(error: BaseException) -> str:
    """'ValueError: text'; the exception's own methods may fail."""
    try:
        return f"{type(error).__name__}: {error}"[:1000].removesuffix(": ")
    except BaseException:  # noqa: B036  a hostile __str__
        return type(error).__name__


def failure(error: BaseException) -> list[Any]:
    """An error as a literal: [name of the exception, one line, whether memory ran out]."""
    return [type(error).__name__, describe(error), isinstance(error, MemoryError)]


def run(code: str | bytes, module: ModuleType) -> list[Any] | None:
    """Run a program to its end: None, or its failure."""
    reserve = bytearray(1 << 20)  # room to report a MemoryError
    try:
        exec(compile(code, "main.py", "exec"), module.__dict__)
        sys.stdout.flush()
        sys.stderr.flush()
        return None
    except BaseException as error:  # noqa: B036  SystemExit too: the code did not reach its end
        del reserve
        return failure(error)


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # noqa: B036  the code may have replaced the stream
            continue


# -- the program's process, if there are tests -----------------------------------------------------


def run_beside_tests(request: dict[str, Any], calls: int, replies: int) -> NoReturn:
    """Report that the process is jailed, then how the program ended, then answer calls."""
    try:
        confine(request, 1)
    except (OSError, ValueError) as error:
        send(replies, describe(error))
        os._exit(1)
    send(replies, "")
    _removed, module = new_main()
    ending, name = run(request.pop("code"), module), request["entry_point"]
    function = module.__dict__.get(name)
    if ending is None and not callable(function):
        ending = failure(NameError(f"the program defines no function {name}"))
    send(replies, ending)
    if ending is None:
        answer_calls(function, calls, replies)
    flush()
    os._exit(0)


def answer_calls(function: Any, calls: int, replies: int) -> None:
    """Call `function` for the tests, until they close the pipe."""
    while True:
        try:
            arguments, keywords = receive(calls)
        except EOFError:
            return
        try:
            reply = ["value", function(*arguments, **keywords)]
            sys.stdout.flush()
            send(replies, reply)
        except BaseException as error:  # noqa: B036  the tests decide about it
            reply = None
            send(replies, failure(error))


# -- the tests' process ----------------------------------------------------------------------------


def remote(calls: int, replies: int) -> Callable[..., Any]:
    """The function that the tests call.

    Arguments and value travel as literals; an exception of the program is raised here.
    """

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        send(calls, [arguments, keywords])
        reply = receive(replies)
        if type(reply) is list and len(reply) == 2 and reply[0] == "value":
            return reply[1]
        name, line, memory = failure_of(reply)
        kind = MemoryError if memory else getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                error = kind(line.removeprefix(f"{name}: "))
            except TypeError:  # a few need more than a line
                error = RuntimeError(line)
        else:
            error = RuntimeError(line)
        raise error

    return candidate


def failure_of(reply: Any) -> list[Any]:
    """Check a failure that the program's process sent, which may be anything."""
    if type(reply) is list and [type(part) for part in reply] == [str, str, bool]:
        return [reply[0], reply[1][:1000], reply[2]]
    raise ValueError("the program answers nonsense")


def program_ending(replies: int) -> list[Any] | None:
    """How the program ended before any call: None, or its failure."""
    try:
        reply = receive(replies)
        return reply if reply is None else failure_of(reply)
    except (EOFError, ValueError, TypeError, RecursionError) as error:
        return [type(error).__name__, f"the program ended before its last line ({error})", False]
