"""The sandbox, attacked from inside namespaces of the test's own (see tests/sandbox_guard.py), so
that a hole in it hurts nobody.
"""

import functools
import os
import struct
import sys
import tempfile
import textwrap
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sandbox_guard import Guard
from zangchat import execution
from zangchat.errors import UserError
from zangchat.execution import (
    ExecutionResult,
    Jail,
    Sandbox,
    SandboxLevel,
    command,
    execute_code,
    execute_tests,
    find_sandbox,
    jail,
    probe,
    run_in_jail,
    supervisor,
)
from zangchat.execution.jail import seccomp, wire

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
MEMORY = 256 * 2**20
WORLDS = ["bubblewrap", "namespaces"]


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> Iterator[Guard]:
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir()
    (home / ".ssh" / "id_rsa").write_text("hf_secret", encoding="utf-8")
    for path in (home / ".ssh" / "id_rsa", home / ".ssh", home, *home.parents[:3]):
        # for everyone's eyes: only a layer that hides files keeps it
        os.chmod(path, path.stat().st_mode | 0o055)
    try:
        guard = Guard(home)
    except OSError as error:
        pytest.skip(
            "the kernel forbids a pid and network namespace of the test's own, so nothing is "
            f"attacked here: {error}"
        )
    yield guard
    guard.close()


@pytest.fixture(scope="module")
def run(guard):
    def run(
        code: str,
        timeout: float = 5.0,
        level: SandboxLevel = SandboxLevel.FILTERED,
        **settings: Any,
    ) -> ExecutionResult:
        if guard.level < level:
            pytest.skip(
                f"the sandbox of this machine reaches '{guard.level}', the test needs '{level}'"
            )
        return guard.run(textwrap.dedent(code), timeout, **settings)

    return run


@pytest.fixture(scope="module")
def isolated(run):
    return lambda code, **settings: run(code, level=SandboxLevel.ISOLATED, **settings)


@pytest.fixture(scope="module")
def attacked(guard):
    """What gets through given layers; skips where they are not to be had."""

    def attacked(jail: Jail) -> dict[str, bool]:
        try:
            return guard.attack(jail)
        except execution.SandboxError as error:
            pytest.skip(f"{jail} cannot be had here: {error}")

    return attacked


# -- what a program may do -------------------------------------------------------------------------


def test_a_program_that_reaches_its_end_succeeds(run):
    result = run("import json, sys\nprint(json.dumps([1, 2]))\nprint('oops', file=sys.stderr)")
    assert result == ExecutionResult(success=True, stdout="[1, 2]\n", stderr="oops\n")


def test_a_program_gets_a_folder_threads_and_no_input(isolated):
    result = isolated(
        """
        import threading, pathlib
        pathlib.Path("a.txt").write_text("kept")
        thread = threading.Thread(target=lambda: print(pathlib.Path("a.txt").read_text()))
        thread.start(); thread.join()
        try:
            input()
        except EOFError:
            print("no input")
        """
    )
    assert result.success, result
    assert result.stdout == "kept\nno input\n"


def test_the_standard_library_is_there(run):
    modules = "bisect collections copy decimal fractions functools hashlib heapq itertools json math random re string typing unittest"
    assert run(f"import {', '.join(modules.split())}\nassert hashlib.md5(b'x').hexdigest()").success


def test_main_is_the_program(run):
    assert run(
        "import sys\nx = 1\nassert __name__ == '__main__' and sys.modules['__main__'].x == 1"
    ).success


def test_many_at_once_do_not_disturb_each_other(guard):
    results = guard.run_many([f"print({i})\nassert {i} % 3" for i in range(12)])
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(12)]
    assert [result.success for result in results] == [i % 3 != 0 for i in range(12)]


# -- how it fails ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, error",
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("x = (", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(): f()\nf()", "RecursionError"),
        (
            "import sys\nsys.setrecursionlimit(10**9)\nclass R:\n  def __repr__(self): return "
            "repr(self)\nrepr(R())",
            "SIGSEGV|RecursionError|MemoryError",
        ),
        ("x = []\nfor _ in range(10**6): x = [x]\nrepr(x)", "RecursionError"),
        ("eval('(' * 10**4 + ')' * 10**4)", "MemoryError|SyntaxError|RecursionError"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("import os; os.abort()", "SIGABRT"),
        ("import sys; sys.set_int_max_str_digits(0) or print(10 ** 100); int('x')", "ValueError"),
        ("str(10 ** 10000)", "ValueError"),
        ("class E(Exception):\n  def __str__(self): raise SystemExit\nraise E", "E"),
        ("raise ValueError('x' * 10**6)", "ValueError: xxx"),
        ("raise ValueError('two\\nlines \\udc80')", "ValueError: two\nlines"),
        ("\0", "SyntaxError|ValueError"),
    ],
)
def test_a_failure_is_named(run, code, error):
    result = run(code)
    assert not result.success and not result.timeout
    assert result.error and any(word in result.error for word in error.split("|"))
    assert len(result.error) <= 1000


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "9 ** 9 ** 9",
        "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
        "import signal, time\nfor s in {*signal.valid_signals()} - {9, 19, 32, 33}: "
        "signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
        "import threading\ndef f():\n  while True: pass\nfor _ in range(8): "
        "threading.Thread(target=f).start()\nf()",
    ],
)
def test_time_is_limited(run, code):
    result = run(code, timeout=0.5)
    assert (result.success, result.timeout, result.error) == (False, True, "timed out after 0.5 s")


