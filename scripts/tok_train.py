"""Train the tokenizer that new base models will use, on the pretraining text.

    python -m scripts.tok_train
    python -m scripts.tok_train --vocab_size=8192 --max_chars=200000000 --dataset=pydocs

It goes to <base>/tokenizer. One that is there already is kept when it was made of the same text
with the same settings; otherwise only --overwrite replaces it. Models that were trained keep a copy
of theirs next to their checkpoints.
"""

import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from tasks.common import TaskMixture
from tasks.registry import build_mixture
from zangchat import configurator
from zangchat.conversation import turns
from zangchat.errors import UserError
from zangchat.report import get_report
from zangchat.runtime.logs import print0
from zangchat.runtime.processes import get_dist_info
from zangchat.runtime.progress import Progress

if TYPE_CHECKING:
    import pyarrow

    from zangchat.dataset import Dataset
    from zangchat.tokenizer import RustBPETokenizer

OF_OTHER = {"text": "of other text", "mixture": "of other conversations"}
GROUP_CONVERSATIONS = 256  # counted together
MAX_VOCAB_SIZE = 1 << 24  # far more than a model can use; the counts of merges are 32 bits wide


@dataclass
class Config:
    max_chars: int = 2_000_000_000  # characters to train on, at most
    doc_cap: int = 10_000  # characters taken of one document, at most
    vocab_size: int = 65_536  # tokens, the special ones included
    pattern: Literal["gpt4", "digits3", "digits1"] = "gpt4"
    """digits of a number that go together: up to 2 (gpt4), 3 as in Llama 3, or 1 as in Qwen"""
    dataset: str | None = None  # a folder of <base>/base_data; default: the only one there
    data_path: str | None = None  # a .parquet, .jsonl or .txt file, or a folder of them, instead
    skip_bad_rows: bool = False  # leave out rows of own files that cannot be read, and count them
    mixture: str = ""
    """conversations to read first, as base_train mixes them in, e.g. stories:8000,identity:1"""
    overwrite: bool = False  # replace a tokenizer that was made otherwise


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, train, argv)


def train(config: Config) -> None:
    check(config)
    if get_dist_info()[1] != 0:
        return  # under torchrun one process is enough: training uses all cores
    from zangchat.dataset import find_dataset
    from zangchat.tokenizer import PATTERNS, RustBPETokenizer, tokenizer_dir

    dataset = find_dataset(config.dataset, config.data_path, config.skip_bad_rows)
    dataset.count_left_out()
    conversations = (
        build_mixture(config.mixture, skip_bad_rows=config.skip_bad_rows)
        if config.mixture
        else None
    )
    facts = settings(config, dataset, conversations)
    if not config.overwrite and already_trained(facts):
        return

    text = Text(config, dataset, conversations)

    @functools.cache
    def merging() -> Progress:
        # from the first merge on: by then the text has been read, and its line is gone
        return line.enter_context(Progress("tokenizer: tokens", config.vocab_size))

    def merged(merges: int) -> None:
        merging().update(min(256 + merges, config.vocab_size), "merging")

    try:
        with contextlib.ExitStack() as line:
            tokenizer = RustBPETokenizer.train_from_iterator(
                text.documents(), config.vocab_size, PATTERNS[config.pattern], facts, merged
            )
    except ValueError:
        if text.characters:
            raise
        raise UserError(
            f"{dataset.folder} has no text to train on: name other text with --dataset or "
            "--data_path"
        ) from None
    tokenizer.save(tokenizer_dir())
    report(config, tokenizer, text)


def check(config: Config) -> None:
    from zangchat.tokenizer import SPECIAL_TOKENS

    smallest = 256 + len(SPECIAL_TOKENS)
    if config.vocab_size < smallest:
        raise UserError(
            f"--vocab_size={config.vocab_size} is too small: the bytes and the special tokens "
            f"alone are {smallest}"
        )
    configurator.check_range(1, config, "vocab_size", most=MAX_VOCAB_SIZE)
    configurator.check_range(1, config, "max_chars", "doc_cap")


def settings(
    config: Config, dataset: "Dataset", conversations: TaskMixture | None
) -> dict[str, Any]:
    """The settings that determine the result; kept in tokenizer.json."""
    mixed = {"mixture": conversations.fingerprints()} if conversations else {}
    return {
        **mixed,
        "vocab_size": config.vocab_size,
        "max_chars": config.max_chars,
        "doc_cap": config.doc_cap,
        "pattern": config.pattern,
        "dataset": dataset.name,
        # Shards of the hub may still be downloading: their names at a pinned revision suffice.
        "text": dataset.name if dataset.arrives_in_order else dataset.fingerprint,
    }


