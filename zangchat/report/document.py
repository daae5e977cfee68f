"""The report as Markdown and as one HTML file."""

import base64
import html
import itertools
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zangchat.report.cards import STAGES, Card, stage_of, summary_table
from zangchat.report.curves import Curve
from zangchat.report.machine import hardware, software
from zangchat.runtime.progress import in_words

MISSING = "-"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f27; }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #d9dde5; padding-bottom: .3rem; }
table { border-collapse: collapse; margin: .8rem 0; display: block; overflow-x: auto; }
th, td { border: 1px solid #d9dde5; padding: .25rem .7rem; }
th, td { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
tr:nth-child(even) td { background: #f6f7fa; } tr:has(> th:empty) { display: none; }
img { max-width: 100%; background: white; }
pre { background: #f6f7fa; padding: .7rem; overflow-x: auto; white-space: pre-wrap; }
@media (prefers-color-scheme: dark) {
  body { background: #14161b; color: #dfe3ea; } th, td, h2 { border-color: #363b46; }
  tr:nth-child(even) td, pre { background: #1c1f26; }
}
"""


def render_markdown(
    cards: Sequence[Card],
    curves: Sequence[Curve],
    plots: Mapping[str, str],
    started: float | None,
    dollars_per_hour: float,
) -> str:
    """The report; `plots` are {file name: SVG}, `started` is in seconds since the epoch."""
    return "\n".join(
        [
            *_header(cards, started, dollars_per_hour),
            *_summary(cards, curves),
            *_curve_sections(curves, plots),
            *(line for card in cards for line in _card_lines(card)),
        ]
    )


def _header(cards: Sequence[Card], started: float | None, dollars_per_hour: float) -> list[str]:
    facts = {**hardware(), **software()}
    if started is not None and cards:
        last = max(card.time for card in cards)
        duration = in_words(max(0.0, last - started))
        facts["wall-clock"] = f"{duration} (start {_clock(started)}, last card {_clock(last)})"
        if dollars_per_hour > 0:
            dollars = (last - started) / 3600 * dollars_per_hour
            facts["cost"] = f"${dollars:.2f} at ${dollars_per_hour:g} an hour"
    title = ["# zangchat report", "", f"Generated {_clock(time.time())}.", ""]
    return [*title, *_item_lines(facts), ""]


def _summary(cards: Sequence[Card], curves: Sequence[Curve]) -> list[str]:
    lines = ["## Summary", ""]
    if not cards and not curves:
        return [
            *lines,
            "Nothing has run yet: there are no report cards and no training curves.",
            "",
        ]
    table = summary_table(cards, curves)
    if table:
        lines += [_row(["metric", *STAGES]), "|---" * (len(STAGES) + 1) + "|"]
        for metric, values in table.items():
            lines.append(_row([metric, *(values.get(stage, MISSING) for stage in STAGES)]))
        lines.append("")
    present = {curve.stage for curve in curves} | {stage_of(card.section) for card in cards}
    missing = [stage for stage in STAGES if stage not in present]
    if missing:
        lines += [f"Not run (yet): {', '.join(missing)}.", ""]
    return lines


def _curve_sections(curves: Sequence[Curve], plots: Mapping[str, str]) -> list[str]:
    lines = ["## Curves", ""] if plots else []
    for curve in curves:
        file = f"{curve.stage.lower()}.svg"
        if file in plots:
            steps = curve.rows[-1]["step"]
            note = f" ({curve.unreadable} damaged lines left out)" if curve.unreadable else ""
            lines += [f"**{curve.stage}**, model tag `{curve.tag}`, {steps:,} steps{note}", ""]
            lines += [f"![{curve.stage} curves]({file})", ""]
    if "core.svg" in plots:
        lines += ["**CORE**", "", "![CORE per task](core.svg)", ""]
    return lines


def _card_lines(card: Card) -> list[str]:
    lines = [f"## {_cell(card.section)}", "", f"Logged {_clock(card.time)}.", ""]
    for columns, group in itertools.groupby(card.data, key=_columns):
        items = list(group)
        if columns and len(items) > 1:  # rows of one table
            lines += [
                _row(columns),
                "|---" * len(columns) + "|",
                *(_row(item.values()) for item in items),
                "",
            ]
            continue
        for item in items:
            lines += [*_item_lines(item), ""]
    return lines


def _columns(item: Any) -> tuple[str, ...]:
    """The names of a table's row; empty for a card's other items."""
    if not isinstance(item, dict) or "prompt" in item or isinstance(item.get("messages"), list):
        return ()
    return tuple(item)


def _row(values: Iterable[Any]) -> str:
    return "| " + " | ".join(map(_cell, values)) + " |"


def _item_lines(item: Any) -> list[str]:
    if isinstance(item, str):
        return [item]
    if isinstance(item.get("messages"), list):
        messages = [message for message in item["messages"] if isinstance(message, dict)]
        turns = [f"{m.get('role', '?')}: {_content_text(m.get('content', ''))}" for m in messages]
        return _fenced("\n\n".join(turns))
    if "prompt" in item:
        return _fenced(f"{item['prompt']}\n-> {item.get('completion', '')}")
    return ["| | |", "|---|---|", *map(_row, item.items())] if item else []


def _content_text(content: Any) -> str:
    """The text of a message's content: a string or parts (text, python, python_output)."""
    if not isinstance(content, list):
        return str(content)
    return "".join(
        part.get("text", "")
        if part.get("type") == "text"
        else f"[{part.get('type')}: {part.get('text')}]"
        for part in content
    )


def _fenced(text: str) -> list[str]:
    """A fenced block that no text can close."""
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
    marks = r"([\\`*\[\]<>|!#~&])|(?<!\w)(_)|(_)(?!\w)"
    return re.sub(marks, lambda match: "\\" + match.group(0), text)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def render_html(markdown: str, plots: Mapping[str, str]) -> str:
    """The report as one HTML file.

    Plots are inline, raw HTML in the text is shown as text, no other image is loaded.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(_renderer: Any, tokens: Any, index: int, _options: Any, _env: Any) -> str:
        token = tokens[index]
        if (svg := plots.get(token.attrs.get("src"))) is None:
            return html.escape(token.content)
        data = base64.b64encode(svg.encode()).decode()
        return f'<img alt="{html.escape(token.content)}" src="data:image/svg+xml;base64,{data}">'

    parser.add_render_rule("image", image)
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width">'
    head += f"<title>zangchat report</title><style>{STYLE}</style></head>"
    return f"{head}<body>\n{parser.render(markdown)}</body></html>\n"
