"""Importing has no effect: no network, no logging set-up, no files, no threads.

Modules that --help needs do not import torch either, to be quick.

The import contracts are in pyproject.toml (import-linter). The tests discover the modules, so new
ones are covered automatically.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("zangchat", "scripts", "tasks")
    for path in (ROOT / package).rglob("*.py")
)
# base modules, and all that a command imports before it parses its flags
TORCH_FREE = [
    *(
        f"zangchat.{name}"
        for name in (
            "config",
            "configurator",
            "errors",
            "flops",
            "schedule",
            "common",
            "report",
            "training.flags",
        )
    ),
    *(
        name
        for name in MODULES
        if name.startswith(
            ("scripts", "tasks", "zangchat.dataset", "zangchat.execution", "zangchat.runtime")
        )
    ),
]
for name in ("collectives", "compiler", "devices", "memory"):
    TORCH_FREE.remove(f"zangchat.runtime.{name}")

# Imports the modules on its command line one by one; prints {module: problem}.
PROBE = """
import importlib, json, logging, os, pathlib, socket, sys, threading, traceback
names, without_torch = json.loads(sys.argv[1]), sys.argv[2] == "without torch"
sys.argv = ["probe", "--no-such-flag"]
base = pathlib.Path(os.environ["ZANGCHAT_BASE_DIR"])

def refuse(*args, **kwargs):
    raise AssertionError("the network was asked for")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise AssertionError("torch was imported")
if without_torch:
    sys.meta_path.insert(0, NoTorch())

wrong = {}
handlers = list(logging.getLogger().handlers)
for name in names:
    threads = threading.active_count()
    try:
        importlib.import_module(name)
        if logging.getLogger().handlers != handlers:
            handlers = list(logging.getLogger().handlers)
            raise AssertionError("logging was set up")
        if threading.active_count() > threads and name.startswith(("zangchat", "scripts", "tasks")):
            raise AssertionError("a thread was started")
        if base.exists():
            raise AssertionError("the base folder was created")
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            raise AssertionError("CUDA was initialised")
    except BaseException:
        wrong[name] = traceback.format_exc()
print(json.dumps(wrong), file=sys.__stdout__)
"""


def probe(names: list[str], torch: str, folder: Path) -> dict[str, str]:
    environment = {**os.environ, "ZANGCHAT_BASE_DIR": str(folder / "must-not-appear")}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(names), torch],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, (
        f"something was printed while importing: {done.stdout[:500]}"
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, str]:
    return probe(MODULES, "with torch", tmp_path_factory.mktemp("imports"))


@pytest.fixture(scope="module")
def imported_without_torch(tmp_path_factory) -> dict[str, str]:
    return probe(TORCH_FREE, "without torch", tmp_path_factory.mktemp("imports"))


@pytest.mark.parametrize("name", MODULES)
def test_importing_has_no_effect(name, imported):
    assert name not in imported, imported[name]


@pytest.mark.parametrize("name", TORCH_FREE)
def test_importing_does_not_load_torch(name, imported_without_torch):
    assert name not in imported_without_torch, imported_without_torch[name]


def test_installed_copy_has_the_non_python_files():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = {
        f"{package}/{name}"
        for package, names in project["tool"]["setuptools"]["package-data"].items()
        for name in names
    }
    files = (
        path
        for package in ("zangchat", "scripts", "tasks")
        for path in (ROOT / package).rglob("*")
        if path.is_file()
    )
    assert listed == {
        path.relative_to(ROOT).as_posix() for path in files if path.suffix not in (".py", ".pyc")
    }
