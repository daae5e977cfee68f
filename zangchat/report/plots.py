"""Training curves and scores, drawn as SVG."""

import io
import math
import os
from collections.abc import Mapping

os.environ["MPLBACKEND"] = "agg"  # a notebook's backend may not be installed here

import matplotlib
from matplotlib.figure import Figure  # without pyplot: no display, no global state
from matplotlib.ticker import EngFormatter

from zangchat.report.curves import Curve, is_number

CURVES = {  # field of metrics.jsonl -> axis label
    "loss": "training loss (nats)",
    "val_bpb": "validation bits per byte",
    "val_loss": "validation loss (nats)",
    "lr": "learning rate multiplier",
    "tok_per_sec": "tokens per second",
    "reward": "reward",
    "pass@1": "held-out pass@1",
}
MAX_POINTS = 600  # of a curve, which has fewer pixels; keeps the SVG small


def _points(curve: Curve, name: str) -> tuple[str, list[float], list[float]]:
    """(name of the x axis, x, y) of the rows in which a metric is a finite number.

    x is tokens if each of these rows has them, else the step.
    """
    rows = [row for row in curve.rows if is_number(row.get(name)) and math.isfinite(row[name])]
    rows = rows[:: max(1, len(rows) // MAX_POINTS)]
    axis = "tokens" if rows and all(is_number(row.get("tokens")) for row in rows) else "step"
    return axis, [float(row[axis]) for row in rows], [float(row[name]) for row in rows]


def plot_curve(curve: Curve) -> str | None:
    """One row of small plots, one for each metric of the stage; None if there are no metrics."""
    # the name tells which tasks are in the mean
    core = {name: name for row in curve.rows for name in row if name.startswith("CORE")}
    panels = [(name, label, *_points(curve, name)) for name, label in (CURVES | core).items()]
    panels = [panel for panel in panels if panel[3]]
    if not panels:
        return None
    figure = Figure(figsize=(4.0 * len(panels), 3.0), layout="constrained")
    for i, (name, label, axis, x, y) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        _, *smooth = _points(curve, f"smooth_{name}")
        if smooth[1]:
            axes.plot(x, y, color="#b9c6f2", linewidth=0.8)
            x, y = smooth
        axes.plot(
            x, y, color="#3056d3", linewidth=1.2, marker="o" if len(x) < 12 else None, markersize=3
        )
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 800k, 2.5M
        axes.set_title(label, fontsize=10)
        axes.set_xlabel(axis, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    return _svg(figure)


def plot_bars(values: Mapping[str, float], title: str) -> str:
    """Horizontal bars, one for each name."""
    figure = Figure(figsize=(8.0, 0.8 + 0.26 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(values), list(values.values()), color="#3056d3")
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.25)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    with matplotlib.rc_context({"svg.hashsalt": "zangchat", "svg.fonttype": "path"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
