"""A world of its own for the jailed program: namespaces, and a root with its visible files."""

from __future__ import annotations

import os
import struct

from zangchat.execution.jail.system import call, fork, long, wait_and_end

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
FILES = "nr_inodes=4096"  # of a tmpfs: an empty one takes a kilobyte that `size` does not count
SYS_MOUNT_SETATTR = 442  # on all machines
SYS_PIVOT_ROOT = {"x86_64": 155}  # 41 on all others


def enter_namespaces(folder: str, visible: tuple[str, ...], tmp_bytes: int) -> None:
    """No network, no other process, no files except read-only `visible` ones and an empty /tmp.

    Returns in the first process of a new pid namespace; the calling process waits for it and passes
    its exit code on.
    """
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    call("unshare", flags | (CLONE_NEWUSER if uid else 0))
    if uid:  # without root, a user namespace gives the privileges for the following steps
        maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    os.umask(0o022)
    child = fork()  # process 1: everything inside ends with it
    if child:
        wait_and_end(child)
    build_root(folder, visible, tmp_bytes)


def build_root(folder: str, visible: tuple[str, ...], tmp_bytes: int) -> None:
    def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
        strings = [text.encode() for text in (source, target, kind)]
        call("mount", *strings, long(flags), options.encode())

    mount("none", "/", "", MS_REC | MS_PRIVATE)  # mounts made here do not reach the outside
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"size=1m,{FILES},mode=755")
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
    tmp_options = f"size={tmp_bytes},{FILES},mode=1777"
    mount("tmpfs", folder + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, tmp_options)
    os.chdir(folder)
    pivot_root = SYS_PIVOT_ROOT.get(os.uname().machine, 41)
    call("syscall", long(pivot_root), b".", b".")  # the old root is now mounted over the new one
    call("umount2", b".", MNT_DETACH)
    read_only("/", recursive=False)
    os.chdir("/tmp")


def read_only(path: str, recursive: bool = True) -> None:
    attributes = struct.pack("4Q", 1 | 2 | 4, 0, 0, 0)  # set RDONLY, NOSUID, NODEV; clear nothing
    at_fdcwd, flags = -100, 0x8000 if recursive else 0  # AT_RECURSIVE
    number = long(SYS_MOUNT_SETATTR)
    call("syscall", number, at_fdcwd, path.encode(), long(flags), attributes, long(32))
