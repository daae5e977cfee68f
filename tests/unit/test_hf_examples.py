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
from tests.documents import ROOT, commands, text_of
from tests.talker import serving
from tests.unit.test_hf import META, make_model
from zangchat import checkpoint_manager
from zangchat.engine import Engine
from zangchat.gpt import GPT
from zangchat.hf.exporting import export
from zangchat.hf.importing import read_hf
from zangchat.task_eval import evaluate_task
from zangchat.tokenizer import RustBPETokenizer

for extra in ("peft", "trl", "lm_eval"):
    pytest.importorskip(extra, reason="the extra `examples` is not installed")

SHARED = ROOT.parent / "shared" / "data" / "tasks" / "ai2_arc"


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(iter([text_of("README.md")]), 400)


@pytest.fixture(scope="module")
def model(tokenizer: RustBPETokenizer) -> GPT:
    return make_model(tokenizer, logit_cap=15.0, sequence_len=2048)


@pytest.fixture(scope="module")
def exported(
    model: GPT, tokenizer: RustBPETokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tiny"
    export(model, tokenizer, META, folder, "float32")
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def log_probability(folder: Path, question: str, answer: str) -> float:
    """Of the answer's tokens, by transformers."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    found = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = torch.tensor(found["input_ids"]), torch.tensor(found["assistant_masks"]).bool()
    with torch.inference_mode():
        scores = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return float(scores.gather(1, ids[1:, None])[:, 0][mask[1:]].sum())


def test_lora_learns_an_answer_and_comes_home(exported, tmp_path):
    talk = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A cat."}]
    data = write_lines(tmp_path / "data.jsonl", [{"messages": talk}] * 8)
    before = log_probability(exported, "Who are you?", "A cat.")
    flags = [
        f"--model={exported}",
        f"--data={data}",
        f"--output={tmp_path / 'out'}",
        "--epochs=20",
        "--batch_size=4",
        "--lr=0.01",
    ]
    assert lora.main(flags) == 0
    after = log_probability(tmp_path / "out", "Who are you?", "A cat.")
    assert after > before / 2
    assert (
        import_model.main([f"--path={tmp_path / 'out'}", "--source=sft", "--model_tag=lora"]) == 0
    )
    ours, tokenizer, _ = checkpoint_manager.load_model(
        "sft", "cpu", "eval", "lora", dtype="float32"
    )
    ids, mask = tokenizer.render_conversation({"messages": talk})
    with torch.inference_mode():
        scores = ours(torch.tensor([ids]))[0, :-1].log_softmax(-1)
    learnt = sum(float(scores[i, ids[i + 1]]) for i in range(len(ids) - 1) if mask[i + 1])
    assert learnt == pytest.approx(after, abs=1e-3)


def test_dpo_widens_the_margin_of_the_chosen_answer(exported, tmp_path):
    question, good, bad = "Who are you?", "A cat.", "A dog."
    row = {"prompt": [{"role": "user", "content": question}]}
    row |= {
        name: [{"role": "assistant", "content": text}]
        for name, text in (("chosen", good), ("rejected", bad))
    }
    data = write_lines(tmp_path / "data.jsonl", [row] * 8)

    def margin(folder: Path) -> float:
        return log_probability(folder, question, good) - log_probability(folder, question, bad)

    flags = [
        f"--model={exported}",
        f"--data={data}",
        f"--output={tmp_path / 'out'}",
        "--epochs=4",
        "--batch_size=4",
        "--lr=0.002",
    ]
    assert dpo.main(flags) == 0
    assert margin(tmp_path / "out") > margin(exported) + 1
    assert read_hf(tmp_path / "out").config == read_hf(exported).config


@pytest.mark.parametrize("example", [lora, dpo])
def test_data_may_come_from_any_editor(exported, tmp_path, example):
    """With a BOM, blank lines, and a line separator within a text."""
    user, good, bad = (
        {"role": role, "content": f"{text}\u2028!"}
        for role, text in (("user", "Who?"), ("assistant", "A cat."), ("assistant", "A dog."))
    )
    row = {"messages": [user, good], "prompt": [user], "chosen": [good], "rejected": [bad]}
    if example is dpo:
        del row["messages"]
    line = json.dumps(row, ensure_ascii=False)
    data = tmp_path / "data.jsonl"
    data.write_text(f"\ufeff{line}\n\n{line}\r\n \n", encoding="utf-8")
    flags = [f"--model={exported}", f"--data={data}", f"--output={tmp_path / 'out'}", "--epochs=1"]
    assert example.main(flags) == 0
    assert read_hf(tmp_path / "out").config == read_hf(exported).config


@pytest.fixture
def arc_rows(base_dir: Path) -> list[dict[str, Any]]:
    """16 questions, real ones where there are any, in the base folder."""
    folder = base_dir / "tasks" / "ai2_arc" / "ARC-Easy"
    folder.mkdir(parents=True)
    if SHARED.is_dir():
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(SHARED / "ARC-Easy" / "test.parquet").to_pylist()[:16]
    else:
        letters = ("A", "B", "C", "D")
        rows = [
            {
                "question": f" Which of these is number {i}?",
                "choices": {"text": [str(i + shift) for shift in range(4)], "label": list(letters)},
                "answerKey": letters[i * 7 % 4],
            }
            for i in range(16)
        ]
    write_lines(folder / "test.jsonl", rows)
    return rows


def lm_eval(
    model: str, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch, results: Path
) -> dict[str, Any]:
    """The scores of the README's command for this kind of model, run here with `changes` in its
    text.
    """
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import TaskManager

    # reading the thousands of tasks that it brings takes longer than all the rest
    init = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager,
        "__init__",
        lambda self, **given: init(self, **{**given, "include_defaults": False}),
    )
    (line,) = [
        line
        for line in commands(text_of("README.md"))
        if f"--model {model} " in line and "zangchat_arc_easy" in line
    ]
    for old, new in changes.items():
        assert old in line
        line = line.replace(old, new)
    monkeypatch.setattr(sys, "argv", [*shlex.split(line), "--output_path", str(results)])
    cli_evaluate()
    (path,) = results.rglob("results_*.json")
    (scores,) = json.loads(path.read_text(encoding="utf-8"))["results"].values()
    return scores


def test_lm_eval_gives_our_accuracy_on_the_export_and_on_the_server(
    exported, model, tokenizer, arc_rows, base_dir, tmp_path, monkeypatch
):
    ours = evaluate_task(Engine(model, tokenizer), ARC("ARC-Easy", "test"))
    assert len(ours.items) == 16 and 0 < ours.accuracy < 1
    items = base_dir / "tasks" / "ai2_arc" / "ARC-Easy" / "test.jsonl"
    shipped = ROOT / "dev" / "examples" / "lm_eval" / "zangchat_arc_easy.yaml"
    local = f"dataset_path: json\ndataset_name: null\ndataset_kwargs:\n  data_files:\n    test: {items}\n"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(
        f"include: {shipped}\ntask: zangchat_arc_easy_local\n{local}", encoding="utf-8"
    )
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    changes = {
        "=d20-sft": f"={exported}",
        "zangchat_arc_easy": "zangchat_arc_easy_local",
        "dev/examples/lm_eval": str(tmp_path / "tasks"),
    }
    scores = lm_eval(
        "hf", changes | {"--model hf": "--model hf --device cpu"}, monkeypatch, tmp_path / "export"
    )
    assert scores["acc,none"] == pytest.approx(ours.accuracy, abs=1e-9)
    with serving(Engine(model, tokenizer)) as (url, _):
        scores = lm_eval(
            "local-completions",
            changes | {"http://localhost:8000": url},
            monkeypatch,
            tmp_path / "server",
        )
    assert scores["acc,none"] == pytest.approx(ours.accuracy, abs=1e-9)


def test_lm_eval_puts_bos_before_plain_text(exported, model, tokenizer):
    """As documents began in training, on either way; what the README says of the server's needs
    `add_bos_token=True`.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    pairs = [("The capital of France is", " Paris."), ("A", " b c"), ("", "zangchat")]
    with serving(Engine(model, tokenizer)) as (url, _):
        server = (
            f"model=zangchat,base_url={url}/v1/completions,tokenizer={exported},add_bos_token=True"
        )
        ways = {"hf": f"pretrained={exported}", "local-completions": server}
        for name, settings in ways.items():
            judge = get_model(name).create_from_arg_string(
                settings, {"batch_size": 1, "device": "cpu"}
            )
            requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
            for (context, text), (found, _) in zip(
                pairs, judge.loglikelihood(requests), strict=True
            ):
                start = len(tokenizer.encode(context)) + 1
                ids = tokenizer.encode(context + text, prepend="<|bos|>")
                with torch.inference_mode():
                    scores = model(torch.tensor([ids]))[0, :-1].log_softmax(-1)
                assert found == pytest.approx(
                    sum(float(scores[i - 1, ids[i]]) for i in range(start, len(ids))), abs=1e-3
                ), name
