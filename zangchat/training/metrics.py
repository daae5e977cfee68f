"""metrics.jsonl: one line of JSON per step and per evaluation."""

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from zangchat.runtime.files import atomic_write

logger = logging.getLogger(__name__)


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with None in place of the numbers that JSON lacks: nan and the infinities."""

    def keep(value: Any) -> bool:
        return not isinstance(value, float) or math.isfinite(value)

    return {key: value if keep(value) else None for key, value in values.items()}


def last_step(path: Path) -> int:
    """The step of the last whole line of a metrics.jsonl; -1 if there is none. A power cut may
    have damaged lines at its end."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if line.endswith(b"\n"):
                return int(json.loads(line)["step"])
    return -1


class MetricsFile:
    """Appends lines to `path` while it is open; None writes nothing (ranks other than 0).

    Lines that a full disk refuses, and lines from before the file is open, are kept and written
    with the next one.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._unwritten = b""
        self._disk_full = False

    @contextlib.contextmanager
    def open(self, known_lines: int) -> Iterator[None]:
        """Cut the file back to the lines that the run's state knows of, those not yet written
        included.
        """
        if self.path is None:
            yield
            return
        known_lines -= self._unwritten.count(b"\n")
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if len(lines) < known_lines:
            missing = known_lines - len(lines)
            logger.warning(f"{self.path} lacks {missing} lines of the steps before this one")
        atomic_write(self.path, b"".join(lines[:known_lines]))
        with open(self.path, "ab", buffering=0) as self._file:
            yield
            self.flush()
        self._file = None

    def write(self, line: Mapping[str, Any]) -> None:
        if self.path is not None:
            self._unwritten += (json.dumps(line) + "\n").encode()
            self.flush()

    def flush(self) -> None:
        """Write the lines that are still waiting, as far as the disk allows."""
        try:
            while self._file is not None and self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._disk_full = False
        except OSError as error:
            if not self._disk_full:
                logger.warning(f"could not write {self.path} ({error}): its lines wait for room")
            self._disk_full = True
