"""The report: one card a section, scores side by side, curves, and nothing that a half-finished run
can break.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from zangchat import report as report_module
from zangchat.errors import UserError
from zangchat.report import Card, Report, get_report, read_curve, stage_of, summary_table
from zangchat.report.__main__ import main


@pytest.fixture
def report(tmp_path, monkeypatch) -> Report:
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(tmp_path))
    return get_report()


def write_metrics(
    base: Path, stage_folder: str, tag: str, rows: list[dict], tail: str = ""
) -> None:
    folder = base / stage_folder / tag
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8"
    )


def base_rows(n: int) -> list[dict]:
    rows: list[dict] = [
        {"step": i, "tokens": 512 * i, "loss": 7 - i / n, "lr": 1.0, "tok_per_sec": 9000 + i}
        for i in range(1, n + 1)
    ]
    rows[-1]["val_bpb"] = 1.25
    return rows


# -- cards -----------------------------------------------------------------------------------------


def test_a_card_is_one_file_and_logging_again_replaces_it(report):
    report.log("Base model training", ["first"])
    report.log("Base model training", ["second"])
    report.log("Midtraining", [{"steps": 3}])
    assert [(card.section, card.data) for card in report.cards()] == [
        ("Base model training", ["second"]),
        ("Midtraining", [{"steps": 3}]),
    ]
    assert len(list(report.folder.iterdir())) == 2


def test_only_rank_0_writes(report, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    report.log("Midtraining", ["from rank 1"])
    assert report.cards() == []


def test_numbers_of_numpy_and_torch_stay_numbers(report):
    torch = pytest.importorskip("torch")
    report.log(
        "Chat evaluation sft",
        [{"a": np.float32(0.5), "b": torch.tensor(0.25), "c": np.int64(3)}, {"path": Path("x")}],
    )
    assert report.cards()[0].data == [{"a": 0.5, "b": 0.25, "c": 3}, {"path": "x"}]


@pytest.mark.parametrize(
    "section, data, error",
    [("!!", ["x"], ValueError), ("", ["x"], ValueError), ("Base", [3], TypeError)],
)
def test_misuse_is_refused(report, section, data, error):
    with pytest.raises(error):
        report.log(section, data)
    assert not report.folder.exists()


def test_a_damaged_card_is_named(report):
    report.log("Midtraining", ["x"])
    (report.folder / "midtraining.card.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"midtraining\.card\.json"):
        report.generate()


@pytest.mark.parametrize(
    "section, stage",
    [
        ("Base model training", "BASE"),
        ("Base model evaluation", "BASE"),
        ("Midtraining", "MID"),
        ("Chat evaluation mid", "MID"),
        ("Chat SFT", "SFT"),
        ("Chat evaluation sft", "SFT"),
        ("Chat RL", "RL"),
        ("Chat evaluation rl", "RL"),
        ("Tokenizer training", None),
        ("Early words", None),  # "rl" and "rds" inside a word are no stage
    ],
)
def test_a_section_names_its_stage(section, stage):
    assert stage_of(section) == stage


# -- the report ------------------------------------------------------------------------------------


def test_an_empty_run_gives_a_report(report):
    text = report.generate().read_text(encoding="utf-8")
    assert "Nothing has run yet" in text
    assert (report.folder / "report.html").exists()


def test_a_half_finished_run_says_what_is_missing(report):
    report.log("Tokenizer training", [{"vocab_size": 2048}])
    write_metrics(report.base_dir, "base_checkpoints", "d2", base_rows(5), tail='{"step": 6, "lo')
    text = report.generate().read_text(encoding="utf-8")
    assert "Not run (yet): MID, SFT, RL." in text
    assert "1 damaged line" in text
    assert "5 steps" in text
    assert "| validation bpb | 1.2500 | - | - | - |" in text


def test_bits_per_byte_of_texts_and_of_answers_are_not_set_side_by_side(report):
    write_metrics(report.base_dir, "base_checkpoints", "d2", [{"step": 1, "val_bpb": 1.2}])
    write_metrics(report.base_dir, "mid_checkpoints", "d2", [{"step": 1, "val_bpb": 0.4}])
    rows = [
        {"step": 0, "pass@1": 0.1},
        {"step": 1, "tokens": 9, "reward": 0.5},
        {"step": 2, "tokens": 20, "reward": 0.7, "pass@1": 0.6},
    ]
    write_metrics(report.base_dir, "chatrl_checkpoints", "d2", rows)
    text = report.generate().read_text(encoding="utf-8")
    for line in (
        *("validation bpb | 1.2000 | - | - | -", "validation bpb, answers | - | 0.4000 | - | -"),
        *("training reward | - | - | - | 0.7000", "held-out pass@1 | - | - | - | 0.6000"),
    ):
        assert f"| {line} |" in text
    assert "![RL curves](rl.svg)" in text


def test_the_summary_sets_the_stages_side_by_side(report):
    settings = {"source": "sft", "temperature": 0.0}
    report.log(
        "Base model evaluation", [{"CORE (21/22, no coqa)": 0.11, "hellaswag": 0.2, "piqa": -0.05}]
    )
    report.log("Chat evaluation mid", [settings, {"GSM8K": 0.01, "MMLU": 0.25}])
    report.log("Chat evaluation sft", [settings, {"GSM8K": 0.04, "MMLU": 0.31}])
    report.log("Chat RL", [{"learning rate": 0.5}])  # no evaluation: no score
    assert summary_table(report.cards(), []) == {
        "CORE (21/22, no coqa)": {"BASE": 0.11},
        "GSM8K": {"MID": 0.01, "SFT": 0.04},
        "MMLU": {"MID": 0.25, "SFT": 0.31},
    }
    assert "| GSM8K | - | 0.0100 | 0.0400 | - |" in report.generate().read_text(encoding="utf-8")
    assert (report.folder / "core.svg").exists()


def test_the_header_tells_machine_versions_and_revision(report):
    report.reset()
    report.log("Midtraining", ["x"])
    text = report.generate(dollars_per_hour=24.0).read_text(encoding="utf-8")
    for fact in ("CPU", "memory", "torch", "Python", "wall-clock", "cost"):
        assert f"| {fact} |" in text
    if (Path(report_module.__file__).parents[2] / ".git").exists():
        assert re.search(r"\| git \| [0-9a-f]{12} on ", text)


def test_the_html_needs_nothing_else(report):
    write_metrics(report.base_dir, "base_checkpoints", "d2", base_rows(20))
    write_metrics(
        report.base_dir,
        "chatrl_checkpoints",
        "d2",
        [{"step": i, "reward": i / 5} for i in range(1, 6)],
    )
    report.log(
        "Base model training",
        ["![tracker](https://example.org/x.png) <script>alert(1)</script>", {"a|b": "<img src=x>"}],
    )
    report.generate()
    page = (report.folder / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/svg+xml;base64,') == 2
    assert (
        len(re.findall(r"<img[^>]+src=", page)) == 2
    )  # text cannot bring an image, or anything else to load
    assert "<script" not in page
    assert len(page) < 1_000_000


def test_samples_are_shown_as_they_are(report):
    nasty = "```\n# heading\n<b>bold</b> | ~~~~"
    conversation = {
        "messages": [
            {"role": "user", "content": nasty},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "6*7="}, {"type": "python", "text": "6*7"}],
            },
        ]
    }
    report.log("Chat SFT", [conversation, {"prompt": "Who are you?", "completion": "zangchat"}])
    text = report.generate().read_text(encoding="utf-8")
    assert (
        "\n````text\nuser: " + nasty in text
        and "[python: 6*7]" in text
        and "Who are you?\n-> zangchat" in text
    )
    page = (report.folder / "report.html").read_text(encoding="utf-8")
    assert "<b>bold</b>" not in page and "&lt;b&gt;bold" in page and "<h1>heading" not in page


def test_dicts_with_the_same_names_are_rows_of_one_table(report):
    report.log(
        "Tokenizer evaluation",
        [{"text": "prose", "ratio": 4.5}, {"text": "code|x", "ratio": 3}, {"other": 1}],
    )
    text = report.generate().read_text(encoding="utf-8")
    assert (
        "| text | ratio |\n|---|---|\n| prose | 4.5000 |\n| code\\|x | 3 |\n\n| | |\n|---|---|\n| "
        "other | 1 |" in text
    )


# -- curves ----------------------------------------------------------------------------------------


def test_a_resumed_run_counts_each_step_once(report):
    write_metrics(
        report.base_dir,
        "base_checkpoints",
        "d2",
        [*base_rows(4), {"step": 3, "loss": 1.5}, {"step": 5, "loss": 1.0}],
    )
    curve = read_curve(report.base_dir, "BASE")
    assert curve is not None
    assert [row["step"] for row in curve.rows] == [1, 2, 3, 4, 5]
    assert curve.rows[2]["loss"] == 1.5


def test_the_newest_model_of_a_stage_is_drawn(report):
    for tag, age in (("old", 100), ("new", 10), ("older", 1000)):
        write_metrics(report.base_dir, "mid_checkpoints", tag, base_rows(2))
        path = report.base_dir / "mid_checkpoints" / tag / "metrics.jsonl"
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    curve = read_curve(report.base_dir, "MID")
    assert curve is not None and curve.tag == "new"


def test_stages_before_a_reset_are_of_another_run(report):
    report.reset()
    for stage, age in (("base", -10), ("mid", 10)):
        write_metrics(report.base_dir, f"{stage}_checkpoints", "d2", base_rows(2))
        path = report.base_dir / f"{stage}_checkpoints" / "d2" / "metrics.jsonl"
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    text = report.generate().read_text(encoding="utf-8")
    assert "**BASE**" in text and "**MID**" not in text
    assert "| validation bpb | 1.25 | - | - | - |" in text.replace("1.2500", "1.25")
    assert "Not run (yet): MID" in text


def test_curves_without_finite_numbers_are_left_out(report):
    rows = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": None}, {"step": 3, "note": "x"}]
    write_metrics(report.base_dir, "base_checkpoints", "d2", rows)
    report.generate()
    assert not (report.folder / "base.svg").exists()


# -- the command -----------------------------------------------------------------------------------


def test_reset_removes_cards_and_leaves_other_files(report):
    report.log("Midtraining", ["x"])
    report.generate()
    (report.folder / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(["reset"]) == 0
    assert sorted(path.name for path in report.folder.iterdir()) == ["notes.txt", "started.json"]


def test_generate_is_the_default_and_names_the_files(report, capsys):
    report.log("Midtraining", ["x"])
    assert main([]) == 0
    assert str(report.folder / "report.md") in capsys.readouterr().out


def test_the_module_loads_neither_torch_nor_matplotlib():
    code = "import sys, zangchat.report; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["zangchat.report", "dev.compare"])
def test_the_backend_of_a_notebook_does_not_matter(module, tmp_path):
    """Notebooks export theirs to the programs that they start, which may not have it."""
    write_metrics(tmp_path, "base_checkpoints", "d2", base_rows(2))
    flags = {"dev.compare": ["--tags=d2", f"--output={tmp_path / 'd2.png'}"]}.get(module, [])
    backend = "module://matplotlib_inline.backend_inline"
    variables = {"MPLBACKEND": backend, "ZANGCHAT_BASE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", module, *flags]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("d2.png")) or (tmp_path / "report" / "base.svg").exists()


def test_sections_come_in_the_order_of_the_pipeline(report):
    order = [
        "Tokenizer training",
        "Base model training",
        "Base model loss",
        "Midtraining",
        "Chat evaluation mid",
        "Chat RL",
        "Samples",
    ]
    for section in sorted(order, key=lambda name: name[::-1]):
        report.log(section, ["x"])
    assert [card.section for card in report.cards()] == order
    assert isinstance(report.cards()[0], Card)
