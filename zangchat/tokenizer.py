"""The tokenizer: byte-level BPE trained and run by the crate rustbpe, and conversations as tokens.

A tokenizer is data: a split pattern, the bytes of each token in the order of their ranks, and
special tokens, whose ids follow. On disk:

    tokenizer.json   {"format", "version", "fingerprint", "pattern", "special_tokens": [name...],
                      "facts": {...}, "ranks": [base64...]}
    token_bytes.pt   int32 (V,): the length in bytes of each token, 0 for special tokens

A conversation {"messages": [{"role", "content"}...]} becomes

    <|bos|> (<|user_start|> text <|user_end|> <|assistant_start|> parts <|assistant_end|>)*

with parts of text, <|python_start|> call <|python_end|> or <|output_start|> result <|output_end|>,
and a system message is put before the first user message. Only the renderer writes special tokens:
text is always encoded as ordinary text, so a user cannot type one.
"""

import base64
import functools
import hashlib
import io
import json
import logging
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import tiktoken

from zangchat import bpe
from zangchat.conversation import Conversation, messages_of, turns
from zangchat.errors import UserError, explain
from zangchat.runtime.files import atomic_write, get_base_dir

if TYPE_CHECKING:
    import torch

    from zangchat.bpe import Text

SPECIAL_TOKENS = (
    "<|bos|>",  # in front of every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # a tool call
    "<|python_end|>",
    "<|output_start|>",  # its output
    "<|output_end|>",
)
# GPT-4's pattern, but numbers go in groups of up to two digits: three would spend a fifth of a
# small vocabulary on numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
PATTERNS = {
    "gpt4": SPLIT_PATTERN,
    "digits3": SPLIT_PATTERN.replace("{1,2}", "{1,3}"),  # GPT-4's own, and Llama 3's
    "digits1": SPLIT_PATTERN.replace("{1,2}", ""),  # Qwen's
}
FORMAT = "zangchat-tokenizer"
VERSION = 1
TOKENIZER_FILE = "tokenizer.json"
TOKEN_BYTES_FILE = "token_bytes.pt"
Token = int | str | None  # by id, or a special token by name
TRAIN = ("python", "-m", "scripts.tok_train")

logger = logging.getLogger(__name__)


