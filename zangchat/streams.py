"""Documents for training in an endless order that depends on (data, seed) only: pretraining text,
conversations, and mixtures of them.

A stream is a function of a cursor, a little JSON that names the source of the next document: it
gives documents in runs of a few, each with the cursor after it. So a run can be resumed at any
document, and nothing has to be remembered between two calls.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from zangchat.config import TOKENS
from zangchat.errors import UserError
from zangchat.runtime.seeds import derive_seed

if TYPE_CHECKING:
    from zangchat.dataset import Dataset

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


Run = tuple[list[Document], dict[str, Any]]  # a few documents, and the state after them


class DocumentStream(Protocol):
    start: dict[str, Any]  # JSON: where the first document comes from

    def runs(self, state: dict[str, Any]) -> Iterator[Run]:
        """The runs from `state` on."""
        ...


class Read(NamedTuple):
    """A document, and the cursors to read it again and to read the one after it."""

    document: Document
    cursor: dict[str, Any]
    next_cursor: dict[str, Any]


def first_cursor(stream: DocumentStream) -> dict[str, Any]:
    return {"state": stream.start, "taken": 0}


def read_documents(stream: DocumentStream, cursor: dict[str, Any]) -> Iterator[Read]:
    """The documents from `cursor` on, one at a time. A cursor is the state before a run, and how
    many of the run's documents are taken already. Raises UserError if the data is shorter now.
    """
    state, taken = cursor["state"], cursor["taken"]
    for run, after in stream.runs(state):
        if taken > len(run):
            raise UserError(SHORTER)
        cursors = [{"state": state, "taken": i} for i in range(len(run))]
        following = [*cursors[1:], {"state": after, "taken": 0}]
        yield from map(Read, run[taken:], cursors[taken:], following[taken:])
        state, taken = after, 0


class TextStream:
    """Documents of a pretraining dataset, endlessly.

    Each epoch has its own order: shards (except in the first epoch of a dataset that may still be
    downloading), groups within a shard, documents within a group. With `max_tokens`, longer ones
    come in pieces, for a MixedStream; the <|bos|> of a continuation is not learned.
    """

    def __init__(
        self, dataset: "Dataset", tokenizer: Any, seed: int, max_tokens: int | None = None
    ) -> None:
        if max_tokens is not None and max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, not {max_tokens}")
        if dataset.tokenizer_fingerprint not in (None, tokenizer and tokenizer.fingerprint):
            problem = f"dataset {dataset.name} was made with another tokenizer than this model's"
            raise UserError(f"{problem}: {dataset.repair_hint()}")
        self.dataset, self.tokenizer, self.seed = dataset, tokenizer, seed
        self.max_tokens = max_tokens
        self.start = {"epoch": 0, "shard": 0, "group": 0, "row": 0}

    def runs(self, state: dict[str, Any]) -> Iterator[Run]:
        """Up to TEXT_RUN texts at a time, all of one group."""
        epoch, first_shard, first_group, first_row = (state[key] for key in self.start)
        epochs_without_text = 0
        while epochs_without_text < 2:
            shards = self._shards(epoch)
            for shard in range(first_shard, len(shards)):
                for group in range(first_group, self.dataset.num_groups(shards[shard], "train")):
                    texts = self._texts(epoch, shards[shard], group)
                    for row in range(first_row, len(texts), TEXT_RUN):
                        run, epochs_without_text = texts[row : row + TEXT_RUN], 0
                        after = (epoch, shard, group, row + len(run))
                        yield self._documents(run), dict(zip(self.start, after, strict=True))
                    first_row = 0
                first_group = 0
            first_shard, epoch, epochs_without_text = 0, epoch + 1, epochs_without_text + 1
        problem = f"no text to train on ({self.dataset.folder})"
        raise UserError(f"dataset {self.dataset.name}: {problem}")

    def _documents(self, run: list[Any]) -> list[Document]:
        """Texts, or arrays of ids, as documents."""
        bos, documents = self.tokenizer.get_bos_token_id(), []
        for ids in self._encoded(run):
            step = self.max_tokens - 1 if self.max_tokens else max(1, len(ids))
            for start in range(0, len(ids), step):
                piece = np.concatenate([[bos], ids[start : start + step]], dtype=np.int32)
                mask = np.arange(len(piece)) > 0 if start else None
                documents.append(Document(piece, mask, True))
        return documents

    def _encoded(self, run: list[Any]) -> list[np.ndarray]:
        if self.dataset.tokenizer_fingerprint is not None:
            return run
        ids, offsets = self.tokenizer.encode_documents(run, num_threads=2)
        return np.split(ids, offsets[1:-1])

    def _shards(self, epoch: int) -> list[str]:
        shards = self.dataset.shards("train")
        if epoch == 0 and self.dataset.arrives_in_order:
            return shards
        return [shards[i] for i in permutation(len(shards), self.seed, "shards", epoch)]

    def _texts(self, epoch: int, shard: str, group: int) -> list[Any]:
        """The documents of the shard's `group`-th group, all in this epoch's order."""
        name = shard.removesuffix(TOKENS)  # ids come in the order of their text
        num_groups = self.dataset.num_groups(shard, "train")
        number = int(permutation(num_groups, self.seed, "groups", epoch, name)[group])
        texts = self.dataset.read_group(shard, number, "train")
        shuffled = permutation(len(texts), self.seed, "rows", epoch, name, number)
        return [texts[i] for i in shuffled if len(texts[i])]


class ConversationStream:
    """A task's conversations, never split, each epoch (endlessly, or num_epochs) in its own order.

    Only tokens that the rendering marks are learned. A conversation longer than `max_tokens` is cut
    there, and one without a token to learn from is left out; an epoch's end logs both counts.
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
        self.start = {"epoch": 0, "index": 0}
        self._counts = {"cut": 0, "left out": 0}

    def runs(self, state: dict[str, Any]) -> Iterator[Run]:
        epoch, index = state["epoch"], state["index"]
        if index >= len(self.task):
            raise UserError(SHORTER)
        epochs_without_document = 0
        while self.num_epochs is None or epoch < self.num_epochs:
            order = permutation(len(self.task), self.seed, "conversations", epoch)
            for start in range(index, len(self.task), CONVERSATION_RUN):
                stop = min(start + CONVERSATION_RUN, len(self.task))
                rendered = [self._render(int(i)) for i in order[start:stop]]
                documents = [document for document in rendered if document is not None]
                after = {"epoch": epoch, "index": stop}
                if stop == len(self.task):
                    after = {"epoch": epoch + 1, "index": 0}
                    self._log_counts(epoch)
                    epochs_without_document += 1
                if documents:
                    epochs_without_document = 0
                    yield documents, after
                elif epochs_without_document > 1:
                    raise UserError(
                        "no conversation has a token to learn from: is there an assistant message "
                        "within the first max_seq_len tokens?",
                    )
            epoch, index = epoch + 1, 0

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
        positions = [first_cursor(stream) for stream in self._streams]
        self.start = {"tokens": [0] * len(parts), "positions": positions}

    def runs(self, state: dict[str, Any]) -> Iterator[Run]:
        tokens, positions = list(state["tokens"]), list(state["positions"])
        readers = [*map(read_documents, self._streams, positions)]
        while True:
            total = sum(tokens)
            shortfalls = [f * total - n for f, n in zip(self.fractions, tokens, strict=True)]
            for i in sorted(range(len(readers)), key=lambda i: -shortfalls[i]):
                if (read := next(readers[i], None)) is not None:
                    tokens[i] += len(read.document.ids)
                    positions[i] = read.next_cursor
                    yield [read.document], {"tokens": [*tokens], "positions": [*positions]}
                    break
            else:
                return


def permutation(n: int, *parts: Any) -> np.ndarray:
    """(n,) int64: an order of range(n) that depends on `parts` only."""
    return np.random.Generator(np.random.PCG64(derive_seed(*parts))).permutation(n)
