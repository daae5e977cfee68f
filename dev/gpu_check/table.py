"""The rows of a check as a table on the terminal, and as text for an issue."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
HEAD = ("part", "what", "measured", "expected", "share", "")


def cells(row: Row) -> tuple[str, ...]:
    verdict = {True: "ok", False: "WRONG"}.get(row.get("ok"), "")  # type: ignore[arg-type]
    share = f"{row['share']:.0%}" if row.get("share") is not None else ""
    unit = row.get("unit", "")
    measured = " ".join(filter(None, (number(row.get("value")), unit)))
    remark = " ".join(filter(None, (verdict, row.get("note", ""))))
    return row["part"], row["name"], measured, number(row.get("expected")), share, remark


def number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def table(rows: Sequence[Row]) -> str:
    lines = [HEAD, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD) - 1)]
    return "\n".join(
        "  ".join(
            [*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[-1]]
        )
        .rstrip()
        .partition("\n")[0]
        for line in lines
    )


def issue(rows: Sequence[Row]) -> str:
    """Markdown: title, failures first, all rows, and how they were made."""
    found = {row["name"]: row.get("value") for row in rows if row["part"] == "machine"}
    device = found.get("device") or "no GPU"
    wrong = [row for row in rows if row.get("ok") is False]
    lines = [f"# gpu_check: {device}, torch {found.get('torch')}, commit {found.get('commit')}", ""]
    lines += [f"{len(wrong)} of {len(rows)} rows are wrong or could not be measured."]
    lines += [
        f"- {row['part']}, {row['name']}: {row.get('note', '')}".rstrip(": ") for row in wrong
    ]
    lines += ["", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for row in rows:
        clean = [cell.replace("|", "/").replace("\n", " ") for cell in cells(row)]
        lines.append("| " + " | ".join(clean) + " |")
    return "\n".join([*lines, "", "Made by `python -m dev.gpu_check`."])
