"""Texts and conversations that an export is checked with."""

import random
import re
from typing import TYPE_CHECKING, Any

from zangchat.runtime.seeds import derive_seed

if TYPE_CHECKING:
    from zangchat.tokenizer import RustBPETokenizer

NUM_TEXTS = 600
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "你是谁？",
    "Once upon a time there was a small model that could count the letters of a word, and so ",
)


CHARACTERS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    " \t\n\r  \n",
    "'’.,:;!?()[]{}<>|/\\\"`~@#$%^&*_+-=",
    "äöüßéèñçåøœИжЩيعאבक्ष",
    "你好世界的一是在不了日本語한국어",
    "\u00a0\u2003\u2028\u3000\u200b\u0085\u0301\ufeff",
    "🙂🤖👩\u200d💻🇨🇭½²Ⅷ٣५①ſK",
)
SUFFIXES = ("'s", "'S", "'ll", "'LL", "'Re", "'ve", "n't", "'ſ", " 's")
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": " Hi,\n\nwho are you? "}],
    [
        {"role": "system", "content": "Answer in one word."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "How many r are in "},
                {"type": "text", "text": "strawberry?"},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": " Let me count. "},
                {"type": "python", "text": "'strawberry'.count('r')"},
                {"type": "python_output", "text": "3"},
                {"type": "text", "text": "Three"},
            ],
        },
        {"role": "user", "content": "谢谢"},
        {"role": "assistant", "content": "不客气\n"},
    ],
)


def sample_texts(tokenizer: "RustBPETokenizer") -> list[str]:
    """Always the same texts: mixtures of characters of many scripts, and runs of random tokens."""
    random_ = random.Random(derive_seed("sample texts"))
    ordinary = tokenizer.get_vocab_size() - len(tokenizer.get_special_tokens())
    texts = ["", " ", *PROMPTS]
    while len(texts) < NUM_TEXTS:
        if len(texts) % 3 == 0:
            text = tokenizer.decode(
                [random_.randrange(ordinary) for _ in range(random_.randrange(1, 40))]
            )
        else:
            pools = random_.choices(CHARACTERS, k=random_.randrange(1, 5))
            text = "".join(
                random_.choice(random_.choice(pools)) for _ in range(random_.randrange(1, 120))
            )
            text += random_.choice(("", *SUFFIXES))
        texts.append(text)
    # others read a special token that is written out as that token
    return [re.sub(r"<\|\w+\|>", "", text) for text in texts]
