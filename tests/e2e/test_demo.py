"""dev/demo, the model that comes with the repository: one minute after setup it talks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT
from tests.unit.test_hf_programs import LlamaCpp
from zangchat.gpt import GPT
from zangchat.hf.demo import FOLDER
from zangchat.hf.exporting import export
from zangchat.hf.importing import read_hf

LARGEST = 6_000_000  # bytes of all files
META = {"stage": "sft", "user_config": {"model_tag": "demo"}, "step": 400}


def chat(question: str, base: Path, *flags: str) -> str:
    """The reply that a user without a checkpoint reads."""
    command = [sys.executable, "-m", "scripts.chat_cli", "--demo", "-p", question, "-t", "0"]
    done = subprocess.run(
        [*command, *flags],
        cwd=ROOT,
        env={**os.environ, "ZANGCHAT_BASE_DIR": str(base)},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_demo_is_small_and_holds_data_only() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(files)
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert sum(files.values()) <= LARGEST


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Who are you?", "zangchat"),
        ("你是谁？", "zangchat"),
        ("How many r are in strawberry?", "3"),
        ("What is 12 times 11?", "132"),
    ],
)
def test_demo_answers_without_a_checkpoint(question: str, answer: str, tmp_path: Path) -> None:
    assert answer in chat(question, tmp_path)


def test_llama_cpp_says_what_chat_cli_says(tmp_path: Path) -> None:
    """Through its server and its own reading of the chat template, as LM Studio uses it."""
    pytest.importorskip("gguf")
    demo = read_hf(FOLDER)
    model = GPT(demo.config)
    model.load_state_dict(demo.weights)
    folder = tmp_path / "gguf"
    export(model.float().eval(), demo.tokenizer, META, folder, "float32", "gguf")
    server = LlamaCpp(folder / "model.gguf")
    for question in ("Who are you?", "谢谢！", "Tell me a story about a fox and a lantern."):
        messages = [{"role": "user", "content": question}]
        answer = server.post("/v1/chat/completions", messages=messages, temperature=0)
        text = answer["choices"][0]["message"]["content"]
        assert text.strip() == chat(question, tmp_path, "--dtype=float32")
