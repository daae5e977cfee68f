"""Downloads that are verified, and attempts that are repeated."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from zangchat.errors import UserError, disk_error
from zangchat.runtime.files import CHUNK, file_lock, file_sha256, get_base_dir, sync_folder

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_RETRY_AFTER = 300.0  # seconds, of a Retry-After header
DOWNLOAD_TRIES = 5
DOWNLOAD_TIMEOUT = 60.0  # seconds without a byte


def download_file_with_lock(
    url: str,
    filename: str,
    postprocess_fn: Callable[[Path], None] | None = None,
    sha256: str | None = None,
) -> Path:
    """Fetch `url` to <base>/filename once for all processes; returns the path.

    `postprocess_fn(path)` gets the complete download before that has its name, so that a present
    file was also processed. Raises UserError if the server refuses, or if DOWNLOAD_TRIES attempts
    gave no complete file with that sha256.
    """
    path = get_base_dir() / filename
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_intact(path, sha256):
        return path
    with file_lock(f"{path}.lock"):
        if _is_intact(path, sha256):  # another process fetched it while this one waited
            return path
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
        try:
            _download(url, temporary, path, sha256)
            if postprocess_fn is not None:
                postprocess_fn(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _is_intact(path: Path, sha256: str | None) -> bool:
    if not path.exists():
        return False
    if sha256 is None or file_sha256(path) == sha256.lower():
        return True
    logger.warning("%s is not the expected file (its sha256 differs): fetching it again", path)
    return False


class Failure(NamedTuple):
    """A failed attempt: the reason, whether a retry is pointless, and the requested wait
    (seconds).
    """

    reason: str
    final: bool
    wait: float


def retry_after(headers: Any) -> float:
    """The seconds of a Retry-After header, at most MAX_RETRY_AFTER; 0 without one."""
    value = headers.get("Retry-After", "")
    return min(float(value), MAX_RETRY_AFTER) if value.isdecimal() else 0.0


def is_refusal(status: int) -> bool:
    """Whether this HTTP status says no, rather than not now."""
    return 400 <= status < 500 and status not in (408, 429)


def with_retries(
    label: str,
    attempt: Callable[[], T],
    judge: Callable[[Exception], Failure],
    *,
    tries: int,
    first_wait: float,
) -> T:
    """attempt(), repeated after temporary failures, with waits that double.

    Raises the last error, or one that `judge` calls final.
    """
    for number in range(1, tries):
        try:
            return attempt()
        except Exception as error:
            failure = judge(error)
            if failure.final:
                raise
            wait = max(first_wait * 2 ** (number - 1), failure.wait)
            logger.warning(
                "%s: %s; trying again in %.0f s (%d of %d)",
                label,
                failure.reason,
                wait,
                number + 1,
                tries,
            )
            time.sleep(wait)
    return attempt()


def _download(url: str, temporary: Path, path: Path, sha256: str | None) -> None:
    def attempt() -> None:
        if problem := _download_once(url, temporary, sha256):
            raise OSError(problem)

    try:
        with_retries(url, attempt, _judge_download, tries=DOWNLOAD_TRIES, first_wait=1.0)
    except ValueError as error:
        raise UserError(
            f"could not download {url} ({error}): an address begins with https:// or file://"
        ) from error
    except (
        OSError,
        HTTPException,
    ) as error:  # URLError, timeouts and broken connections are OSErrors
        if disk_error(error):
            raise
        problem = _judge_download(error).reason
        raise UserError(
            f"could not download {url}: {problem}; check the network and run this again, or put "
            f"the file at {path} yourself"
        ) from error


def _judge_download(error: Exception) -> Failure:
    if isinstance(error, urllib.error.HTTPError):
        return Failure(
            f"the server answered {error.code} {error.reason}",
            is_refusal(error.code),
            retry_after(error.headers),
        )
    temporary = isinstance(error, (OSError, HTTPException)) and not disk_error(error)
    return Failure(str(error) or type(error).__name__, not temporary, 0.0)


def _download_once(url: str, temporary: Path, sha256: str | None) -> str:
    """One attempt; returns the problem with the received bytes, "" if they are complete."""
    digest, length = hashlib.sha256(), 0
    request = urllib.request.Request(url, headers={"User-Agent": "zangchat"})
    with (
        urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response,
        open(temporary, "wb") as file,
    ):
        announced = response.headers.get("Content-Length")
        while block := response.read(CHUNK):
            file.write(block)
            digest.update(block)
            length += len(block)
        file.flush()
        os.fsync(file.fileno())
    if announced is not None and length != int(announced):
        return f"{length} bytes came of {announced}"
    if sha256 is not None and digest.hexdigest() != sha256.lower():
        return f"the sha256 of what came is {digest.hexdigest()}, not {sha256.lower()}"
    return ""
