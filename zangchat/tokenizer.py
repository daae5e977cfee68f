"""The tokenizer: byte-level BPE trained and run by the crate rustbpe, and the grammar of chat.

A tokenizer is data: a split pattern, the bytes of each token in the order of their ranks, and special tokens, whose ids follow. On disk:

    tokenizer.json   {"format", "version", "fingerprint", "pattern", "special_tokens": [name...], "facts": {...}, "ranks": [base64...]}
    token_bytes.pt   int32 (V,): the length in bytes of each token, 0 for special tokens; what bits per byte need

A conversation {"messages": [{"role", "content"}...]} becomes

    <|bos|> (<|user_start|> text <|user_end|> <|assistant_start|> parts <|assistant_end|>)*

where a part is text, <|python_start|> call <|python_end|> or <|output_start|> result <|output_end|>, and a system message is put before the
first user message. Only this module's renderer writes special tokens: text is always encoded as ordinary text, so nobody can type one.
"""

import base64
import binascii
import functools
import hashlib
import io
import json
import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

import rustbpe
from zangchat.conversation import messages_of, turns
from zangchat.errors import UserError
from zangchat.runtime.files import atomic_write, get_base_dir

if TYPE_CHECKING:
    import pyarrow
    import tiktoken
    import torch

SPECIAL_TOKENS = (
    "<|bos|>",  # in front of every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # a tool call
    "<|python_end|>",
    "<|output_start|>",  # what the tool answered
    "<|output_end|>",
)
# GPT-4's pattern, but numbers go in groups of up to two digits: three would spend a fifth of a small vocabulary on numbers.
SPLIT_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
FORMAT = "zangchat-tokenizer"
VERSION = 1
TOKENIZER_FILE = "tokenizer.json"
TOKEN_BYTES_FILE = "token_bytes.pt"
TRAIN = ("python", "-m", "scripts.tok_train")

logger = logging.getLogger(__name__)


# ---- text to ids ----------------------------------------------------------------------------------------------------


class _TiktokenEncoder:
    """What the crate's encoder does, through tiktoken: the same ids, slower."""

    def __init__(self, encoding: "tiktoken.Encoding") -> None:
        self._encoding = encoding

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def batch_encode(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def encode_documents(self, texts: Sequence[str], num_threads: int) -> tuple[np.ndarray, np.ndarray]:
        encoded = self.batch_encode(texts, num_threads)
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in encoded], out=offsets[1:])
        return np.fromiter((i for ids in encoded for i in ids), dtype=np.uint32, count=int(offsets[-1])), offsets


@functools.cache
def _crate_encodes() -> bool:
    """Whether `rustbpe` is this project's crate; PyPI's package stands in where it cannot be built: it trains alike, but takes no ranks."""
    if not hasattr(rustbpe, "Tokenizer"):  # the source folder, found from the top of the repository
        raise UserError("the package rustbpe is not installed: run `bash dev/setup.sh`")
    if hasattr(rustbpe.Tokenizer, "from_ranks"):
        return True
    logger.info("the crate rustbpe is not built here: training with PyPI's rustbpe, encoding with tiktoken (slower, the same tokens)")
    return False


def by_rank(ranks: dict[bytes, int]) -> list[bytes]:
    """The tokens in the order of their ranks. Raises ValueError where these are not 0, 1, 2, ..."""
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its ranks have gaps")
    return sorted(ranks, key=ranks.__getitem__)


