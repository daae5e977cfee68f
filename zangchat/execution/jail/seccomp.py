"""The seccomp filter: which system calls the jailed program may make."""

from __future__ import annotations

import ctypes
import os
import struct

from zangchat.execution.jail.system import (
    ENOSYS,
    EPERM,
    PR_GET_NAME,
    PR_SET_NAME,
    PR_SET_SECCOMP,
    PR_SET_VMA,
    call,
    long,
)

TYPE_CHECKING = False  # typing takes longer to import than everything else here
if TYPE_CHECKING:
    Instruction = tuple[int, int, int, int]  # operation, jump if true, jump if false, operand

SECCOMP_MODE_FILTER = 2
LOAD, JUMP_EQUAL, JUMP_GREATER, JUMP_SET, LEAVE = 0x20, 0x15, 0x25, 0x45, 0x06  # BPF operations
ALLOW, KILL, REFUSE, UNKNOWN = 0x7FFF0000, 0x80000000, 0x50000 | EPERM, 0x50000 | ENOSYS  # verdicts

# System calls that a pure computation never needs: EPERM. Shared memory and queues cannot be made,
# and those of others cannot be used: their numbers can be guessed. Calls since 424 have the same
# number on all machines.
# fmt: skip
NEWER = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    "mount_setattr": 442,
    "quotactl_fd": 443,
    "memfd_secret": 447,
    "process_mrelease": 448,
}
# fmt: skip
X86_64 = {
    "shmget": 29,
    "shmat": 30,
    "shmctl": 31,
    "socket": 41,
    "socketpair": 53,
    "fork": 57,
    "vfork": 58,
    "execve": 59,
    "semget": 64,
    "semop": 65,
    "semctl": 66,
    "msgget": 68,
    "msgsnd": 69,
    "msgrcv": 70,
    "msgctl": 71,
    "ptrace": 101,
    "syslog": 103,
    "setpgid": 109,
    "setsid": 112,
    "rt_sigqueueinfo": 129,
    "personality": 135,
    "setpriority": 141,
    "sched_setparam": 142,
    "sched_setscheduler": 144,
    "modify_ldt": 154,
    "pivot_root": 155,
    "adjtimex": 159,
    "chroot": 161,
    "acct": 163,
    "settimeofday": 164,
    "mount": 165,
    "umount2": 166,
    "swapon": 167,
    "swapoff": 168,
    "reboot": 169,
    "sethostname": 170,
    "setdomainname": 171,
    "iopl": 172,
    "ioperm": 173,
    "init_module": 175,
    "delete_module": 176,
    "quotactl": 179,
    "tkill": 200,
    "sched_setaffinity": 203,
    "io_setup": 206,
    "semtimedop": 220,
    "clock_settime": 227,
    "mq_open": 240,
    "mq_unlink": 241,
    "kexec_load": 246,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "ioprio_set": 251,
    "inotify_init": 253,
    "migrate_pages": 256,
    "unshare": 272,
    "move_pages": 279,
    "inotify_init1": 294,
    "rt_tgsigqueueinfo": 297,
    "perf_event_open": 298,
    "fanotify_init": 300,
    "name_to_handle_at": 303,
    "open_by_handle_at": 304,
    "clock_adjtime": 305,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "kcmp": 312,
    "finit_module": 313,
    "sched_setattr": 314,
    "memfd_create": 319,
    "kexec_file_load": 320,
    "bpf": 321,
    "execveat": 322,
    "userfaultfd": 323,
}
# fmt: skip
AARCH64 = {
    "io_setup": 0,
    "inotify_init1": 26,
    "ioprio_set": 30,
    "umount2": 39,
    "mount": 40,
    "pivot_root": 41,
    "chroot": 51,
    "quotactl": 60,
    "acct": 89,
    "personality": 92,
    "unshare": 97,
    "kexec_load": 104,
    "init_module": 105,
    "delete_module": 106,
    "clock_settime": 112,
    "syslog": 116,
    "ptrace": 117,
    "sched_setparam": 118,
    "sched_setscheduler": 119,
    "sched_setaffinity": 122,
    "tkill": 130,
    "rt_sigqueueinfo": 138,
    "setpriority": 140,
    "reboot": 142,
    "setpgid": 154,
    "setsid": 157,
    "sethostname": 161,
    "setdomainname": 162,
    "settimeofday": 170,
    "adjtimex": 171,
    "mq_open": 180,
    "mq_unlink": 181,
    "msgget": 186,
    "msgctl": 187,
    "msgrcv": 188,
    "msgsnd": 189,
    "semget": 190,
    "semctl": 191,
    "semtimedop": 192,
    "semop": 193,
    "shmget": 194,
    "shmctl": 195,
    "shmat": 196,
    "socket": 198,
    "socketpair": 199,
    "add_key": 217,
    "request_key": 218,
    "keyctl": 219,
    "execve": 221,
    "swapon": 224,
    "swapoff": 225,
    "migrate_pages": 238,
    "move_pages": 239,
    "rt_tgsigqueueinfo": 240,
    "perf_event_open": 241,
    "fanotify_init": 262,
    "name_to_handle_at": 264,
    "open_by_handle_at": 265,
    "clock_adjtime": 266,
    "setns": 268,
    "process_vm_readv": 270,
    "process_vm_writev": 271,
    "kcmp": 272,
    "finit_module": 273,
    "sched_setattr": 274,
    "memfd_create": 279,
    "bpf": 280,
    "execveat": 281,
    "userfaultfd": 282,
    "kexec_file_load": 294,
}
DENIED = {"x86_64": X86_64, "aarch64": AARCH64}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Calls that change a file, its name or its attributes: EPERM if the program has no folder to write.
# fmt: skip
CHANGES = {
    "x86_64": {
        "truncate": 76,
        "rename": 82,
        "mkdir": 83,
        "rmdir": 84,
        "creat": 85,
        "link": 86,
        "unlink": 87,
        "symlink": 88,
        "chmod": 90,
        "fchmod": 91,
        "chown": 92,
        "fchown": 93,
        "lchown": 94,
        "utime": 132,
        "mknod": 133,
        "setxattr": 188,
        "lsetxattr": 189,
        "fsetxattr": 190,
        "removexattr": 197,
        "lremovexattr": 198,
        "fremovexattr": 199,
        "utimes": 235,
        "mkdirat": 258,
        "mknodat": 259,
        "fchownat": 260,
        "futimesat": 261,
        "unlinkat": 263,
        "renameat": 264,
        "linkat": 265,
        "symlinkat": 266,
        "fchmodat": 268,
        "utimensat": 280,
        "renameat2": 316,
        "openat2": 437,
    },
    "aarch64": {
        "setxattr": 5,
        "lsetxattr": 6,
        "fsetxattr": 7,
        "removexattr": 14,
        "lremovexattr": 15,
        "fremovexattr": 16,
        "mknodat": 33,
        "mkdirat": 34,
        "unlinkat": 35,
        "symlinkat": 36,
        "linkat": 37,
        "renameat": 38,
        "truncate": 45,
        "fchmod": 52,
        "fchmodat": 53,
        "fchownat": 54,
        "fchown": 55,
        "utimensat": 88,
        "renameat2": 276,
        "openat2": 437,
    },
}
# Calls that are allowed or refused by one of their arguments.
# fmt: skip
BY_ARGUMENT = {
    "x86_64": {
        "kill": 62,
        "tgkill": 234,
        "prlimit64": 302,
        "clone": 56,
        "prctl": 157,
        "fcntl": 72,
        "open": 2,
        "openat": 257,
    },
    "aarch64": {
        "kill": 129,
        "tgkill": 131,
        "prlimit64": 261,
        "clone": 220,
        "prctl": 167,
        "fcntl": 25,
        "openat": 56,
    },
}
CLONE3, CLONE_THREAD, NEW_NAMESPACE, LAST_KNOWN = 435, 0x10000, 0x7E020000, 451


