"""The progress of a long job: a live line at the bottom of a terminal, else a plain line every few
seconds.
"""

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    import rich.progress

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_FRAMES = 0.1


def in_words(seconds: float) -> str:
    """3725 -> "1h02m"; 65 -> "1m05s"."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


class Progress:
    """`with Progress("sft", total) as progress: progress.update(done, "loss 1.234")`; silent unless
    `shown` (other ranks).
    """

    def __init__(self, label: str, total: int, done: int = 0, shown: bool = True) -> None:
        self.label, self.total, self.shown = label, total, shown
        self.start: tuple[float, int] | None = None  # (clock, done) when the pace began to count
        self.last_line = -float("inf")
        self.bar: rich.progress.Progress | None = None
        console = Console()
        if shown and console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Bar(*columns, console=console, auto_refresh=False)
            self.task = self.bar.add_task(label, total=total, completed=done, text="")

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done: int, text: str) -> None:
        if not self.shown:
            return
        now = time.monotonic()
        # the first unit pays for compiling and warming up, so the pace is that of the later ones
        if self.start is None:
            self.start = (now, done)
        left = self._seconds_left(now, done)
        text = text if left is None else f"{text} | ETA {in_words(left)}"
        if self.bar:
            # drawing costs more than a tiny step
            redraw = now - self.last_line >= SECONDS_BETWEEN_FRAMES or done >= self.total
            self.bar.update(self.task, completed=done, text=text, refresh=redraw)
            self.last_line = now if redraw else self.last_line
        elif now - self.last_line >= SECONDS_BETWEEN_LINES or done >= self.total:
            self.last_line = now
            print(f"{self.label} {done}/{self.total} | {text}", flush=True)

    def _seconds_left(self, now: float, done: int) -> float | None:
        assert self.start is not None
        since, first = self.start
        return (now - since) / (done - first) * (self.total - done) if done > first else None
