"""The exception that a command turns into one line for its user, and how other errors become
one.
"""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """A user's mistake: one sentence that names the flag or file, the problem and the way out."""


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
