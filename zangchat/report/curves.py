"""Training curves, read from metrics.jsonl."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from zangchat.config import SOURCES


class Curve(NamedTuple):
    """The metrics of one stage's newest run: one dict per step, in step order."""

    stage: str
    tag: str
    rows: list[dict[str, Any]]
    unreadable: int  # lines that are not a JSON object: interrupted writes


def read_curve(base_dir: Path, stage: str, since: float = 0.0) -> Curve | None:
    """The metrics.jsonl of the stage's most recent model tag; None if the stage has not run since
    then, in seconds since the epoch."""
    folder = base_dir / SOURCES[stage.lower()]
    ages = {path: path.stat().st_mtime for path in folder.glob("*/metrics.jsonl")}
    newest = max(ages, key=lambda path: ages[path], default=None)
    return curve_of(newest, stage) if newest and ages[newest] >= since else None


def curve_of(path: Path, stage: str) -> Curve:
    """The curve in a metrics.jsonl.

    A resumed run repeats the steps since its last save; the later line of a step counts.
    """
    rows: dict[int, dict[str, Any]] = {}
    unreadable = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                step = int(row["step"])
            except (ValueError, KeyError, TypeError):
                unreadable += 1
                continue
            rows[step] = {**rows.get(step, {}), **row}
    return Curve(stage, path.parent.name, [rows[step] for step in sorted(rows)], unreadable)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
