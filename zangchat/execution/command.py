"""How the jail's interpreter is started: its path, the files that it needs, bubblewrap's flags."""

import functools
import os
import sys
from pathlib import Path

from zangchat.execution.jail import START
from zangchat.execution.sandbox import Jail

TMP_BYTES = 16 * 2**20
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/dev/null", "/dev/urandom")
BUBBLEWRAP = [
    *("bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"),
    *("--unshare-cgroup-try", "--die-with-parent", "--cap-drop", "ALL"),
]


def command(jail: Jail, result_fd: int, tests_fd: int) -> list[str]:
    """The command line of a jail; it reads the program and the request from stdin."""
    python = [interpreter(), "-I", "-S", "-B", "-c", START, str(result_fd), str(tests_fd)]
    return python if jail.world != "bubblewrap" else [*bubblewrap(), *python]


def bubblewrap() -> list[str]:
    """bubblewrap with the visible files, read-only, and an empty /tmp; a command follows."""
    flags = list(BUBBLEWRAP)
    if os.getuid() == 0:  # to become another user, which drops these capabilities
        flags += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        flags += ["--unshare-user"]
    visible = visible_paths()
    parents = {str(parent) for path in visible for parent in Path(path).parents}
    for folder in sorted(parents - {"/"}):
        flags += ["--perms", "0755", "--dir", folder]  # else it copies the mode of a private home
    for path in visible:
        if os.path.islink(path):
            flags += ["--symlink", os.readlink(path), path]
        else:
            flags += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    # the number of files stays without a limit: there is no option for it, see namespaces.FILES
    flags += ["--size", str(TMP_BYTES), "--perms", "1777", "--tmpfs", "/tmp"]
    return [*flags, "--remount-ro", "/", "--chdir", "/tmp", "--"]


@functools.cache
def interpreter() -> str:
    """The interpreter itself, not the virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.cache
def visible_paths() -> tuple[str, ...]:
    """The interpreter's installation and the system's libraries, none within another."""
    paths: list[str] = []
    for path in (os.path.realpath(sys.base_prefix), interpreter(), *LIBRARIES):
        nested = any(path == seen or path.startswith(seen + "/") for seen in paths)
        if os.path.lexists(path) and not nested:
            paths.append(path)
    return tuple(paths)


@functools.cache
def interpreter_is_public() -> bool:
    """Whether another user can read the interpreter's files; if not, root cannot simply drop."""
    folder = Path(os.path.realpath(sys.base_prefix))
    return all(path.stat().st_mode & 0o005 == 0o005 for path in (folder, *folder.parents))