def whole_characters(text: str) -> str:
    """Surrogate pairs joined, lone surrogates replaced by U+FFFD: text that came through a careless \\u escape still has an encoding."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# ---- the tokenizer --------------------------------------------------------------------------------------------------


class RustBPETokenizer:
    """Mergeable ranks with their pattern, and special tokens after them.

    `token_bytes_of[i]` are the bytes of mergeable token i; `facts` is JSON about how it was made and does not influence encoding.
    Raises ValueError for ranks or names that make no tokenizer.
    """

    def __init__(
        self,
        token_bytes_of: Sequence[bytes],
        pattern: str = SPLIT_PATTERN,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        facts: dict[str, Any] | None = None,
    ) -> None:
        missing = [name for name in SPECIAL_TOKENS if name not in special_tokens]
        if missing or len(set(special_tokens)) != len(special_tokens):
            raise ValueError(f"special tokens must be distinct and include {', '.join(missing or SPECIAL_TOKENS)}")
        if len(set(token_bytes_of)) != len(token_bytes_of) or not set(token_bytes_of) >= {bytes([i]) for i in range(256)}:
            raise ValueError("the ranks must be distinct and include all 256 single bytes")
        self.pattern = pattern
        self.facts = dict(facts or {})
        self._tokens = list(token_bytes_of)
        self._special_ids = {name: len(self._tokens) + i for i, name in enumerate(special_tokens)}
        self._all_tokens = [*self._tokens, *(name.encode() for name in special_tokens)]
        self._bos = self._special_ids["<|bos|>"]
        self._encoder: rustbpe.Tokenizer | _TiktokenEncoder
        if _crate_encodes():
            self._encoder = rustbpe.Tokenizer.from_ranks([(token, i) for i, token in enumerate(self._tokens)], pattern)
        else:
            self._encoder = _TiktokenEncoder(self.enc)

    @functools.cached_property
    def enc(self) -> "tiktoken.Encoding":
        """The same tokenizer as tiktoken's, for tools that want one."""
        import tiktoken

        ranks = {token: i for i, token in enumerate(self._tokens)}
        return tiktoken.Encoding(name="zangchat", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self._special_ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of all that decides the ids of a text."""
        content = [self.pattern, list(self._special_ids), [token.hex() for token in self._tokens]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    # -- making one

    @classmethod
    def train_from_iterator(
        cls,
        text_iterator: "Iterable[str | pyarrow.Array | pyarrow.ChunkedArray]",
        vocab_size: int,
        pattern: str = SPLIT_PATTERN,
        facts: dict[str, Any] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> "RustBPETokenizer":
        """Train on the strings of an iterator, or on Arrow arrays of them, whose memory the crate reads in place; `vocab_size` counts the
        special tokens, and is not reached where the text has nothing left to merge. `progress(merges_done)` is called a few times a second
        while merging. Raises ValueError when there is no text at all.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size must be at least {smallest} (256 bytes and {len(SPECIAL_TOKENS)} special tokens), not {vocab_size}"
            )
        crate, found = _crate_encodes(), False

        def counted() -> "Iterator[str | pyarrow.Array | pyarrow.ChunkedArray]":
            nonlocal found
            for item in text_iterator:
                found = found or len(item) > 0
                if isinstance(item, str):
                    yield item if item.isascii() else whole_characters(item)
                elif crate:
                    yield item
                else:
                    yield from item.drop_null().to_pylist()

        trainer = rustbpe.Tokenizer()
        options: dict[str, Any] = {"progress": progress} if crate else {}
        trainer.train_from_iterator(counted(), vocab_size - len(SPECIAL_TOKENS), pattern=pattern, **options)
        if not found:
            raise ValueError("there is no text to train on")
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        return cls([bytes(token) for token, _ in ranks], pattern, facts=facts)

    @classmethod
    def from_pretrained(cls, tiktoken_name: str) -> "RustBPETokenizer":
        """tiktoken's ranks and pattern of that name ("gpt2", "cl100k_base"...; it may download them), with our own special tokens."""
        import tiktoken

        encoding = tiktoken.get_encoding(tiktoken_name)
        return cls(by_rank(encoding._mergeable_ranks), encoding._pat_str, facts={"tiktoken": tiktoken_name})

    @classmethod
    def from_directory(cls, tokenizer_dir: str | Path, *flags: str) -> "RustBPETokenizer":
        """Load what `save` wrote.

        Raises UserError naming the file that is missing or damaged, and the command that makes it: scripts.tok_train with `flags`.
        """
        path = Path(tokenizer_dir) / TOKENIZER_FILE
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}: run `{shlex.join([*TRAIN, *flags])}`")
        try:
            return cls._from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            remedy = f"put an intact copy there, or run `{shlex.join([*TRAIN, *flags, '--overwrite'])}`"
            raise UserError(f"{path} is no usable tokenizer ({reason}): {remedy}") from error

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> "RustBPETokenizer":
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f'its "format" is not "{FORMAT}"')
        if data["version"] != VERSION:
            raise ValueError(f"its version is {data['version']}, this program reads {VERSION}")
        try:
            tokens = [base64.b64decode(token, validate=True) for token in data["ranks"]]
        except binascii.Error as error:
            raise ValueError(f"a rank is not base64: {error}") from error
        tokenizer = cls(tokens, data["pattern"], data["special_tokens"], data["facts"])
        if tokenizer.fingerprint != data["fingerprint"]:
            raise ValueError("its contents have changed since it was written")
        return tokenizer

    def save(self, tokenizer_dir: str | Path) -> None:
        """Write tokenizer.json and token_bytes.pt; each appears whole or not at all."""
        import torch

        buffer = io.BytesIO()
        torch.save(torch.from_numpy(self.token_bytes()), buffer)
        folder = Path(tokenizer_dir)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / TOKEN_BYTES_FILE, buffer.getvalue())
        atomic_write(folder / TOKENIZER_FILE, json.dumps(self._to_dict(), ensure_ascii=False, indent=0))

    def _to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "pattern": self.pattern,
            "special_tokens": list(self._special_ids),
            "facts": self.facts,
            "ranks": [base64.b64encode(token).decode("ascii") for token in self._tokens],
        }

    # -- vocabulary

    def get_vocab_size(self) -> int:
        """Mergeable and special tokens."""
        return len(self._all_tokens)

    def get_special_tokens(self) -> list[str]:
        """In the order of their ids."""
        return list(self._special_ids)

    def get_bos_token_id(self) -> int:
        return self._bos

    def encode_special(self, text: str) -> int:
        """The id of a special token by its name. Raises ValueError for anything else."""
        if text not in self._special_ids:
            raise ValueError(f"{text!r} is no special token: {', '.join(self._special_ids)}")
        return self._special_ids[text]

    def id_to_token(self, id: int) -> str:
        """One token as text; U+FFFD stands for bytes that are no whole character."""
        return self.decode([id])

    def token_bytes(self) -> np.ndarray:
        """int32 (V,): the length in bytes of each token, 0 for special tokens."""
        return np.array([len(token) for token in self._tokens] + [0] * len(self._special_ids), dtype=np.int32)

    # -- encode and decode

    @overload
    def encode(self, text: str, prepend: int | str | None = None, append: int | str | None = None, num_threads: int = 8) -> list[int]: ...
    @overload
    def encode(
        self, text: list[str], prepend: int | str | None = None, append: int | str | None = None, num_threads: int = 8
    ) -> list[list[int]]: ...
    def encode(
        self, text: str | list[str], prepend: int | str | None = None, append: int | str | None = None, num_threads: int = 8
    ) -> list[int] | list[list[int]]:
        """Ordinary text to ids, or a list of texts to lists of ids; `prepend` and `append` are special tokens by name, or any by id."""
        before, after = ([] if token is None else [self._token_id(token)] for token in (prepend, append))
        if isinstance(text, str):
            try:
                return before + self._encoder.encode(text) + after
            except UnicodeEncodeError:
                return before + self._encoder.encode(whole_characters(text)) + after
        if not isinstance(text, (list, tuple)):
            raise TypeError(f"encode takes a str or a list of str, not {type(text).__name__}")
        try:
            encoded = self._encoder.batch_encode(text, num_threads)
        except UnicodeEncodeError:
            encoded = self._encoder.batch_encode([whole_characters(item) for item in text], num_threads)
        return [before + ids + after for ids in encoded] if before or after else encoded  # copies only where something is added

    __call__ = encode

    def encode_documents(self, texts: Sequence[str], num_threads: int = 8) -> tuple[np.ndarray, np.ndarray]:
        """All texts at once, without the GIL: (ids end to end, uint32 (N,); offsets, int64 (len(texts) + 1,)). No special tokens."""
        try:
            return self._encoder.encode_documents(texts, num_threads)
        except UnicodeEncodeError:
            return self._encoder.encode_documents([whole_characters(text) for text in texts], num_threads)

    def _token_id(self, token: int | str) -> int:
        return self.encode_special(token) if isinstance(token, str) else token

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Special tokens become their names. Raises ValueError for an id outside the vocabulary."""
        try:
            ids = [int(i) for i in ids]
            if min(ids, default=0) >= 0:
                return b"".join([self._all_tokens[i] for i in ids])
        except IndexError:
            pass
        wrong = next(i for i in ids if not 0 <= i < len(self._all_tokens))
        raise ValueError(f"token id {wrong} is outside the vocabulary of {len(self._all_tokens)}")

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are no whole character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # -- chat

    def render_conversation(self, conversation: dict[str, Any], max_tokens: int | None = None) -> tuple[list[int], list[int]]:
        """(ids, mask), at most `max_tokens` of them. The mask is 1 for what the assistant must learn to write: its text and tool calls with
        their markers and <|assistant_end|>, not the tools' output, and nothing of a message with `"weight": 0`, which is context (as in
        OpenAI's fine-tuning format). Raises ValueError, naming the message, for a malformed conversation.
        """
        ids, mask = [self._bos], [0]

        def add(tokens: Sequence[int], learn: int) -> None:
            ids.extend(tokens)
            mask.extend([learn] * len(tokens))

        for role, parts, weight in turns(conversation):
            start, end = self.encode_special(f"<|{role}_start|>"), self.encode_special(f"<|{role}_end|>")
            learn = int(role == "assistant" and weight)
            add([start], 0)
            for kind, text in parts:
                if kind == "text":
                    add(self.encode(text), learn)
                else:
                    marks = "python" if kind == "python" else "output"
                    call = [self.encode_special(f"<|{marks}_start|>"), *self.encode(text), self.encode_special(f"<|{marks}_end|>")]
                    add(call, int(kind == "python" and learn))
            add([end], learn)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict[str, Any]) -> list[int]:
        """The prompt for the assistant's next answer: without the last message if that is the assistant's, up to <|assistant_start|>."""
        messages = messages_of(conversation)
        if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        ids, _ = self.render_conversation({**conversation, "messages": messages})
        if ids[-1] == self.encode_special("<|assistant_end|>"):
            raise ValueError(f"message {len(messages) - 1} is the assistant's: the one before an answer must be the user's")
        return [*ids, self.encode_special("<|assistant_start|>")]

    def visualize_tokenization(self, ids: Sequence[int], mask: Sequence[int], with_token_id: bool = False) -> str:
        """For a terminal: green where the mask is 1, red where it is 0, tokens separated by bars."""
        red, green, grey, reset = "\033[91m", "\033[92m", "\033[90m", "\033[0m"
        shown = []
        for token, learn in zip(ids, mask, strict=True):
            number = f"{grey}({token}){reset}" if with_token_id else ""
            shown.append(f"{green if learn else red}{self.id_to_token(token)}{reset}{number}")
        return "|".join(shown)


# ---- the tokenizer of this base directory ---------------------------------------------------------------------------


def tokenizer_dir() -> Path:
    """Where the tokenizer that new base models use lives."""
    return get_base_dir() / "tokenizer"


def get_tokenizer(*flags: str) -> RustBPETokenizer:
    """The tokenizer that new base models use. Raises UserError if there is none, with the command that trains one with `flags`."""
    return RustBPETokenizer.from_directory(tokenizer_dir(), *flags)


def get_token_bytes(device: str = "cpu") -> "torch.Tensor":
    """int32 (V,): the length in bytes of each token of `get_tokenizer()`, 0 for special tokens. Raises UserError where there is none."""
    import torch

    # From the ranks themselves, so that the two files cannot disagree; token_bytes.pt is for other programs.
    return torch.from_numpy(get_tokenizer().token_bytes()).to(device)