def test_threads_end_with_the_program_that_left_them(run):
    result = run(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        timeout=30,
    )
    assert (result.success, result.timeout) == (True, False)


def test_closed_descriptors_do_not_hide_a_program_from_the_clock(run):
    assert run("import os, time; os.closerange(0, 64); time.sleep(60)", timeout=0.5).timeout
    assert not run("import os; os.closerange(0, 64); os._exit(0)").success


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(10**10)",
        "x = []\nwhile True: x.append(bytearray(10**6))",
        "x = 'ab' * 10**10",
        "import zlib\npacked = zlib.compress(bytes(10**7), 1)\nx = [zlib.decompress(packed) for _ "
        "in range(100)]",
        "x = 1 << 10**10",
    ],
)
def test_memory_is_limited(run, code):
    result = run(code)
    assert (
        not result.success
        and result.memory_exceeded
        and (result.error or "").startswith("MemoryError")
    )


def test_memory_limit_is_the_callers(run):
    code = "x = bytearray(100 * 2**20)"
    assert run(code).success
    assert run(code, memory=96 * 2**20).memory_exceeded


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_limited(run, stream):
    result = run(f"import sys\nwhile True: sys.{stream}.write('x' * 10000)")
    assert not result.success and not result.timeout
    assert result.error == "more than 64 KiB of output"
    assert len(getattr(result, stream)) == 64 * 1024


def test_output_that_is_no_text_is_shown(run):
    assert run(r"import sys; sys.stdout.buffer.write(b'a\xffb')").stdout == "a\ufffdb"


def test_files_are_limited(isolated):
    assert "File too large" in (isolated("open('big', 'wb').write(bytes(8 * 2**20))").error or "")
    assert "No space left" in (
        isolated("for i in range(64): open(str(i), 'wb').write(bytes(2**20))").error or ""
    )
    unseen = (
        "import os\nfor i in range(70): fd = os.memfd_create(str(i)); os.write(fd, bytes(2**19))"
    )
    assert "PermissionError" in (isolated(unseen).error or "")


def test_files_without_contents_are_limited(guard, attacked):
    """The kernel's own memory for each does not count as the file system's."""
    jail = Jail("namespaces", drop=True)
    attacked(jail)
    result = guard.run("for i in range(10**4): open(str(i), 'w').close()", jail=jail)
    assert "No space left" in (result.error or ""), result


# -- verdicts of a program on itself ---------------------------------------------------------------