def filter_system_calls(writes: bool) -> None:
    """No network, new process or program, no tracing, no signal except to itself; threads work.

    Without `writes` no changes to files either. Needs no privilege.
    """
    machine = os.uname().machine
    if machine not in DENIED:
        raise OSError(ENOSYS, f"no system call table for {machine}")
    program = filter_program(machine, os.getpid(), writes)
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    instructions = ctypes.create_string_buffer(packed)
    sock_fprog = struct.pack("HP", len(program), ctypes.addressof(instructions))
    call("prctl", PR_SET_SECCOMP, long(SECCOMP_MODE_FILTER), sock_fprog, long(0), long(0))


def filter_program(machine: str, pid: int, writes: bool) -> list[Instruction]:
    """The filter for a process as BPF, which reads struct seccomp_data."""
    program = [(LOAD, 0, 0, 4), (JUMP_EQUAL, 1, 0, AUDIT_ARCH[machine]), (LEAVE, 0, 0, KILL)]
    program += [(LOAD, 0, 0, 0)]  # the number of the call
    program += [(JUMP_GREATER, 0, 1, LAST_KNOWN), (LEAVE, 0, 0, UNKNOWN)]  # x32 numbers, too
    # clone3's flags are in memory, out of the filter's reach: libc falls back to clone
    program += [(JUMP_EQUAL, 0, 1, CLONE3), (LEAVE, 0, 0, UNKNOWN)]
    changes = {} if writes else CHANGES[machine]
    for number in [*DENIED[machine].values(), *NEWER.values(), *changes.values()]:
        program += [(JUMP_EQUAL, 0, 1, number), (LEAVE, 0, 0, REFUSE)]
    rules = argument_rules(pid, writes)
    for name, number in BY_ARGUMENT[machine].items():
        argument, cases, otherwise = rules[name]
        program += [(JUMP_EQUAL, 0, 2 + 2 * len(cases), number)]
        program += [(LOAD, 0, 0, 16 + 8 * argument)]  # its low half
        for test, value, verdict in cases:
            program += [(test, 0, 1, value), (LEAVE, 0, 0, verdict)]
        program.append((LEAVE, 0, 0, otherwise))
    program.append((LEAVE, 0, 0, ALLOW))
    return program


def argument_rules(
    pid: int, writes: bool
) -> dict[str, tuple[int, list[tuple[int, int, int]], int]]:
    """{call: (which argument, [(test, value, verdict)], verdict if no test applies)}."""
    itself = [(JUMP_EQUAL, pid, ALLOW)]
    names = [(JUMP_EQUAL, option, ALLOW) for option in (PR_SET_NAME, PR_GET_NAME, PR_SET_VMA)]
    threads = [(JUMP_SET, NEW_NAMESPACE, REFUSE), (JUMP_SET, CLONE_THREAD, ALLOW)]
    # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals by way of files
    owner_and_signal = [(JUMP_EQUAL, command, REFUSE) for command in (8, 10, 15)]
    change = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    changing = [] if writes else [(JUMP_SET, change, REFUSE)]
    return {
        "kill": (0, itself, REFUSE),
        "tgkill": (0, itself, REFUSE),
        "prlimit64": (0, [(JUMP_EQUAL, 0, ALLOW)], REFUSE),
        "prctl": (0, names, REFUSE),
        "clone": (0, threads, REFUSE),
        "fcntl": (1, owner_and_signal, ALLOW),
        "open": (1, changing, ALLOW),
        "openat": (2, changing, ALLOW),
    }
