from collections.abc import Sequence
from typing import Any

VERSION: int
IS_FAST: bool

class Step:
    def __init__(
        self,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        hidden: int,
        vocab_size: int,
        outputs: int,
        eps: float,
        cap: float,
        key_offset: bool,
        embedding: Any,
        layers: Sequence[Sequence[Any]],
        values: Sequence[Any],
        head: Any,
        rotary: Any,
    ) -> None: ...
    def __call__(
        self,
        tokens: Sequence[int],
        rows: Sequence[int],
        lengths: Sequence[int],
        storage: Any,
        out: Any,
        threads: int,
    ) -> None: ...
