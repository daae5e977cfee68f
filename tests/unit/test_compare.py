"""dev.compare: the same tokens, the same seconds, the spread of the seeds, one picture."""

import json
from pathlib import Path

import pytest

from dev.compare import main, verdict
from zangchat.checkpoint_files import FORMAT_VERSION


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_run(base: Path, tag: str, *scores: float, pace: float = 1.0, **settings: object) -> None:
    """A run that took a step of 100 tokens in `pace` seconds between two of its scores."""
    folder = base / "base_checkpoints" / tag
    folder.mkdir(parents=True)
    rows = [{"step": 0, "tokens": 0, "val_bpb": scores[0]}]
    for step, score in enumerate(scores[1:], 1):
        rows.append({"step": step, "tokens": 100 * step, "loss": 5.0, "seconds": pace})
        rows.append({"step": step, "tokens": 100 * step, "val_bpb": score})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    user_config = {"seed": tag, "head_dim": 128, **settings}
    meta = {"format_version": FORMAT_VERSION, "step": 2, "files": {}, "user_config": user_config}
    (folder / "meta_000002.json").write_text(json.dumps(meta), encoding="utf-8")


def test_groups_are_compared_at_equal_tokens_and_at_equal_time(base, capsys):
    for seed, score in enumerate((2.0, 2.1, 2.2)):
        write_run(base, f"before-{seed}", 4.0, 3.0, score)
        write_run(base, f"after-{seed}", 4.0, 3.0, score - 0.5, pace=2.0, head_dim=64)
    assert main(["--tags=before-*,after-*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"after-{seed}: head_dim 128 -> 64" for seed in range(3)]
    tokens, seconds = (lines.index(line) for line in lines if line.startswith("val_bpb after"))
    assert lines[tokens : tokens + 3] == [
        "val_bpb after 200 tokens",
        "before-*  2.0000 2.1000 2.2000; median 2.1000, range 0.2000",
        "after-*   1.5000 1.6000 1.7000; median 1.6000, range 0.2000; -0.5000, every seed lower",
    ]
    # twice the time a step: after the 2 seconds of the faster runs it has done one step
    assert lines[seconds] == "val_bpb after 2 seconds of training"
    assert lines[seconds + 2].startswith("after-*   3.0000 3.0000 3.0000")
    assert lines[seconds + 2].endswith("+0.9000, every seed higher")


def test_a_longer_run_is_read_where_the_shorter_one_ends(base, capsys):
    write_run(base, "short", 4.0, 3.0)
    write_run(base, "long", 4.0, 2.5, 1.0)
    assert main(["--tags=short,long", "--output=pictures/two.png"]) == 0
    out = capsys.readouterr().out
    assert "val_bpb after 100 tokens" in out and "long   2.5000; -0.5000 (one seed" in out
    assert (base / "pictures" / "two.png").read_bytes().startswith(b"\x89PNG")


def test_another_field_and_a_run_without_a_checkpoint(base, capsys):
    write_run(base, "d4", 4.0, 3.0, 2.0)
    (base / "base_checkpoints" / "d4" / "meta_000002.json").unlink()
    assert main(["--tags=d4", "--metric=loss"]) == 0
    assert "loss after 200 tokens" in capsys.readouterr().out


def test_scores_without_a_number_of_tokens_stand_at_the_beginning(base, capsys):
    write_run(base, "d4", 4.0, 3.0)
    with (base / "base_checkpoints" / "d4" / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 0, "pass@1": 0.5}\n{"step": 1, "tokens": 100, "pass@1": 0.75}\n')
    assert main(["--tags=d4", "--metric=pass@1"]) == 0
    assert "pass@1 after 100 tokens" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named(base, capsys):
    write_run(base, "d4", 4.0, 3.0, 2.0)
    (base / "base_checkpoints" / "d4" / "meta_000002.json").write_text("{")
    assert main(["--tags=d4"]) == 2
    assert "meta_000002.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.5], "one seed"),
        ([1.5, 1.6], "every seed lower"),
        ([2.5, 2.6], "every seed higher"),
        ([1.5, 2.05], "the seeds overlap"),
    ],
)
def test_the_verdict_counts_seeds(values, words):
    assert words in verdict(values, [2.0, 2.1])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tags=d4,d5"], "called 'd5'"),
        (["--tags="], "called ''"),
        (["--tags=d4", "--metric=reward"], "has no reward"),
        (["--tags=d4", "--source=sft"], "chatsft_checkpoints"),
        (["--tags=d4", "--source=chat"], "--source=chat"),
        (["--tags=/d4"], "called '/d4'"),
        (["--tags=**d4", "--metric=reward"], "has no reward"),
    ],
)
def test_mistakes_get_one_sentence(base, capsys, flags, words):
    write_run(base, "d4", 4.0, 3.0)
    assert main(flags) == 2
    assert words in capsys.readouterr().err
    assert not (base / "compare.png").exists()