CHECK = "\nassert add(1, 2) == 3\nassert add(2, 2) == 4\n"
# Candidates that do not add, but try to pass.
CHEATS = {
    "constant": "def add(a, b): return 3",
    "leaves when called": "import os\ndef add(a, b): os._exit(0)",
    "leaves at once": "import os; os._exit(0)",
    "sys.exit when called": "import sys\ndef add(a, b): sys.exit(0)",
    "sys.exit at once": "import sys; sys.exit(0)",
    "SystemExit": "def add(a, b): raise SystemExit(0)",
    "a signal": "import os, signal\ndef add(a, b): os.kill(os.getpid(), signal.SIGTERM)",
    "words on every descriptor": """
        import os
        def add(a, b):
            for fd in range(3, 64):
                for word in (b" finished 0 \\n", b'{"word": "finished"}\\n'):
                    try: os.write(fd, word)
                    except OSError: pass
            os._exit(0)
        """,
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_program_passes_only_at_its_end(run, cheat):
    assert run("def add(a, b): return a + b" + CHECK).success
    assert not run(textwrap.dedent(CHEATS[cheat]) + CHECK).success


# -- verdicts of tests in a process of their own ---------------------------------------------------

FORGERIES = {
    # reaches every frame and object of its own interpreter, and writes the verdict wherever it can,
    # with every word that may be the secret
    "frame walking": """
        import gc, os, sys
        def secrets():
            frame = sys._getframe()
            while frame:
                yield from frame.f_locals.values()
                yield from frame.f_globals.values()
                frame = frame.f_back
            yield from gc.get_objects()
        def forge():
            seen = set()
            for value in list(secrets()):
                for word in value.values() if type(value) is dict else [value]:
                    if type(word) is str and len(word) == 32: seen.add(word)
                    cells = getattr(word, "__closure__", None) or ()
                    for cell in cells:
                        try: content = cell.cell_contents
                        except ValueError: continue
                        if type(content) is str: seen.add(content)
            for fd in range(3, 64):
                for word in seen:
                    try: os.write(fd, f"{word} finished 0 \\n".encode())
                    except OSError: break
        forge()
        def add(a, b):
            forge()
            os._exit(0)
        """,
    "patched builtins": """
        import builtins, sys
        class Yes:
            def __eq__(self, other): return True
            __hash__ = None
        builtins.AssertionError = Warning
        builtins.isinstance = lambda *_: True
        builtins.compile = lambda *_: compile
        for module in list(sys.modules.values()):
            for name in ("encode", "_encode", "send", "describe", "run"):
                if hasattr(module, name): setattr(module, name, lambda *_: b"N0:")
        def add(a, b): return Yes()
        """,
    "always equal": "class Yes(int):\n  def __eq__(self, other): return True\ndef add(a, b): "
    "return Yes(7)",
    "always equal, no literal": "class Yes:\n  def __eq__(self, other): return True\ndef add(a, "
    "b): return Yes()",
    "nan": "def add(a, b): return float('nan')",
    "no function": "add = None",
    "not a function": "def sub(a, b): return a - b",
    "replies of its own": """
        import os, struct
        def frame(data): return struct.pack(">Q", len(data)) + data
        for fd in range(3, 64):
            for data in (b"N0:", b"l2:s5:valuei1:3", b"l2:s8:finishedT0:", b"s8:finished", b"l3:s1:xs1:xT0:", b"l0:", b"d1:", b"\\xff"):
                try: os.write(fd, frame(data))
                except OSError: break
        def add(a, b): return 0
        """,
    "a reply without end": """
        import os, struct
        def add(a, b):
            for fd in range(3, 64):
                try: os.write(fd, struct.pack(">Q", 1 << 62) + b"x" * 1000)
                except OSError: pass
            os._exit(0)
        """,
    "half a reply": """
        import os, struct
        def add(a, b):
            for fd in range(3, 64):
                try: os.write(fd, struct.pack(">Q", 100) + b"l2:s5:value")
                except OSError: pass
            os._exit(0)
        """,
    "a deep nest": "def add(a, b):\n  x = []\n  for _ in range(300): x = [x]\n  return x",
    "a bottomless nest": "def add(a, b):\n  x = []\n  x.append(x)\n  return x",
    "a forged nest": """
        import os, struct
        data = b"l2:s5:value" + b"l1:" * 10**6
        def add(a, b):
            for fd in range(3, 64):
                try: os.write(fd, struct.pack(">Q", len(data)) + data)
                except OSError: pass
        """,
    "a huge number": "def add(a, b): return 1 << 10**7",
    "too much": "def add(a, b): return bytes(10**8)",
    "the assertion itself": "def add(a, b): raise AssertionError",
    "an exit": "def add(a, b): raise SystemExit(0)",
    "no more memory": "def add(a, b): return bytearray(10**10)",
    "closed descriptors": "import os\ndef add(a, b): os.closerange(0, 64)",
    "the tests' memory": """
        import os, ctypes
        def add(a, b):
            libc = ctypes.CDLL(None)
            for pid in range(1, 64):
                try: open(f"/proc/{pid}/mem", "r+b")
                except OSError: pass
                else: return "opened"
                if pid != os.getpid() and libc.ptrace(0x4206, pid, 0, 0) == 0: return "traced"
                buffer = ctypes.create_string_buffer(8)
                if pid != os.getpid() and libc.process_vm_readv(pid, buffer, 0, buffer, 0, 0) == 0: return "read"
            return 0
        """,
    "signals to the tests": """
        import os, signal
        def add(a, b):
            for pid in (-1, 0, *range(1, 64)):
                if pid != os.getpid():
                    try: os.kill(pid, signal.SIGKILL)
                    except OSError: pass
            return 0
        """,
}
ADDS = ("assert candidate(1, 2) == 3\nassert candidate(2, 2) == 4\n", "add")


@pytest.mark.parametrize("cheat", [*CHEATS, *FORGERIES])
def test_only_what_adds_passes_tests_in_another_process(run, cheat):
    result = run({**CHEATS, **FORGERIES}[cheat], timeout=2.0, tests=ADDS)
    assert not result.success and result.error, result
    assert not any(word in result.error for word in ("opened", "traced", "read"))


def test_a_program_that_answers_passes(run):
    assert run("def add(a, b): return a + b", tests=ADDS).success
    assert run("add = lambda a, b: sum((a, b))", tests=ADDS).success


def test_what_the_code_defines_is_not_there_in_the_tests_and_vice_versa(run):
    code = "helper = 1\nimport builtins\nbuiltins.sum = lambda _: 7\ndef f(): return 'check' in globals()"
    assert run(
        code,
        tests=(
            "check = 1\nassert candidate() is False\nassert 'helper' not in globals() and sum([1, "
            "1]) == 2",
            "f",
        ),
    ).success


def test_an_exception_of_the_code_is_raised_in_the_tests(run):
    code = """
class Own(ValueError): pass
def f(kind):
    raise {"key": KeyError("k"), "own": Own("o"), "code": UnicodeDecodeError("a", b"", 0, 1, "r")}[kind]
"""
    tests = """
for kind, expected in (("key", KeyError), ("own", RuntimeError), ("code", RuntimeError)):
    try:
        candidate(kind)
    except Exception as error:
        assert type(error) is expected, (kind, error)
    else:
        raise AssertionError(kind)
"""
    assert run(code, tests=(tests, "f")).success
    assert (
        run("def f(): raise ValueError('so')", tests=("candidate()", "f")).error == "ValueError: so"
    )
    assert (
        run("def f(): return iter(())", tests=("candidate()", "f")).error
        == "TypeError: an object of type tuple_iterator is no literal"
    )
    assert run("def f(): return bytearray(10**10)", tests=("candidate()", "f")).memory_exceeded


def test_a_call_does_not_change_the_arguments_of_the_tests(run):
    assert run(
        "def f(x): x.append(1); return x",
        tests=("x = [0]\nassert candidate(x) == [0, 1] and x == [0]", "f"),
    ).success


def test_the_programs_time_and_output_count_wherever_they_are_spent(run):
    assert run("while True: pass", timeout=0.5, tests=ADDS).timeout
    assert run("def add(a, b):\n  while True: pass", timeout=0.5, tests=ADDS).timeout
    assert "64 KiB" in (
        run("def add(a, b):\n  while True: print('x' * 1000)", tests=ADDS).error or ""
    )
    assert run("def add(a, b): print('seen'); return a + b", tests=ADDS).stdout.count("seen") == 2


VALUES = [
    *(
        float("inf"),
        -float("inf"),
        0.0,
        -0.0,
        1e-320,
        2**0.5,
        1 + 2j,
        complex("nan+infj"),
        0,
        -1,
        10**5000,
        True,
        None,
        ...,
    ),
    *(
        "",
        "ä中\0\ud800\n",
        b"\xff\0",
        bytearray(b"x"),
        [],
        (),
        set(),
        frozenset(),
        {},
        [()],
        ({1: {2}},),
        {(1, "a"): [None], b"": 0},
    ),
]
literals = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.binary()
    | st.just(...),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.sets(st.integers())
        | st.dictionaries(st.integers() | st.text(), inner)
    ),
    max_leaves=10,
)


