"""tokenizer.json and tokenizer_config.json, in both directions."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from zangchat.config import GPTConfig
from zangchat.errors import UserError, explain
from zangchat.hf.format import read_json
from zangchat.hf.samples import sample_texts
from zangchat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer

if TYPE_CHECKING:
    from zangchat.tokenizer import RustBPETokenizer


@functools.cache
def byte_characters() -> list[str]:
    """One visible character for each byte, as byte-level vocabularies write them.

    The byte itself if it is visible, else one from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [
        chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)
    ]


def recover_merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The two parts that made each token of more than one byte, in order.

    They are left of a token if only earlier tokens may be merged.

    Raises ValueError for a token that no merge makes.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for rank, token in enumerate(tokens):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            best, i = min(
                (ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1)
            )
            if best >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 2 or any(
            ranks.get(part, rank) >= rank for part in parts[:2] if len(part) > 1
        ):
            raise ValueError(f"token {rank}, {token!r}, is not made of two earlier ones")
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def token_strings(tokenizer: "RustBPETokenizer") -> list[str]:
    """Every token as byte-level vocabularies write it; special tokens by name."""
    written = [visible(token) for token in tokenizer.mergeable_tokens]
    return [*written, *tokenizer.get_special_tokens()]


def merge_strings(tokenizer: "RustBPETokenizer") -> list[tuple[str, str]]:
    """The merges, written alike. Raises UserError if the ranks are not those of merges."""
    problem, remedy = "this tokenizer cannot be exported", "its ranks must be those of merges"
    with explain(problem, remedy, ValueError):
        merges = recover_merges(tokenizer.mergeable_tokens)
    return [(visible(left), visible(right)) for left, right in merges]


def visible(token: bytes) -> str:
    return "".join(map(byte_characters().__getitem__, token))


def tokenizer_json(tokenizer: "RustBPETokenizer") -> dict[str, Any]:
    """The file of the library `tokenizers`: the same tokens for the same text. Raises UserError if
    the ranks are not those of merges.
    """
    ordinary = token_strings(tokenizer)[: len(tokenizer.mergeable_tokens)]
    vocab = {token: i for i, token in enumerate(ordinary)}
    theirs: Any = Tokenizer(models.BPE(vocab=vocab, merges=merge_strings(tokenizer)))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens(
        [AddedToken(name, normalized=False) for name in tokenizer.get_special_tokens()]
    )
    bos = ("<|bos|>", tokenizer.get_bos_token_id())
    theirs.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[bos]
    )
    return dict(json.loads(theirs.to_str()))


def tokenizer_config(
    config: GPTConfig, tokenizer: "RustBPETokenizer", base: bool
) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|bos|>" if base else "<|assistant_end|>",
        "pad_token": "<|bos|>",
        "additional_special_tokens": [
            name for name in tokenizer.get_special_tokens() if name != "<|bos|>"
        ],
        "model_max_length": config.sequence_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


def read_tokenizer_json(path: Path) -> "RustBPETokenizer":
    """Our tokenizer from a byte-level BPE of the library `tokenizers`. Raises UserError if it would
    give other tokens.
    """
    data = read_json(path)
    problem = f"{path} is not a byte-level BPE with the special tokens of a chat"
    remedy = "it cannot be imported"
    with explain(problem, remedy, KeyError, TypeError, ValueError, AttributeError):
        special = {token["content"]: token["id"] for token in data["added_tokens"]}
        for token in data["added_tokens"]:
            if not token["special"] and token["content"] not in SPECIAL_TOKENS:
                raise ValueError(f"its added token {token['content']!r} is an ordinary word")
        vocab = {id: text for text, id in data["model"]["vocab"].items() if text not in special}
        bytes_of = {character: byte for byte, character in enumerate(byte_characters())}
        tokens = [bytes(bytes_of[character] for character in vocab[i]) for i in range(len(vocab))]
        steps = data["pre_tokenizer"].get("pretokenizers", [data["pre_tokenizer"]])
        (pattern,) = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
        if sorted(special.values()) != list(range(len(tokens), len(tokens) + len(special))):
            raise ValueError("its special tokens do not follow the others")
        tokenizer = RustBPETokenizer(
            tokens,
            pattern,
            sorted(special, key=special.__getitem__),
            {"imported": path.parent.name},
        )
    theirs = Tokenizer.from_file(str(path))
    theirs.no_padding()  # a call's padding and truncation stay in the file
    theirs.no_truncation()
    texts = sample_texts(tokenizer)
    for text, encoding in zip(
        texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        if encoding.ids != tokenizer.encode(text):
            raise UserError(
                f"{path} splits text in a way that this tokenizer cannot, as in {text[:40]!r}: it "
                "cannot be imported"
            )
    return tokenizer
