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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import filelock

from zangchat.errors import UserError, explain

if TYPE_CHECKING:
    import filelock


logger = logging.getLogger(__name__)
CHUNK = 1 << 20
BOM = b"\xef\xbb\xbf"  # Windows programs put it before UTF-8
PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # ending: its name in pyarrow
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


def get_base_dir() -> Path:
    """The folder of all that runs write: $ZANGCHAT_BASE_DIR, else ~/.cache/zangchat.

    It is created if missing. Raises UserError if it cannot be.
    """
    base = Path(os.environ.get("ZANGCHAT_BASE_DIR") or "~/.cache/zangchat")
    remedy = "set ZANGCHAT_BASE_DIR to one you can write to"
    # expanduser raises RuntimeError if the user has no home, as in a container without HOME
    with explain(f"the folder {base} cannot be made", remedy, OSError, RuntimeError):
        base = base.expanduser()
        base.mkdir(parents=True, exist_ok=True)
    return base


def expand_home(path: str | Path) -> Path:
    """Replace a leading `~`. Raises UserError if the home directory cannot be determined."""
    with explain(f"{path} leads nowhere", "write the path without ~", RuntimeError):
        return Path(path).expanduser()


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file that gets its name only if the block ends without an exception; then it is
    synced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
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
        # a lone surrogate, as a path may hold, becomes the escape that JSON writes for it
        file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


def open_for_lines(path: str | Path) -> IO[bytes]:
    """Open a file to append lines. If its last one has no end, as some editors leave it, it gets
    one."""
    file = open(path, "ab")  # noqa: SIM115, the caller closes it
    with contextlib.suppress(OSError), open(path, "rb") as before:  # if seekable
        before.seek(-1, os.SEEK_END)
        if before.read(1) != b"\n":
            file.write(b"\n")
    return file


def sync_folder(folder: Path) -> None:
    """Make a rename durable.

    Some file systems (CIFS, some FUSE mounts, Windows) cannot sync a folder: a warning, then.
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
            f"{folder} is on a file system that cannot sync folders ({error.strerror}): after a "
            "power cut the last files may be missing"
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
    class Lock(filelock.FileLock):  # type: ignore[misc, valid-type]
        def _acquire(self) -> None:
            try:
                super()._acquire()
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                raise UserError(
                    f"{self.lock_file} cannot be locked ({error.strerror}): set ZANGCHAT_BASE_DIR "
                    "to a folder on a disk with locks"
                ) from error

    return Lock


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def unpacked_name(path: Path) -> Path:
    """The name without the ending of a compressed file: texts.jsonl of texts.jsonl.gz."""
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def unpacked(path: Path) -> Path:
    """The file itself, or of a compressed one a copy in <base>/unpacked, made at the first use:
    readers go to and fro in a file. Raises UserError for a damaged one."""
    if path.suffix.lower() not in PACKED:
        return path
    status = path.stat()
    facts = f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"
    key = hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    copy = get_base_dir() / "unpacked" / f"{key}-{unpacked_name(path).name}"
    if not copy.exists():
        copy.parent.mkdir(exist_ok=True)
        with file_lock(copy.with_name(f".{key}.lock")):  # the other ranks wait for it
            if not copy.exists():
                _unpack(path, copy)
    return copy


def _unpack(path: Path, copy: Path) -> None:
    import pyarrow

    logger.info("unpacking %s to %s", path, copy)
    kind, remedy = PACKED[path.suffix.lower()], "put an intact copy in its place"
    with atomic_file(copy) as file, pyarrow.input_stream(str(path), compression=kind) as stream:
        while True:
            # a disk that is full is another error than a damaged file
            with explain(f"{path} cannot be unpacked", remedy, pyarrow.ArrowException, OSError):
                block = stream.read(CHUNK)
            if not block:
                return
            file.write(block)


class LeftOut:
    """The rows that --skip_bad_rows leaves out; one that is read again counts once."""

    def __init__(self) -> None:
        self.first: UserError | None = None
        self._rows: set[int] = set()

    def add(self, error: UserError) -> None:
        self.first = self.first or error
        self._rows.add(hash(str(error)))  # it names the place

    def __len__(self) -> int:
        return len(self._rows)


def converted(
    rows: Iterable[tuple[str, Any]],
    convert: Callable[[Any, str], Any],
    left_out: LeftOut | None = None,
) -> Iterator[tuple[str, Any]]:
    """(place, convert(row, place)) of each; a UserError is raised, or with `left_out` noted there
    and the row left out."""
    for place, row in rows:
        try:
            value = convert(row, place)
        except UserError as error:
            if left_out is None:
                raise
            left_out.add(error)
        else:
            yield place, value


def read_jsonl(
    path: Path,
    kinds: tuple[type, ...] = (dict,),
    *,
    start: int = 0,
    end: int | None = None,
    left_out: LeftOut | None = None,
) -> Iterator[tuple[str, Any]]:
    """(place, value) of each line in bytes [start, end) of a file, as unpacked; blank lines are
    skipped.

    Both offsets must be line starts. The place is "file:line", or tells the line after a byte.
    Raises UserError, naming the place, for a line that is not JSON or not of these `kinds`, unless
    there is a `left_out` for it.
    """

    def parse(line: bytes, place: str) -> Any:
        return _parse_json(line, place, kinds)

    return converted(_read_lines(path, start, end), parse, left_out)


def _read_lines(path: Path, start: int, end: int | None) -> Iterator[tuple[str, bytes]]:
    with open(unpacked(path), "rb") as file:
        file.seek(start)
        number, position = 0, start
        while (end is None or position < end) and (line := file.readline()):
            number += 1
            if position == 0:
                line = line.removeprefix(BOM)
            position = file.tell()
            if line.strip():
                yield (
                    f"{path}:{number}" if not start else f"{path}:{number} after byte {start}",
                    line,
                )


def _parse_json(line: bytes, place: str, kinds: tuple[type, ...]) -> Any:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        # also an integer of 5,000 digits, or deep nesting
        hint = (
            "; of a JSON array, each item goes on a line" if line.lstrip().startswith(b"[") else ""
        )
        reason = getattr(error, "msg", None) or str(error)
        raise UserError(
            f"{place} is not JSON ({reason}); each line must be one JSON object{hint}"
        ) from error
    if not isinstance(value, kinds):
        raise UserError(
            f"{place} is a JSON {type(value).__name__}; each line must be one JSON object"
        )
    return value
