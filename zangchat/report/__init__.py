"""Report cards of a run, and the report made of them.

Every command logs one card per section (`get_report().log("Midtraining", [...])`);
`python -m zangchat.report generate` puts all cards, one table BASE / MID / SFT / RL and the
training curves into <base>/report/report.md and report.html. An unfinished run has fewer cards and
shorter curves, and still gives a report.

A card holds, in any order:
  str                       a paragraph of Markdown
  dict with "messages"      a sample conversation: {"messages": [{"role", "content"}, ...]}
  dict with "prompt"        a sample completion:   {"prompt": str, "completion": str}
  any other dict            a table of names and values; in a card whose section contains
                            "evaluation", a dict of only numbers is a set of scores and enters the
                            summary table; several in a row with the same names are the rows of one
                            table
Sections name their stage ("Base model training", "Chat evaluation sft", ...); see `stage_of`.
"""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zangchat.errors import UserError
from zangchat.report.cards import (
    STAGES,
    Card,
    checkpoint_name,
    core_scores,
    pipeline_order,
    stage_of,
    summary_table,
)
from zangchat.report.curves import Curve, read_curve
from zangchat.report.document import render_html, render_markdown
from zangchat.report.machine import cpu_name, software
from zangchat.runtime.files import atomic_write, get_base_dir
from zangchat.runtime.processes import get_dist_info

__all__ = [
    "Card",
    "Curve",
    "Report",
    "checkpoint_name",
    "cpu_name",
    "get_report",
    "read_curve",
    "software",
    "stage_of",
    "summary_table",
]


class Report:
    """The report folder of one base directory."""

    def __init__(self) -> None:
        self.base_dir = get_base_dir()
        self.folder = self.base_dir / "report"

    def log(self, section: str, data: Sequence[str | dict[str, Any]]) -> None:
        """Write the card of a section; replaces an earlier one. Only rank 0 writes.

        Raises ValueError for a section without a letter or digit, TypeError for items of `data`
        that are neither strings nor dicts.
        """
        slug = re.sub(r"[^a-z0-9]+", "-", section.lower()).strip("-")
        if not slug:
            raise ValueError(f"a report section needs a name, not {section!r}")
        for item in data:
            if not isinstance(item, (str, dict)):
                raise TypeError(f"a report card holds strings and dicts, not {type(item).__name__}")
        if get_dist_info()[1] != 0:
            return
        card = {"section": section, "time": time.time(), "data": list(data)}
        text = json.dumps(card, indent=1, ensure_ascii=False, default=_plain)
        atomic_write(self.folder / f"{slug}.card.json", text)

    def reset(self) -> None:
        """Start the report of a new run: delete cards, plots and reports, start the clock."""
        names = ("report.md", "report.html", "started.json")
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.endswith((".card.json", ".svg")) or path.name in names:
                    path.unlink()
        atomic_write(self.folder / "started.json", json.dumps({"time": time.time()}))

    def cards(self) -> list[Card]:
        """All cards in the order of the pipeline. Raises UserError naming a damaged card file."""
        found = []
        for path in sorted(self.folder.glob("*.card.json")):
            try:
                fields = json.loads(path.read_text(encoding="utf-8"))
                section, data = str(fields["section"]), list(fields["data"])
                found.append(Card(section, float(fields["time"]), data))
            except (ValueError, KeyError, TypeError) as e:
                remedy = "delete it, or run the command that wrote it again"
                raise UserError(f"{path} is no report card ({e}): {remedy}") from e
        return sorted(found, key=pipeline_order)

    def generate(self, dollars_per_hour: float = 0.0) -> Path:
        """Write report.md, its plots and the self-contained report.html; the path of report.md."""
        from zangchat.report.plots import plot_bars, plot_curve

        cards = self.cards()
        reset = self._reset_time()
        # a stage before the reset is of another run, whose numbers are not compared with these
        found = (read_curve(self.base_dir, stage, since=reset or 0.0) for stage in STAGES)
        curves = [curve for curve in found if curve is not None]
        plots = {}  # file name -> SVG
        for curve in curves:
            if svg := plot_curve(curve):
                plots[f"{curve.stage.lower()}.svg"] = svg
        core = core_scores(cards)
        if core:
            plots["core.svg"] = plot_bars(core, "CORE, centred score per task")
        for name, svg in plots.items():
            atomic_write(self.folder / name, svg)
        started = reset or min((card.time for card in cards), default=None)
        markdown = render_markdown(cards, curves, plots, started, dollars_per_hour)
        atomic_write(self.folder / "report.md", markdown)
        atomic_write(self.folder / "report.html", render_html(markdown, plots))
        return self.folder / "report.md"

    def _reset_time(self) -> float | None:
        path = self.folder / "started.json"
        if not path.exists():
            return None
        return float(json.loads(path.read_text(encoding="utf-8"))["time"])


def get_report() -> Report:
    """The report of the current base directory."""
    return Report()


def _plain(value: Any) -> Any:
    """A value for JSON: numpy's and torch's scalars become numbers, everything else its text."""
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_scalar else str(value)