def same(a: Any, b: Any) -> bool:
    """Equal in kind as well, all the way down; nan is nan."""
    if type(a) is not type(b):
        return False
    if isinstance(a, set | frozenset):
        return bool(a == b)
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


@given(literals)
@settings(deadline=None, max_examples=100)
def test_literals_come_back_as_they_were(value):
    assert same(wire.decode(wire.encode(value)), value)


@pytest.mark.parametrize(
    "value", VALUES, ids=lambda value: repr(value)[:20] if not isinstance(value, int) else "int"
)
def test_every_kind_of_literal(value):
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        assert same(wire.decode(wire.encode(value)), value)
    finally:
        sys.set_int_max_str_digits(limit)


def test_literals_travel_both_ways(run):
    names = [value for value in VALUES if value != 10**5000 and value == value]
    code = "seen = []\ndef f(x, *, keep=True): seen.append(x); return seen"
    tests = f"from math import nan, inf\nvalues = {names!r}\nfor value in values: got = candidate(value, keep=False)\nassert got == values, got"
    assert run(code, tests=(tests, "f")) == ExecutionResult(True, "", "")


def test_subclasses_travel_as_what_they_are_made_of():
    point = namedtuple("point", "x y")(1, 2)
    for value, plain in (
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (point, (1, 2)),
        (type("I", (int,), {})(3), 3),
    ):
        assert same(wire.decode(wire.encode([value])), [plain])
    for value in (object(), iter([]), range(3), len, type):
        with pytest.raises(TypeError, match="no literal"):
            wire.encode([value])


