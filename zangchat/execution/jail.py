"""The program inside the sandbox: execution.py compiles this file and starts it as `python -I -S -B` on its bytecode.

It reads one request, enters a world of its own where that is asked for, and forks the processes that run code; each of them gives up what
the request says before it runs anything:

    runner     runs the program and, where there are tests, then answers their calls; it never holds the descriptor of the verdict
    tests      calls the program through a pipe that carries literals, believes nothing that comes back, and alone writes the verdict

Only the standard library, and nothing from this project: it has to work where nothing else is visible. Order matters: namespaces need
privileges, dropping the user needs them too, and the seccomp filter comes last because it forbids everything before it.
"""

from __future__ import annotations

import builtins
import ctypes
import os
import struct
import sys

TYPE_CHECKING = False  # typing takes longer to import than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NAME, PR_GET_NAME, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 15, 16, 22, 38
PR_SET_VMA = 0x53564D41  # libc names its memory with it
SECCOMP_MODE_FILTER = 2
SYS_MOUNT_SETATTR, SYS_LANDLOCK = 442, 444  # the same numbers everywhere, as all calls since 424
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
M_ARENA_MAX = -8
NOBODY = 65534
MAX_FRAME = 4 * 2**20  # bytes of one message between the processes

# System calls that a pure computation never needs; EPERM. Per machine: (audit architecture, {name: number}).
NEWER = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434, "pidfd_getfd": 438,
    "process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443, "memfd_secret": 447, "process_mrelease": 448,
}  # fmt: skip
X86_64 = {
    "shmget": 29, "socket": 41, "socketpair": 53, "fork": 57, "vfork": 58, "execve": 59, "semget": 64, "msgget": 68, "ptrace": 101,
    "syslog": 103, "setpgid": 109, "setsid": 112, "rt_sigqueueinfo": 129, "personality": 135, "setpriority": 141, "sched_setparam": 142,
    "sched_setscheduler": 144, "modify_ldt": 154, "pivot_root": 155, "chroot": 161, "acct": 163, "mount": 165, "umount2": 166,
    "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173,
    "init_module": 175, "delete_module": 176, "quotactl": 179, "tkill": 200, "io_setup": 206, "mq_open": 240, "kexec_load": 246,
    "add_key": 248, "request_key": 249, "keyctl": 250, "ioprio_set": 251, "migrate_pages": 256, "unshare": 272, "move_pages": 279,
    "rt_tgsigqueueinfo": 297, "perf_event_open": 298, "fanotify_init": 300, "name_to_handle_at": 303, "open_by_handle_at": 304,
    "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "sched_setattr": 314,
    "memfd_create": 319, "kexec_file_load": 320, "bpf": 321, "execveat": 322, "userfaultfd": 323,
}  # fmt: skip
AARCH64 = {
    "io_setup": 0, "ioprio_set": 30, "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "quotactl": 60, "acct": 89,
    "personality": 92, "unshare": 97, "kexec_load": 104, "init_module": 105, "delete_module": 106, "syslog": 116, "ptrace": 117,
    "sched_setparam": 118, "sched_setscheduler": 119, "tkill": 130, "rt_sigqueueinfo": 138, "setpriority": 140, "reboot": 142,
    "setpgid": 154, "setsid": 157, "sethostname": 161, "setdomainname": 162, "mq_open": 180, "msgget": 186, "semget": 190, "shmget": 194,
    "socket": 198, "socketpair": 199, "add_key": 217, "request_key": 218, "keyctl": 219, "execve": 221, "swapon": 224, "swapoff": 225,
    "migrate_pages": 238, "move_pages": 239, "rt_tgsigqueueinfo": 240, "perf_event_open": 241, "fanotify_init": 262,
    "name_to_handle_at": 264, "open_by_handle_at": 265, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272,
    "finit_module": 273, "sched_setattr": 274, "memfd_create": 279, "bpf": 280, "execveat": 281, "userfaultfd": 282,
    "kexec_file_load": 294,
}  # fmt: skip
DENIED = {"x86_64": (0xC000003E, X86_64), "aarch64": (0xC00000B7, AARCH64)}
# And where the program has no place of its own to write: whatever changes a file, its name or its attributes.
CHANGES = {
    "x86_64": {
        "truncate": 76, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "chmod": 90,
        "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "utime": 132, "mknod": 133, "setxattr": 188, "lsetxattr": 189,
        "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "utimes": 235, "mkdirat": 258, "mknodat": 259,
        "fchownat": 260, "futimesat": 261, "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266, "fchmodat": 268,
        "utimensat": 280, "renameat2": 316, "openat2": 437,
    },
    "aarch64": {
        "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16, "mknodat": 33,
        "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38, "truncate": 45, "fchmod": 52, "fchmodat": 53,
        "fchownat": 54, "fchown": 55, "utimensat": 88, "renameat2": 276, "openat2": 437,
    },
}  # fmt: skip
# Allowed by one of their arguments: {name: number}, per machine.
BY_ARGUMENT = {
    "x86_64": {"kill": 62, "tgkill": 234, "prlimit64": 302, "clone": 56, "prctl": 157, "fcntl": 72, "open": 2, "openat": 257},
    "aarch64": {"kill": 129, "tgkill": 131, "prlimit64": 261, "clone": 220, "prctl": 167, "fcntl": 25, "openat": 56},
}
CLONE3, CLONE_THREAD, NEW_NAMESPACE, LAST_KNOWN = 435, 0x10000, 0x7E020000, 451
EPERM, ENOSYS, SIGKILL = 1, 38, 9  # the modules errno and signal take milliseconds to import


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> int:
    """A libc function that sets errno; its value. Raises OSError naming the function."""
    value = getattr(libc(), name)(*arguments)
    if value < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return value


