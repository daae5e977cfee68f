"""The program inside the sandbox: execution.py starts it as `python -I -S -B -c <this file> <result fd>`.

It reads one JSON request on stdin, gives up what the request says, reports "started", runs the code and reports how it
ended. Only the standard library, and nothing from this project: it has to work where nothing else is visible.

Order matters: namespaces need privileges, dropping the user needs them too, and the seccomp filter comes last because it
forbids everything before it.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import types

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
SYS_MOUNT_SETATTR = 442  # the same number everywhere, as all calls since 424
NOBODY = 65534

# System calls that a pure computation never needs; EPERM. Per machine: (audit architecture, {name: number}).
NEWER = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434, "pidfd_getfd": 438,
    "process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443, "memfd_secret": 447, "process_mrelease": 448,
}  # fmt: skip
X86_64 = {
    "shmget": 29, "socket": 41, "socketpair": 53, "fork": 57, "vfork": 58, "execve": 59, "semget": 64, "msgget": 68, "ptrace": 101,
    "rt_sigqueueinfo": 129, "personality": 135, "setpriority": 141, "sched_setparam": 142, "sched_setscheduler": 144, "pivot_root": 155,
    "chroot": 161, "acct": 163, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170,
    "setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176, "quotactl": 179, "tkill": 200,
    "mq_open": 240, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "ioprio_set": 251, "migrate_pages": 256,
    "unshare": 272, "move_pages": 279, "rt_tgsigqueueinfo": 297, "perf_event_open": 298, "name_to_handle_at": 303,
    "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313,
    "sched_setattr": 314, "kexec_file_load": 320, "bpf": 321, "execveat": 322, "userfaultfd": 323,
}  # fmt: skip
AARCH64 = {
    "ioprio_set": 30, "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "quotactl": 60, "acct": 89, "personality": 92,
    "unshare": 97, "kexec_load": 104, "init_module": 105, "delete_module": 106, "ptrace": 117, "sched_setparam": 118,
    "sched_setscheduler": 119, "tkill": 130, "rt_sigqueueinfo": 138, "setpriority": 140, "reboot": 142, "sethostname": 161,
    "setdomainname": 162, "mq_open": 180, "msgget": 186, "semget": 190, "shmget": 194, "socket": 198, "socketpair": 199, "add_key": 217,
    "request_key": 218, "keyctl": 219, "execve": 221, "swapon": 224, "swapoff": 225, "migrate_pages": 238, "move_pages": 239,
    "rt_tgsigqueueinfo": 240, "perf_event_open": 241, "name_to_handle_at": 264, "open_by_handle_at": 265, "setns": 268,
    "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "sched_setattr": 274, "bpf": 280,
    "execveat": 281, "userfaultfd": 282, "kexec_file_load": 294,
}  # fmt: skip
ON_ITSELF = {"x86_64": {"kill": 62, "tgkill": 234}, "aarch64": {"kill": 129, "tgkill": 131}}  # first argument: own pid
PRLIMIT = {"x86_64": 302, "aarch64": 261}  # first argument: 0, oneself
CLONE = {"x86_64": 56, "aarch64": 220}
DENIED = {"x86_64": (0xC000003E, X86_64), "aarch64": (0xC00000B7, AARCH64)}
CLONE3, CLONE_THREAD, LAST_KNOWN = 435, 0x10000, 451
EPERM, ENOSYS = 1, 38

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """A libc function that sets errno; raises OSError naming the function."""
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def long(value):
    return ctypes.c_ulong(value)  # variadic C functions need full registers


# -- namespaces --------------------------------------------------------------------------------------------------------


def enter_namespaces(folder, visible, tmp_bytes):
    """A world of its own: no network, no other process, and of all files the `visible` ones, read-only, and an empty /tmp.

    Returns in the process that runs the code (the second of a new pid namespace); the others wait and pass its exit code on.
    """
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    call("unshare", flags | (CLONE_NEWUSER if uid else 0))
    if uid:  # without root a user namespace lends the privileges for what follows
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    os.umask(0o022)
    fork_and_wait()  # the child is process 1: with it dies everything inside
    build_root(folder, visible, tmp_bytes)


def fork_and_wait():
    """Fork; the parent waits, holding no descriptor, and ends as the child ended. Returns in the child."""
    child = os.fork()
    if child == 0:
        call("prctl", PR_SET_PDEATHSIG, long(signal.SIGKILL), long(0), long(0), long(0))
        return
    os.closerange(0, 256)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def build_root(folder, visible, tmp_bytes):
    def mount(source, target, kind, flags, options=""):
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


def read_only(path, recursive=True):
    attributes = (ctypes.c_uint64 * 4)(1 | 2 | 4, 0, 0, 0)  # set RDONLY, NOSUID, NODEV; clear, propagation, user namespace: nothing
    at_fdcwd, at_recursive = -100, 0x8000
    call("syscall", long(SYS_MOUNT_SETATTR), at_fdcwd, path.encode(), long(at_recursive if recursive else 0), attributes, long(32))


# -- privileges and limits ---------------------------------------------------------------------------------------------


def drop_privileges(uid):
    """Become `uid` (nobody where that number does not exist here); without root, put down the user namespace's capabilities."""
    if os.getuid() == 0 and uid is not None:
        os.setgroups([])
        try:
            os.setresgid(uid, uid, uid)
        except OSError:
            uid = NOBODY
            os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    elif sys.platform == "linux":
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        call("capset", header, none)
    if sys.platform == "linux":
        call("prctl", PR_SET_PDEATHSIG, long(signal.SIGKILL), long(0), long(0), long(0))  # a change of user had cleared it


