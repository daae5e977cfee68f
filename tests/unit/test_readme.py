"""What the READMEs and the large scripts say is true: files, commands, flags, the example of a task."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from zangchat import configurator

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README_CN.md")
LISTED = ("zangchat", "scripts", "tasks")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fenced(text: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for found, body in blocks if found == language]


def commands(text: str) -> list[str]:
    """The lines of all bash blocks, continued ones joined."""
    return [line.strip() for block in fenced(text, "bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def check_python(words: list[str], where: str) -> None:
    """`-m module flags...` as it would be parsed."""
    module = importlib.import_module(words[1])
    arguments = words[2:]
    verify = words[1] == "zangchat.dataset" and arguments[:1] == ["verify"]
    try:
        configurator.parse(module.VerifyConfig if verify else module.Config, arguments[1:] if verify else arguments)
    except configurator.UserError as error:
        pytest.fail(f"{where}: {' '.join(words)}: {error}")


def check_command(line: str, where: str) -> None:
    words = shlex.split(line, comments=True)
    variables = []
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        variables.append(words.pop(0).partition("=")[0])
    if words[0] == "bash":
        script = text_of(words[1])
        assert all(re.search(rf"\b{name}\b", script) for name in variables), f"{where}: {words[1]} does not read one of {variables}"
    elif words[0] in ("python", "torchrun"):
        check_python(words[words.index("-m") :], where)
        if words[0] == "torchrun":  # it takes abbreviations of its own flags, --run among them, unless a `--` comes first
            assert words[words.index("-m") + 2 :][:1] in ([], ["--"]), f"{where}: {line} needs `--` after the module"
    else:
        assert words[0] == "source", f"{where}: unknown command {line}"


@pytest.mark.parametrize("name", READMES)
def test_commands_exist_with_their_flags(name):
    for line in commands(text_of(name)):
        check_command(line, name)


def test_both_readmes_give_the_same_commands():
    assert commands(text_of("README.md")) == commands(text_of("README_CN.md"))


@pytest.mark.parametrize("name", READMES)
def test_flags_of_the_command_table_exist(name):
    rows = re.findall(r"^\| (`(?:zangchat|scripts)\..*?) \| (.*) \|$", text_of(name), re.MULTILINE)
    assert len(rows) >= 10
    for modules, flags in rows:
        known = set()
        for module in re.findall(r"`([a-z_.]+)`", modules):
            found = importlib.import_module(module)
            for config in (found.Config, getattr(found, "VerifyConfig", None)):
                known |= (
                    {spelling for flag in configurator._flags(config) for spelling in (f"--{flag.name}", *flag.aliases)}
                    if config
                    else set()
                )
        named = {flag for span in re.findall(r"`([^`]*)`", flags) for flag in re.findall(r"(?<![\w-])--?[a-z_]+", span)}
        assert named <= known, f"{name}: {modules} has no {', '.join(sorted(named - known))}"


@pytest.mark.parametrize("name", READMES)
def test_the_tree_lists_exactly_the_files(name):
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
    """What git tracks below the listed folders; without git what is there."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        done = subprocess.run(["git", "-C", str(ROOT), "ls-files", *LISTED], capture_output=True, text=True, check=True)
        found = {name for name in done.stdout.splitlines() if (ROOT / name).exists()}
    else:
        found = {
            str(path.relative_to(ROOT)) for folder in LISTED for path in (ROOT / folder).rglob("*.*") if "__pycache__" not in path.parts
        }
    return {name for name in found if Path(name).name not in ("__init__.py", "py.typed")}


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    text = text_of(name)
    for target in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text):
        path, _, anchor = "".join(target).partition("#")
        if path.startswith("https://"):
            continue
        assert (ROOT / path).exists(), f"{name} points to {path}"
        if anchor:
            headings = [line.lstrip("# ").lower().replace(" ", "-") for line in text_of(path).splitlines() if line.startswith("#")]
            assert anchor in headings


def test_the_numbers_of_the_schedule_table_are_computed():
    from zangchat import flops, schedule

    for name in READMES:
        rows = re.findall(
            r"^\| d(\d+) \| ([\d.]+)([MB]) \| (\d+), (\d+) \| ([\d.]+)B \| 2\^(\d+) \| ([\d.]+) \| ([\d.]+) \|$",
            text_of(name),
            re.MULTILINE,
        )
        assert len(rows) == 4
        for depth, size, unit, width, heads, tokens, power, per_parameter, ratio in rows:
            config = schedule.model_config_for_depth(int(depth), 128, 0, vocab_size=65536, sequence_len=2048)
            params, plan = flops.count_params(config), schedule.plan_run(config, target_param_data_ratio=12)
            assert (config.n_embd, config.n_head, plan.total_batch_size) == (int(width), int(heads), 2 ** int(power))
            assert float(size) == pytest.approx(params["total"] / {"M": 1e6, "B": 1e9}[unit], rel=5e-3)
            assert float(tokens) == pytest.approx(plan.tokens / 1e9, rel=5e-3)
            assert float(per_parameter) == pytest.approx(plan.tokens / params["total"], abs=0.06)
            assert float(ratio) == pytest.approx(20 * params["total"] / (params["matrices"] + params["lm_head"]), abs=0.06)


