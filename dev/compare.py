"""Compare runs: a table of their seeds, and their curves in one picture.

    python -m dev.compare --tags=d4,d4-wide
    python -m dev.compare --tags="before-*,after-*"      each pattern is a group of seeds

The table gives the metric at the same tokens and at the same seconds of training, for the shortest
run of all. The first group is the one that the others are compared with.
"""

import fnmatch
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zangchat import configurator
from zangchat.checkpoint_files import read_meta, steps
from zangchat.checkpoint_manager import checkpoints_dir
from zangchat.config import SourceFlag
from zangchat.errors import UserError
from zangchat.report.curves import curve_of, is_number

AXES = {"tokens": "tokens", "seconds": "seconds of training"}
COLORS = ("#3056d3", "#d9791a", "#2f9e5b", "#7a4fd0", "#c2334d", "#4b5563")
# settings that may differ between the seeds of a group, or change no number
FREE = ("seed", "model_tag", "run", "resume", "overwrite", "save_every", "keep_last", "keep_every")


@dataclass
class Config:
    tags: str
    """model tags, or patterns such as "before-*" for the seeds of a group, separated by commas"""
    source: SourceFlag = "base"  # base | mid | sft | rl
    metric: str = "val_bpb"  # a field of metrics.jsonl
    output: Path = Path("compare.png")


class Run(NamedTuple):
    """One run's metric: `value` after so many tokens and seconds, step by step."""

    tag: str
    tokens: np.ndarray
    seconds: np.ndarray
    value: np.ndarray
    settings: dict[str, Any]

    def at(self, axis: str, place: float) -> float:
        """The metric at this place of an axis, linear between two evaluations."""
        return float(np.interp(place, getattr(self, axis), self.value))


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, compare, argv)


def compare(config: Config) -> int:
    groups = {tags: find_runs(config, tags) for tags in config.tags.split(",")}
    print_settings(groups)
    for axis in AXES:
        print_table(groups, axis, config.metric)
    draw(groups, config)
    print(f"\n{config.output}")
    return 0


def find_runs(config: Config, tags: str) -> list[Run]:
    """The runs whose tag fits a pattern."""
    folder = checkpoints_dir(config.source)
    found = sorted(folder.glob("*/metrics.jsonl"))
    files = [path for path in found if fnmatch.fnmatchcase(path.parent.name, tags)]
    if not files:
        raise UserError(f"no run in {folder} is called {tags!r}: see the folders there")
    return [read_run(path, config) for path in files]


def read_run(path: Path, config: Config) -> Run:
    points, seconds = [], 0.0
    for row in curve_of(path, config.source).rows:
        seconds += row.get("seconds", 0.0)
        if is_number(row.get(config.metric)):
            points.append((row.get("tokens", 0), seconds, row[config.metric]))
    if not points:
        raise UserError(f"{path} has no {config.metric}: name another field with --metric")
    newest = next(steps(path.parent, check=""), None)
    settings = {} if newest is None else read_meta(path.parent, newest)["user_config"]
    tokens, at, value = np.array(points, dtype=float).T
    return Run(path.parent.name, tokens, at, value, settings)


def print_settings(groups: dict[str, list[Run]]) -> None:
    """The settings that differ, which should be the change and nothing else."""
    first = next(iter(groups.values()))[0].settings
    for runs in groups.values():
        for run in runs:
            found = {
                name: (first.get(name), value)
                for name, value in run.settings.items()
                if name not in FREE and first and value != first.get(name)
            }
            if found:
                changes = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in found.items())
                print(f"{run.tag}: {changes}")


def print_table(groups: dict[str, list[Run]], axis: str, metric: str) -> None:
    place = min(getattr(run, axis)[-1] for runs in groups.values() for run in runs)
    print(f"\n{metric} after {place:,.0f} {AXES[axis]}")
    width = max(map(len, groups))
    reference: list[float] = []
    for tags, runs in groups.items():
        values = [run.at(axis, place) for run in runs]
        parts = [" ".join(f"{value:.4f}" for value in values)]
        if len(values) > 1:
            spread = max(values) - min(values)
            parts.append(f"median {statistics.median(values):.4f}, range {spread:.4f}")
        if reference:
            parts.append(verdict(values, reference))
        print(f"{tags:{width}}  {'; '.join(parts)}")
        reference = reference or values


def verdict(values: Sequence[float], reference: Sequence[float]) -> str:
    """The difference from the reference, and whether it exceeds the spread of the seeds."""
    difference = statistics.median(values) - statistics.median(reference)
    if min(len(values), len(reference)) < 2:
        return f"{difference:+.4f} (one seed: the spread is unknown)"
    if max(values) < min(reference):
        return f"{difference:+.4f}, every seed lower"
    if min(values) > max(reference):
        return f"{difference:+.4f}, every seed higher"
    return f"{difference:+.4f}, the seeds overlap"


def draw(groups: dict[str, list[Run]], config: Config) -> None:
    """A thin line for each run, one color for each group, over tokens and over seconds."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend may not be installed here
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    # not the first steep fall, in which all curves look alike
    ends = np.concatenate(
        [run.value[len(run.value) // 4 :] for runs in groups.values() for run in runs]
    )
    margin = 0.05 * float(np.ptp(ends)) or 0.01
    for number, (axis, label) in enumerate(AXES.items(), 1):
        axes = figure.add_subplot(1, len(AXES), number)
        for i, (tags, runs) in enumerate(groups.items()):
            for run in runs:
                name = tags if run is runs[0] else None
                axes.plot(
                    getattr(run, axis),
                    run.value,
                    color=COLORS[i % len(COLORS)],
                    linewidth=1.3,
                    alpha=0.8,
                    marker="o" if len(run.value) < 20 else None,
                    markersize=3,
                    label=name,
                )
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(label)
        axes.set_ylabel(config.metric)
        axes.set_ylim(ends.min() - margin, ends.max() + margin)
        axes.grid(alpha=0.25)
        axes.legend()
    config.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.output, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
