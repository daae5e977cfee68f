"""Check the READMEs and the large scripts: files, commands, flags, the example of a task."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
import yaml

from tests.commands import entry_point
from tests.documents import (
    LANGUAGES,
    NOT_RUN,
    PAGES,
    READMES,
    ROOT,
    blocks,
    check_command,
    commands,
    fenced,
    text_of,
)
from tests.machines import gpus, nvidia_smi
from tests.sizes import rehearsal
from zangchat import configurator, flops, schedule
from zangchat.config import GPTConfig

LISTED = ("zangchat", "scripts", "tasks")
DOCUMENTS = [
    *READMES,
    "dev/LEADERBOARD.md",
    *(f"dev/docs/{language}/{page}" for language in LANGUAGES for page in PAGES),
]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_and_their_flags_exist(name):
    if not name.endswith("extending.md"):  # its commands need its examples: tests/e2e/test_docs.py
        for line in commands(text_of(name)):
            check_command(line, name)
    for block in blocks(text_of(name)):
        assert block.info in ("", "llama-server", *NOT_RUN) or block.info.startswith("file="), (
            f"{name}: what does {block.info!r} mean?"
        )


@pytest.mark.parametrize(
    "names",
    [READMES, *((f"dev/docs/en/{page}", f"dev/docs/zh/{page}") for page in PAGES)],
    ids=lambda names: names[0],
)
def test_both_languages_have_the_same_code(names):
    english, chinese = (text_of(name) for name in names)
    assert [block for block in blocks(english) if block.language] == [
        block for block in blocks(chinese) if block.language
    ]
    if names != READMES:  # the Chinese README has an extra section for beginners
        assert [len(found) for found in re.findall(r"^#+", english, re.M)] == [
            len(found) for found in re.findall(r"^#+", chinese, re.M)
        ]
    # they mention the same files and functions
    assert sorted(references(english)) == sorted(references(chinese))


# -- files and functions in a text: `zangchat/gpt.py`, `zangchat/gpt.py:GPT.forward` ---------------


def references(text: str) -> list[str]:
    spans = re.findall(
        r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    )
    return [
        span
        for span in spans
        if re.fullmatch(
            r"(?:zangchat|scripts|tasks|dev|tests|rustbpe|ruststep)/[\w./]*\w(?::[\w.]+)?", span
        )
    ]


def defined(tree: ast.AST, name: str) -> bool:
    """Whether a module, or a class in it, defines a dotted name."""
    first, _, rest = name.partition(".")
    for node in getattr(tree, "body", []):
        names = (
            [node.name]
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            else []
        )
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        names += [target.id for target in targets if isinstance(target, ast.Name)]
        if first in names:
            return not rest or defined(node, rest)
    return False


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_files_and_functions_exist(name):
    text = text_of(name)
    for reference in references(text):
        path, _, function = reference.partition(":")
        if any(block.info == f"file={path}" for block in blocks(text)):
            continue
        assert (ROOT / path).exists(), f"{name} names {path}"
        if function:
            assert defined(ast.parse(text_of(path)), function), f"{name} names {reference}"


@pytest.mark.parametrize("name", READMES)
def test_flags_of_the_command_table_exist(name):
    rows = re.findall(r"^\| (`(?:zangchat|scripts)\..*?) \| (.*) \|$", text_of(name), re.MULTILINE)
    assert len(rows) >= 10
    for modules, flags in rows:
        known = set()
        for module in re.findall(r"`([a-z_.]+)`", modules):
            found = entry_point(module)
            for config in (
                found.Config,
                *(getattr(found, name, None) for name in ("VerifyConfig", "TokenizeConfig")),
            ):
                known |= (
                    {
                        spelling
                        for flag in configurator._flags(config)
                        for spelling in (f"--{flag.name}", *flag.aliases)
                    }
                    if config
                    else set()
                )
        named = {
            flag
            for span in re.findall(r"`([^`]*)`", flags)
            for flag in re.findall(r"(?<![\w-])--?[a-z_]+", span)
        }
        assert named <= known, f"{name}: {modules} has no {', '.join(sorted(named - known))}"


@pytest.mark.parametrize("name", READMES)
def test_tree_lists_exactly_the_files(name):
    tree = next(block for block in fenced(text_of(name), "") if block.startswith("zangchat/"))
    listed, folder = set(), ""
    for line in tree.splitlines():
        entry, _, description = line.strip().partition(" ")
        assert description.strip(), f"{entry} has no description"
        if line.startswith(" "):
            listed.add(folder + entry)
        else:
            folder = entry
    assert listed == files()


def files() -> set[str]:
    """The files that git tracks below the listed folders; without git, all files there."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        done = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", *LISTED],
            capture_output=True,
            text=True,
            check=True,
        )
        found = {name for name in done.stdout.splitlines() if (ROOT / name).exists()}
    else:
        found = {
            str(path.relative_to(ROOT))
            for folder in LISTED
            for path in (ROOT / folder).rglob("*.*")
            if "__pycache__" not in path.parts
        }
    return {name for name in found if Path(name).name not in ("__init__.py", "py.typed")}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_link_targets_exist(name):
    text = re.sub(r"^```.*?^```$", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text):
        path, _, anchor = "".join(target).partition("#")
        if path.startswith("https://"):
            continue
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), f"{name} points to {path}"
        if anchor:
            lines = found.read_text(encoding="utf-8").splitlines()
            headings = [
                re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in lines
                if line.startswith("#")
            ]
            assert anchor in headings, f"{name} points to #{anchor}"


