"""The seeds of all random draws after initialization."""

from __future__ import annotations

import hashlib
import operator
from typing import Any


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed that depends only on `parts`, e.g. (seed, "shuffle", epoch, index).

    Parts are str, int, float, bool, None or tuples of these; raises TypeError for others, whose
    repr may not be the same elsewhere.
    """
    text = "\x1f".join(_stable(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little") >> 1


def _stable(part: Any) -> str:
    if part is None or isinstance(part, (bool, str)):
        return repr(part)
    if isinstance(part, (tuple, list)):
        return "(" + ",".join(_stable(item) for item in part) + ")"
    if isinstance(part, float):
        return repr(float(part))
    if hasattr(part, "__index__"):  # numpy's integers print differently, and differ by version
        return repr(operator.index(part))
    raise TypeError(f"a seed cannot be derived from {type(part).__name__}")
