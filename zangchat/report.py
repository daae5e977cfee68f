"""Report cards of a run, and the report made of them.

Every command logs one card per section (`get_report().log("Midtraining", [...])`); `python -m zangchat.report generate`
puts all cards, one table BASE / MID / SFT / RL and the training curves into <base>/report/report.md and report.html.
A half-finished run has fewer cards and shorter curves, and still gives a report.

What a card may hold, in any order:
  str                       a paragraph of Markdown
  dict with "messages"      a sample conversation: {"messages": [{"role", "content"}, ...]}
  dict with "prompt"        a sample completion:   {"prompt": str, "completion": str}
  any other dict            a table of names and values; in a card whose section says "evaluation",
                            a dict of numbers alone is a set of scores and goes into the summary table;
                            several in a row with the same names are the rows of one table
Sections name their stage ("Base model training", "Chat evaluation sft", ...); see `stage_of`.
"""

import base64
import html
import io
import itertools
import json
import math
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from zangchat import configurator
from zangchat.config import SOURCES
from zangchat.runtime.files import atomic_write, get_base_dir
from zangchat.runtime.processes import get_dist_info
from zangchat.runtime.progress import in_words

STAGES = tuple(source.upper() for source in SOURCES)
CURVES = {  # field of metrics.jsonl -> axis label
    "loss": "training loss (nats)",
    "val_bpb": "validation bits per byte",
    "val_loss": "validation loss (nats)",
    "lr": "learning rate multiplier",
    "tok_per_sec": "tokens per second",
    "reward": "reward",
    "pass@1": "held-out pass@1",
}
MAX_POINTS = 600  # a curve has more pixels than this nowhere; keeps the SVG small
MISSING = "-"


class Card(NamedTuple):
    section: str
    time: float  # seconds since the epoch, when it was logged
    data: list[Any]  # str | dict, as described above


class Curve(NamedTuple):
    """The metrics of one stage's newest run: one dict per step, in step order."""

    stage: str
    tag: str
    rows: list[dict[str, Any]]
    unreadable: int  # lines that are no JSON object: a write that was cut off


def checkpoint_name(meta: Mapping[str, Any]) -> str:
    """What files and cards about a checkpoint call it: sft_d20_000650."""
    return f"{meta['stage']}_{meta['user_config'].get('model_tag') or 'untagged'}_{meta['step']:06d}"


def stage_of(section: str) -> str | None:
    """The stage a section is about, by its words: "Midtraining" -> MID, "Chat evaluation sft" -> SFT, "Tokenizer" -> None."""
    words = re.findall(r"[a-z]+", section.lower())
    for stage, marks in (
        ("RL", ("rl", "grpo")),
        ("SFT", ("sft", "finetuning")),
        ("MID", ("mid", "midtraining")),
        ("BASE", ("base", "core")),
    ):
        if any(word in marks for word in words):
            return stage
    return None


def is_evaluation(section: str) -> bool:
    return "eval" in section.lower()


class Report:
    """The report folder of one base directory."""

    def __init__(self) -> None:
        self.base_dir = get_base_dir()
        self.folder = self.base_dir / "report"

    def log(self, section: str, data: Sequence[str | dict[str, Any]]) -> None:
        """Write the card of one section, in place of an earlier one of that section. Only rank 0 writes.

        Raises ValueError for a section without a letter or digit, TypeError for anything but strings and dicts in `data`.
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
        atomic_write(self.folder / f"{slug}.card.json", json.dumps(card, indent=1, ensure_ascii=False, default=_plain))

    def reset(self) -> None:
        """Start the report of a new run: old cards, plots and reports go, the clock starts."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.endswith((".card.json", ".svg")) or path.name in ("report.md", "report.html", "started.json"):
                    path.unlink()
        atomic_write(self.folder / "started.json", json.dumps({"time": time.time()}))

    def cards(self) -> list[Card]:
        """All cards in the order of the pipeline. Raises UserError naming a card file that is damaged."""
        found = []
        for path in sorted(self.folder.glob("*.card.json")):
            try:
                fields = json.loads(path.read_text(encoding="utf-8"))
                found.append(Card(str(fields["section"]), float(fields["time"]), list(fields["data"])))
            except (ValueError, KeyError, TypeError) as e:
                raise configurator.UserError(f"{path} is no report card ({e}): delete it, or run the command that wrote it again") from e
        return sorted(found, key=_pipeline_order)

    def generate(self, dollars_per_hour: float = 0.0) -> Path:
        """Write report.md, its plots and the self-contained report.html; returns the path of report.md."""
        cards = self.cards()
        curves = [curve for stage in STAGES if (curve := read_curve(self.base_dir, stage)) is not None]
        plots = {}  # file name -> SVG
        for curve in curves:
            if svg := plot_curve(curve):
                plots[f"{curve.stage.lower()}.svg"] = svg
        core = core_scores(cards)
        if core:
            plots["core.svg"] = plot_bars(core, "CORE, centred score per task")
        for name, svg in plots.items():
            atomic_write(self.folder / name, svg)
        markdown = "\n".join(
            [
                *_header(cards, self._started(cards), dollars_per_hour),
                *_summary(cards, curves),
                *_curve_sections(curves, plots),
                *(line for card in cards for line in _card_lines(card)),
            ]
        )
        atomic_write(self.folder / "report.md", markdown)
        atomic_write(self.folder / "report.html", render_html(markdown, plots))
        return self.folder / "report.md"

    def _started(self, cards: Sequence[Card]) -> float | None:
        path = self.folder / "started.json"
        if path.exists():
            return float(json.loads(path.read_text(encoding="utf-8"))["time"])
        return min((card.time for card in cards), default=None)


