"""Every command has frozen flags, a --help that needs no torch, and one sentence per mistake.

python tests/unit/test_cli.py        rewrites cli_flags.json after an intended change of flags
"""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import entry_point
from zangchat.configurator import list_flags

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("cli_flags.json")
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for package in ("scripts", "zangchat")
    for path in (ROOT / package).rglob("*.py")
    if "\n@dataclass\nclass Config" in path.read_text(encoding="utf-8")
)

# Flags that nanochat's users know or this project's own texts promise.
TRAINING = (
    "--run --model_tag --device_type --dtype --seed --save_every --keep_last --resume --overwrite"
)
PROMISED = {
    "scripts.tok_train": "--max_chars --doc_cap --pattern --vocab_size --data_path --dataset",
    "scripts.tok_eval": "",
    "scripts.base_train": TRAINING
    + " --depth --head_dim --n_kv_head --max_seq_len --device_batch_size --total_batch_size "
    "--num_iterations --target_flops"
    " --target_param_data_ratio --embedding_lr --unembedding_lr --matrix_lr --weight_decay "
    "--grad_clip --warmup_ratio --warmdown_ratio"
    " --final_lr_frac --eval_every --eval_tokens --core_metric_every --core_metric_max_per_task "
    "--sample_every --dry_run --dataset"
    " --data_path",
    "scripts.base_loss": "--model_tag",
    "scripts.base_eval": "--max_per_task",
    "scripts.fetch": "--mid_mixture --sft_mixture --rl_task --core",
    "scripts.mid_train": TRAINING + " --identity_data --mixture",
    "scripts.chat_sft": TRAINING
    + " --source --num_epochs --target_examples_per_step --eval_steps --init_lr_frac --mixture",
    "scripts.chat_rl": TRAINING + " --task --examples_per_step --num_samples --eval_examples",
    "scripts.chat_eval": "-i --source -g --model_tag -s --step -a --task_name --all_tasks -m -n -b "
    "-x -t",
    "scripts.chat_cli": "-i --source -g --model_tag -s --step -p --prompt -t --temperature -k "
    "--top_k --top_p --seed",
    "scripts.export_hf": "-i --source -g --model_tag -o --format --dtype",
    "scripts.import_model": "--path --source --model_tag --from_tag --step",
    "scripts.chat_web": "-i --source -g --model_tag -s --step --host -p --port -t --temperature -k "
    "--top_k --top_p -m --num_gpus",
}


def flags_of(command: str) -> list[str]:
    return list_flags(entry_point(command).Config)


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_equal_the_frozen_ones(command):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    advice = "its flags changed; where that is meant: python tests/unit/test_cli.py, then look at README.md and the shell scripts"
    assert flags_of(command) == golden.get(command), advice


def test_frozen_commands_still_exist():
    assert sorted(json.loads(GOLDEN.read_text(encoding="utf-8"))) == COMMANDS


@pytest.mark.parametrize("command", PROMISED)
def test_promised_flags_exist(command):
    spellings = {spelling for flag in flags_of(command) for spelling in flag.split()}
    assert set(PROMISED[command].split()) <= spellings


# Runs each command's main with the same arguments.
# Prints {command: [exit code, stdout, stderr, the slow libraries that it loaded]}.
CALLS = """
import contextlib, io, json, sys
from tests.commands import entry_point
slow = {"torch", "datasets", "matplotlib", "transformers", "wandb", "huggingface_hub"}
assert not slow & sys.modules.keys()
results = {}
for name in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = entry_point(name).main(sys.argv[2:])
    results[name] = [code, out.getvalue(), err.getvalue(), sorted(slow & sys.modules.keys())]
print(json.dumps(results))
"""


def call_all(*argv: str) -> dict[str, tuple[int, str, str, list[str]]]:
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(COMMANDS), *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def help_of() -> dict[str, tuple[int, str, str, list[str]]]:
    return call_all("--help")


@pytest.fixture(scope="module")
def mistake_of() -> dict[str, tuple[int, str, str, list[str]]]:
    return call_all("--modle_tag=d4")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_flag_without_slow_imports(command, help_of):
    code, out, err, slow = help_of[command]
    assert code == 0, err
    assert all(spelling in out for flag in flags_of(command) for spelling in flag.split())
    assert slow == []


@pytest.mark.parametrize("command", COMMANDS)
def test_formatter_keeps_flags_with_their_help(command):
    """A field's help is the comment on its line; wrapping its default would detach the comment."""
    source = inspect.getsource(entry_point(command).Config)
    assert not re.search(r"^    \w+: .* = \($", source, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_flag_is_reported_in_one_sentence(command, mistake_of):
    code, out, err, _ = mistake_of[command]
    assert (code, out) == (2, "")
    assert err.startswith("error: unknown flag --modle_tag") and err.count("\n") == 1


if __name__ == "__main__":
    GOLDEN.write_text(
        json.dumps({command: flags_of(command) for command in COMMANDS}, indent=1) + "\n",
        encoding="utf-8",
        newline="\n",
    )
    print(f"{GOLDEN}: {len(COMMANDS)} commands")


SWALLOWING = """
import os, signal, sys
from dataclasses import dataclass
from zangchat import configurator

signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run with it ignored

@dataclass
class Config: ...

def command(config):
    try:
        import interrupted  # stands for an extension, from which no exception comes out
    except BaseException:
        print("lost")

sys.exit(configurator.run(Config, command))
"""


def test_ctrl_c_is_not_lost_in_an_extension_that_is_imported(tmp_path, monkeypatch):
    (tmp_path / "interrupted.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n", encoding="utf-8"
    )
    (tmp_path / "command.py").write_text(SWALLOWING, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "command.py")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_during_imports_prints_one_line_and_exits_with_130(tmp_path, monkeypatch):
    # as if Ctrl-C came during this import
    (tmp_path / "tyro.py").write_text("raise KeyboardInterrupt", encoding="utf-8")
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join((str(tmp_path), *filter(None, (os.environ.get("PYTHONPATH"),)))),
    )
    done = subprocess.run(
        [sys.executable, "-m", "scripts.chat_web"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    (tmp_path / "tyro.py").write_text("raise ImportError('no such thing')", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "scripts.chat_web"], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith("Traceback")
        and "no such thing" in done.stderr
    )
