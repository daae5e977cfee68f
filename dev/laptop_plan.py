r"""Plan the steps of each stage for the minutes of dev/runcpu.sh, from this machine's measured
speed.

    python -m dev.laptop_plan --minutes=25 --depth=4 --n_embd=192 --head_dim=96 --max_seq_len=320 \
        --total_batch_size=1920
    python -m dev.laptop_plan --minutes=25 --pretrained      the later stages, at pretraining's pace

The plan is printed as shell variables. A schedule needs its length beforehand, and a resumed run
needs the same length again. So the speed is measured once, before the first stage, and runcpu.sh
keeps the plan in <base>/runcpu.plan. A machine may be slower over minutes than for a moment, or
have other work: the later stages are planned again after pretraining, in the time that it left.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dev import bench_train
from zangchat import configurator
from zangchat.checkpoint_files import read_meta
from zangchat.checkpoint_manager import checkpoints_dir, find_last_step, resolve_tag
from zangchat.tokenizer import get_tokenizer

SLOWER = 1.25  # a step of pretraining took 1.13 and 1.35 times the measured time (dev/LOG.md)
OVERHEAD_MINUTES = 5.0  # setup, corpus, tokenizer, evaluations, report, starting ten processes
SHARES = {"MID_STEPS": 0.52, "SFT_STEPS": 0.13, "RL_STEPS": 0.05}
# The cost of a step, in steps of pretraining; RL first samples 64 answers.
COST = {"MID_STEPS": 1.0, "SFT_STEPS": 1.0, "RL_STEPS": 2.2}
LEAST = {"BASE_STEPS": 50, "MID_STEPS": 50, "SFT_STEPS": 20, "RL_STEPS": 5}  # a useful minimum
MOST = {"MID_STEPS": 2500, "SFT_STEPS": 400, "RL_STEPS": 80}  # more helps only in pretraining


@dataclass
class Config(bench_train.Config):
    minutes: float = 25.0  # for all of runcpu.sh; the other flags configure its pretraining
    pretrained: bool = False  # plan the later stages, by the time that pretraining has taken


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, plan, argv)


def plan(config: Config) -> int:
    if config.pretrained:
        pace, spent = pretraining(config.model_tag)
        said = f"pretraining took {spent / 60:.1f} min, {pace:.3f} s per step"
    else:
        config.vocab_size = get_tokenizer().get_vocab_size()
        measured, tokens = seconds_per_step(config), config.total_batch_size
        pace, spent = SLOWER * measured, 0.0
        said = f"{measured:.3f} s per step of {tokens} tokens ({tokens / measured:,.0f} tok/s)"
    print(f"# {said}, planned for {config.minutes:g} minutes")
    for name, steps in steps_that_fit(config.minutes, pace, spent).items():
        print(f"{name}={steps}")
    return 0


def steps_that_fit(minutes: float, pace: float, spent: float = 0.0) -> dict[str, int]:
    """Steps per stage for a pace in seconds per training step. Pretraining gets the
    steps that the later stages leave; after it, when `spent` seconds are gone, they share the rest.
    """
    left = max(60 * (minutes - OVERHEAD_MINUTES) - spent, 0) / pace  # in steps of pretraining
    whole = sum(SHARES.values()) if spent else 1.0
    later = {
        name: min(MOST[name], int(left * share / whole / COST[name]))
        for name, share in SHARES.items()
    }
    base = int(left - sum(steps * COST[name] for name, steps in later.items()))
    steps = later if spent else {"BASE_STEPS": base, **later}
    return {name: max(LEAST[name], number) for name, number in steps.items()}


def pretraining(tag: str | None) -> tuple[float, float]:
    """(seconds per step, seconds) of the base model's training, over all attempts."""
    folder = resolve_tag(checkpoints_dir("base"), tag)
    state = read_meta(folder, find_last_step(folder))["run_state"]
    return state["training_seconds"] / state["step"], state["training_seconds"]


def seconds_per_step(config: Config) -> float:
    """The median step of the real training loop on random tokens, in a process of its own, whose
    threads wait as those of training do.
    """
    names = [field.name for field in dataclasses.fields(bench_train.Config)]
    bench = bench_train.Config(**{name: getattr(config, name) for name in names})
    return float(bench_train.Side(bench, "zangchat").repetition()["step_seconds"])


if __name__ == "__main__":
    sys.exit(main())