def test_schedule_table_matches_the_code():
    for name in READMES:
        rows = re.findall(
            r"^\| d(\d+) \| ([\d.]+)([MB]) \| (\d+), (\d+) \| ([\d.]+)B \| 2\^(\d+) \| ([\d.]+) \| "
            r"([\d.]+) \|$",
            text_of(name),
            re.MULTILINE,
        )
        assert len(rows) == 4
        for depth, size, unit, width, heads, tokens, power, per_parameter, ratio in rows:
            config = schedule.model_config_for_depth(
                int(depth), 128, 0, vocab_size=65536, sequence_len=2048
            )
            params, plan = (
                flops.count_params(config),
                schedule.plan_run(config, target_param_data_ratio=12),
            )
            assert (config.n_embd, config.n_head, plan.total_batch_size) == (
                int(width),
                int(heads),
                2 ** int(power),
            )
            assert float(size) == pytest.approx(
                params["total"] / {"M": 1e6, "B": 1e9}[unit], rel=5e-3
            )
            assert float(tokens) == pytest.approx(plan.tokens / 1e9, rel=5e-3)
            assert float(per_parameter) == pytest.approx(plan.tokens / params["total"], abs=0.06)
            assert float(ratio) == pytest.approx(
                20 * params["total"] / (params["matrices"] + params["lm_head"]), abs=0.06
            )


