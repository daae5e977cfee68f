"""The exception that a command turns into one line for its user, and how other errors become
one.
"""

import contextlib
import errno
from collections.abc import Iterator

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


class UserError(Exception):
    """A user's mistake: one sentence that names the flag or file, the problem and the way out."""


def disk_error(error: BaseException | None) -> OSError | None:
    """The error of a full or forbidden disk: this one, or the one that led to it, or None. A
    firewall's EACCES names no file.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error if error.filename or error.errno != errno.EACCES else None
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def explain(problem: str, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these `kinds` into the UserError "<problem> (<reason>): <remedy>"."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{problem} ({reason_of(error)}): {remedy}") from error


def reason_of(error: BaseException) -> str:
    """An error as a phrase of at most 200 characters."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
    if isinstance(error, KeyError):
        return f"{text} is missing"
    return text or type(error).__name__
