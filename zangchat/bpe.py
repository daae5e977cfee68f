"""Byte-level BPE by the crate rustbpe: train on text, and encode text as ids.

On machines that cannot build the crate, PyPI's package of the same name trains and tiktoken
encodes: the same tokens, slower.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import tiktoken

import rustbpe
from zangchat.errors import UserError

if TYPE_CHECKING:
    import pyarrow

    Text: TypeAlias = str | pyarrow.Array | pyarrow.ChunkedArray

logger = logging.getLogger(__name__)
VERSION = 1  # of the crate, as in its py.rs: an older build may take other arguments


@functools.cache
def is_crate() -> bool:
    """Whether `rustbpe` is this project's crate as it is now, not PyPI's package."""
    if not hasattr(rustbpe, "Tokenizer"):  # the source folder, found from the repository's root
        raise UserError("the package rustbpe is not installed: run `bash dev/setup.sh`")
    if getattr(rustbpe, "VERSION", None) == VERSION:
        return True
    remedy = "with cargo, `bash dev/setup.sh` builds it"
    logger.info("no up-to-date crate rustbpe: tiktoken encodes (slower, the same ids); %s", remedy)
    return False


def train(
    text_iterator: "Iterable[Text]",
    vocab_size: int,
    pattern: str,
    progress: Callable[[int], None] | None,
) -> list[bytes]:
    """At most `vocab_size` tokens in the order of their ranks, see RustBPETokenizer."""
    found = False

    def counted() -> "Iterator[Text]":
        nonlocal found
        for item in text_iterator:
            found = found or len(item) > 0
            if isinstance(item, str):
                yield repair_surrogates(item)
            elif is_crate():
                yield item
            else:
                yield from item.drop_null().to_pylist()

    trainer = rustbpe.Tokenizer()
    options: dict[str, Any] = {"progress": progress} if is_crate() else {}
    trainer.train_from_iterator(counted(), vocab_size, pattern=pattern, **options)
    if not found:
        raise ValueError("there is no text to train on")
    return by_rank({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})


def by_rank(ranks: dict[bytes, int]) -> list[bytes]:
    """The tokens in the order of their ranks. Raises ValueError if these are not 0, 1, 2, ..."""
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its ranks have gaps")
    return sorted(ranks, key=ranks.__getitem__)


def make_encoder(tokens: Sequence[bytes], pattern: str, special_ids: dict[str, int]) -> Any:
    """The crate's encoder of these ranks, else a TiktokenEncoder."""
    if is_crate():
        return rustbpe.Tokenizer.from_ranks([(token, i) for i, token in enumerate(tokens)], pattern)
    return TiktokenEncoder(tiktoken_encoding(tokens, pattern, special_ids))


def tiktoken_encoding(
    tokens: Sequence[bytes], pattern: str, special_ids: dict[str, int]
) -> tiktoken.Encoding:
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding(
        "zangchat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_ids
    )


class TiktokenEncoder:
    """The methods of the crate's encoder, through tiktoken."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def batch_encode(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def encode_documents(
        self, texts: Sequence[str], num_threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        encoded = self.batch_encode(texts, num_threads)
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.uint32), offsets


def encode_repaired(encode: Callable[..., Any], text: Any, *options: Any) -> Any:
    """encode(text, *options), with repaired surrogates if the text, or one of a list, has any."""
    try:
        return encode(text, *options)
    except UnicodeEncodeError:
        repair = repair_surrogates
        return encode(repair(text) if isinstance(text, str) else [*map(repair, text)], *options)


def repair_surrogates(text: str) -> str:
    """Join surrogate pairs (of a careless \\u escape), replace lone surrogates by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
