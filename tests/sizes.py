"""The sizes, the only settings that a test of the defaults may change.

Everything else keeps its default, as in a user's first run.
"""

import os
import shlex
import subprocess

from tests.documents import ROOT

FLAGS = frozenset(
    """
    depth vocab_size max_seq_len device_batch_size total_batch_size num_iterations target_examples_per_step examples_per_step num_samples
    num_shards max_chars eval_tokens eval_steps eval_examples split_tokens
    max_per_task core_metric_max_per_task max_problems max_new_tokens max_tokens
    """.split()
)
VARIABLES = frozenset(
    """
    DEPTH VOCAB_SIZE MAX_SEQ_LEN DEVICE_BATCH_SIZE TOTAL_BATCH_SIZE NUM_ITERATIONS NUM_SHARDS MAX_CHARS NPROC_PER_NODE
    """.split()
)


def users_environment(**more: str) -> dict[str, str]:
    """The environment of a new user plus `more`, without any variable that the tests set."""
    ours = {
        *VARIABLES,
        "ZANGCHAT_BASE_DIR",
        "ZANGCHAT_EVAL_BUNDLE_URL",
        "OMP_NUM_THREADS",
        "WANDB_MODE",
    }
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not name.startswith("PYTEST")
    }
    return inherited | more


def rehearsal() -> dict[str, str]:
    """The variables of the rehearsal that the header of speedrun.sh promises to work."""
    lines = (ROOT / "speedrun.sh").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("#   DEPTH=2"))
    command = ""
    for line in lines[start:]:
        command += line.removeprefix("#").strip().removesuffix("\\")
        if not line.endswith("\\"):
            break
    script = command.replace("bash speedrun.sh", "env -0")
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": os.environ["PATH"]}, capture_output=True, check=True
    )
    pairs = (pair.partition("=") for pair in done.stdout.decode().split("\0") if pair)
    return {
        name: value
        for name, _, value in pairs
        if name not in ("PATH", "PWD", "SHLVL", "_", "OLDPWD")
    }


def others(variables: dict[str, str]) -> list[str]:
    """The variables of a chain that are not sizes, including flags within the *_FLAGS variables."""
    found = []
    for name, value in variables.items():
        if name.endswith("_FLAGS"):
            flags = [word.partition("=")[0].lstrip("-") for word in shlex.split(value)]
            found += [f"{name}: --{flag}" for flag in flags if flag not in FLAGS]
        elif name not in VARIABLES:
            found.append(name)
    return found
