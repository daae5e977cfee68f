from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

VERSION: int

class ArrowArray(Protocol):
    """Strings (string or large_string) as Arrow memory: pyarrow.Array..."""

    def __arrow_c_array__(self, requested_schema: Any = None) -> tuple[Any, Any]: ...

class ArrowStream(Protocol):
    """The same in chunks: pyarrow.ChunkedArray..."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any: ...

class Tokenizer:
    def __init__(self) -> None: ...
    @staticmethod
    def from_ranks(ranks: list[tuple[bytes, int]], pattern: str | None = None) -> Tokenizer: ...
    def train_from_iterator(
        self,
        iterator: Iterable[str | ArrowArray | ArrowStream],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        progress: Callable[[int], object] | None = None,
        num_threads: int | None = None,
    ) -> None: ...
    def encode(self, text: str) -> list[int]: ...
    def batch_encode(
        self, texts: Iterable[str] | ArrowArray | ArrowStream, num_threads: int | None = None
    ) -> list[list[int]]: ...
    def encode_documents(
        self,
        texts: Iterable[str] | ArrowArray | ArrowStream | Buffer,
        num_threads: int | None = None,
        offsets: npt.ArrayLike | None = None,
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]: ...
    def decode_documents(
        self, ids: npt.ArrayLike, offsets: npt.ArrayLike, num_threads: int | None = None
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]: ...
    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str: ...
    def decode_bytes(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> bytes: ...
    def split(self, text: str) -> list[str]: ...
    @property
    def vocab_size(self) -> int: ...
    def get_pattern(self) -> str: ...
    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]: ...