@given(
    st.binary(max_size=60) | st.text("ltdezifcsbaNTFE0123456789:-_ +", max_size=60).map(str.encode)
)
@settings(deadline=None, max_examples=300)
def test_nonsense_is_refused_and_makes_nothing_but_literals(data):
    try:
        value = wire.decode(data)
    except (ValueError, TypeError, OverflowError):
        return
    wire.encode(value)  # a literal


# -- the filter, simulated -------------------------------------------------------------------------


def verdict(machine: str, writes: bool, number: int, *arguments: int) -> int:
    """What the kernel would decide about a call of process 7: the filter, instruction by
    instruction.
    """
    arguments += (0,) * (6 - len(arguments))
    data = struct.pack("=iIQ6Q", number, seccomp.AUDIT_ARCH[machine], 0, *arguments)
    program, place, value = seccomp.filter_program(machine, 7, writes), 0, 0
    tests = {
        seccomp.JUMP_EQUAL: int.__eq__,
        seccomp.JUMP_GREATER: int.__gt__,
        seccomp.JUMP_SET: lambda a, b: bool(a & b),
    }
    while True:
        operation, if_true, if_false, operand = program[place]
        place += 1
        if operation == seccomp.LEAVE:
            return operand
        if operation == seccomp.LOAD:
            (value,) = struct.unpack_from("=I", data, operand)
        else:
            place += if_true if tests[operation](value, operand) else if_false


@pytest.mark.parametrize("machine", seccomp.DENIED)
def test_the_filter_refuses_what_it_lists_and_allows_computing(machine):
    decide, known = functools.partial(verdict, machine), seccomp.BY_ARGUMENT[machine]
    for name, number in {**seccomp.DENIED[machine], **seccomp.NEWER}.items():
        assert decide(True, number) == decide(False, number) == seccomp.REFUSE, name
    for name, number in seccomp.CHANGES[machine].items():
        assert (decide(True, number), decide(False, number)) == (seccomp.ALLOW, seccomp.REFUSE), (
            name
        )
    read, write, mmap = {"x86_64": (0, 1, 9), "aarch64": (63, 64, 222)}[machine]
    assert {decide(False, number) for number in (read, write, mmap)} == {seccomp.ALLOW}
    assert {
        decide(True, number) for number in (seccomp.CLONE3, seccomp.LAST_KNOWN + 1, 1 << 30)
    } == {seccomp.UNKNOWN}
    assert (decide(True, known["kill"], 7), decide(True, known["kill"], 8)) == (
        seccomp.ALLOW,
        seccomp.REFUSE,
    )
    assert (
        decide(True, known["prlimit64"], 0) == seccomp.ALLOW
        and decide(True, known["prlimit64"], 8) == seccomp.REFUSE
    )
    assert decide(True, known["clone"], seccomp.CLONE_THREAD) == seccomp.ALLOW
    for flags in (
        0,
        seccomp.CLONE_THREAD | 0x10000000,
    ):  # a process; a thread in a user namespace of its own
        assert decide(True, known["clone"], flags) == seccomp.REFUSE
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT):
        assert decide(True, known["openat"], 0, 0, flags) == seccomp.ALLOW
        assert decide(False, known["openat"], 0, 0, flags) == seccomp.REFUSE
    assert decide(False, known["openat"], 0, 0, os.O_RDONLY) == seccomp.ALLOW


# -- what it must not reach ------------------------------------------------------------------------


def test_the_environment_is_empty(guard, run):
    paths = [f"/proc/{pid}/environ" for pid in ("self", 1, guard.owner, guard.canary)]
    result = run(
        f"""
        import ctypes, os
        print(sorted(os.environ))
        for path in {paths}:
            try: print(open(path).read())
            except OSError: pass
        """
    )
    assert result.success and "hf_secret" not in result.stdout and "HOME" not in result.stdout


def test_descriptors_of_the_caller_are_closed(tmp_path):
    if find_sandbox().level < SandboxLevel.FILTERED:
        pytest.skip("the sandbox of this machine is too weak")
    secret = tmp_path / "secret"
    secret.write_text("hf_secret", encoding="utf-8")
    code = """
import os
for fd in range(3, 256):
    try:
        os.lseek(fd, 0, 0)
        print(os.read(fd, 100))
    except OSError:
        pass
"""
    with secret.open("rb") as file:
        os.set_inheritable(file.fileno(), True)
        assert execute_code(code) == ExecutionResult(True, "", "")
        answer = execute_tests(code + "def f(): return 1", "assert candidate() == 1", "f")
    assert answer == ExecutionResult(True, "", "")


