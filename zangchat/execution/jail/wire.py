"""Literals on a pipe between the processes of the jail.

A value is a letter, a decimal size, a colon, and that many bytes or that many values. Decoding
makes nothing but literals, in time and memory proportional to the bytes.
"""

from __future__ import annotations

import os
import struct

TYPE_CHECKING = False  # typing takes longer to import than everything else here
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_FRAME = 4 * 2**20  # bytes of one message


def _complex(data: bytes) -> complex:
    real, imaginary = data.decode().split(" ")
    return complex(float.fromhex(real), float.fromhex(imaginary))


def _float(data: bytes) -> float:
    return float.fromhex(data.decode())


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


SCALARS: tuple[tuple[Any, bytes, Callable[[Any], bytes], Callable[[bytes], Any]], ...] = (
    # type, letter, to bytes, from bytes; integers in hexadecimal: decimal takes quadratic time
    (int, b"i", lambda value: int.__format__(value, "x").encode(), lambda data: int(data, 16)),
    (float, b"f", lambda value: float.hex(value).encode(), _float),
    (complex, b"c", lambda value: f"{value.real.hex()} {value.imag.hex()}".encode(), _complex),
    (str, b"s", lambda value: str.encode(value, "utf-8", "surrogatepass"), _text),
    (bytes, b"b", bytes, bytes),
    (bytearray, b"a", bytes, bytearray),
)
CONTAINERS: tuple[tuple[Any, bytes], ...] = (
    *((list, b"l"), (tuple, b"t"), (set, b"e"), (frozenset, b"z")),
    (dict, b"d"),
)
CONSTANTS = ((None, b"N"), (True, b"T"), (False, b"F"), (Ellipsis, b"E"))


def encode(value: Any) -> bytes:
    """A literal as bytes: numbers, text, bytes, None, and lists, tuples, sets and dicts of them.

    An instance of a subclass becomes its literal base type. Raises TypeError for anything else.
    """
    parts: list[bytes] = []
    _encode(value, parts.append)
    return b"".join(parts)


def _encode(value: Any, add: Callable[[bytes], None]) -> None:
    for constant, letter in CONSTANTS:
        if value is constant:
            add(letter + b"0:")
            return
    for kind, letter, to_bytes, _ in SCALARS:
        if isinstance(value, kind):
            data = to_bytes(value)
            add(b"%s%d:" % (letter, len(data)))
            add(data)
            return
    for kind, letter in CONTAINERS:
        if isinstance(value, kind):
            items = list(kind.__iter__(value))
            if kind is dict:
                items = [part for pair in dict.items(value) for part in pair]
            add(b"%s%d:" % (letter, len(items)))
            for item in items:
                _encode(item, add)
            return
    raise TypeError(f"an object of type {type(value).__name__} is no literal")


def decode(data: bytes) -> Any:
    """The inverse of `encode`.

    Raises ValueError or TypeError for anything else, RecursionError for values nested too deeply.
    """
    value, end = _decode(data, 0)
    if end != len(data):
        raise ValueError("a message has something after its end")
    return value


def _decode(data: bytes, start: int) -> tuple[Any, int]:
    colon = data.index(b":", start, start + 20)
    letter, size = data[start : start + 1], int(data[start + 1 : colon])
    start = colon + 1
    for constant, own in CONSTANTS:
        if letter == own:
            return constant, start
    if size < 0 or size > len(data) - start:
        raise ValueError("a message is cut short")
    for _, own, _, from_bytes in SCALARS:
        if letter == own:
            return from_bytes(data[start : start + size]), start + size
    for kind, own in CONTAINERS:
        if letter == own:
            items = []
            for _ in range(size):
                item, start = _decode(data, start)
                items.append(item)
            if kind is dict:
                return dict(zip(items[::2], items[1::2], strict=True)), start
            return kind(items), start
    raise ValueError(f"{letter!r} is no kind of value")


def send(fd: int, value: Any) -> None:
    data = encode(value)
    if len(data) > MAX_FRAME:
        size = len(data) >> 20
        raise ValueError(f"a value of {size} MiB is more than passes between the processes")
    data = struct.pack(">Q", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> Any:
    """The next value from a pipe. Raises EOFError at its end."""
    (size,) = struct.unpack(">Q", _read(fd, 8))
    if size > MAX_FRAME:
        raise ValueError(f"a message announces {size >> 20} MiB")
    return decode(_read(fd, size))


def _read(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 16))
        if not part:
            raise EOFError("the other process is gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
