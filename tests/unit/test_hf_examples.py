"""dev/examples and lm-eval on an export, as their users run them, at a tiny size."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dev.examples import dpo, lora
from scripts import import_model
from tasks.arc import ARC
from tests.unit.test_hf import META, make_model
from zangchat import checkpoint_manager, hf
from zangchat.engine import Engine
from zangchat.task_eval import evaluate_task
from zangchat.tokenizer import RustBPETokenizer

for extra in ("peft", "trl", "lm_eval"):
    pytest.importorskip(extra, reason="the extra `examples` is not installed")

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data" / "tasks" / "ai2_arc"


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(iter([(ROOT / "README.md").read_text(encoding="utf-8")]), 400)


@pytest.fixture(scope="module")
def exported(tokenizer: RustBPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tiny"
    hf.export(make_model(tokenizer, logit_cap=15.0, sequence_len=1024), tokenizer, META, folder, "float32")
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def log_probability(folder: Path, question: str, answer: str) -> float:
    """Of the answer's tokens, by transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = torch.tensor(found["input_ids"]), torch.tensor(found["assistant_masks"]).bool()
    with torch.inference_mode():
        scores = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return float(scores.gather(1, ids[1:, None])[:, 0][mask[1:]].sum())


def test_lora_learns_an_answer_and_comes_home(exported, tmp_path):
    talk = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A cat."}]
    data = write_lines(tmp_path / "data.jsonl", [{"messages": talk}] * 8)
    before = log_probability(exported, "Who are you?", "A cat.")
    flags = [f"--model={exported}", f"--data={data}", f"--output={tmp_path / 'out'}", "--epochs=20", "--batch_size=4", "--lr=0.01"]
    assert lora.main(flags) == 0
    after = log_probability(tmp_path / "out", "Who are you?", "A cat.")
    assert after > before / 2
    assert import_model.main([f"--path={tmp_path / 'out'}", "--source=sft", "--model_tag=lora"]) == 0
    ours, tokenizer, _ = checkpoint_manager.load_model("sft", "cpu", "eval", "lora", dtype="float32")
    ids, mask = tokenizer.render_conversation({"messages": talk})
    with torch.inference_mode():
        scores = ours(torch.tensor([ids]))[0, :-1].log_softmax(-1)
    learnt = sum(float(scores[i, ids[i + 1]]) for i in range(len(ids) - 1) if mask[i + 1])
    assert learnt == pytest.approx(after, abs=1e-3)


def test_dpo_widens_the_margin_of_the_chosen_answer(exported, tmp_path):
    question, good, bad = "Who are you?", "A cat.", "A dog."
    row = {"prompt": [{"role": "user", "content": question}]}
    row |= {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", good), ("rejected", bad))}
    data = write_lines(tmp_path / "data.jsonl", [row] * 8)

    def margin(folder: Path) -> float:
        return log_probability(folder, question, good) - log_probability(folder, question, bad)

    flags = [f"--model={exported}", f"--data={data}", f"--output={tmp_path / 'out'}", "--epochs=4", "--batch_size=4", "--lr=0.002"]
    assert dpo.main(flags) == 0
    assert margin(tmp_path / "out") > margin(exported) + 1
    assert hf.read_hf(tmp_path / "out").config == hf.read_hf(exported).config


@pytest.fixture
def arc_rows(base_dir: Path) -> list[dict[str, Any]]:
    """48 questions, real ones where there are any, in the base folder."""
    folder = base_dir / "tasks" / "ai2_arc" / "ARC-Easy"
    folder.mkdir(parents=True)
    if SHARED.is_dir():
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(SHARED / "ARC-Easy" / "test.parquet").to_pylist()[:48]
    else:
        letters = ("A", "B", "C", "D")
        rows = [
            {
                "question": f" Which of these is number {i}?",
                "choices": {"text": [str(i + shift) for shift in range(4)], "label": list(letters)},
                "answerKey": letters[i * 7 % 4],
            }
            for i in range(48)
        ]
    write_lines(folder / "test.jsonl", rows)
    return rows


def readme_command(text: str) -> list[str]:
    """The words of the README's command that holds `text`."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if line.startswith("lm_eval") and text in line]
    return shlex.split(line)


def lm_eval(words: list[str], monkeypatch: pytest.MonkeyPatch, results: Path) -> dict[str, Any]:
    """The scores of a command of the harness, run here."""
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.setattr(sys, "argv", [*words, "--output_path", str(results)])
    cli_evaluate()
    (path,) = results.rglob("results_*.json")
    (scores,) = json.loads(path.read_text(encoding="utf-8"))["results"].values()
    return scores


def test_lm_eval_gives_our_accuracy(exported, tokenizer, arc_rows, base_dir, tmp_path, monkeypatch):
    ours = evaluate_task(Engine(make_model(tokenizer, logit_cap=15.0, sequence_len=1024), tokenizer), ARC("ARC-Easy", "test"))
    assert len(ours.items) == 48 and 0 < ours.accuracy < 1
    items = base_dir / "tasks" / "ai2_arc" / "ARC-Easy" / "test.jsonl"
    shipped = ROOT / "dev" / "examples" / "lm_eval" / "zangchat_arc_easy.yaml"
    local = f"dataset_path: json\ndataset_name: null\ndataset_kwargs:\n  data_files:\n    test: {items}\n"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(f"include: {shipped}\ntask: zangchat_arc_easy_local\n{local}", encoding="utf-8")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    replaced = {
        "pretrained=d20-sft": f"pretrained={exported}",
        "zangchat_arc_easy": "zangchat_arc_easy_local",
        "dev/examples/lm_eval": str(tmp_path / "tasks"),
    }
    words = [replaced.get(word, word) for word in readme_command("zangchat_arc_easy")]
    scores = lm_eval([*words, "--device", "cpu"], monkeypatch, tmp_path / "results")
    assert scores["acc,none"] == pytest.approx(ours.accuracy, abs=1e-9)