def test_files_of_the_machine_are_not_there(isolated, guard, tmp_path):
    secret = tmp_path / "id_rsa"
    secret.write_text("secret", encoding="utf-8")
    secret.chmod(0o644)
    result = isolated(
        f"""
        import os
        secret = {str(secret)!r}
        os.symlink(secret, "link")
        os.symlink("/", "root")
        os.mkdir("up")
        for path in (secret, "link", "root" + secret, "../.." + secret, "up/../../.." + secret, "/proc/self/root" + secret, "/etc/passwd",
                     "/etc/shadow", os.path.expanduser("~/.ssh/id_rsa"), "/proc/self/mem", "/proc/1/environ", "/proc/self/maps",
                     "/proc/1/root" + secret, "/proc/1/cwd/x", "/dev/mem", "/dev/kmsg", "/sys/kernel/notes"):
            try:
                print("read", path, open(path, "rb").read(10))
            except OSError:
                pass
        for path in (secret, "link", "/new", "/usr/lib/new", os.path.dirname(os.__file__) + "/new", os.__file__, "/dev/new",
                     "/proc/self/mem", "/proc/sys/kernel/core_pattern"):
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
                print("opened", path)
            except OSError:
                pass
        for change in (os.unlink, os.rmdir, lambda path: os.chmod(path, 0o777), lambda path: os.rename(path, path + "x")):
            for path in (secret, "/usr/lib", os.__file__):
                try:
                    change(path)
                    print("changed", path)
                except OSError:
                    pass
        try:
            os.chroot("up")
            print("chroot")
        except OSError:
            pass
        """
    )
    assert result.success, result
    assert result.stdout == ""
    assert secret.read_text(encoding="utf-8") == "secret"


def test_no_network(run):
    result = run(
        """
        import socket
        for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
                try:
                    socket.socket(family, kind)
                    print(family, kind)
                except OSError:
                    pass
        """
    )
    assert result.success and result.stdout == "", result


def test_new_processes_programs_and_powers_are_refused(run):
    result = run(
        """
        import os, subprocess, ctypes
        def tries(name, attack):
            try:
                print(name, attack())
            except OSError:
                pass
        tries("fork", os.fork)
        tries("subprocess", lambda: subprocess.run(["/bin/true"]))
        tries("spawn", lambda: os.posix_spawn("/bin/true", ["true"], {}))
        tries("exec", lambda: os.execv("/bin/true", ["true"]))
        tries("signal", lambda: os.kill(-1, 0))
        tries("parent", lambda: os.kill(os.getppid(), 0))
        tries("group", lambda: os.killpg(0, 0))
        tries("session", os.setsid)
        tries("nice", lambda: os.nice(-1))
        tries("root", lambda: os.setuid(0))
        libc = ctypes.CDLL(None, use_errno=True)
        call = lambda number, *rest: libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, rest))
        print([libc.fork(), libc.vfork(), libc.ptrace(0, 0, 0, 0), libc.unshare(0x10000000), libc.mount(0, b"/tmp", b"tmpfs", 0, 0)])
        print([libc.prctl(1, 0), libc.prctl(4, 1), libc.prctl(22, 0), libc.setns(0, 0)])  # live on, be traced, another filter
        if os.uname().machine == "x86_64":
            print([call(56, 17), call(56, 0x10000000 | 0x10000 | 0x900), call(435, 0, 0), call(435 | 0x40000000, 0, 0), call(425, 1, 0)])
            print([ctypes.get_errno() for _ in [call(435, 0, 0)]])
        """
    )
    assert result.success, result
    lines = result.stdout.splitlines()
    assert lines[:2] == ["[-1, -1, -1, -1, -1]", "[-1, -1, -1, -1]"]
    assert lines[2:] in (
        [],
        ["[-1, -1, -1, -1, -1]", "[38]"],
    )  # clone3: ENOSYS, so that libc falls back to clone


def test_the_jails_own_modules_are_out_of_reach(run):
    """All parts arrive in the interpreter, and none can be imported or looked up there."""
    names = sorted(path.stem for path in Path(jail.__file__).parent.glob("[a-z]*.py"))
    assert sorted(jail.PARTS) == names
    result = run(
        """
        import sys
        print([name for name in sys.modules if "zangchat" in name], hasattr(sys.modules["__main__"], "module"))
        try:
            import zangchat.execution.jail.main
        except ModuleNotFoundError as error:
            print(error)
        """
    )
    assert result.stdout == "[] False\nNo module named 'zangchat'\n"


def test_other_processes_are_out_of_reach(guard, run):
    result = run(
        f"""
        import ctypes, fcntl, os, signal
        libc = ctypes.CDLL(None)
        for pid in {(guard.owner, guard.canary)}:
            for number in range(65):
                try: os.kill(pid, number); print("kill", pid, number, os.getpid())
                except OSError: pass
            for command in (fcntl.F_SETOWN, fcntl.F_SETSIG):
                try: fcntl.fcntl(1, command, pid % 64); print("signals by a file", command)
                except OSError: pass
            for request in (16, 0x4206):  # attach, seize
                if libc.ptrace(request, pid, 0, 0) == 0: print("traced", pid)
            for path in ("mem", "environ", "cmdline", "fd/0", "root/etc/passwd", "cwd"):
                try: os.close(os.open(f"/proc/{{pid}}/{{path}}", os.O_RDONLY)); print("opened", path)
                except OSError: pass
        for target in (-1, 0):
            try: os.kill(target, signal.SIGKILL)
            except OSError: pass
        """
    )
    assert result.success and result.stdout == "", result