def set_limits(memory_bytes, cpu_seconds, file_bytes, processes):
    limits = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": cpu_seconds,
        "RLIMIT_FSIZE": file_bytes,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_NPROC": processes,
        "RLIMIT_AS": memory_bytes,
    }
    for name, value in limits.items():
        if value is None or not hasattr(resource, name) or (sys.platform == "darwin" and name == "RLIMIT_AS"):
            continue  # macOS refuses RLIMIT_AS; the level that execution.py reports shows that
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def filter_system_calls():
    """No network, no new process or program, no tracing, no signal but to oneself; threads work. Needs no privilege."""
    machine = os.uname().machine
    if machine not in DENIED:
        raise OSError(ENOSYS, f"no system call table for {machine}")
    architecture, numbers = DENIED[machine]
    load, jump_equal, jump_greater, jump_set, leave = 0x20, 0x15, 0x25, 0x45, 0x06
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x50000 | EPERM, 0x50000 | ENOSYS
    argument = 16  # low half of the first argument in struct seccomp_data
    program = [(load, 0, 0, 4), (jump_equal, 1, 0, architecture), (leave, 0, 0, kill), (load, 0, 0, 0)]
    program += [(jump_greater, 0, 1, LAST_KNOWN), (leave, 0, 0, unknown)]  # x32 numbers, too
    program += [(jump_equal, 0, 1, CLONE3), (leave, 0, 0, unknown)]  # its flags lie in memory: libc then uses clone
    for number in {**numbers, **NEWER}.values():
        program += [(jump_equal, 0, 1, number), (leave, 0, 0, refuse)]
    only = [(number, jump_equal, os.getpid()) for number in ON_ITSELF[machine].values()]
    only += [(PRLIMIT[machine], jump_equal, 0), (CLONE[machine], jump_set, CLONE_THREAD)]
    for number, test, value in only:
        program += [(jump_equal, 0, 4, number), (load, 0, 0, argument), (test, 0, 1, value), (leave, 0, 0, allow), (leave, 0, 0, refuse)]
    program.append((leave, 0, 0, allow))

    class Instruction(ctypes.Structure):
        _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction))]

    instructions = (Instruction * len(program))(*[Instruction(*line) for line in program])
    filter_program = Program(len(program), ctypes.cast(instructions, ctypes.POINTER(Instruction)))
    call("prctl", PR_SET_SECCOMP, long(SECCOMP_MODE_FILTER), ctypes.byref(filter_program), long(0), long(0))


# -- the run -----------------------------------------------------------------------------------------------------------


def describe(error):
    """'ValueError: text', whatever the exception's own methods do."""
    try:
        return f"{type(error).__name__}: {error}"[:1000].removesuffix(": ")
    except BaseException:  # noqa: B036  a hostile __str__
        return type(error).__name__


def main():
    with os.fdopen(0, "rb", closefd=False) as stdin:
        request = json.loads(stdin.read())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    result = int(sys.argv[1])
    nonce = request["nonce"]

    def say(word, text="", memory=False):
        os.write(result, (json.dumps({"nonce": nonce, "word": word, "text": text, "memory": memory}) + "\n").encode())

    try:
        if request["namespaces"]:
            enter_namespaces(request["folder"], request["visible"], request["tmp_bytes"])
        if request["drop"]:
            drop_privileges(request["uid"])
        if request["namespaces"]:
            fork_and_wait()  # process 1 has signal rules of its own: the code runs in process 2
        os.umask(0o077)
        set_limits(request["memory_bytes"], request["cpu_seconds"], request["file_bytes"], request["processes"])
        if sys.platform == "linux":
            call("prctl", PR_SET_NO_NEW_PRIVS, long(1), long(0), long(0), long(0))
        if request["seccomp"]:
            filter_system_calls()
    except (OSError, ValueError) as error:
        say("broken", describe(error))
        os._exit(1)
    code = request.pop("code")
    del request
    own_module, module = sys.modules["__main__"], types.ModuleType("__main__")
    sys.modules["__main__"] = module
    reserve = bytearray(1 << 20)  # room to report a MemoryError
    say("started")
    try:
        sys.argv = ["main.py"]
        exec(compile(code, "main.py", "exec"), module.__dict__)  # what this whole file is for
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:  # noqa: B036  SystemExit too: the code did not reach its end
        del reserve, own_module
        memory = isinstance(error, MemoryError)
        text = describe(error)
        del error  # and with its frames what filled the memory
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BaseException:  # noqa: B036  whatever the code put there
                continue
        say("failed", text, memory)
        os._exit(1)
    say("finished")
    os._exit(0)


if __name__ == "__main__":
    main()
