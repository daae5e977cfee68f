"""Documents for training in an endless order that depends on (data, seed) only: pretraining text,
conversations, and mixtures of them.

A stream hands out documents in runs of a few; its cursor is a little JSON and says where the next
document comes from, so that a run can be resumed at any document.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from zangchat.dataset import Dataset
from zangchat.dataset.shards import TOKENS
from zangchat.errors import UserError
from zangchat.runtime.seeds import derive_seed

logger = logging.getLogger(__name__)

TEXT_RUN = 32  # documents tokenised at a time
CONVERSATION_RUN = 8
SHORTER = (
    "the run cannot be resumed: it had read beyond the end of its data. Restore the data, or "
    "start over with --overwrite"
)


class Document(NamedTuple):
    ids: np.ndarray  # (n,) int32, beginning with <|bos|>
    mask: np.ndarray | None  # (n,) 1 = learn to predict this token; None = all
    splittable: bool  # may continue in the next row


class DocumentStream(Protocol):
    # JSON: where the next document comes from; set it to go there. A call replaces the dict as a
    # whole
    cursor: dict[str, Any]

    def next_documents(self) -> list[Document]:
        """The next few documents; none at the end of a finite stream."""
        ...


class TextStream:
    """Documents of a pretraining dataset, endlessly.

    Each epoch has its own order: shards (except in the first epoch of a dataset that may still be
    downloading), groups within a shard, documents within a group. With `max_tokens`, a longer
    document comes in several pieces, each with its own <|bos|>: finer grains for a MixedStream.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Any,
        seed: int,
        max_tokens: int | None = None,
    ) -> None:
        if max_tokens is not None and max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, not {max_tokens}")
        if dataset.tokenizer_fingerprint not in (None, tokenizer and tokenizer.fingerprint):
            problem = f"dataset {dataset.name} was made with another tokenizer than this model's"
            raise UserError(f"{problem}: {dataset.repair_hint()}")
        self.dataset, self.tokenizer, self.seed = dataset, tokenizer, seed
        self.max_tokens = max_tokens
        self.cursor: dict[str, Any] = {"epoch": 0, "shard": 0, "group": 0, "row": 0}
        # the current group: (epoch, shard, group), and its documents in this epoch's order
        self._group: tuple[tuple[int, int, int], list[Any]] | None = None

    def next_documents(self) -> list[Document]:
        bos = np.array([self.tokenizer.get_bos_token_id()], dtype=np.int32)
        documents = []
        for ids in self._encoded(self._next_run()):
            step = self.max_tokens - 1 if self.max_tokens else max(1, len(ids))
            for start in range(0, len(ids), step):
                piece = ids[start : start + step].astype(np.int32)
                documents.append(Document(np.concatenate([bos, piece]), None, True))
        return documents

    def _encoded(self, run: list[Any]) -> list[np.ndarray]:
        if self.dataset.tokenizer_fingerprint is not None:
            return run
        ids, offsets = self.tokenizer.encode_documents(run, num_threads=2)
        return np.split(ids, offsets[1:-1])

    def _next_run(self) -> list[Any]:
        """Up to TEXT_RUN texts (or arrays of ids), all of one group; moves the cursor past them."""
        epoch, shard, group, row = (self.cursor[key] for key in ("epoch", "shard", "group", "row"))
        empty_epochs = 0
        while True:
            shards = self._shards(epoch)
            if shard >= len(shards):
                epoch, shard, group, row = epoch + 1, 0, 0, 0
                empty_epochs += 1
                if empty_epochs > 1:
                    problem = f"no text to train on ({self.dataset.folder})"
                    raise UserError(f"dataset {self.dataset.name}: {problem}")
            elif row == 0 and group >= self.dataset.num_groups(shards[shard], "train"):
                shard, group = shard + 1, 0
            else:
                texts = self._texts(epoch, shard, group)
                if row < len(texts):
                    run = texts[row : row + TEXT_RUN]
                    row += len(run)
                    self.cursor = {"epoch": epoch, "shard": shard, "group": group, "row": row}
                    return run
                group, row = group + 1, 0

    def _shards(self, epoch: int) -> list[str]:
        shards = self.dataset.shards("train")
        if epoch == 0 and self.dataset.arrives_in_order:
            return shards
        return [shards[i] for i in permutation(len(shards), self.seed, "shards", epoch)]

    def _texts(self, epoch: int, shard: int, group: int) -> list[Any]:
        """The documents of the `group`-th group of the `shard`-th shard, all in this epoch's
        order.
        """
        key = (epoch, shard, group)
        if self._group is None or self._group[0] != key:
            shard_name = self._shards(epoch)[shard]
            name = shard_name.removesuffix(TOKENS)  # ids come in the order of their text
            num_groups = self.dataset.num_groups(shard_name, "train")
            number = int(permutation(num_groups, self.seed, "groups", epoch, name)[group])
            texts = self.dataset.read_group(shard_name, number, "train")
            shuffled = permutation(len(texts), self.seed, "rows", epoch, name, number)
            self._group = (key, [texts[i] for i in shuffled if len(texts[i])])
        return self._group[1]


