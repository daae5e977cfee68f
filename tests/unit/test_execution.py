"""The sandbox, attacked. Every attack is harmless where it should get through: bounded loops, signal 0, files of the test's own."""

import os
import socket
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zangchat import execution
from zangchat.configurator import UserError
from zangchat.execution import ExecutionResult, Jail, Sandbox, SandboxLevel, execute_code, run_in_jail, sandbox_level

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
MEMORY = 256 * 2**20


def run(code: str, timeout: float = 5.0, minimum_level: SandboxLevel = SandboxLevel.FILTERED) -> ExecutionResult:
    if sandbox_level() < minimum_level:
        pytest.skip(f"the sandbox of this machine reaches {sandbox_level()}, the test needs {minimum_level}")
    return execute_code(textwrap.dedent(code), timeout=timeout)


def isolated(code: str) -> ExecutionResult:
    return run(code, minimum_level=SandboxLevel.ISOLATED)


# -- what a program may do ---------------------------------------------------------------------------------------------


def test_a_program_that_reaches_its_end_succeeds():
    result = run("import json, sys\nprint(json.dumps([1, 2]))\nprint('oops', file=sys.stderr)")
    assert result == ExecutionResult(success=True, stdout="[1, 2]\n", stderr="oops\n")


def test_a_program_gets_a_folder_threads_and_no_input():
    result = run(
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


def test_main_is_the_program():
    assert run("import sys\nx = 1\nassert __name__ == '__main__' and sys.modules['__main__'].x == 1").success


def test_many_at_once_do_not_disturb_each_other():
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: run(f"print({i})\nassert {i} % 3"), range(12)))
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(12)]
    assert [result.success for result in results] == [i % 3 != 0 for i in range(12)]


# -- how it fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, error",
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("x = (", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("import os; os.abort()", "SIGABRT"),
        ("import sys; sys.set_int_max_str_digits(0) or print(10 ** 100); int('x')", "ValueError"),
        ("class E(Exception):\n  def __str__(self): raise SystemExit\nraise E", "E"),
        ("raise ValueError('x' * 10**6)", "ValueError: xxx"),
        ("\0", "SyntaxError|ValueError"),
    ],
)
def test_a_failure_is_named(code, error):
    result = run(code)
    assert not result.success and not result.timeout and not result.memory_exceeded
    assert result.error and any(word in result.error for word in error.split("|"))
    assert len(result.error) <= 1000


@pytest.mark.parametrize(
    "code",
    ["while True: pass", "9 ** 9 ** 9", "import signal, time\nfor s in (15, 2, 1): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)"],
)
def test_time_is_limited(code):
    result = run(code, timeout=0.5)
    assert (result.success, result.timeout, result.error) == (False, True, "timed out after 0.5 s")


def test_closed_descriptors_do_not_hide_a_program_from_the_clock():
    assert run("import os, time; os.closerange(0, 64); time.sleep(60)", timeout=0.5).timeout
    assert not run("import os; os.closerange(0, 64); os._exit(0)").success


@pytest.mark.parametrize("code", ["x = bytearray(10**10)", "x = []\nwhile True: x.append(bytearray(10**6))", "x = 'ab' * 10**10"])
def test_memory_is_limited(code):
    result = run(code)
    assert (result.success, result.memory_exceeded, result.error) == (False, True, "MemoryError")


def test_memory_limit_is_the_callers():
    code = "x = bytearray(100 * 2**20)"
    assert run(code).success
    assert execute_code(code, maximum_memory_bytes=96 * 2**20).memory_exceeded


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_limited(stream):
    result = run(f"import sys\nwhile True: sys.{stream}.write('x' * 10000)")
    assert not result.success and not result.timeout
    assert result.error == "more than 64 KiB of output"
    assert len(getattr(result, stream)) == 64 * 1024


def test_output_that_is_no_text_is_shown():
    assert run(r"import sys; sys.stdout.buffer.write(b'a\xffb')").stdout == "a\ufffdb"


def test_files_are_limited():
    assert "File too large" in (run("open('big', 'wb').write(bytes(8 * 2**20))").error or "")
    result = isolated("for i in range(64): open(str(i), 'wb').write(bytes(2**20))")
    assert "No space left" in (result.error or "")


# -- verdicts ----------------------------------------------------------------------------------------------------------

CHECK = "\nassert add(1, 2) == 3\nassert add(2, 2) == 4\n"


@pytest.mark.parametrize(
    "candidate, passes",
    [
        ("def add(a, b): return a + b", True),
        ("def add(a, b): return 3", False),
        ("import os\ndef add(a, b): os._exit(0)", False),
        ("import os; os._exit(0)", False),
        ("import sys\ndef add(a, b): sys.exit(0)", False),
        ("def add(a, b): raise SystemExit(0)", False),
        ("import os, signal\ndef add(a, b): os.kill(os.getpid(), signal.SIGTERM)", False),
        # words on every descriptor, without the nonce
        (
            'import os\ndef add(a, b):\n for fd in range(3, 64):\n  try: os.write(fd, b\'{"word": "finished", "nonce": ""}\\n\')\n'
            "  except OSError: pass\n os._exit(0)",
            False,
        ),
    ],
)
def test_only_passing_every_assert_is_a_success(candidate, passes):
    assert run(candidate + CHECK).success is passes


# -- what it must not reach --------------------------------------------------------------------------------------------


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hf_secret")
    result = run("import os; print(sorted(os.environ))")
    assert "SECRET_TOKEN" not in result.stdout and "HOME" not in result.stdout