def already_trained(facts: dict[str, Any]) -> bool:
    """Whether the tokenizer there is the requested one. Raises UserError if it is another."""
    from zangchat.tokenizer import TOKENIZER_FILE, RustBPETokenizer, tokenizer_dir

    folder = tokenizer_dir()
    if not (folder / TOKENIZER_FILE).exists():
        return False
    found = RustBPETokenizer.from_directory(folder)
    were = {"pattern": "gpt4", **found.facts}  # older files do not name it
    names = dict.fromkeys((*facts, "mixture"))
    differences = [name for name in names if were.get(name) != facts.get(name)]
    if differences:
        said = ", ".join(
            OF_OTHER.get(name) or f"{name} {were.get(name)} instead of {facts[name]}"
            for name in differences
        )
        raise UserError(
            f"{folder} holds a tokenizer made otherwise ({said}): --overwrite replaces it"
        )
    print0(
        f"{folder} has this tokenizer already ({found.get_vocab_size():,} tokens); --overwrite "
        "trains it again"
    )
    return True


class Text:
    """The documents to train on, and counts of those read."""

    def __init__(
        self, config: Config, dataset: "Dataset", conversations: TaskMixture | None = None
    ) -> None:
        self.config, self.dataset, self.conversations = config, dataset, conversations or ()
        self.num_documents = self.characters = 0
        self.start = time.monotonic()

    def documents(self) -> "Iterator[pyarrow.ChunkedArray]":
        """At most doc_cap characters of each document, at most max_chars in all: a group of
        documents at a time, as Arrow memory, so that text from parquet never becomes Python
        strings.
        """
        with Progress("tokenizer: characters", self.expected_characters()) as reading:
            for group in itertools.chain(self.said(), self.dataset.iter_arrow("train")):
                texts = self.capped(group)
                self.num_documents += len(texts)
                yield texts
                rate = self.characters / (time.monotonic() - self.start)
                reading.update(
                    min(self.characters, reading.total), f"{rate / 1e6:.1f} M characters/s"
                )
                if self.characters >= self.config.max_chars:
                    break

    def said(self) -> Iterator[list[str]]:
        """The texts of the conversations, a group of conversations at a time."""
        mixture = self.conversations
        for start in range(0, len(mixture), GROUP_CONVERSATIONS):
            group = range(start, min(start + GROUP_CONVERSATIONS, len(mixture)))
            yield [text for i in group for turn in turns(mixture[i]) for _, text in turn.parts]

    def capped(self, group: "pyarrow.ChunkedArray | list[str]") -> "pyarrow.ChunkedArray":
        """The documents of a group that are still wanted, cut to doc_cap characters and the last of
        them to max_chars in all.
        """
        import numpy as np
        import pyarrow
        import pyarrow.compute as pc

        from zangchat.bpe import repair_surrogates

        if isinstance(group, list):
            group = pyarrow.chunked_array(
                [[repair_surrogates(text) for text in group]], pyarrow.large_string()
            )
        texts = pc.utf8_slice_codeunits(
            group.filter(pc.greater(pc.binary_length(group), 0)), 0, self.config.doc_cap
        )
        ends = np.cumsum(pc.utf8_length(texts).to_numpy(), dtype=np.int64) + self.characters
        # the document that reaches the limit, if there is one
        last = int(np.searchsorted(ends, self.config.max_chars))
        if last < len(texts):
            within = self.config.max_chars - (int(ends[last - 1]) if last else self.characters)
            rest = pc.utf8_slice_codeunits(texts[last : last + 1], 0, within)
            texts = pyarrow.chunked_array([*texts[:last].chunks, *rest.chunks], texts.type)
        self.characters = (
            min(int(ends[-1]), self.config.max_chars) if len(ends) else self.characters
        )
        return texts

    def expected_characters(self) -> int:
        """An estimate, from the first group of documents and the sizes of the files."""
        shards = [
            entry
            for entry in self.dataset.manifest["shards"]
            if entry["name"] in self.dataset.shards("train")
        ]
        if not shards:
            return 1
        groups = self.dataset.num_groups(shards[0]["name"], "train")
        sample = self.dataset.read_group(shards[0]["name"], 0, "train") if groups else []
        sample_chars = sum(min(len(document), self.config.doc_cap) for document in sample)
        characters = (
            sample_chars
            * groups
            * sum(entry["bytes"] for entry in shards)
            / max(shards[0]["bytes"], 1)
        )
        return max(1, min(round(characters), self.config.max_chars))


def report(config: Config, tokenizer: "RustBPETokenizer", text: Text) -> None:
    from zangchat.tokenizer import tokenizer_dir

    seconds = time.monotonic() - text.start
    found, lengths = tokenizer.get_vocab_size(), tokenizer.token_bytes()
    lengths = lengths[lengths > 0]
    print0(
        f"{tokenizer_dir()}: {found:,} tokens from {text.characters:,} characters in "
        f"{text.num_documents:,} documents, {seconds:.1f} s"
    )
    if found < config.vocab_size:
        print0(
            f"--vocab_size={config.vocab_size} was not reached: the text has no more pairs to "
            f"merge; {found} is the vocabulary now"
        )
    results = {
        "documents": text.num_documents,
        "characters": text.characters,
        "seconds": round(seconds, 1),
        "tokens": found,
        "special tokens": len(tokenizer.get_special_tokens()),
        "bytes per token, mean": round(float(lengths.mean()), 2),
        "bytes per token, longest": int(lengths.max()),
    }
    get_report().log(section="Tokenizer training", data=[asdict(config), results])


if __name__ == "__main__":
    sys.exit(main())