class ConversationStream:
    """A task's conversations, each a document that is never split, each epoch in its own order;
    endlessly, or for `num_epochs`.

    Only tokens that the rendering marks are learned. A conversation longer than `max_tokens` is cut
    there, and one without a token to learn from is left out; the counts of both are logged at the
    end of an epoch.
    """

    def __init__(
        self,
        task: Any,
        tokenizer: Any,
        seed: int,
        max_tokens: int,
        num_epochs: int | None = None,
    ) -> None:
        if len(task) == 0:
            raise ValueError("the task has no examples")
        self.task, self.tokenizer, self.seed = task, tokenizer, seed
        self.max_tokens, self.num_epochs = max_tokens, num_epochs
        self.cursor: dict[str, Any] = {"epoch": 0, "index": 0}
        self._order: tuple[int, np.ndarray] | None = None
        self._counts = {"cut": 0, "left out": 0}

    def next_documents(self) -> list[Document]:
        epoch, index = self.cursor["epoch"], self.cursor["index"]
        if index >= len(self.task):
            raise UserError(SHORTER)
        empty_epochs = 0
        while self.num_epochs is None or epoch < self.num_epochs:
            stop = min(index + CONVERSATION_RUN, len(self.task))
            rendered = [self._render(int(i)) for i in self._epoch_order(epoch)[index:stop]]
            documents = [document for document in rendered if document is not None]
            epoch, index = (epoch, stop) if stop < len(self.task) else (epoch + 1, 0)
            self.cursor = {"epoch": epoch, "index": index}
            if index == 0:
                self._log_counts(epoch - 1)
                empty_epochs += 1
            if documents:
                return documents
            if empty_epochs > 1:
                raise UserError(
                    "no conversation has a token to learn from: is there an assistant message "
                    "within the first max_seq_len tokens?",
                )
        return []

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(len(self.task), self.seed, "conversations", epoch))
        return self._order[1]

    def _render(self, index: int) -> Document | None:
        limit = self.max_tokens + 1  # one more than fits, to notice a cut
        ids, mask = self.tokenizer.render_conversation(self.task[index], max_tokens=limit)
        if len(ids) > self.max_tokens:
            self._counts["cut"] += 1
            ids, mask = ids[: self.max_tokens], mask[: self.max_tokens]
        if not any(mask):
            self._counts["left out"] += 1
            return None
        return Document(np.array(ids, dtype=np.int32), np.array(mask, dtype=bool), False)

    def _log_counts(self, epoch: int) -> None:
        if any(self._counts.values()):
            counts = ", ".join(f"{count} {outcome}" for outcome, count in self._counts.items())
            conversations = f"of {len(self.task)} conversations {counts}"
            logger.warning(f"epoch {epoch}: {conversations} (limit {self.max_tokens} tokens)")
        self._counts = dict.fromkeys(self._counts, 0)


class MixedStream:
    """Several streams as one: each document comes from the stream that falls shortest of its
    fraction of the tokens so far."""

    def __init__(self, parts: Sequence[tuple[DocumentStream, float]]) -> None:
        if not parts or min(fraction for _, fraction in parts) <= 0:
            raise ValueError("a mixture needs streams with positive fractions")
        total = sum(fraction for _, fraction in parts)
        self.fractions = [fraction / total for _, fraction in parts]
        self._streams = [stream for stream, _ in parts]
        self._readers = [DocumentReader(stream) for stream in self._streams]
        self._tokens = [0] * len(parts)

    @property
    def cursor(self) -> dict[str, Any]:
        positions = [reader.cursor for reader in self._readers]
        return {"tokens": list(self._tokens), "positions": positions}

    @cursor.setter
    def cursor(self, cursor: dict[str, Any]) -> None:
        self._tokens = list(cursor["tokens"])
        pairs = zip(self._streams, cursor["positions"], strict=True)
        self._readers = [DocumentReader(stream, position) for stream, position in pairs]

    def next_documents(self) -> list[Document]:
        total = sum(self._tokens)
        pairs = zip(self.fractions, self._tokens, strict=True)
        deficits = [fraction * total - tokens for fraction, tokens in pairs]
        for i in sorted(range(len(deficits)), key=lambda i: -deficits[i]):
            document = self._readers[i].next()
            if document is not None:
                self._tokens[i] += len(document.ids)
                return [document]
        return []


class DocumentReader:
    """One document at a time from a stream, with an exact cursor although the stream moves by
    runs.
    """

    def __init__(self, stream: DocumentStream, cursor: dict[str, Any] | None = None) -> None:
        self._stream = stream
        self._run: list[Document] = []
        self._taken = 0
        if cursor is not None:
            stream.cursor = cursor["state"]
        self._run_start = stream.cursor  # of the current run
        if cursor is not None and cursor["taken"]:
            self._run = stream.next_documents()
            self._taken = cursor["taken"]
            if self._taken > len(self._run):
                raise UserError(SHORTER)

    @property
    def cursor(self) -> dict[str, Any]:
        """JSON: where the next document comes from, as the start of its run and its place in it."""
        if self._taken == len(self._run):
            return {"state": self._stream.cursor, "taken": 0}
        return {"state": self._run_start, "taken": self._taken}

    def next(self) -> Document | None:
        """None at the end of a finite stream."""
        if self._taken == len(self._run):
            self._run_start = self._stream.cursor
            self._run, self._taken = self._stream.next_documents(), 0
            if not self._run:
                return None
        self._taken += 1
        return self._run[self._taken - 1]


def permutation(n: int, *parts: Any) -> np.ndarray:
    """(n,) int64: an order of range(n) that depends on `parts` only."""
    return np.random.Generator(np.random.PCG64(derive_seed(*parts))).permutation(n)
