"""The sandbox's vocabulary: results, levels, layers, errors."""

import enum
import os
from dataclasses import dataclass

from zangchat.errors import UserError

MEMORY_BYTES = 256 * 2**20  # of address space, the interpreter's ~30 MB included


@dataclass
class ExecutionResult:
    success: bool  # the code ran to its end
    stdout: str
    stderr: str
    error: str | None = None  # why it failed, in one line
    timeout: bool = False
    memory_exceeded: bool = False


class SandboxLevel(enum.IntEnum):
    """The protection that held under attack; each level includes those before it."""

    NONE = 0  # nothing: not even a memory limit
    LIMITS = 1  # resources are limited, the program ends with its time
    # no network, new processes or signals, no changes to the user's files; it can read files
    FILTERED = 2
    ISOLATED = 3  # no file of this machine can be read either

    def __str__(self) -> str:
        return self.name.lower()


class SandboxRefused(UserError):
    """The sandbox of this machine is weaker than requested."""


class SandboxError(RuntimeError):
    """The sandbox itself failed; says nothing about the code."""


@dataclass(frozen=True)
class Jail:
    """Which layers to use. The tests remove single ones to see that each holds by itself."""

    world: str = "none"  # namespaces | bubblewrap | none
    landlock: bool = False
    seccomp: bool = False
    drop: bool = False  # root's rights, or those of the user namespace


@dataclass(frozen=True)
class Sandbox:
    jail: Jail
    level: SandboxLevel

    def __str__(self) -> str:
        layers = [self.jail.world] if self.jail.world != "none" else []
        layers += ["another user"] if self.jail.drop and os.getuid() == 0 else []
        layers += [name for name in ("landlock", "seccomp") if getattr(self.jail, name)]
        return f"{self.level} ({', '.join([*layers, 'resource limits'])})"