def test_descriptors_of_the_caller_are_closed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hf_secret", encoding="utf-8")
    with secret.open("rb") as file:
        os.set_inheritable(file.fileno(), True)
        code = """
        import os
        for fd in range(3, 256):
            try:
                os.lseek(fd, 0, 0)
                print(os.read(fd, 100))
            except OSError:
                pass
        """
        assert run(code).stdout == ""


@pytest.mark.parametrize("world", ["bubblewrap", "namespaces"])
def test_each_world_hides_files_and_network(world, tmp_path):
    """Without seccomp and without changing the user: the namespaces alone."""
    through = probe(Jail(world))
    assert not through["read"] and not through["write"] and not through["network"] and not through["signal"]


def test_the_filter_alone_stops_network_processes_and_signals():
    through = probe(Jail("none", seccomp=True))
    assert not through["network"] and not through["process"] and not through["signal"]


def test_limits_alone_stop_memory():
    assert not probe(Jail())["memory"]


@pytest.mark.parametrize("world", ["bubblewrap", "namespaces"])
def test_root_steps_down(world):
    if os.getuid() != 0:
        pytest.skip("only root has something to put down")
    assert not probe(Jail(world, drop=True))["root"]
    assert probe(Jail(world, drop=False))["root"]  # else this test would prove nothing


def probe(jail: Jail) -> dict[str, bool]:
    try:
        return execution.attack(jail)
    except (execution.SandboxError, OSError) as error:
        pytest.skip(f"{jail.world} cannot be had here: {error}")


def test_files_of_the_machine_are_not_there(tmp_path):
    secret = tmp_path / "id_rsa"
    secret.write_text("secret", encoding="utf-8")
    secret.chmod(0o644)
    result = isolated(
        f"""
        import os
        os.symlink({str(secret)!r}, "link")
        for path in ({str(secret)!r}, "link", "/etc/passwd", os.path.expanduser("~/.ssh"), "/proc/self/mem", "/proc/1/environ"):
            try:
                print("read", path, open(path).read())
            except OSError:
                pass
        for path in ({str(secret)!r}, "/new", "/usr/lib/new", os.path.dirname(os.__file__) + "/new"):
            try:
                open(path, "w").close()
                print("wrote", path)
            except OSError:
                pass
        """
    )
    assert result.success, result
    assert result.stdout == ""
    assert secret.read_text(encoding="utf-8") == "secret"


def test_no_network_reaches_the_caller():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        result = run(f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)")
        assert not result.success
        with pytest.raises(BlockingIOError):
            server.accept()


def test_new_processes_and_programs_are_refused():
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
        libc = ctypes.CDLL(None, use_errno=True)
        print([libc.fork(), libc.vfork(), libc.ptrace(0, 0, 0, 0), libc.unshare(0x10000000), libc.mount(0, b"/tmp", b"tmpfs", 0, 0)])
        """
    )
    assert result.success, result
    assert result.stdout == "[-1, -1, -1, -1, -1]\n"


@pytest.mark.parametrize("world", ["bubblewrap", "namespaces"])
def test_a_pid_namespace_takes_runaway_children_with_it(world):
    """Without the filter: a few children in sessions of their own, sleeping on; none is left when the verdict is there."""
    probe(Jail(world, drop=True))
    name = f"zc{os.getpid() % 10**8}"
    code = f"""
import ctypes, os, time
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        ctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)
        time.sleep(20)
        os._exit(0)
time.sleep(0.2)
"""
    assert run_in_jail(code, Jail(world, drop=True), timeout=5.0, memory_bytes=MEMORY).success
    assert name not in {path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm") if path.exists()}


@pytest.mark.parametrize("world", ["bubblewrap", "namespaces"])
def test_a_fork_bomb_stops_at_the_process_limit(world):
    """Without the filter, at most 200 forks: RLIMIT_NPROC binds, because root has become a user of its own."""
    if os.getuid() != 0:
        pytest.skip("without root the limit would count the tester's own processes")
    probe(Jail(world, drop=True))
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
    result = run_in_jail(code, Jail(world, drop=True), timeout=10.0, memory_bytes=MEMORY)
    assert 0 < int(result.stdout) < execution.PROCESSES


# -- the level ---------------------------------------------------------------------------------------------------------


def test_below_the_asked_level_nothing_runs(monkeypatch):
    monkeypatch.setattr(execution, "find_sandbox", lambda: Sandbox(Jail(), SandboxLevel.LIMITS))
    monkeypatch.setattr(execution, "run_in_jail", lambda *_: pytest.fail("the code was run"))
    with pytest.raises(UserError, match="'limits', below 'filtered'.*bubblewrap"):
        execute_code("print(1)")


def test_the_level_is_told_in_words():
    assert str(Sandbox(Jail("bubblewrap", seccomp=True), SandboxLevel.ISOLATED)) == "isolated (bubblewrap, seccomp, resource limits)"
    assert str(Sandbox(Jail(), SandboxLevel.LIMITS)) == "limits (resource limits)"


def test_a_jail_that_breaks_is_no_verdict(monkeypatch):
    monkeypatch.setattr(execution, "_interpreter", lambda: "/bin/false")
    with pytest.raises(execution.SandboxError):
        run_in_jail("print(1)", Jail(), timeout=5.0, memory_bytes=MEMORY)


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run("open('x', 'w').close()").success
    assert list(tmp_path.iterdir()) == []