def long(value: int) -> ctypes.c_ulong:
    return ctypes.c_ulong(value)  # variadic C functions need full registers


def prctl(option: int, value: int) -> None:
    call("prctl", option, long(value), long(0), long(0), long(0))


# -- literals ----------------------------------------------------------------------------------------------------------
# A value is a letter, a decimal size, a colon, and so many bytes, or so many values. Reading one makes nothing but literals, and takes time
# and memory in proportion to the bytes.


def _complex(data: bytes) -> complex:
    real, imaginary = data.decode().split(" ")
    return complex(float.fromhex(real), float.fromhex(imaginary))


SCALARS: tuple[tuple[Any, bytes, Callable[[Any], bytes], Callable[[bytes], Any]], ...] = (  # kind, letter, to bytes, from bytes
    # hexadecimal, in the time that it takes to read it; decimal digits would take the square
    (int, b"i", lambda value: int.__format__(value, "x").encode(), lambda data: int(data, 16)),
    (float, b"f", lambda value: float.hex(value).encode(), lambda data: float.fromhex(data.decode())),
    (complex, b"c", lambda value: f"{value.real.hex()} {value.imag.hex()}".encode(), _complex),
    (str, b"s", lambda value: str.encode(value, "utf-8", "surrogatepass"), lambda data: data.decode("utf-8", "surrogatepass")),
    (bytes, b"b", bytes, bytes),
    (bytearray, b"a", bytes, bytearray),
)
CONTAINERS: tuple[tuple[Any, bytes], ...] = ((list, b"l"), (tuple, b"t"), (set, b"e"), (frozenset, b"z"), (dict, b"d"))
CONSTANTS = ((None, b"N"), (True, b"T"), (False, b"F"), (Ellipsis, b"E"))


def encode(value: Any) -> bytes:
    """A literal as bytes: numbers (inf and nan too), text, bytes, None, and lists, tuples, sets and dicts of them.

    An object of a subclass travels as what it is a subclass of. TypeError for anything else.
    """
    parts: list[bytes] = []
    _encode(value, parts.append)
    return b"".join(parts)