def test_no_core_file_and_no_priority(run):
    limits = "import resource\nprint([resource.getrlimit(getattr(resource, name)) for name in ('RLIMIT_CORE', 'RLIMIT_MEMLOCK')])"
    assert run(limits).stdout == "[(0, 0), (0, 0)]\n"
    assert not run(
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)"
    ).success


# -- single layers, the others taken away ----------------------------------------------------------


@pytest.mark.parametrize("layer", probe.BLOCKED_BY)
def test_each_layer_holds_by_itself_what_it_is_there_for(attacked, layer):
    through = attacked(Jail(layer) if layer in WORLDS else Jail(**{layer: True}))
    assert not any(through[name] for name in probe.BLOCKED_BY[layer])
    nothing = attacked(Jail())
    assert all(
        nothing[name] for name in probe.BLOCKED_BY[layer] if name != "signal" or os.getuid() == 0
    ), nothing  # else this proves nothing
    assert not nothing["memory"]


@pytest.mark.parametrize("world", WORLDS)
def test_root_steps_down(attacked, world):
    if os.getuid() != 0:
        pytest.skip("only root has something to put down")
    assert not attacked(Jail(world, drop=True))["root"]
    assert attacked(Jail(world, drop=False))["root"]


def test_without_namespaces_the_other_layers_hold_everything_together(guard, attacked):
    """As in Docker, where root's interpreter may lie in a home that is closed to the user it
    becomes.
    """
    alone = Jail(landlock=True, seccomp=True, drop=True)
    assert not any(attacked(alone).values())
    changes = """
import os
for flags in (os.O_WRONLY, os.O_RDWR, os.O_TRUNC, os.O_CREAT):
    try: os.close(os.open(os.__file__, flags)); print("opened", flags)
    except OSError: pass
for change in (os.unlink, os.rmdir, os.mkdir, os.mknod, lambda path: os.chmod(path, 0o777), lambda path: os.chown(path, -1, -1), os.utime,
               lambda path: os.rename(path, path), lambda path: os.link(path, path + "x"), lambda path: os.symlink(path, path + "x"),
               lambda path: os.truncate(path, 0), lambda path: os.setxattr(path, "user.x", b"x")):
    try: change(os.__file__); print("changed")
    except OSError: pass
print(len(open(os.__file__).read()) > 1000)
"""
    assert guard.run(changes, jail=alone).stdout == "True\n"
    assert guard.run(
        "def f(x): return x", tests=("assert candidate(1) == 1", "f"), jail=alone
    ).success


