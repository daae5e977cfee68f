"""Signals that stop a run after the step under way."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType

from zangchat.runtime.logs import print0

# SIGHUP: the terminal was closed. SIGUSR1: schedulers send it some time before the end.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
STOPPING = [number for name in NAMES if (number := getattr(signal, name, None)) is not None]
# torchrun sends a Ctrl-C to its processes once more; within this time it is not a second one
RELAY_SECONDS = 5.0


class StopSignals:
    """Inside the `with` block the first signal of STOPPING is noted in `received`; a second Ctrl-C
    raises KeyboardInterrupt at once. Only the main thread can set handlers; others note nothing."""

    def __init__(self, world_size: int = 1) -> None:
        self.received = 0  # number of the signal; 0 = none
        self._world_size, self._received_at = world_size, 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if not _is_ignored(number):
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
            # inside a print that waits for its reader there can be no other one
            with contextlib.suppress(RuntimeError):
                print0("\nstopping after this step (Ctrl-C again: at once, losing unsaved steps)")
            return
        relayed = self._world_size > 1 and now - self._received_at <= RELAY_SECONDS
        if number == signal.SIGINT and not relayed:
            raise KeyboardInterrupt


def _is_ignored(number: signal.Signals) -> bool:
    """Whether the process was started to ignore SIGHUP, as by nohup. torchrun forwards the signal
    nevertheless before it kills its processes, so under torchrun it counts."""
    if number != getattr(signal, "SIGHUP", None) or "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    return signal.getsignal(number) is signal.SIG_IGN
