"""Byte-pair encoding, slow and obvious; the crate must train and encode exactly like it."""

from collections import Counter
from collections.abc import Iterable, Mapping

import regex


def split(text: str, pattern: str) -> list[bytes]:
    """The pieces of a text; merges never cross their borders."""
    return [piece.encode("utf-8") for piece in regex.findall(pattern, text)]


def train(texts: Iterable[str], vocab_size: int, pattern: str) -> list[bytes]:
    """Tokens in the order of their ids: the 256 bytes, then one for each merge.

    Each step merges the most frequent pair of neighbours, the smallest pair of ids among equals.
    There are fewer than `vocab_size` tokens if no pair is left.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    words = [
        (list(piece), count)
        for piece, count in Counter(
            piece for text in texts for piece in split(text, pattern)
        ).items()
    ]
    while len(tokens) < vocab_size:
        counts: Counter[tuple[int, int]] = Counter()
        for ids, count in words:
            for pair in zip(ids, ids[1:]):  # noqa: B905 (the last id has no right neighbour)
                counts[pair] += count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [(merge(ids, best, len(tokens)), count) for ids, count in words]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Every occurrence of `pair`, from the left, becomes `new`."""
    out: list[int] = []
    for right in ids:
        if out and (out[-1], right) == pair:
            out[-1] = new
        else:
            out.append(right)
    return out


def encode_piece(piece: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """A piece that is a token stays whole.

    In others, join neighbours while any join: lowest rank first, then leftmost.
    """
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        joins = [
            (ranks[left + right], i)
            for i, (left, right) in enumerate(zip(parts, parts[1:], strict=False))
            if left + right in ranks
        ]
        if not joins:
            return [ranks[part] for part in parts]
        _, i = min(joins)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def encode(text: str, ranks: Mapping[bytes, int], pattern: str) -> list[int]:
    return [token for piece in split(text, pattern) for token in encode_piece(piece, ranks)]
