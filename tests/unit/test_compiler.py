"""torch.compile: without a working compiler a run says so and goes without; shapes are few."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._guards import CompileContext

from scripts import base_train, chat_rl, chat_sft, mid_train
from tests.unit.test_train_scripts import MODEL, text
from zangchat.runtime import compiler
from zangchat.tokenizer import RustBPETokenizer

ROOT = Path(__file__).parents[2]


class Compilations:
    """A backend that runs the graphs as they are, and counts them by the function they are of."""

    def __init__(self) -> None:
        self.of: Counter[Any] = Counter()

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.of[CompileContext.current_compile_id().frame_id] += 1
        return graph.forward


@pytest.fixture
def compilations() -> Iterator[Compilations]:
    torch._dynamo.reset()
    yield Compilations()
    torch._dynamo.reset()


# ---- the trial -----------------------------------------------------------------------------------

TRIAL = """
import logging, sys, torch
logging.basicConfig()
from zangchat.runtime.compiler import working_backend
print(working_backend(eval(sys.argv[1]), torch.device("cpu")), "torch._dynamo" in sys.modules)
"""


def trial(requested: bool | None, cache: Path, **environment: str) -> tuple[str, str]:
    """The chosen backend, and the log, of a new process."""
    done = subprocess.run(
        [sys.executable, "-c", TRIAL, repr(requested)],
        cwd=ROOT,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()[0], done.stderr


def test_a_compiler_is_tried_anew_although_the_cache_has_its_results(tmp_path: Path) -> None:
    """It still tells its version and reads headers, as torch has it do each time; it cannot link."""
    real, cxx, gone = (
        shutil.which(os.environ.get("CXX", "g++")),
        tmp_path / "c++",
        tmp_path / "gone",
    )
    script = f'case "$*" in *-shared*) test ! -e {gone} || exit 1 ;; esac'
    cxx.write_text(f'#!/bin/sh\n{script}\nexec {real} "$@"\n')
    cxx.chmod(0o755)
    assert trial(True, tmp_path / "cache", CXX=str(cxx)) == ("inductor", "")
    gone.touch()
    backend, log = trial(True, tmp_path / "cache", CXX=str(cxx))
    assert backend == "None"
    assert "not compiling, which is slower: CppCompileError" in log


def test_on_a_cpu_and_where_it_is_refused_nothing_is_compiled_or_tried(tmp_path: Path) -> None:
    device = torch.device("cpu")
    assert compiler.working_backend(None, device) is None
    assert compiler.working_backend(False, torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nonexistent-c++"}, "InvalidCxxCompiler"),
        ({"CXX": "false"}, "InvalidCxxCompiler|CppCompileError|CalledProcessError"),
        ({"TORCHINDUCTOR_CACHE_DIR": "/dev/null/cache"}, "NotADirectoryError|FileExistsError"),
    ],
    ids=["no compiler", "a compiler that fails", "no cache folder"],
)
def test_what_is_broken_is_named_and_the_run_goes_without(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    backend, log = trial(True, tmp_path / "cache", **environment)
    assert backend == "None"
    assert "not compiling, which is slower" in log and any(
        name in log for name in reason.split("|")
    )
    assert "Traceback" not in log


def test_a_missing_triton_or_a_wrong_result_is_no_working_compiler(
    monkeypatch: pytest.MonkeyPatch, compilations: Compilations
) -> None:
    def missing(graph: Any, inputs: Any) -> Any:
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(compiler, "BACKEND", missing)
    assert "No module named 'triton'" in str(compiler.compile_failure(torch.device("cpu")))
    monkeypatch.setattr(
        compiler, "BACKEND", lambda graph, _: lambda *args: [out + 1 for out in graph(*args)]
    )
    assert compiler.compile_failure(torch.device("cpu")) == "a compiled function is off by 1"


# ---- compilations of a run -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compiled")
    documents = [text(index)[: 5 + index % 120] for index in range(300)]
    RustBPETokenizer.train_from_iterator(iter(documents), 300).save(root / "tokenizer")
    (root / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    return root


STAGES: dict[str, tuple[Any, list[str]]] = {
    "base": (base_train, [*MODEL, "--total_batch_size=256", "--device_batch_size=4"]),
    "mid": (mid_train, ["--mixture=arithmetic:400", "--block_diagonal=1"]),
    "sft": (chat_sft, ["--mixture=arithmetic:400", "--target_examples_per_step=14"]),
    "rl": (
        chat_rl,
        ["--task=arithmetic", "--examples_per_step=4", "--num_samples=4", "--max_new_tokens=8"],
    ),
}


def test_each_stage_compiles_a_function_at_most_for_one_shape_and_then_for_all(
    root: Path, compilations: Compilations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(root))
    monkeypatch.setattr(compiler, "BACKEND", compilations)
    for stage, (command, flags) in STAGES.items():
        if stage == "base":
            more = [
                "--core_metric_every=-1",
                "--sample_every=-1",
                f"--data_path={root / 'text.txt'}",
            ]
        else:
            more = ["--device_type=cpu"]
        torch._dynamo.reset()
        compilations.of.clear()
        flags = [*flags, *more, "--compile=1", "--num_iterations=12", "--eval_every=4"]
        assert command.main(flags) == 0, stage
        # the first shape, all shapes, and the one row that torch takes for a case of its own
        assert max(compilations.of.values()) <= 3, (stage, compilations.of)
        # the trial, blocks with and without gradients, the loss and its gradient
        assert len(compilations.of) <= 5, (stage, compilations.of)