def get_report() -> Report:
    """The report of the current base directory."""
    return Report()


def _plain(value: Any) -> Any:
    """JSON for what scripts hand over: numpy and torch scalars become numbers, everything else its text."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else str(value)


def _pipeline_order(card: Card) -> tuple[int, bool, str]:
    stage = stage_of(card.section)
    position = (
        STAGES.index(stage) + 1 if stage else (0 if "token" in card.section.lower() or "data" in card.section.lower() else len(STAGES) + 1)
    )
    looks_back = is_evaluation(card.section) or card.section.lower().endswith("loss")  # what is measured follows what was trained
    return position, looks_back, card.section


# -- curves ------------------------------------------------------------------------------------------------------------


def read_curve(base_dir: Path, stage: str) -> Curve | None:
    """The metrics.jsonl of the stage's model tag that was trained last; None where the stage has not run.

    A resumed run repeats the steps since its last save; the later line of a step counts.
    """
    files = sorted((base_dir / SOURCES[stage.lower()]).glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    if not files:
        return None
    rows: dict[int, dict[str, Any]] = {}
    unreadable = 0
    with files[-1].open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                step = int(row["step"])
            except (ValueError, KeyError, TypeError):
                unreadable += 1
                continue
            rows[step] = {**rows.get(step, {}), **row}
    return Curve(stage, files[-1].parent.name, [rows[step] for step in sorted(rows)], unreadable)


def _points(curve: Curve, name: str) -> tuple[str, list[float], list[float]]:
    """(what x is, x, y) of one metric where it is a finite number; x is tokens where every such row has them, else the step."""
    rows = [row for row in curve.rows if _is_number(row.get(name)) and math.isfinite(row[name])]
    rows = rows[:: max(1, len(rows) // MAX_POINTS)]
    axis = "tokens" if rows and all(_is_number(row.get("tokens")) for row in rows) else "step"
    return axis, [float(row[axis]) for row in rows], [float(row[name]) for row in rows]


def plot_curve(curve: Curve) -> str | None:
    """One row of small plots, one for each metric that the stage has; None where there is nothing to draw."""
    from matplotlib.ticker import EngFormatter

    core = {name: name for row in curve.rows for name in row if name.startswith("CORE")}  # which says what it is the mean of
    panels = [(name, label, *_points(curve, name)) for name, label in (CURVES | core).items()]
    panels = [panel for panel in panels if panel[3]]
    if not panels:
        return None
    figure = _figure(4.0 * len(panels), 3.0)
    for i, (name, label, axis, x, y) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        _, *smooth = _points(curve, f"smooth_{name}")
        if smooth[1]:
            axes.plot(x, y, color="#b9c6f2", linewidth=0.8)
            x, y = smooth
        axes.plot(x, y, color="#3056d3", linewidth=1.2, marker="o" if len(x) < 12 else None, markersize=3)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 800k, 2.5M
        axes.set_title(label, fontsize=10)
        axes.set_xlabel(axis, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    return _svg(figure)


def plot_bars(values: Mapping[str, float], title: str) -> str:
    """Horizontal bars, one for each name."""
    figure = _figure(8.0, 0.8 + 0.26 * len(values))
    axes = figure.add_subplot()
    axes.barh(list(values), list(values.values()), color="#3056d3")
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.25)
    return _svg(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # the object-oriented way: no display, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "zangchat", "svg.fonttype": "path"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


# -- the parts of the report -------------------------------------------------------------------------------------------


def _header(cards: Sequence[Card], started: float | None, dollars_per_hour: float) -> list[str]:
    facts = {**hardware(), **software()}
    if started is not None and cards:
        last = max(card.time for card in cards)
        facts["wall-clock"] = f"{in_words(max(0.0, last - started))} (start {_clock(started)}, last card {_clock(last)})"
        if dollars_per_hour > 0:
            facts["cost"] = f"${(last - started) / 3600 * dollars_per_hour:.2f} at ${dollars_per_hour:g} an hour"
    return ["# zangchat report", "", f"Generated {_clock(time.time())}.", "", *_item_lines(facts), ""]


def hardware() -> dict[str, str]:
    """What the machine is made of, as far as it says."""
    import psutil

    cores = f"{psutil.cpu_count(logical=False) or '?'} cores, {psutil.cpu_count()} threads"
    facts = {"system": platform.platform(), "CPU": f"{cpu_name()} ({cores})", "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB"}
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        size = torch.cuda.get_device_properties(0).total_memory / 2**30
        facts["GPU"] = f"{len(names)}x {names[0]}, {size:.0f} GiB each"
    return facts


def cpu_name() -> str:
    """The processor's model, as far as the system says."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def software() -> dict[str, str]:
    """Versions of what computed the numbers, and the exact source: revision, changes, lines."""
    facts = {"Python": platform.python_version()}
    for name in ("torch", "numpy", "tiktoken", "zangchat"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parent.parent
    revision = _git(root, "rev-parse", "--short=12", "HEAD")
    if revision:
        branch = _git(root, "rev-parse", "--abbrev-ref", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        facts["git"] = f"{revision} on {branch}" + (f", {len(changed.splitlines())} files changed since" if changed else "")
        counts = []
        for language, pattern in (("Python", "*.py"), ("Rust", "*.rs")):
            files = [root / name for name in (_git(root, "ls-files", pattern) or "").splitlines()]
            counts.append(f"{sum(_line_count(path) for path in files):,} lines of {language} in {len(files)} files")
        facts["source"] = ", ".join(counts)
    return facts


def _line_count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _git(root: Path, *arguments: str) -> str | None:
    """Git's answer; None where there is no git or no repository (an installed copy)."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, encoding="utf-8", timeout=30)
    return done.stdout.strip() if done.returncode == 0 else None


def summary_table(cards: Iterable[Card], curves: Iterable[Curve]) -> dict[str, dict[str, float]]:
    """{metric: {stage: value}}: the last validation result and reward of each stage's run, and every score of its evaluation cards."""
    table: dict[str, dict[str, float]] = {}
    names = {"val_bpb": "validation bpb", "val_loss": "validation loss", "reward": "training reward", "pass@1": "held-out pass@1"}
    for curve in curves:
        if curve.stage != "BASE":
            names["val_bpb"] = "validation bpb, answers"  # of conversations: not to be compared with that of texts
        for name in names:
            values = [row[name] for row in curve.rows if _is_number(row.get(name))]
            if values:
                table.setdefault(names[name], {})[curve.stage] = values[-1]
    for card in cards:
        stage = stage_of(card.section)
        if stage is None or not is_evaluation(card.section):
            continue
        for scores in filter(_is_scores, card.data):
            core = [name for name in scores if name.upper().startswith("CORE")]
            for name in core or scores:  # of CORE the mean: its tasks have a plot of their own
                table.setdefault(name, {})[stage] = scores[name]
    return table


def core_scores(cards: Iterable[Card]) -> dict[str, float]:
    """The centred score of each CORE task, from the card whose scores include CORE's mean."""
    for card in cards:
        for scores in filter(_is_scores, card.data):
            if any(name.upper().startswith("CORE") for name in scores):
                tasks = {name: float(value) for name, value in scores.items() if not name.upper().startswith("CORE")}
                if tasks:
                    return tasks
    return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_scores(item: Any) -> bool:
    return isinstance(item, dict) and bool(item) and all(map(_is_number, item.values()))


def _summary(cards: Sequence[Card], curves: Sequence[Curve]) -> list[str]:
    lines = ["## Summary", ""]
    if not cards and not curves:
        return [*lines, "Nothing has run yet: there are no report cards and no training curves.", ""]
    table = summary_table(cards, curves)
    if table:
        lines += [_row(["metric", *STAGES]), "|---" * (len(STAGES) + 1) + "|"]
        lines += [_row([metric, *(values.get(stage, MISSING) for stage in STAGES)]) for metric, values in table.items()]
        lines.append("")
    missing = [stage for stage in STAGES if stage not in {curve.stage for curve in curves} | {stage_of(card.section) for card in cards}]
    if missing:
        lines += [f"Not run (yet): {', '.join(missing)}.", ""]
    return lines


def _curve_sections(curves: Sequence[Curve], plots: Mapping[str, str]) -> list[str]:
    lines = ["## Curves", ""] if plots else []
    for curve in curves:
        if f"{curve.stage.lower()}.svg" in plots:
            note = f" ({curve.unreadable} damaged lines left out)" if curve.unreadable else ""
            lines += [f"**{curve.stage}**, model tag `{curve.tag}`, {curve.rows[-1]['step']:,} steps{note}", ""]
            lines += [f"![{curve.stage} curves]({curve.stage.lower()}.svg)", ""]
    if "core.svg" in plots:
        lines += ["**CORE**", "", "![CORE per task](core.svg)", ""]
    return lines


def _card_lines(card: Card) -> list[str]:
    lines = [f"## {_cell(card.section)}", "", f"Logged {_clock(card.time)}.", ""]
    for columns, group in itertools.groupby(card.data, key=_columns):
        items = list(group)
        if columns and len(items) > 1:  # rows of one table
            lines += [_row(columns), "|---" * len(columns) + "|", *(_row(item.values()) for item in items), ""]
            continue
        for item in items:
            lines += [*_item_lines(item), ""]
    return lines


def _columns(item: Any) -> tuple[str, ...]:
    """The names of a table's row; nothing for all else that a card holds."""
    return tuple(item) if isinstance(item, dict) and "prompt" not in item and not isinstance(item.get("messages"), list) else ()


def _row(values: Iterable[Any]) -> str:
    return "| " + " | ".join(map(_cell, values)) + " |"


def _item_lines(item: Any) -> list[str]:
    if isinstance(item, str):
        return [item]
    if isinstance(item.get("messages"), list):
        turns = [f"{m.get('role', '?')}: {_content_text(m.get('content', ''))}" for m in item["messages"] if isinstance(m, dict)]
        return _fenced("\n\n".join(turns))
    if "prompt" in item:
        return _fenced(f"{item['prompt']}\n-> {item.get('completion', '')}")
    return ["| | |", "|---|---|", *map(_row, item.items())] if item else []


def _content_text(content: Any) -> str:
    """The text of a message, whose content is a string or a list of parts (text, python, python_output)."""
    if isinstance(content, list):
        return "".join(
            f"[{part.get('type')}: {part.get('text')}]" if part.get("type") != "text" else part.get("text", "") for part in content
        )
    return str(content)


def _fenced(text: str) -> list[str]:
    """A fenced block that the text, whatever it holds, cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", text, fence]


def _cell(value: Any) -> str:
    """A value as the text of a table cell; nothing in it acts as Markdown or HTML."""
    if isinstance(value, float):
        value = f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.4g}"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    text = re.sub(r"\s+", " ", str(value)).strip()
    return re.sub(r"([\\`*\[\]<>|!#~&])|(?<!\w)(_)|(_)(?!\w)", lambda m: "\\" + m.group(0), text)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f27; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d9dde5; padding-bottom: .3rem; }
table { border-collapse: collapse; margin: .8rem 0; display: block; overflow-x: auto; }
th, td { border: 1px solid #d9dde5; padding: .25rem .7rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
tr:nth-child(even) td { background: #f6f7fa; } tr:has(> th:empty) { display: none; }
img { max-width: 100%; background: white; } pre { background: #f6f7fa; padding: .7rem; overflow-x: auto; white-space: pre-wrap; }
@media (prefers-color-scheme: dark) {
  body { background: #14161b; color: #dfe3ea; } th, td, h2 { border-color: #363b46; } tr:nth-child(even) td, pre { background: #1c1f26; }
}
"""


def render_html(markdown: str, plots: Mapping[str, str]) -> str:
    """The report as one HTML file: plots inline, raw HTML in the text shown as text, no image from elsewhere."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(_renderer: Any, tokens: Any, index: int, _options: Any, _env: Any) -> str:
        token = tokens[index]
        if (svg := plots.get(token.attrs.get("src"))) is None:
            return html.escape(token.content)
        data = base64.b64encode(svg.encode()).decode()
        return f'<img alt="{html.escape(token.content)}" src="data:image/svg+xml;base64,{data}">'

    parser.add_render_rule("image", image)
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return f"{head}<title>zangchat report</title><style>{STYLE}</style></head><body>\n{parser.render(markdown)}</body></html>\n"


# -- command line ------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """The report of a run: `generate` writes <base>/report/report.md and report.html, `reset` starts a new one."""

    command: Annotated[Literal["generate", "reset"], tyro.conf.Positional] = "generate"
    dollars_per_hour: float = 0.0  # price of the machine; above 0 the report says what the run cost


def report(config: Config) -> int:
    if config.command == "reset":
        get_report().reset()
        return 0
    path = get_report().generate(config.dollars_per_hour)
    print(f"report: {path} and {path.with_suffix('.html')}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, report, argv)


if __name__ == "__main__":
    sys.exit(main())
