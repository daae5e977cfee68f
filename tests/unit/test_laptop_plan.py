"""What dev/runcpu.sh's minutes are spent on."""

import json
from pathlib import Path

import pytest

from dev import plan
from dev.laptop_plan import COST, LEAST, MOST, OVERHEAD_MINUTES, main, steps_that_fit
from zangchat.checkpoint_files import FORMAT_VERSION


@pytest.mark.parametrize("pace", [0.05, 0.1, 0.35, 1.0])
@pytest.mark.parametrize("minutes", [15.0, 25.0, 60.0])
def test_the_stages_fill_the_minutes(minutes: float, pace: float) -> None:
    steps = steps_that_fit(minutes, pace)
    planned = sum(number * pace * COST.get(name, 1.0) for name, number in steps.items())
    assert planned == pytest.approx(60 * (minutes - OVERHEAD_MINUTES), abs=2 * pace)


def test_a_slow_machine_keeps_the_proportions_of_the_stages_and_a_fast_one_pretrains_longer() -> (
    None
):
    slow, fast = steps_that_fit(25, 0.5), steps_that_fit(25, 0.1)
    assert list(slow) == ["BASE_STEPS", "MID_STEPS", "SFT_STEPS", "RL_STEPS"]
    assert slow["MID_STEPS"] / slow["BASE_STEPS"] == pytest.approx(0.52 / 0.30, rel=0.01)
    assert {name: fast[name] for name in MOST} == MOST and fast["BASE_STEPS"] > 5 * slow[
        "BASE_STEPS"
    ]


def test_no_stage_is_left_out_however_few_the_minutes() -> None:
    assert steps_that_fit(1, 0.35) == LEAST


@pytest.mark.parametrize("slower", [1.0, 1.5])
def test_after_a_slow_pretraining_the_later_stages_fill_the_minutes_that_are_left(
    slower: float,
) -> None:
    planned = steps_that_fit(25, 0.5)
    pace, spent = 0.5 * slower, planned["BASE_STEPS"] * 0.5 * slower
    later = steps_that_fit(25, pace, spent)
    assert list(later) == ["MID_STEPS", "SFT_STEPS", "RL_STEPS"]
    used = spent + sum(number * pace * COST[name] for name, number in later.items())
    assert used == pytest.approx(60 * (25 - OVERHEAD_MINUTES), abs=4 * pace)


def test_after_a_pretraining_that_took_all_the_minutes_each_stage_is_short() -> None:
    later = steps_that_fit(25, 2.0, 60 * 25)
    assert later == {name: LEAST[name] for name in later}


def test_the_pace_is_that_of_the_model_that_is_named(
    base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A larger one may stand beside it."""
    for tag, seconds in (("d4", 60.0), ("d6", 600.0)):
        folder = base_dir / "base_checkpoints" / tag
        folder.mkdir(parents=True)
        meta = {"format_version": FORMAT_VERSION, "step": 100, "files": {}}
        meta["run_state"] = {"step": 100, "training_seconds": seconds}
        (folder / "meta_000100.json").write_text(json.dumps(meta))
    assert main(["--minutes=9", "--pretrained", "--model_tag=d4"]) == 0
    assert "pretraining took 1.0 min, 0.600 s per step" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--world_size=0", "--memory_gb=0", "--vocab_size=0"])
def test_a_machine_of_nothing_is_refused(flag, capsys):
    assert plan.main([flag]) == 2
    assert f"{flag} is not possible" in capsys.readouterr().err
