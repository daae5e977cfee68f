"""The machine and the software of a run."""

import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def hardware() -> dict[str, str]:
    """Name and size of processors and memory."""
    import psutil
    import torch

    cores = f"{psutil.cpu_count(logical=False) or '?'} cores, {psutil.cpu_count()} threads"
    facts = {
        "system": platform.platform(),
        "CPU": f"{cpu_name()} ({cores})",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        size = torch.cuda.get_device_properties(0).total_memory / 2**30
        facts["GPU"] = f"{len(names)}x {names[0]}, {size:.0f} GiB each"
    return facts


def cpu_name() -> str:
    """The processor's model, or only its architecture if the system does not tell more."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def software() -> dict[str, str]:
    """Versions of the libraries, and the exact source: revision, changes, lines."""
    facts = {"Python": platform.python_version()}
    for name in ("torch", "numpy", "tiktoken", "zangchat"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    revision = _git("rev-parse", "--short=12", "HEAD")
    if revision:
        branch = _git("rev-parse", "--abbrev-ref", "HEAD")
        facts["git"] = f"{revision} on {branch}"
        if changed := _git("status", "--porcelain", "--untracked-files=no"):
            facts["git"] += f", {len(changed.splitlines())} files changed since"
        counts = []
        for language, pattern in (("Python", "*.py"), ("Rust", "*.rs")):
            files = [ROOT / name for name in (_git("ls-files", pattern) or "").splitlines()]
            lines = sum(_line_count(path) for path in files)
            counts.append(f"{lines:,} lines of {language} in {len(files)} files")
        facts["source"] = ", ".join(counts)
    return facts


def _line_count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _git(*arguments: str) -> str | None:
    """Git's output; None without git or a repository (an installed copy)."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=30)
    return done.stdout.strip() if done.returncode == 0 else None