def _encode(value: Any, add: Callable[[bytes], None]) -> None:
    for constant, letter in CONSTANTS:
        if value is constant:
            add(letter + b"0:")
            return
    for kind, letter, to_bytes, _ in SCALARS:
        if isinstance(value, kind):
            data = to_bytes(value)
            add(b"%s%d:" % (letter, len(data)))
            add(data)
            return
    for kind, letter in CONTAINERS:
        if isinstance(value, kind):
            items = [part for pair in dict.items(value) for part in pair] if kind is dict else list(kind.__iter__(value))
            add(b"%s%d:" % (letter, len(items)))
            for item in items:
                _encode(item, add)
            return
    raise TypeError(f"an object of type {type(value).__name__} is no literal")


def decode(data: bytes) -> Any:
    """What `encode` wrote. Raises ValueError or TypeError for anything else, RecursionError for nests too deep."""
    value, end = _decode(data, 0)
    if end != len(data):
        raise ValueError("a message has something behind its end")
    return value


def _decode(data: bytes, start: int) -> tuple[Any, int]:
    colon = data.index(b":", start, start + 20)
    letter, size = data[start : start + 1], int(data[start + 1 : colon])
    start = colon + 1
    for constant, own in CONSTANTS:
        if letter == own:
            return constant, start
    if size < 0 or size > len(data) - start:
        raise ValueError("a message is cut short")
    for _, own, _, from_bytes in SCALARS:
        if letter == own:
            return from_bytes(data[start : start + size]), start + size
    for kind, own in CONTAINERS:
        if letter == own:
            items = []
            for _ in range(size):
                item, start = _decode(data, start)
                items.append(item)
            return kind(zip(items[::2], items[1::2], strict=True)) if kind is dict else kind(items), start
    raise ValueError(f"{letter!r} is no kind of value")


