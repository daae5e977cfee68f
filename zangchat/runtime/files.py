"""Where files live, and how they are written, locked and read."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from zangchat.errors import UserError

if TYPE_CHECKING:
    import filelock


logger = logging.getLogger(__name__)
CHUNK = 1 << 20
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


def get_base_dir() -> Path:
    """Where everything a run makes is kept: $ZANGCHAT_BASE_DIR, else ~/.cache/zangchat. Created when missing; UserError if it cannot be."""
    base = Path(os.environ.get("ZANGCHAT_BASE_DIR") or "~/.cache/zangchat")
    try:
        base = base.expanduser()
        base.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home, as in a container without HOME
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the folder {base} cannot be made ({reason}): set ZANGCHAT_BASE_DIR to one you can write to") from error
    return base


def expand_home(path: str | Path) -> Path:
    """`~/x` as the x of one's home. Raises UserError for a home that nobody has."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} leads nowhere ({error}): write the path without ~") from error


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under its name only when the block ends without an exception: whole, and on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode.replace("w", "x"), **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Replace a file whole or not at all, whenever the process or the machine stops."""
    with atomic_file(path) as file:
        # half a character, as a path may hold, becomes what JSON writes for it
        file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


def sync_folder(folder: Path) -> None:
    """Make a rename durable. Some file systems (CIFS, some FUSE mounts, Windows) cannot sync a folder:
    then the file, which is synced itself, is all that can be had.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
        _warn_once(
            f"{folder} is on a file system that cannot sync folders ({error.strerror}): after a power cut the last files may be missing"
        )
    finally:
        os.close(descriptor)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def file_lock(path: str | Path) -> filelock.FileLock:
    """A lock between processes, on the file `path`. Acquiring it raises UserError on a file system
    without locks, and filelock.Timeout if a timeout is set and another process holds it.
    """
    return _lock_class()(path)


@functools.cache
def _lock_class() -> type[filelock.FileLock]:
    import filelock

    class Lock(filelock.FileLock):  # type: ignore[misc, valid-type]
        def _acquire(self) -> None:
            try:
                super()._acquire()
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                raise UserError(
                    f"{self.lock_file} cannot be locked ({error.strerror}): set ZANGCHAT_BASE_DIR to a folder on a disk with locks"
                ) from error

    return Lock


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def read_jsonl(path: Path, kinds: tuple[type, ...] = (dict,)) -> Iterator[tuple[str, Any]]:
    """("file:line", value) of every line that is not blank. Raises UserError naming a line that is no JSON, or none of these kinds."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}:{number} is not JSON ({error.msg}); each line must be one JSON object") from error
                if not isinstance(value, kinds):
                    raise UserError(f"{path}:{number} is a JSON {type(value).__name__}; each line must be one JSON object")
                yield f"{path}:{number}", value
