"""How much there is to read: lines of the core, and the largest files, classes and functions, at
100 columns.

    python -m dev.code_size            JSON: the core by file, the parts beside it, each package,
                                       the largest pieces

The core is the part that a learner reads to know how the model is built, trained and run. Lines are
counted after `ruff format --line-length=100` of a copy, so that wide lines gain nothing; blank
lines, comments and docstrings count.
"""

import ast
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = (
    "zangchat/gpt.py zangchat/nn zangchat/muon.py zangchat/adamw.py zangchat/sharded.py "
    "zangchat/optim.py zangchat/bpe.py zangchat/tokenizer.py zangchat/streams.py "
    "zangchat/dataloader.py zangchat/training/trainer.py zangchat/schedule.py zangchat/engine"
).split()
# Read with the core, and reported beside it: moving code there is no gain.
BESIDE = (
    "zangchat/conversation.py zangchat/training zangchat/checkpoint_manager.py "
    "zangchat/checkpoint_files.py zangchat/fsdp.py"
).split()
PACKAGES = "zangchat scripts tasks dev tests rustbpe/src ruststep/src".split()


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = checkout(Path(folder))
        core = {path: lines for name in CORE for path, lines in lines_of(copy, name)}
        beside = {p: n for name in BESIDE for p, n in lines_of(copy, name) if p not in core}
        packages = {name: sum(n for _, n in lines_of(copy, name)) for name in PACKAGES}
        largest = {
            kind: [f"{lines} {name}" for lines, name in pieces[:5]]
            for kind, pieces in measured(copy).items()
        }
    sums = {"core": sum(core.values()), "beside": sum(beside.values()), "packages": packages}
    print(json.dumps({**sums, "largest": largest, "files": {**core, **beside}}, indent=1))
    return 0


def checkout(folder: Path) -> Path:
    """A copy of the code in `folder`, formatted to 100 columns."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    ruff = [sys.executable, "-m", "ruff", "format", "--quiet", "--isolated", "--line-length=100"]
    subprocess.run([*ruff, folder], check=True)
    return folder


def lines_of(copy: Path, name: str) -> Iterator[tuple[str, int]]:
    """(path, lines) of a file, or of all Python and Rust below a folder."""
    path = copy / name
    files = [path] if path.suffix else sorted([*path.rglob("*.py"), *path.rglob("*.rs")])
    for file in files:
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            yield file.relative_to(copy).as_posix(), text.count("\n")


def measured(copy: Path) -> dict[str, list[tuple[int, str]]]:
    """(lines, name) of the files, classes and functions of what is installed, largest first."""
    found: dict[str, list[tuple[int, str]]] = {"files": [], "classes": [], "functions": []}
    for package in ("zangchat", "scripts", "tasks"):
        for path, lines in lines_of(copy, package):
            found["files"].append((lines, path))
            for node in ast.walk(ast.parse((copy / path).read_text(encoding="utf-8"))):
                if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    kind = "classes" if isinstance(node, ast.ClassDef) else "functions"
                    size = (node.end_lineno or node.lineno) - node.lineno + 1
                    found[kind].append((size, f"{path}:{node.name}"))
    return {kind: sorted(pieces, reverse=True) for kind, pieces in found.items()}


if __name__ == "__main__":
    sys.exit(main())