class RustBPETokenizer:
    """Mergeable ranks with their pattern, and special tokens after them.

    `token_bytes_of[i]` are the bytes of mergeable token i. `facts` is JSON about how it was made
    and does not influence encoding. Raises ValueError for ranks or names that make no tokenizer.
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
            needed = ", ".join(missing or SPECIAL_TOKENS)
            raise ValueError(f"special tokens must be distinct and include {needed}")
        tokens, distinct = list(token_bytes_of), set(token_bytes_of)
        if len(distinct) != len(tokens) or not distinct >= {bytes([i]) for i in range(256)}:
            raise ValueError("the ranks must be distinct and include all 256 single bytes")
        self.pattern, self.facts, self.mergeable_tokens = pattern, dict(facts or {}), tokens
        self._special_ids = {name: len(tokens) + i for i, name in enumerate(special_tokens)}
        self._all_tokens = [*tokens, *(name.encode() for name in special_tokens)]
        self._bos = self._special_ids["<|bos|>"]
        self._encoder = bpe.make_encoder(tokens, pattern, self._special_ids)

    @functools.cached_property
    def enc(self) -> tiktoken.Encoding:
        """The same tokenizer as a tiktoken.Encoding, for tools that need one."""
        return bpe.tiktoken_encoding(self.mergeable_tokens, self.pattern, self._special_ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of everything that determines the ids of a text."""
        tokens = [token.hex() for token in self.mergeable_tokens]
        content = [self.pattern, list(self._special_ids), tokens]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    # -- making one

    @classmethod
    def train_from_iterator(
        cls,
        text_iterator: "Iterable[Text]",
        vocab_size: int,
        pattern: str = SPLIT_PATTERN,
        facts: dict[str, Any] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> "RustBPETokenizer":
        """Train on strings, or on Arrow arrays of them, whose memory the crate reads in place.

        `vocab_size` counts the special tokens; it is not reached if the text has nothing left to
        merge. `progress(merges_done)` is called a few times a second while merging. Raises
        ValueError if there is no text at all.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            parts = f"256 bytes and {len(SPECIAL_TOKENS)} special tokens"
            raise ValueError(f"vocab_size must be at least {smallest} ({parts}), not {vocab_size}")
        merged_size = vocab_size - len(SPECIAL_TOKENS)
        return cls(bpe.train(text_iterator, merged_size, pattern, progress), pattern, facts=facts)

    @classmethod
    def from_pretrained(cls, tiktoken_name: str) -> "RustBPETokenizer":
        """tiktoken's ranks and pattern of that name ("gpt2", "cl100k_base"), with our own special
        tokens; tiktoken may download them."""
        encoding = tiktoken.get_encoding(tiktoken_name)
        tokens = bpe.by_rank(encoding._mergeable_ranks)
        return cls(tokens, encoding._pat_str, facts={"tiktoken": tiktoken_name})

    @classmethod
    def from_directory(cls, tokenizer_dir: str | Path, *flags: str) -> "RustBPETokenizer":
        """Load a tokenizer that `save` wrote.

        Raises UserError naming a missing or damaged file, and scripts.tok_train with `flags`.
        """
        path = Path(tokenizer_dir) / TOKENIZER_FILE
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}: run `{shlex.join([*TRAIN, *flags])}`")
        command = shlex.join([*TRAIN, *flags, "--overwrite"])
        problem = f"{path} is not a usable tokenizer"
        remedy = f"put an intact copy there, or run `{command}`"
        with explain(problem, remedy, ValueError, KeyError, TypeError):
            return _from_dict(json.loads(path.read_text(encoding="utf-8")))

    def save(self, tokenizer_dir: str | Path) -> None:
        """Write tokenizer.json and token_bytes.pt; each appears whole or not at all."""
        import torch

        buffer, folder = io.BytesIO(), Path(tokenizer_dir)
        torch.save(torch.from_numpy(self.token_bytes()), buffer)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / TOKEN_BYTES_FILE, buffer.getvalue())
        text = json.dumps(_to_dict(self), ensure_ascii=False, indent=0)
        atomic_write(folder / TOKENIZER_FILE, text)

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
            known = ", ".join(self._special_ids)
            raise ValueError(f"{text!r} is not a special token: {known}")
        return self._special_ids[text]

    def id_to_token(self, id: int) -> str:
        """One token as text; U+FFFD stands for bytes that are not a whole character."""
        return self.decode([id])

    def token_bytes(self) -> np.ndarray:
        """int32 (V,): the length in bytes of each token, 0 for special tokens."""
        lengths = [len(token) for token in self.mergeable_tokens] + [0] * len(self._special_ids)
        return np.array(lengths, dtype=np.int32)

    # -- encode and decode

    @overload
    def encode(
        self, text: str, prepend: Token = None, append: Token = None, num_threads: int = 8
    ) -> list[int]: ...
    @overload
    def encode(
        self, text: list[str], prepend: Token = None, append: Token = None, num_threads: int = 8
    ) -> list[list[int]]: ...
    def encode(
        self, text: Any, prepend: Token = None, append: Token = None, num_threads: int = 8
    ) -> Any:
        """Ordinary text or texts to ids; `prepend` and `append`: special tokens by name, or ids."""
        before, after = (
            [] if token is None else [self._token_id(token)] for token in (prepend, append)
        )
        if isinstance(text, str):
            return before + bpe.encode_repaired(self._encoder.encode, text) + after
        if not isinstance(text, (list, tuple)):
            raise TypeError(f"encode takes a str or a list of str, not {type(text).__name__}")
        encoded = bpe.encode_repaired(self._encoder.batch_encode, text, num_threads)
        # copies only if something is added
        return [before + ids + after for ids in encoded] if before or after else encoded

    __call__ = encode

    def encode_documents(
        self, texts: Sequence[str], num_threads: int = 8
    ) -> tuple[np.ndarray, np.ndarray]:
        """All texts at once, without the GIL; no special tokens.

        Returns the ids end to end, uint32 (N,), and offsets, int64 (len(texts) + 1,).
        """
        return bpe.encode_repaired(self._encoder.encode_documents, texts, num_threads)

    def _token_id(self, token: int | str) -> int:
        return self.encode_special(token) if isinstance(token, str) else token

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Special tokens become their names. Raises ValueError for an id outside the vocabulary."""
        ids, size = [int(i) for i in ids], len(self._all_tokens)
        if ids and not 0 <= min(ids) <= max(ids) < size:
            wrong = next(i for i in ids if not 0 <= i < size)
            raise ValueError(f"token id {wrong} is outside the vocabulary of {size}")
        return b"".join([self._all_tokens[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not a whole character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # -- chat

    def render_conversation(
        self, conversation: Conversation, max_tokens: int | None = None
    ) -> tuple[list[int], list[int]]:
        """(ids, mask), at most `max_tokens` of them.

        The mask is 1 for tokens that the assistant must learn to write: its text, and its tool
        calls with their markers, and <|assistant_end|>. It is 0 for the tools' output, and for a
        message with `"weight": 0`, which is context (as in OpenAI's fine-tuning format). Raises
        ValueError, naming the message, for a malformed conversation.
        """
        ids, mask = [self._bos], [0]

        def add(tokens: Sequence[int], learn: int) -> None:
            ids.extend(tokens)
            mask.extend([learn] * len(tokens))

        for role, parts, weight in turns(conversation):
            learn = int(role == "assistant" and weight)
            add([self.encode_special(f"<|{role}_start|>")], 0)
            for kind, text in parts:
                if kind == "text":
                    add(self.encode(text), learn)
                else:
                    marks = "python" if kind == "python" else "output"
                    call = self.encode(text, f"<|{marks}_start|>", f"<|{marks}_end|>")
                    add(call, int(kind == "python" and learn))
            add([self.encode_special(f"<|{role}_end|>")], learn)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        """The prompt up to <|assistant_start|>, without a last message of the assistant's."""
        messages = messages_of(conversation)
        if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        ids, _ = self.render_conversation({**conversation, "messages": messages})
        if ids[-1] == self.encode_special("<|assistant_end|>"):
            problem = f"message {len(messages) - 1} is the assistant's"
            raise ValueError(f"{problem}: the one before an answer must be the user's")
        return [*ids, self.encode_special("<|assistant_start|>")]

    def visualize_tokenization(
        self, ids: Sequence[int], mask: Sequence[int], with_token_id: bool = False
    ) -> str:
        """For a terminal: tokens between bars, green if the mask is 1, red if it is 0."""
        red, green, grey, reset = "\033[91m", "\033[92m", "\033[90m", "\033[0m"
        shown = []
        for token, learn in zip(ids, mask, strict=True):
            number = f"{grey}({token}){reset}" if with_token_id else ""
            shown.append(f"{green if learn else red}{self.id_to_token(token)}{reset}{number}")
        return "|".join(shown)


def _to_dict(tokenizer: RustBPETokenizer) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": tokenizer.fingerprint,
        "pattern": tokenizer.pattern,
        "special_tokens": tokenizer.get_special_tokens(),
        "facts": tokenizer.facts,
        "ranks": [base64.b64encode(token).decode("ascii") for token in tokenizer.mergeable_tokens],
    }


def _from_dict(data: dict[str, Any]) -> RustBPETokenizer:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f'its "format" is not "{FORMAT}"')
    if data["version"] != VERSION:
        raise ValueError(f"its version is {data['version']}, this program reads {VERSION}")
    tokens = [base64.b64decode(token, validate=True) for token in data["ranks"]]
    tokenizer = RustBPETokenizer(tokens, data["pattern"], data["special_tokens"], data["facts"])
    if tokenizer.fingerprint != data["fingerprint"]:
        raise ValueError("its contents have changed since it was written")
    return tokenizer


# ---- the tokenizer of this base directory --------------------------------------------------------


def tokenizer_dir() -> Path:
    """The folder of the tokenizer that new base models use."""
    return get_base_dir() / "tokenizer"


def get_tokenizer(*flags: str) -> RustBPETokenizer:
    """The tokenizer that new base models use. Raises UserError, see from_directory."""
    return RustBPETokenizer.from_directory(tokenizer_dir(), *flags)


def get_token_bytes(device: str = "cpu") -> "torch.Tensor":
    """int32 (V,): the bytes of each token of `get_tokenizer()`, 0 for special tokens.

    Raises UserError if there is no tokenizer.
    """
    import torch

    # From the ranks, so that two files cannot disagree; token_bytes.pt is for other programs.
    return torch.from_numpy(get_tokenizer().token_bytes()).to(device)
