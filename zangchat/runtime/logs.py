"""Output: two channels, streams that may break, experiment tracking.

`print0` is for people: the answer of a command, its progress, the next command. It goes to stdout,
on rank 0 only. A module's `logger` is for the log: how the command got there. It goes to stderr
with time and level, on rank 0 from INFO and on other ranks from WARNING; `log0` is for a warning
that all ranks would repeat. rich only draws (bars, tables, the terminal chat).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import uuid
from collections.abc import Iterator
from typing import Any

from zangchat.errors import UserError, explain, reason_of
from zangchat.runtime.processes import get_dist_info

BANNER = r"""
 #####   ###   #   #   ####   ####  #   #   ###   #####
    #   #   #  ##  #  #      #      #   #  #   #    #
   #    #####  # # #  #  ##  #      #####  #####    #
  #     #   #  #  ##  #   #  #      #   #  #   #    #
 #####  #   #  #   #   ####   ####  #   #  #   #    #
"""


class ColoredFormatter(logging.Formatter):
    """Time, level, logger and message; the level in color if `color` is true."""

    COLORS = {
        logging.DEBUG: "\x1b[36m",
        logging.INFO: "\x1b[32m",
        logging.WARNING: "\x1b[33m",
        logging.ERROR: "\x1b[31m",
        logging.CRITICAL: "\x1b[1;31m",
    }
    RESET = "\x1b[0m"

    def __init__(self, color: bool = True):
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        self.color = color

    def format(self, record: logging.LogRecord) -> str:
        if not self.color or record.levelno not in self.COLORS:
            return super().format(record)
        painted = logging.makeLogRecord(record.__dict__)  # other handlers see the record unpainted
        painted.levelname = f"{self.COLORS[record.levelno]}{record.levelname}{self.RESET}"
        return super().format(painted)


class _StderrHandler(logging.StreamHandler):
    """Writes to the sys.stderr of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def setup_default_logging() -> None:
    """Log to stderr: our own modules from INFO (rank 0) or WARNING (elsewhere), others from
    WARNING.

    A second call changes nothing.
    """
    root = logging.getLogger()
    if any(isinstance(handler.formatter, ColoredFormatter) for handler in root.handlers):
        return
    handler = _StderrHandler()
    handler.setFormatter(
        ColoredFormatter(color=sys.stderr.isatty() and not os.environ.get("NO_COLOR"))
    )
    root.addHandler(handler)
    for name in ("zangchat", "scripts", "tasks", "__main__"):
        logging.getLogger(name).setLevel(
            logging.INFO if get_dist_info()[1] == 0 else logging.WARNING
        )


class _SteadyStream:
    """A text stream that drops text that it cannot write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def steady_streams() -> Iterator[None]:
    """Inside the block, output that cannot be written is dropped and does not end the program.

    The terminal may be closed, `| tee` may have died of the same Ctrl-C, a log's disk may be full.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_SteadyStream(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            try:
                stream.flush()
            except OSError:  # Python would try again at its end, and fail with exit code 120
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print0(*values: Any, **kwargs: Any) -> None:
    """print() on rank 0 only."""
    if get_dist_info()[1] == 0:
        print(*values, **{"flush": True, **kwargs})


def log0(message: str, level: int = logging.INFO) -> None:
    """Log on rank 0 only, under the name `zangchat`.

    In a program of your own, call setup_default_logging() first: without it INFO is not shown.
    """
    if get_dist_info()[1] == 0:
        logging.getLogger("zangchat").log(level, message, stacklevel=2)


def print_banner() -> None:
    print0(BANNER)


class DummyWandb:
    """Has the methods of a wandb run and does nothing."""

    id: str | None = None

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass

    def finish(self, *args: Any, **kwargs: Any) -> None:
        pass


class _ContinuedWandb:
    """A wandb run that continues one with the steps up to `last_step`: none is logged twice."""

    def __init__(self, run: Any, last_step: int) -> None:
        self._run, self._last_step = run, last_step

    def log(self, values: dict[str, Any], step: int) -> None:
        if step > self._last_step:
            self._run.log(values, step=step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)


def get_wandb(
    run: str,
    config: dict[str, Any],
    project: str,
    run_id: str | None = None,
    last_step: int = -1,
) -> Any:
    """A wandb run named `run` (for "dummy": $WANDB_RUN), with `config` recorded; its `id` continues
    it later, as `run_id`, with the `last_step` that was logged.

    A DummyWandb if both names are "dummy", and on other ranks than 0. Raises UserError if wandb is
    not installed or cannot start, as without a key.
    """
    if run in ("", "dummy"):
        run = os.environ.get("WANDB_RUN") or "dummy"
    if run == "dummy" or get_dist_info()[1] != 0:
        return DummyWandb()
    with explain(f"--run={run} needs wandb", "install it, or give --run=dummy", ImportError):
        import wandb

    try:
        own_id = run_id or uuid.uuid4().hex[:12]
        started = wandb.init(project=project, name=run, id=own_id, config=config, resume="allow")
    except wandb.Error as error:
        remedy = "run `wandb login`, set WANDB_MODE=offline, or give --run=dummy"
        raise UserError(
            f"--run={run}: wandb did not start ({reason_of(error)}): {remedy}"
        ) from error
    if run_id is None:
        return started
    # the server knows the last step; offline only the caller knows it
    return _ContinuedWandb(started, started.step - 1 if started.step else last_step)
