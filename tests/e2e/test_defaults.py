"""Run every command in order in an empty base folder, changing only sizes (tests/sizes.py).

The commands share one child process. It sees a stand-in for the hub and no other setting of the
tests.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import sizes
from tests.documents import ROOT
from tests.hub.contents import stand_in

pytestmark = pytest.mark.timeout(900)
FLAGS = json.loads((ROOT / "tests" / "unit" / "cli_flags.json").read_text(encoding="utf-8"))
# required flags
NO_DEFAULT = {
    "scripts.export_hf": {"output"},
    "scripts.import_model": {"path", "source", "model_tag"},
}
RUNS = """
    zangchat.report reset
    zangchat.dataset --num_shards=2
    zangchat.dataset verify
    zangchat.dataset
    scripts.fetch
    scripts.tok_train --vocab_size=1024 --max_chars=300000
    scripts.tok_eval --max_chars=300000
    zangchat.dataset tokenize
    scripts.base_train --depth=2 --max_seq_len=128 --device_batch_size=4 --total_batch_size=1024 --num_iterations=6 --eval_tokens=2048
        --core_metric_max_per_task=2
    scripts.base_loss --split_tokens=2048
    scripts.base_eval --max_per_task=2
    scripts.mid_train --num_iterations=3 --eval_tokens=2048
    scripts.chat_sft --num_iterations=3 --eval_steps=1
    scripts.chat_rl --num_iterations=2 --examples_per_step=2 --num_samples=2 --eval_examples=2 --max_new_tokens=8
    scripts.chat_eval --max_problems=2 --max_new_tokens=8
    scripts.chat_cli --max_tokens=8
    scripts.export_hf --output=exported
    scripts.import_model --path=exported --source=sft --model_tag=back
    zangchat.report
"""
CHILD = """
import json, sys
from tests.commands import entry_point

calls = sys.stdin.readline()
for module, *flags in json.loads(calls):
    print(f"\\n@@@ {' '.join([module, *flags])}", flush=True)
    print("\\n@@@ code", entry_point(module).main(flags), flush=True)
"""


class Done(NamedTuple):
    """(exit code, stdout) of each command, by its text, and the resulting base folder."""

    results: dict[str, tuple[int, str]]
    log: str
    base: Path
    env: dict[str, str]


def calls() -> list[list[str]]:
    return [
        line.split() for line in RUNS.replace("\n        --", " --").split("\n") if line.strip()
    ]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    work = tmp_path_factory.mktemp("work")
    with stand_in() as hub:
        places = {
            "HOME": str(work),
            "ZANGCHAT_BASE_DIR": str(work / "base"),
            "PYTHONPATH": str(ROOT),
        }
        env = sizes.users_environment(**places, **hub.environment(work / "hf"))
        # input of chat_cli, followed by the end of stdin
        question = "How many r are in strawberry?\n"
        process = subprocess.run(
            [sys.executable, "-c", CHILD],
            cwd=work,
            env=env,
            input=f"{json.dumps(calls())}\n{question}",
            capture_output=True,
            text=True,
        )
        results, command = {}, ""
        for part in process.stdout.split("\n@@@ ")[1:]:
            head, _, output = part.partition("\n")
            if head.startswith("code "):
                results[command] = (int(head.removeprefix("code ")), results[command][1])
            else:
                command = head
                results[command] = (-1, output)
        assert not hub.unknown
        yield Done(results, process.stderr, work / "base", env)


@pytest.mark.parametrize("command", [" ".join(call) for call in calls()])
def test_command_runs_with_only_sizes(done: Done, command: str) -> None:
    names = {
        word.partition("=")[0].removeprefix("--")
        for word in command.split()
        if word.startswith("--")
    }
    assert names <= sizes.FLAGS | NO_DEFAULT.get(command.split()[0], set())
    code, output = done.results.get(command, (-1, ""))
    if command == "zangchat.dataset":  # lists the available sources
        assert code == 2 and "--source is missing" in done.log
    else:
        assert code == 0, f"{output}\n{done.log[-3000:]}"


def test_commands_write_checkpoints_cards_and_report(done: Done) -> None:
    base = done.base
    assert {
        "base_checkpoints",
        "mid_checkpoints",
        "chatsft_checkpoints",
        "chatrl_checkpoints",
        "eval_bundle",
    } <= set(os.listdir(base))
    assert {path.name for path in (base / "chatsft_checkpoints").iterdir() if path.is_dir()} == {
        "d2",
        "back",
    }
    cards = {path.name.removesuffix(".card.json") for path in (base / "report").glob("*.card.json")}
    assert len(cards) == 9 and (base / "report" / "report.html").is_file(), cards
    assert "Not scored" not in (base / "report" / "report.md").read_text(encoding="utf-8")
    chat = done.results["scripts.chat_cli --max_tokens=8"][1]
    assert chat.strip(), "an answer"


def test_every_flag_runs_at_its_default(done: Done) -> None:
    """Each flag keeps its default in some run that succeeded.

    Sizes are exempt. Add any other flag that the runs must set to NO_DEFAULT.
    """
    missing = {}
    for module, flags in FLAGS.items():
        names = {spelling.split()[0].removeprefix("--") for spelling in flags}
        runs = [
            call
            for call in calls()
            if call[0] == module and done.results.get(" ".join(call), (-1, ""))[0] == 0
        ]
        if module == "scripts.chat_web":
            runs = [[module]]  # test_chat_web_runs_on_its_defaults
        kept = [
            names - {word.partition("=")[0].removeprefix("--") for word in call[1:]}
            for call in runs
        ]
        missing[module] = names - set().union(*kept) - sizes.FLAGS - NO_DEFAULT.get(module, set())
    assert not {module: names for module, names in missing.items() if names}


def test_chat_web_runs_on_its_defaults(done: Done) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("something else serves at port 8000")
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.chat_web"],
        cwd=done.base.parent,
        env=done.env,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert "chat at http://127.0.0.1:8000" in process.stdout.readline()
        question: dict[str, Any] = {
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 4,
        }
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            "http://127.0.0.1:8000/v1/chat/completions", json.dumps(question).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["choices"][0]["message"]["role"] == "assistant"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130, "as of every command that Ctrl-C ends"