def test_the_filter_keeps_the_clock_and_what_others_made_out_of_reach(guard, attacked):
    """By itself, even from root."""
    jail = Jail(seccomp=True)
    attacked(jail)
    names = """shmat shmctl semop semctl semtimedop msgsnd msgrcv msgctl mq_unlink inotify_init1
        sched_setaffinity settimeofday clock_settime adjtimex clock_adjtime""".split()
    numbers = seccomp.DENIED[os.uname().machine]
    code = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {[(name, numbers.get(name)) for name in names]}:
    if number is None or libc.syscall(number, {guard.canary}, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1:
        print(name, ctypes.get_errno())
"""
    result = guard.run(code, jail=jail)
    assert result.success and result.stdout == "", result


@pytest.mark.parametrize("world", WORLDS)
def test_a_pid_namespace_takes_runaway_children_with_it(guard, attacked, world):
    """Without the filter: children of children, in sessions of their own, sleep on; the guard sees
    that none is left.
    """
    attacked(Jail(world, drop=True))
    code = """
import os, signal, time
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(1, 32):
                try: signal.signal(number, signal.SIG_IGN)
                except (OSError, ValueError): pass
            time.sleep(20)
        os._exit(0)
time.sleep(0.2)
"""
    assert guard.run(code, jail=Jail(world, drop=True)).success


@pytest.mark.parametrize("world", WORLDS)
def test_a_fork_bomb_stops_at_the_process_limit(guard, attacked, world):
    """Without the filter: RLIMIT_NPROC binds, because root has become a user of its own."""
    if os.getuid() != 0:
        pytest.skip("without root the limit would count the tester's own processes")
    attacked(Jail(world, drop=True))
    code = """
import os, time
children = 0
try:
    for _ in range(200):
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        children += 1
except BlockingIOError:
    print(children)
"""
    assert (
        0
        < int(guard.run(code, timeout=10.0, jail=Jail(world, drop=True)).stdout)
        < supervisor.PROCESSES
    )


def test_a_bomb_of_forks_is_no_bomb(run):
    assert "PermissionError" in (run("import os\nwhile True: os.fork()").error or "")
    threads = "import threading, time\nfor _ in range(10**5): threading.Thread(target=time.sleep, args=(60,)).start()"
    assert not run(threads, timeout=3.0).success


@pytest.mark.parametrize("world", WORLDS)
def test_signals_to_everybody_stay_inside(guard, attacked, world):
    """As root, without the filter: kill -9 -1 reaches nobody outside; the guard's canary would be
    the first to die.
    """
    attacked(Jail(world))
    guard_alive = "import os\nos.kill(-1, 9)"
    guard.run(guard_alive, jail=Jail(world, drop=True))
    assert guard.run("print(1)").success


# -- the level -------------------------------------------------------------------------------------


def test_below_the_asked_level_nothing_runs(monkeypatch):
    monkeypatch.setattr(execution, "find_sandbox", lambda: Sandbox(Jail(), SandboxLevel.LIMITS))
    monkeypatch.setattr(execution, "run_in_jail", lambda *_: pytest.fail("the code was run"))
    for attempt in (lambda: execute_code("print(1)"), lambda: execute_tests("", "", "f")):
        with pytest.raises(UserError, match="'limits', below 'filtered'.*bubblewrap"):
            attempt()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="darwin has no such sandbox: run this on Linux"):
        execute_code("print(1)")


def test_told_otherwise_it_runs(monkeypatch):
    ran: list[Any] = []
    monkeypatch.setattr(execution, "find_sandbox", lambda: Sandbox(Jail(), SandboxLevel.LIMITS))
    monkeypatch.setattr(execution, "run_in_jail", lambda *given: ran.append(given))
    execute_code("print(1)", minimum_level=SandboxLevel.NONE)
    assert ran


def test_where_there_are_no_processes_to_fork_it_is_said(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    monkeypatch.setattr(sys, "platform", "win32")
    assert execution.find_sandbox.__wrapped__().level == SandboxLevel.NONE
    with pytest.raises(UserError, match="win32 has no sandbox"):
        run_in_jail("print(1)", Jail(), 5.0, MEMORY)


def test_a_layer_that_breaks_or_leaks_is_left_out_and_the_level_falls(monkeypatch):
    """The layers found are those that hold under attack, whatever the machine claims to have."""
    clean = dict.fromkeys(
        (
            "network",
            "process",
            "signal",
            "trace",
            "share",
            "root",
            "write",
            "change",
            "read",
            "environment",
            "memory",
        ),
        False,
    )

    def attack(jail: Jail) -> dict[str, bool]:
        if jail.world == "namespaces":
            raise execution.SandboxError("unshare: Operation not permitted")
        return (
            {**clean, "read": True}
            if jail.world == "bubblewrap" or not jail.landlock
            else {**clean, "process": not jail.seccomp}
        )

    monkeypatch.setattr(probe, "attack", attack)
    found = execution.find_sandbox.__wrapped__()
    assert found.level == SandboxLevel.ISOLATED and (
        found.jail.world,
        found.jail.landlock,
        found.jail.seccomp,
    ) == ("none", True, True)
    monkeypatch.setattr(
        probe, "attack", lambda jail: {**clean, "read": jail.landlock, "network": jail.seccomp}
    )
    assert not execution.find_sandbox.__wrapped__().jail.landlock
    monkeypatch.setattr(probe, "attack", lambda jail: {**clean, "memory": True})
    assert execution.find_sandbox.__wrapped__().level == SandboxLevel.NONE


def test_the_level_is_told_in_words():
    sandbox = Sandbox(Jail("bubblewrap", landlock=True, seccomp=True), SandboxLevel.ISOLATED)
    assert str(sandbox) == "isolated (bubblewrap, landlock, seccomp, resource limits)"
    assert str(Sandbox(Jail(), SandboxLevel.LIMITS)) == "limits (resource limits)"


def test_a_jail_that_breaks_is_no_verdict(monkeypatch):
    monkeypatch.setattr(command, "interpreter", lambda: "/bin/false")
    with pytest.raises(execution.SandboxError):
        run_in_jail("print(1)", Jail(), timeout=5.0, memory_bytes=MEMORY)


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    if find_sandbox().level < SandboxLevel.ISOLATED:
        pytest.skip("the sandbox of this machine has no place to write")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert execute_code("open('x', 'w').close()").success
    assert list(tmp_path.iterdir()) == []
