"""Simulated machines: a PATH with a few tools of the system and stand-ins for the rest.

The stand-ins for macOS refuse the options that its own tools lack, and its `wc` pads.
"""

import shutil
import subprocess
from pathlib import Path

# The tools of a bare Linux or macOS: no python3, pip, uv, cargo or nvidia-smi.
TOOLS = """awk basename bash cat chmod cksum cp cut date df dirname env find grep head hostname id
ls mkdir mktemp mv printf ps pwd readlink rm sed seq sh sleep sort tail tee touch tr uname wc
which""".split()
GNU = "timeout flock nproc tac setsid sha256sum".split()
# tool -> arguments that macOS refuses (a pattern of bash's `case`)
REFUSED = {
    "sed": "-i|-r|-z|-s|--*",
    "grep": "-P|-*P|--perl*",
    "find": "-printf|-regextype|--*",
    "date": "-d|--*",
    "df": "--*|-BG|-h*B",
    "head": "-c-*|-n-*|--*",
    "cp": "-t|-u|--*",
    "ls": "--*",
    "mktemp": "--*",
    "readlink": "-f|-m|-e|--*",
    "sort": "-V|-h|--*",
    "tail": "--*",
    "mv": "-t|--*",
    "rm": "--*",
    "mkdir": "--*",
    "cut": "--*",
    "tr": "--*",
}


class Machine:
    """`install(name, text)` adds a program; `run(command)` has nothing else on its PATH."""

    def __init__(self, folder: Path, system: str = "Linux") -> None:
        self.bin, self.home = folder / "bin", folder / "home"
        self.bin.mkdir(parents=True)
        self.home.mkdir()
        for tool in [*TOOLS, *(GNU if system == "Linux" else [])]:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.install(
            "uname",
            f'[ "$*" = -m ] && echo {"arm64" if system == "Darwin" else "x86_64"} || echo {system}',
        )
        if system == "Darwin":
            for tool, pattern in REFUSED.items():
                complain = f'echo "{tool}: illegal option $word" >&2; exit 64'
                refuse = f"for word; do case $word in {pattern}) {complain} ;; esac; done"
                self.install(tool, f'{refuse}\nexec {shutil.which(tool)} "$@"')
            self.install("wc", f'{shutil.which("wc")} "$@" | {shutil.which("sed")} "s/^/       /"')

    def install(self, name: str, text: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        path.chmod(0o755)

    def run(self, *command: str, cwd: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
        environment = {"PATH": str(self.bin), "HOME": str(self.home), **variables}
        return subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            check=False,
        )


def nvidia_smi(
    listing: str, driver: str = "580.65.06", memory: str = "81559", code: int = 0
) -> str:
    """The text of a stand-in for nvidia-smi."""
    return f"""case "$*" in
    *-L*) cat << 'LISTING'
{listing}
LISTING
    exit {code} ;;
    *driver_version*) echo {driver} ;;
    *memory.total*) echo {memory} ;;
esac
exit {code}"""


def gpus(*migs: int) -> str:
    """The list of `nvidia-smi -L`: a line for each GPU, followed by its number of MIG instances."""
    lines = []
    for i, instances in enumerate(migs):
        lines.append(
            f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i}a5de8f1-0000-1111-2222-33334444555{i})"
        )
        lines += [
            f"  MIG 3g.40gb     Device  {k}: (UUID: MIG-{i}{k}c0ffee-0000-5555-aaaa-bbbbccccdddd)"
            for k in range(instances)
        ]
    return "\n".join(lines)


def no_path(name: str) -> str:
    """The text of a pyenv shim for `name` that finds no program."""
    return f'echo "pyenv: {name}: command not found" >&2\nexit 127'