def test_the_example_of_a_task_works(monkeypatch):
    from tasks import common

    section = text_of("README.md").split("## Adding a task")[1].split("\n## ")[0]
    source, line = fenced(section, "python")
    module = types.ModuleType("tasks.capitals")
    exec(compile(source, "README.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "tasks.capitals", module)
    for name, entry in eval("{" + line + "}", vars(common)).items():
        monkeypatch.setitem(common.REGISTRY, name, entry)

    train, test = common.load_task("capitals"), common.load_task("Capitals", "test")
    questions = {split: {task[i]["messages"][0]["content"] for i in range(len(task))} for split, task in (("train", train), ("test", test))}
    assert questions["train"] and questions["test"] and not questions["train"] & questions["test"]
    for i in range(len(train)):
        conversation = train[i]
        common.check_conversation(conversation["messages"], "README.md")
        assert train.evaluate(conversation, conversation["messages"][-1]["content"])
        assert not train.evaluate(conversation, "I do not know.")
        assert train.reward(conversation, conversation["messages"][-1]["content"]) == 1.0
    assert len(common.build_mixture("capitals:2")) == 2 * len(train)


# -- speedrun.sh and run1000.sh, with commands that only write down how they were called --------------------------------------------------


@pytest.fixture
def chain(tmp_path):
    """A copy of the scripts; `run(script, fail=..., **variables) -> (exit code, output, commands)` runs one with recorded commands."""
    for name in ("speedrun.sh", "run1000.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    for path, body in {
        "dev/setup.sh": "exit 0\n",
        ".venv/bin/python": """#!/usr/bin/env bash
if [[ "$*" == *zangchat.dataset* && "$*" == *-n* ]]; then
    folder=$ZANGCHAT_BASE_DIR/base_data/climbmix; mkdir -p "$folder"
    for i in $(seq 0 "${!#}"); do printf '{"name": "shard_%05d.parquet"}\\n' "$i"; done > "$folder/manifest.json"
fi
[[ "$*" != *tok_train* ]] || { mkdir -p "$ZANGCHAT_BASE_DIR/tokenizer" && touch "$ZANGCHAT_BASE_DIR/tokenizer/tokenizer.json"; }
[[ "$*" != *"report reset"* ]] || { mkdir -p "$ZANGCHAT_BASE_DIR/report" && touch "$ZANGCHAT_BASE_DIR/report/started.json"; }
printf '%s\\0' python "$@" | tr '\\n' ' ' >> "$RECORD"; echo >> "$RECORD"
[[ -z "${FAIL:-}" || "$*" != *"$FAIL"* ]]
""",
        ".venv/bin/torchrun": """#!/usr/bin/env bash
printf '%s\\0' torchrun "$@" >> "$RECORD"; echo >> "$RECORD"
[[ -z "${FAIL:-}" || "$*" != *"$FAIL"* ]]
""",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(body, encoding="utf-8")
        (tmp_path / path).chmod(0o755)

    def run(script: str, **variables: str) -> tuple[int, str, list[list[str]]]:
        record = tmp_path / "record"
        record.write_text("")
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "RECORD": str(record), "NPROC_PER_NODE": "8", **variables}
        done = subprocess.run(["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        calls = [line.split("\0")[:-1] for line in record.read_text().splitlines()]
        return done.returncode, done.stdout + done.stderr, calls

    return run


def modules(calls: list[list[str]]) -> list[str]:
    return [call[call.index("-m") + 1] for call in calls if "zangchat.dataset" not in call]


CHAIN = ["zangchat.report", "scripts.tok_train", "scripts.tok_eval", "scripts.base_train", "scripts.base_loss", "scripts.base_eval"]
CHAIN += [
    "scripts.mid_train",
    "scripts.chat_eval",
    "scripts.chat_sft",
    "scripts.chat_eval",
    "scripts.chat_rl",
    "scripts.chat_eval",
    "zangchat.report",
]
REHEARSAL = next(re.finditer(r"^#   (DEPTH=2 .*?) bash speedrun\.sh$", text_of("speedrun.sh").replace(" \\\n#  ", ""), re.MULTILINE))[1]


@pytest.mark.parametrize("script", ["speedrun.sh", "run1000.sh"])
def test_the_chain_calls_every_command_with_flags_that_exist(chain, script):
    code, output, calls = chain(script)
    assert code == 0, output
    assert modules(calls) == CHAIN
    for call in calls:
        check_command(shlex.join(call), script)
    assert "$ at" not in output and "an hour" in output


def test_the_rehearsal_in_the_comment_has_flags_that_exist(chain):
    variables = dict(word.split("=", 1) for word in shlex.split(REHEARSAL))
    script = text_of("speedrun.sh").split("set -euo pipefail", 1)[1]
    assert all(f"${{{name}:-" in script for name in variables)
    code, output, calls = chain("speedrun.sh", **variables)
    assert code == 0, output
    assert modules(calls) == [name for name in CHAIN if name != "scripts.base_eval"]
    assert all(call[0] == "python" or "--nproc_per_node=2" in call for call in calls)
    for call in calls:
        check_command(shlex.join(call), "the rehearsal")


def test_a_failed_stage_ends_the_chain_and_says_how_to_go_on(chain):
    code, output, calls = chain("run1000.sh", FAIL="scripts.mid_train")
    assert code == 1
    assert modules(calls)[-1] == "scripts.mid_train"
    assert "Midtraining stopped with exit code 1" in output
    assert re.search(r"torchrun --standalone .*-m scripts\.mid_train .*--resume=latest", output) and "bash run1000.sh" in output


def test_a_second_run_skips_what_is_evaluated_and_resumes_the_rest(chain, tmp_path):
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
    assert modules(chain("speedrun.sh")[2]).count("scripts.chat_eval") == 1  # the evaluation of mid, which has a newer checkpoint


def test_one_process_needs_no_torchrun(chain):
    _, _, calls = chain("speedrun.sh", NPROC_PER_NODE="1")
    assert {call[0] for call in calls} == {"python"}