def send(fd: int, value: Any) -> None:
    data = encode(value)
    if len(data) > MAX_FRAME:
        raise ValueError(f"a value of {len(data) >> 20} MiB is more than passes between the processes")
    data = struct.pack(">Q", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> Any:
    """The next value from a pipe; EOFError at its end."""
    (size,) = struct.unpack(">Q", _read(fd, 8))
    if size > MAX_FRAME:
        raise ValueError(f"a message announces {size >> 20} MiB")
    return decode(_read(fd, size))


def _read(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 16))
        if not part:
            raise EOFError("the other process is gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# -- namespaces --------------------------------------------------------------------------------------------------------


def enter_namespaces(folder: str, visible: tuple[str, ...], tmp_bytes: int) -> None:
    """A world of its own: no network, no other process, and of all files the `visible` ones, read-only, and an empty /tmp.

    Returns in the first process of a new pid namespace; the one that was started waits and passes its exit code on.
    """
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    call("unshare", flags | (CLONE_NEWUSER if uid else 0))
    if uid:  # without root a user namespace lends the privileges for what follows
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    os.umask(0o022)
    child = fork()  # process 1: with it dies everything inside
    if child:
        wait_and_end(child)
    build_root(folder, visible, tmp_bytes)


def fork() -> int:
    """os.fork, the child ending with its parent."""
    child = os.fork()
    if child == 0 and sys.platform == "linux":
        prctl(PR_SET_PDEATHSIG, SIGKILL)
    return child


def wait_and_end(child: int) -> NoReturn:
    """Wait, holding no descriptor open for anybody, and end as the child ended."""
    close_all_but()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def build_root(folder: str, visible: tuple[str, ...], tmp_bytes: int) -> None:
    def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
        call("mount", source.encode(), target.encode(), kind.encode(), long(flags), options.encode())

    mount("none", "/", "", MS_REC | MS_PRIVATE)  # nothing done here reaches the outside
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in visible:
        target = folder + path
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, mode=0o755, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(path, target, "", MS_BIND | MS_REC)
        if not path.startswith("/dev/"):
            read_only(target)
    os.mkdir(folder + "/tmp")
    mount("tmpfs", folder + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={tmp_bytes},mode=1777")
    os.chdir(folder)
    call("syscall", long(155 if os.uname().machine == "x86_64" else 41), b".", b".")  # pivot_root: the old root lies over the new
    call("umount2", b".", MNT_DETACH)
    read_only("/", recursive=False)
    os.chdir("/tmp")


def read_only(path: str, recursive: bool = True) -> None:
    attributes = struct.pack("4Q", 1 | 2 | 4, 0, 0, 0)  # set RDONLY, NOSUID, NODEV; clear, propagation, user namespace: nothing
    at_fdcwd, at_recursive = -100, 0x8000
    call("syscall", long(SYS_MOUNT_SETATTR), at_fdcwd, path.encode(), long(at_recursive if recursive else 0), attributes, long(32))


# -- privileges and limits ---------------------------------------------------------------------------------------------


def drop_privileges(uid: int, keep_search: bool = False) -> None:
    """Become `uid` (nobody where that number does not exist here); without root, put down the user namespace's capabilities.

    keep_search: all of root's rights but one go, that of reading what is closed to others: for an interpreter within root's home, where
    Landlock says what may be read.
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
            except OSError:  # Docker gives the greater one only
                keep_capability(CAP_DAC_OVERRIDE)
        prctl(PR_SET_PDEATHSIG, SIGKILL)  # a change of user had cleared it


def keep_capability(*kept: int) -> None:
    mask = sum(1 << number for number in kept)
    call("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", mask, mask, 0, 0, 0, 0))


def set_limits(limits: dict[str, int]) -> None:
    """{name of a limit: its value}, as soft and hard limit; never above what is set."""
    import resource

    for name, value in limits.items():
        if not hasattr(resource, name) or (sys.platform == "darwin" and name == "RLIMIT_AS"):
            continue  # macOS refuses RLIMIT_AS; the level that execution.py reports shows that
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def restrict_files(visible: tuple[str, ...], writable: tuple[str, ...]) -> None:
    """Landlock: files below `visible` can be read, those below `writable` changed, nothing else opened, no program started.

    Newer kernels also refuse TCP, abstract sockets and signals to the outside. Needs no privilege.
    """
    execute, write_file, read_file, read_dir = 1, 2, 4, 8
    version = call("syscall", long(SYS_LANDLOCK), None, long(0), long(1))
    every = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    devices = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 15  # make device, socket, pipe; control a device
    ruleset = struct.pack("3Q", every, 3 * (version >= 4), 3 * (version >= 6))[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = call("syscall", long(SYS_LANDLOCK), ruleset, long(len(ruleset)), long(0))
    rights = dict.fromkeys(visible, read_file | read_dir)
    rights |= dict.fromkeys(writable, every & ~execute & ~devices) | {"/dev/null": read_file | write_file}
    for path, allowed in rights.items():
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            allowed &= read_file | write_file
        call("syscall", long(SYS_LANDLOCK + 1), rules, long(1), struct.pack("=Qi", allowed, fd), long(0))
        os.close(fd)
    call("syscall", long(SYS_LANDLOCK + 2), rules, long(0))
    os.close(rules)


def filter_system_calls(writes: bool) -> None:
    """No network, no new process or program, no tracing, no signal but to oneself, no change to files without `writes`; threads work.

    Needs no privilege.
    """
    machine = os.uname().machine
    if machine not in DENIED:
        raise OSError(ENOSYS, f"no system call table for {machine}")
    architecture, numbers = DENIED[machine]
    load, jump_equal, jump_greater, jump_set, leave = 0x20, 0x15, 0x25, 0x45, 0x06
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x50000 | EPERM, 0x50000 | ENOSYS
    program = [(load, 0, 0, 4), (jump_equal, 1, 0, architecture), (leave, 0, 0, kill), (load, 0, 0, 0)]
    program += [(jump_greater, 0, 1, LAST_KNOWN), (leave, 0, 0, unknown)]  # x32 numbers, too
    program += [(jump_equal, 0, 1, CLONE3), (leave, 0, 0, unknown)]  # its flags lie in memory: libc then uses clone
    changes = {} if writes else CHANGES[machine]
    for number in [*numbers.values(), *NEWER.values(), *changes.values()]:
        program += [(jump_equal, 0, 1, number), (leave, 0, 0, refuse)]
    itself = [(jump_equal, os.getpid(), allow)]
    to_change = [] if writes else [(jump_set, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC, refuse)]
    owner_and_signal = [(jump_equal, command, refuse) for command in (8, 10, 15)]  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals by files
    # which argument, tests and their verdicts, the verdict where none applies
    tests = {
        "kill": (0, itself, refuse),
        "tgkill": (0, itself, refuse),
        "prlimit64": (0, [(jump_equal, 0, allow)], refuse),
        "prctl": (0, [(jump_equal, option, allow) for option in (PR_SET_NAME, PR_GET_NAME, PR_SET_VMA)], refuse),
        "clone": (0, [(jump_set, NEW_NAMESPACE, refuse), (jump_set, CLONE_THREAD, allow)], refuse),
        "fcntl": (1, owner_and_signal, allow),
        "open": (1, to_change, allow),
        "openat": (2, to_change, allow),
    }
    for name, number in BY_ARGUMENT[machine].items():
        argument, cases, otherwise = tests[name]
        program += [(jump_equal, 0, 2 + 2 * len(cases), number), (load, 0, 0, 16 + 8 * argument)]  # the low half in struct seccomp_data
        for test, value, verdict in cases:
            program += [(test, 0, 1, value), (leave, 0, 0, verdict)]
        program.append((leave, 0, 0, otherwise))
    program.append((leave, 0, 0, allow))
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    sock_fprog = struct.pack("HP", len(program), ctypes.addressof(instructions))
    call("prctl", PR_SET_SECCOMP, long(SECCOMP_MODE_FILTER), sock_fprog, long(0), long(0))


def confine(request: dict[str, Any], role: int) -> None:
    """Everything that is to be given up, in the process that will run the code. Raises OSError or ValueError where it cannot be."""
    if request["drop"]:
        drop_privileges(request["uid"] + role, request["keep_search"])
    if hasattr(libc(), "mallopt"):
        libc().mallopt(M_ARENA_MAX, 1)  # else each thread takes 64 MiB of the address space
    os.umask(0o077)
    set_limits(request["limits"])
    if sys.platform == "linux":
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_DUMPABLE, 0)  # nobody traces it or opens its memory
    if request["landlock"]:
        restrict_files(request["visible"], request["writable"])
    if request["seccomp"]:
        filter_system_calls(bool(request["writable"]))


# -- the run -----------------------------------------------------------------------------------------------------------


def close_all_but(*kept: int) -> None:
    for fd in sorted(OPEN - set(kept), reverse=True):
        os.close(fd)
    OPEN.intersection_update(kept)


def opened(*fds: int) -> tuple[int, ...]:
    OPEN.update(fds)
    return fds


OPEN = {0, 1, 2}  # descriptors: the parent has passed no other than the ones in the command line


def describe(error: BaseException) -> str:
    """'ValueError: text', whatever the exception's own methods do."""
    try:
        return f"{type(error).__name__}: {error}"[:1000].removesuffix(": ")
    except BaseException:  # noqa: B036  a hostile __str__
        return type(error).__name__


def failure(error: BaseException) -> list[Any]:
    """How something failed, as a literal: [name of the exception, one line, whether memory ran out]."""
    return [type(error).__name__, describe(error), isinstance(error, MemoryError)]


def run(code: str | bytes, module: ModuleType) -> list[Any] | None:
    """None, or how the program failed."""
    reserve = bytearray(1 << 20)  # room to report a MemoryError
    try:
        exec(compile(code, "main.py", "exec"), module.__dict__)  # what this whole file is for
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
        except BaseException:  # noqa: B036  whatever the code put there
            continue


def answer_calls(function: Any, calls: int, replies: int) -> None:
    """Call `function` as the tests ask, until they ask no more."""
    while True:
        try:
            arguments, keywords = receive(calls)
        except EOFError:
            return
        try:
            reply = ["value", function(*arguments, **keywords)]
            sys.stdout.flush()
            send(replies, reply)
        except BaseException as error:  # noqa: B036  whatever it raises is the tests' business
            reply = None
            send(replies, failure(error))


def remote(calls: int, replies: int) -> Callable[..., Any]:
    """The function that the tests call: its arguments and its value travel as literals; what the runner raised is raised here."""

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
            except TypeError:  # a few want more than a line
                error = RuntimeError(line)
        else:
            error = RuntimeError(line)
        raise error

    return candidate


def failure_of(reply: Any) -> list[Any]:
    """A runner's [name, line, whether memory ran out], which may be anything."""
    if type(reply) is list and [type(part) for part in reply] == [str, str, bool]:
        return [reply[0], reply[1][:1000], reply[2]]
    raise ValueError("the program answers nonsense")


def first_word(replies: int) -> list[Any] | None:
    """How the program ended, before any call: None, or its failure."""
    try:
        reply = receive(replies)
        return reply if reply is None else failure_of(reply)
    except (EOFError, ValueError, TypeError, RecursionError) as error:
        return [type(error).__name__, f"the program ended before its last line ({error})", False]


def new_main() -> tuple[ModuleType, ModuleType]:
    """A fresh __main__ for the program; and a reference to this one, whose functions are still needed."""
    own, module = sys.modules["__main__"], type(sys)("__main__")
    sys.modules["__main__"], sys.argv = module, ["main.py"]
    return own, module


def runner(request: dict[str, Any], calls: int, replies: int) -> NoReturn:
    """The process that runs the program beside the tests: says that it is jailed, then how the program ended, then answers calls."""
    try:
        confine(request, 1)
    except (OSError, ValueError) as error:
        send(replies, describe(error))
        os._exit(1)
    send(replies, "")
    _own, module = new_main()
    ending, name = run(request.pop("code"), module), request["entry_point"]
    function = module.__dict__.get(name)
    if ending is None and not callable(function):
        ending = failure(NameError(f"the program defines no function {name}"))
    send(replies, ending)
    if ending is None:
        answer_calls(function, calls, replies)
    flush()
    os._exit(0)


def main() -> NoReturn:
    request = decode(sys.stdin.buffer.read())
    result, tests = int(sys.argv[1]), int(sys.argv[2])  # descriptors; -1: there are no tests
    opened(*{result, tests} - {-1})
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    nonce = request.pop("nonce")

    def say(word: str, text: str = "", memory: bool = False) -> None:
        line = f"{nonce} {word} {memory:d} ".encode() + text.encode("unicode_escape") + b"\n"
        os.write(result, line)

    calls: tuple[int, ...] = (-1, -1)
    replies = calls
    try:
        if sys.platform == "linux":
            prctl(PR_SET_PDEATHSIG, SIGKILL)
        if request["namespaces"]:
            enter_namespaces(request["folder"], request["visible"], request["tmp_bytes"])
        if tests >= 0:
            calls, replies = opened(*os.pipe()), opened(*os.pipe())
            if not fork():
                nonce = ""
                close_all_but(0, 1, 2, calls[0], replies[1])
                runner(request, calls[0], replies[1])
        child = fork()
        if child:
            if request["drop"]:
                drop_privileges(request["uid"] + 2)
            wait_and_end(child)
        close_all_but(*{0, 1, 2, result, tests, calls[1], replies[0]} - {-1})
        code = request.pop("code")
        if tests >= 0:
            with os.fdopen(tests, "rb") as file:
                code = file.read()
            OPEN.remove(tests)
        confine(request, 0)
        trouble = receive(replies[0]) if tests >= 0 else ""  # of the runner, which has not run the program yet
    except (OSError, ValueError, EOFError) as error:
        trouble = describe(error)
    if trouble:
        say("broken", trouble)
        os._exit(1)
    say("started")
    _own, module = new_main()
    ending = None
    if tests >= 0:
        ending = first_word(replies[0])
        module.__dict__["candidate"] = remote(calls[1], replies[0])
    if ending is None:
        ending = run(code, module)
    flush()
    if ending is None:
        say("finished")
    else:
        say("failed", ending[1], ending[2])
    os._exit(ending is not None)


if __name__ == "__main__":
    main()
