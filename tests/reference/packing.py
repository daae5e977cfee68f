"""The slow, obvious twins of the packing in zangchat.dataloader: lists, one token at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

LOOK_AHEAD = 16


@dataclass
class Waiting:
    tokens: list[tuple[int, bool]]  # (id, learn) still to be placed
    splittable: bool
    begun: bool = False


def pack(
    documents: Sequence[tuple[list[int], list[bool], bool]], width: int, bos: int
) -> list[list[tuple[int, bool]]]:
    """(ids, learn, splittable) documents -> rows of `width` (id, learn) pairs."""
    unread = [
        Waiting(list(zip(ids, learn, strict=True))[: None if splittable else width], splittable)
        for ids, learn, splittable in documents
    ]
    waiting: list[Waiting] = []
    rows = []
    while unread or waiting:
        row: list[tuple[int, bool]] = []
        while len(row) < width:
            room = width - len(row)
            while (
                unread
                and len(waiting) < LOOK_AHEAD
                and not any(fits(entry, room) for entry in waiting)
            ):
                waiting.append(unread.pop(0))
            oldest = next((entry for entry in waiting if fits(entry, room)), None)
            if oldest is None:
                break
            if oldest.begun:
                row.append((bos, False))
            oldest.begun = True
            while oldest.tokens and len(row) < width:
                row.append(oldest.tokens.pop(0))
            if not oldest.tokens:
                waiting = [entry for entry in waiting if entry is not oldest]
        rows.append(row + [(bos, False)] * (width - len(row)))
    return rows


def fits(entry: Waiting, room: int) -> bool:
    """Whether `room` suffices: a continuation needs <|bos|> and a token, a conversation all."""
    if not entry.splittable:
        return len(entry.tokens) <= room
    return room >= (2 if entry.begun else 1)


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Rows of item numbers: each item goes into the first row that has room for it."""
    rows: list[list[int]] = []
    for item, length in enumerate(lengths):
        for row in rows:
            if sum(lengths[other] for other in row) + length <= width:
                row.append(item)
                break
        else:
            rows.append([item])
    return rows