def test_task_example_works(monkeypatch):
    from tasks import registry
    from tasks.common import check_conversation

    section = text_of("README.md").split("## Adding a task")[1].split("\n## ")[0]
    source, line = fenced(section, "python")
    module = types.ModuleType("tasks.capitals")
    exec(compile(source, "README.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "tasks.capitals", module)
    for name, entry in eval("{" + line + "}", vars(registry)).items():
        monkeypatch.setitem(registry.REGISTRY, name, entry)

    train, test = registry.load_task("capitals"), registry.load_task("Capitals", "test")
    questions = {
        split: {task[i]["messages"][0]["content"] for i in range(len(task))}
        for split, task in (("train", train), ("test", test))
    }
    assert questions["train"] and questions["test"] and not questions["train"] & questions["test"]
    for i in range(len(train)):
        conversation = train[i]
        check_conversation(conversation["messages"], "README.md")
        assert train.evaluate(conversation, conversation["messages"][-1]["content"])
        assert not train.evaluate(conversation, "I do not know.")
        assert train.reward(conversation, conversation["messages"][-1]["content"]) == 1.0
    assert len(registry.build_mixture("capitals:2")) == 2 * len(train)


# -- speedrun.sh and run1000.sh, with commands that only record their arguments --------------------


@pytest.fixture
def chain(tmp_path):
    """`run(script, **variables) -> (exit code, output, commands)` runs a copy of a script.

    `programs` are stand-ins for programs of the system, name -> text. `smi` is the GPU memory that
    nvidia-smi reports; "" removes that program.
    """
    (tmp_path / "dev").mkdir()
    for name in (
        "speedrun.sh",
        "run1000.sh",
        "dev/rungpu.sh",
        "dev/machine.sh",
        "dev/slurm.sbatch",
    ):
        shutil.copy(ROOT / name, tmp_path / name)
    for path, body in {
        "dev/setup.sh": "exit 0\n",
        ".venv/bin/python": """#!/usr/bin/env bash
case "$*" in
    "-m dev.gpus") [ -n "${TORCH_GPUS:-}" ] || { echo "error: torch cannot use it" >&2; exit 2; }; echo "$TORCH_GPUS"; exit ;;
    "-m dev.plan"*) PATH=${PATH#*:}; cd "$ROOT"; exec "$PYTHON" "$@" ;;
esac
if [[ "$*" == *zangchat.dataset* && "$*" == *-n* ]]; then
    folder=$ZANGCHAT_BASE_DIR/base_data/climbmix; mkdir -p "$folder"
    for i in $(seq 0 "${!#}"); do printf '{"name": "shard_%05d.parquet"}\\n' "$i"; done > "$folder/manifest.json"
fi
case "${SLOW_HUB:+$*}" in
    *"-n 115") until grep -q tok_train "$RECORD"; do sleep 0.02; done ;;
    *tok_eval) until grep -q 115 "$RECORD"; do sleep 0.02; done ;;
esac
[[ "$*" != *tok_train* ]] || { mkdir -p "$ZANGCHAT_BASE_DIR/tokenizer" && touch "$ZANGCHAT_BASE_DIR/tokenizer/tokenizer.json"; }
[[ "$*" != *"report reset"* ]] || { mkdir -p "$ZANGCHAT_BASE_DIR/report" && touch "$ZANGCHAT_BASE_DIR/report/started.json"; }
(IFS=$'\\t'; line="python$IFS$*"; printf '%s\\n' "${line//$'\\n'/ }" >> "$RECORD")  # one write: the download runs beside the others
[[ -z "${FAIL:-}" || "$*" != *"$FAIL"* ]]
""",
        ".venv/bin/torchrun": """#!/usr/bin/env bash
(IFS=$'\\t'; printf '%s\\n' "torchrun$IFS$*" >> "$RECORD")
[[ -z "${FAIL:-}" || "$*" != *"$FAIL"* ]]
""",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(body, encoding="utf-8")
        (tmp_path / path).chmod(0o755)

    def run(
        script: str,
        programs: dict[str, str] | None = None,
        smi: str = "",
        flags: tuple[str, ...] = (),
        **variables: str,
    ) -> tuple[int, str, list[list[str]]]:
        memory = {"nvidia-smi": f"#!/bin/bash\n{nvidia_smi(gpus(0), memory=smi)}\n"} if smi else {}
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        for name, body in {**memory, **(programs or {})}.items():
            (folder / name).write_text(body, encoding="utf-8")
            (folder / name).chmod(0o755)
        record = tmp_path / "record"
        record.write_text("")
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "RECORD": str(record),
            "NPROC_PER_NODE": "8",
            "TORCH_GPUS": "1",
            "ROOT": str(ROOT),
            "PYTHON": sys.executable,
            **variables,
        }
        done = subprocess.run(
            ["bash", script, *flags],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = [line.split("\t") for line in record.read_text().splitlines()]
        return done.returncode, done.stdout + done.stderr, calls

    return run


def modules(calls: list[list[str]]) -> list[str]:
    return [call[call.index("-m") + 1] for call in calls if "zangchat.dataset" not in call]


CHAIN = [
    "zangchat.report",
    "scripts.fetch",
    "scripts.tok_train",
    "scripts.tok_eval",
    "scripts.base_train",
    "scripts.base_loss",
    "scripts.base_eval",
]
CHAIN += [
    "scripts.mid_train",
    "scripts.chat_eval",
    "scripts.chat_sft",
    "scripts.chat_eval",
    "scripts.chat_rl",
    "scripts.chat_eval",
    "zangchat.report",
]


@pytest.mark.parametrize("script", ["speedrun.sh", "run1000.sh"])
def test_chain_calls_every_command_with_existing_flags(chain, script):
    code, output, calls = chain(script)
    assert code == 0, output
    assert modules(calls) == CHAIN
    for call in calls:
        check_command(shlex.join(call), script)
    assert "$ at" not in output and "an hour" in output


@pytest.mark.parametrize("script", ["speedrun.sh", "run1000.sh"])
def test_chain_takes_no_flags(chain, script):
    for flag in ("--help", "--depth=12"):
        code, output, calls = chain(script, flags=(flag,))
        assert (code, calls) == (2, []) and f"error: {script} takes no flags" in output


def test_rehearsal_uses_existing_flags(chain):
    variables = rehearsal()
    script = text_of("speedrun.sh").split("set -euo pipefail", 1)[1]
    assert all(f"${{{name}:-" in script for name in variables)
    code, output, calls = chain("speedrun.sh", **variables)
    assert code == 0, output
    assert modules(calls) == CHAIN
    assert all(call[0] == "python" or "--nproc_per_node=2" in call for call in calls)
    for call in calls:
        check_command(shlex.join(call), "the rehearsal")


@pytest.mark.parametrize(
    ("script", "own"),
    [
        ("run1000.sh", {"--device_batch_size": "8", "--target_param_data_ratio": "20"}),
        ("dev/rungpu.sh", {"--device_batch_size": "auto", "--dollars_per_hour": "1"}),
    ],
)
def test_other_chains_run_the_commands_of_speedrun(chain, tmp_path, script, own):
    """At the same sizes, so the results of tests/e2e/test_speedrun.py hold for them, too.

    `own` are the flags with a value of their own.
    """
    variables = {name: value for name, value in rehearsal().items() if name != "DEVICE_BATCH_SIZE"}
    found = {}
    for name in ("speedrun.sh", script):
        code, output, found[name] = chain(
            name,
            smi(0, memory="8192"),
            ZANGCHAT_BASE_DIR=str(tmp_path / Path(name).stem),
            **variables,
        )
        assert code == 0, output

    def without(calls, flags):
        return [
            [word for word in call if word.partition("=")[0] not in flags]
            for call in calls
            if "zangchat.dataset" not in call
        ]

    assert (
        without(found[script], own) == without(found["speedrun.sh"], own)
        and modules(found[script]) == CHAIN
    )
    for flag, value in own.items():
        values = {
            word.partition("=")[2]
            for call in found[script]
            for word in call
            if word.startswith(f"{flag}=")
        }
        assert values == {value}


def test_tokenizer_trains_while_shards_arrive(chain):
    """Here the download of all shards ends after the training, and later stages wait for it."""
    code, output, calls = chain("speedrun.sh", SLOW_HUB="1")
    assert code == 0, output
    steps = [
        "dataset " + call[-1] if "zangchat.dataset" in call else call[call.index("-m") + 1]
        for call in calls
    ]
    assert steps.index("dataset 8") < steps.index("scripts.tok_train") < steps.index("dataset 115")


def test_failed_download_ends_the_chain(chain):
    code, output, calls = chain("speedrun.sh", FAIL="-n 8")
    assert (
        code == 1
        and "Text from climbmix: 8 of 115 shards stopped with exit code 1" in output
        and "bash speedrun.sh" in output
    )
    assert modules(calls) == ["zangchat.report"]


def test_failed_stage_ends_the_chain_and_says_how_to_resume(chain):
    code, output, calls = chain("run1000.sh", FAIL="scripts.mid_train")
    assert code == 1
    assert modules(calls)[-1] == "scripts.mid_train"
    assert "Midtraining stopped with exit code 1" in output
    assert (
        re.search(r"torchrun --standalone .*-m scripts\.mid_train .*--resume=latest", output)
        and "bash run1000.sh" in output
    )


def test_second_run_skips_finished_evaluations_and_resumes_the_rest(chain, tmp_path):
    assert chain("speedrun.sh", FAIL="scripts.chat_rl")[0] == 1
    _, _, calls = chain("speedrun.sh")
    assert modules(calls) == [
        "scripts.base_train",
        "scripts.mid_train",
        "scripts.chat_sft",
        "scripts.chat_rl",
        "scripts.chat_eval",
        "zangchat.report",
    ]
    meta = tmp_path / ".cache/zangchat/mid_checkpoints/d20/meta_000001.json"
    meta.parent.mkdir(parents=True)
    meta.write_text(json.dumps({}))
    future = meta.stat().st_mtime + 100
    os.utime(meta, (future, future))
    # of mid, whose checkpoint is newer than its evaluation
    assert modules(chain("speedrun.sh")[2]).count("scripts.chat_eval") == 1


def test_one_process_needs_no_torchrun(chain):
    _, _, calls = chain("speedrun.sh", NPROC_PER_NODE="1")
    assert {call[0] for call in calls} == {"python"}


# -- before any download: the number of GPUs, and whether torch can use them -----------------------


def smi(*migs: int, **options) -> dict[str, str]:
    return {"nvidia-smi": f"#!/bin/bash\n{nvidia_smi(gpus(*migs), **options)}\n"}


def processes(calls: list[list[str]]) -> set[str]:
    found = {
        word.partition("=")[2]
        for call in calls
        for word in call
        if word.startswith("--nproc_per_node")
    }
    return found or {"1"}


@pytest.mark.parametrize(
    "migs, visible, usable, expected",
    [((0, 0, 0), None, "3", "3"), ((0, 0, 0), "2,0", "2", "2"), ((2,), None, "1", "1")],
)
def test_every_usable_gpu_gets_a_process(chain, migs, visible, usable, expected):
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    code, output, calls = chain(
        "speedrun.sh", smi(*migs), NPROC_PER_NODE="", TORCH_GPUS=usable, **variables
    )
    assert code == 0 and processes(calls) == {expected}, output
    assert processes(
        dry_commands(
            chain("speedrun.sh", smi(*migs), NPROC_PER_NODE="", DRY_RUN="1", **variables)[1]
        )
    ) == {expected}


@pytest.mark.parametrize("script", ["speedrun.sh", "run1000.sh", "dev/rungpu.sh"])
def test_missing_gpu_is_reported_before_any_download(chain, tmp_path, script):
    (tmp_path / "dev/setup.sh").write_text('echo setup >> "$RECORD"\n')
    failed = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    for programs, variables, reason in (
        (None, {}, "No GPU found (nvidia-smi is not installed)"),
        (
            {"nvidia-smi": f"#!/bin/bash\n{nvidia_smi(failed, code=9)}\n"},
            {},
            f"No GPU found (nvidia-smi failed: {failed})",
        ),
        (smi(0), {"CUDA_VISIBLE_DEVICES": ""}, "No GPU found (CUDA_VISIBLE_DEVICES= hides them)"),
        (
            smi(0),
            {"CUDA_VISIBLE_DEVICES": "-1"},
            "No GPU found (CUDA_VISIBLE_DEVICES=-1 hides them)",
        ),
    ):
        code, output, calls = chain(script, programs, NPROC_PER_NODE="", **variables)
        assert code == 2 and reason in output and not calls, output
        assert "dev/runcpu.sh" in output
    assert not (tmp_path / ".cache").exists()


@pytest.mark.parametrize("script", ["speedrun.sh", "run1000.sh", "dev/rungpu.sh"])
def test_unusable_gpu_ends_the_chain_before_any_download(chain, script):
    for number in ("", "8"):
        code, output, calls = chain(script, smi(0), NPROC_PER_NODE=number, TORCH_GPUS="")
        assert code == 2 and output.endswith("error: torch cannot use it\n") and not calls
        code, output, calls = chain(script, smi(0), NPROC_PER_NODE=number, TORCH_GPUS="0")
        assert code == 2 and "nvidia-smi lists a GPU, but torch finds none" in output and not calls


# -- DRY_RUN=1 -------------------------------------------------------------------------------------


def dry_commands(output: str) -> list[list[str]]:
    return [
        shlex.split(line)
        for line in output.splitlines()
        if line.startswith(("python ", "torchrun ", "srun "))
    ]


@pytest.mark.parametrize(
    "variables",
    [{}, {"NPROC_PER_NODE": "1", "DEVICE_BATCH_SIZE": "auto", "RL": "0", "CORE": "0"}, "rehearsal"],
)
def test_dry_run_lists_the_commands_of_the_run(chain, tmp_path, variables):
    if variables == "rehearsal":
        variables = rehearsal()
    for script in ("speedrun.sh", "run1000.sh", "dev/rungpu.sh"):
        shutil.rmtree(tmp_path / ".cache", ignore_errors=True)
        code, output, calls = chain(script, smi(0), DRY_RUN="1", **variables)
        assert code == 0 and not calls, output
        assert not (tmp_path / ".cache").exists()
        code, ran, calls = chain(script, smi(0), **variables)
        assert code == 0, ran
        assert sorted(dry_commands(output)) == sorted(calls), (
            "the download of all shards may come before or after its neighbours"
        )
        assert [call for call in dry_commands(output) if "zangchat.dataset" not in call] == [
            call for call in calls if "zangchat.dataset" not in call
        ]
    code, output, _ = chain(script, smi(0), DRY_RUN="1", **variables)
    assert not any("_eval" in name for name in modules(dry_commands(output))), (
        "what is finished is not issued again"
    )


def test_dry_run_prints_the_plan(chain):
    code, output, _ = chain("speedrun.sh", NPROC_PER_NODE="", DRY_RUN="1")
    assert (
        code == 0 and "No GPU found (nvidia-smi is not installed): this is the plan for 8" in output
    )
    assert processes(dry_commands(output)) == {"8"}
    assert (
        "20 layers, width 1280" in output
        and "64 on each of 8 ranks in 2 passes" in output
        and "8 x H100       1.8 h" in output
    )
    code, output, _ = chain(
        "dev/rungpu.sh", smi(0, memory="24564"), NPROC_PER_NODE="1", DRY_RUN="1"
    )
    assert (
        code == 0
        and "the preset for 24 GB" in output
        and "18.1 GiB on each GPU with 16 rows in a pass" in output
    )
    code, output, _ = chain("speedrun.sh", DRY_RUN="1", BASE_FLAGS="--num_iterations=7")
    assert code == 0 and "\nsteps          7 of" in output
    code, output, _ = chain(
        "dev/rungpu.sh", smi(0, memory="8192"), NPROC_PER_NODE="1", DEPTH="40", DRY_RUN="1"
    )
    assert code == 2 and "not even one row of this model fits into 8 GB" in output


def test_dry_run_works_in_a_fresh_checkout(chain, tmp_path):
    shutil.rmtree(tmp_path / ".venv")
    for script in ("speedrun.sh", "run1000.sh"):
        code, output, _ = chain(script, DRY_RUN="1")
        assert code == 0 and modules(dry_commands(output)) == CHAIN
        assert output.endswith(
            "The plan and its memory need the environment: run `bash dev/setup.sh`, then this "
            "again.\n"
        )
    assert not (tmp_path / ".cache").exists()


# -- other ways to start the chain: one GPU, Slurm, SkyPilot ---------------------------------------


PRESETS = {
    int(card): tuple(map(int, sizes.split()))
    for card, sizes in re.findall(
        r"^    (\d+)\) preset=\(([\d ]+)\)", text_of("dev/rungpu.sh"), re.M
    )
}


def plan_of(
    depth: int, vocab_size: int, ratio: float = 12
) -> tuple[GPTConfig, schedule.TrainPlan, float]:
    """(model, plan, training FLOPs)"""
    model = schedule.model_config_for_depth(depth, 128, 0, vocab_size=vocab_size, sequence_len=2048)
    plan = schedule.plan_run(model, target_param_data_ratio=ratio)
    return model, plan, float(flops.flops_per_token(model) * plan.tokens)


def rows_on(card: int, model: GPTConfig, plan: schedule.TrainPlan) -> int:
    return flops.fitting_batch(model, plan.total_batch_size // 2048, card * 2**30)


@pytest.mark.parametrize("card", PRESETS)
def test_preset_fits_its_gpu(card):
    depth, vocab_size, shards = PRESETS[card]
    model, plan, _ = plan_of(depth, vocab_size)
    assert rows_on(card, model, plan) >= 8
    assert 1 <= shards * 250e6 / (plan.tokens * 4.5) < 1.35


def test_tables_of_predictions_match_the_code():
    text = text_of("dev/docs/en/scaling.md")
    rows = re.findall(
        r"^\| (\d+) GB \| d(\d+), (\d+)M \| (\d+) \| ([\d.]+) GiB \| ([\d.]+)B \| ([\d.e]+) \| "
        r"(.*?) \|",
        text,
        re.M,
    )
    assert [int(row[0]) for row in rows] == list(PRESETS)
    for card, depth, size, per_pass, memory, tokens, total, hours in rows:
        expected_depth, vocab_size, _ = PRESETS[int(card)]
        model, plan, work = plan_of(int(depth), vocab_size)
        assert (int(depth), int(per_pass)) == (expected_depth, rows_on(int(card), model, plan))
        assert int(size) == round(flops.count_params(model)["total"] / 1e6)
        assert float(memory) == pytest.approx(
            flops.memory_estimate(model, int(per_pass))["total"] / 2**30, abs=0.06
        )
        assert float(tokens) == pytest.approx(plan.tokens / 1e9, abs=0.006) and float(
            total
        ) == pytest.approx(work, rel=0.04)
        for amount, name in re.findall(r"([\d.]+) h ([\w ]+)", hours):
            assert float(amount) == pytest.approx(
                work / (0.4e12 * flops.DEVICES[name].half) / 3600, abs=0.06
            )

    rows = re.findall(
        r"^\| d(\d+)(?:, ratio ([\d.]+)[^|]*)? \| ([\d.]+)B \| ([\d.e]+) \| (.*) \|$", text, re.M
    )
    assert len(rows) == 6
    for depth, ratio, tokens, total, cells in rows:
        _, plan, work = plan_of(int(depth), 65536, float(ratio or 12))
        assert float(tokens) == pytest.approx(plan.tokens / 1e9, abs=0.06) and float(
            total
        ) == pytest.approx(work, rel=0.04)
        for cell, utilisation in zip(cells.split(" | "), (0.4, 0.5, 0.59), strict=True):
            hours, dollars = re.fullmatch(r"([\d.]+) h, \$(\d+)", cell).groups()
            expected = work / (8 * 989e12 * utilisation) / 3600
            assert float(hours) == pytest.approx(expected, abs=0.06) and float(
                dollars
            ) == pytest.approx(24 * expected, abs=0.6)


@pytest.mark.parametrize("name", READMES)
def test_readmes_quote_the_tables_of_predictions(name):
    text, page = text_of(name), text_of("dev/docs/en/scaling.md")
    for card, memory in (("RTX 4090", 24), ("H100", 80)):
        row = rf"^\| {card}\D+{memory} GB \| `bash dev/rungpu.sh` \| (d\d+)\D+(\d+M) \| ([\d.]+) h"
        ((model, size, hours),) = re.findall(row, text, re.M)
        assert re.search(rf"^\| {memory} GB \| {model}, {size} .*\b{hours} h {card}\b", page, re.M)
    for script, model in (
        ("speedrun.sh", "d20"),
        ("run1000.sh", r"d32, ratio 20 \(`run1000.sh`\)"),
    ):
        row = rf"`bash {script}` \| .* \| ([\d.]+)\D+([\d.]+) h\D+(\d+)\D+(\d+)\D*\|$"
        ((hours, more_hours, dollars, more_dollars),) = re.findall(row, text, re.M)
        # at a utilization of 40 and 50 %
        cells = f"{more_hours} h, ${more_dollars} | {hours} h, ${dollars} |"
        assert re.search(rf"^\| {model} \| .* \| {re.escape(cells)}", page, re.M)


def test_rungpu_picks_sizes_for_the_gpu_memory(chain):
    code, output, calls = chain("dev/rungpu.sh", smi="24564", NPROC_PER_NODE="1")
    assert code == 0 and "the preset for 24 GB" in output
    assert modules(calls) == CHAIN and {call[0] for call in calls} == {"python"}
    base = next(call for call in calls if "scripts.base_train" in call)
    assert {"--depth=14", "--device_batch_size=auto"} <= set(base)
    for call in calls:
        check_command(shlex.join(call), "dev/rungpu.sh")
    assert any("--vocab_size=32768" in call for call in calls)
    _, _, calls = chain("dev/rungpu.sh", smi="24564", NPROC_PER_NODE="1", DEPTH="2")
    assert any("--depth=2" in call for call in calls), "what is set in front counts"
    for memory, card in (("15109", 16), ("23034", 24), ("46068", 48), ("81559", 80)):  # T4, L4, ...
        _, output, _ = chain("dev/rungpu.sh", smi(0, memory=memory), DRY_RUN="1")
        assert f"the preset for {card} GB" in output
    for memory, complaint in (
        ("", "No GPU found"),
        ("4096", "smallest preset is for 8 GB"),
        ("[N/A]", "memory ([N/A]): say how much"),
    ):
        code, output, calls = chain("dev/rungpu.sh", smi=memory)
        assert code == 2 and complaint in output and not calls
    lost = nvidia_smi(gpus(0)).replace("echo 81559", "echo Unable to determine the handle; exit 15")
    code, output, _ = chain("dev/rungpu.sh", {"nvidia-smi": f"#!/bin/bash\n{lost}\n"})
    assert code == 2 and "memory (Unable to determine the handle): say how much" in output
    code, output, _ = chain("dev/rungpu.sh", smi(7), NPROC_PER_NODE="1", DRY_RUN="1")
    assert code == 0 and "the preset for 24 GB" in output, (
        "the memory of an instance, not of the card"
    )


SCONTROL = """#!/usr/bin/env bash
case "$1" in
    show) printf 'node1\\nnode2\\n' ;;
    requeue) echo "requeued $2" ;;
esac
"""


def test_slurm_starts_each_stage_on_all_nodes_and_requeues_after_progress(chain, tmp_path):
    # one call is enough to see the command; without its own variable, srun gives one core
    srun = '#!/usr/bin/env bash\n[ "$SRUN_CPUS_PER_TASK" = 12 ] || exit 1\nshift 3\nexec "$@"\n'
    slurm = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "12",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    programs = {"srun": srun, "scontrol": SCONTROL}
    code, output, calls = chain("dev/slurm.sbatch", programs=programs, **slurm)
    assert code == 0, output
    assert modules(calls) == CHAIN
    for call in calls:
        check_command(shlex.join(call), "dev/slurm.sbatch")
        if "scripts.base_train" in call:
            assert {
                "--nnodes=2",
                "--nproc_per_node=8",
                "--rdzv_backend=c10d",
                "--rdzv_endpoint=node1:24711",
                "--max-restarts=3",
            } <= set(call)
            assert "--resume=latest" in call
    code, output, _ = chain("dev/slurm.sbatch", programs=programs, FAIL="scripts.chat_sft", **slurm)
    assert code == 1 and "requeued" not in output, "without progress it would come back for ever"
    meta = tmp_path / "runs" / "mid_checkpoints" / "d20" / "meta_000001.json"
    meta.parent.mkdir(parents=True)
    meta.touch()
    future = meta.stat().st_mtime + 100
    os.utime(meta, (future, future))
    code, output, _ = chain("dev/slurm.sbatch", programs=programs, FAIL="scripts.chat_sft", **slurm)
    assert code == 1 and "requeued 4711" in output


def test_skypilot_runs_the_same_chain(chain, tmp_path):
    task = yaml.safe_load(text_of("dev/skypilot.yaml"))
    assert task["resources"]["accelerators"] == "H100:8" and task["workdir"] == "."
    assert all(
        re.search(rf"\b{name}\b", text_of("speedrun.sh") + str(task["file_mounts"]))
        for name in task["envs"]
    )
    (tmp_path / "run.sh").write_text(
        task["run"].replace("/zangchat", str(tmp_path / "bucket")), encoding="utf-8"
    )
    code, output, calls = chain("run.sh", SKYPILOT_NUM_GPUS_PER_NODE="8", NPROC_PER_NODE="")
    assert code == 0, output
    assert modules(calls) == CHAIN and any("--nproc_per_node=8" in call for call in calls)


def test_ci_runs_the_same_tests_as_developers():
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]
    assert [step["run"] for step in jobs["test"]["steps"] if "run" in step][
        -1
    ] == "bash dev/test.sh"
    assert "bash dev/test.sh" in text_of(".ci/run")
