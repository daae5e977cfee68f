"""Documents -> packed (inputs, targets) batches: one global order of text, cut into rows, sliced over ranks, resumable at any step.

    stream    endless documents in an order that is a function of (data, seed); its position is a little JSON
    packer    documents -> rows of T+1 tokens, each beginning with <|bos|>
    batches   step s is rows [s*R, (s+1)*R) of the packer's output, rank r takes the r-th slice of them; made ahead by a thread

Every rank reads and packs the whole stream, so that a step's rows depend neither on the number of ranks nor on interruptions. A
cursor says from where the documents must be read again and which of them are still unfinished, so it stays small whatever is pending.
Legend: R rows of a step, T targets in a row, W = T + 1 tokens in a row.
"""

import itertools
import logging
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from zangchat.dataset import Dataset
from zangchat.dataset.shards import TOKENS
from zangchat.errors import UserError
from zangchat.runtime.seeds import derive_seed

logger = logging.getLogger(__name__)
Item = TypeVar("Item")

TEXT_RUN = 32  # documents tokenised at a time
CONVERSATION_RUN = 8
LOOK_AHEAD = 16  # unfinished documents that the packer holds while it looks for one that fits
PREFETCHED_STEPS = 2
IGNORED = -1  # target without loss


@dataclass
class Batch:
    """One rank's rows of one optimizer step."""

    inputs: torch.Tensor  # (R / world_size, T) int64
    targets: torch.Tensor  # (R / world_size, T) int64, -1 = ignored
    cursor: dict[str, Any]  # JSON: the position after this step, equal on all ranks
    weights: torch.Tensor | None = None  # (R / world_size, T) float32 factors on each token's loss


class Document(NamedTuple):
    ids: np.ndarray  # (n,) int32, beginning with <|bos|>
    mask: np.ndarray | None  # (n,) 1 = learn to predict this token; None = all
    splittable: bool  # may go on in the next row


class DocumentStream(Protocol):
    state: dict[str, Any]  # JSON: where the next document comes from; set it to go there. A call replaces the dict, and changes none

    def next_documents(self) -> list[Document]:
        """The next few documents; none at the end of a finite stream."""
        ...


# ---- streams ------------------------------------------------------------------------------------------------------------


class TextStream:
    """Documents of a pretraining dataset, for ever.

    Each epoch has its own order: shards (except in the first epoch of a dataset that may still be downloading), groups within a
    shard, documents within a group. With `max_tokens`, a longer document is handed out in several, each with its own <|bos|>: finer
    grains for a MixedStream.
    """

    def __init__(self, dataset: Dataset, tokenizer: Any, seed: int, max_tokens: int | None = None) -> None:
        if max_tokens is not None and max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, not {max_tokens}")
        if dataset.tokenizer_fingerprint not in (None, tokenizer and tokenizer.fingerprint):
            raise UserError(f"dataset {dataset.name} was made with another tokenizer than this model's: {dataset.repair_hint()}")
        self.dataset, self.tokenizer, self.seed, self.max_tokens = dataset, tokenizer, seed, max_tokens
        self.state: dict[str, Any] = {"epoch": 0, "shard": 0, "group": 0, "row": 0}
        self._group: tuple[tuple[int, int, int], list[Any]] | None = None  # the group in hand, in this epoch's order

    def next_documents(self) -> list[Document]:
        bos = np.array([self.tokenizer.get_bos_token_id()], dtype=np.int32)
        documents = []
        for ids in self._encoded(self._next_run()):
            step = self.max_tokens - 1 if self.max_tokens else max(1, len(ids))
            for piece in range(0, len(ids), step):
                documents.append(Document(np.concatenate([bos, ids[piece : piece + step].astype(np.int32)]), None, True))
        return documents

    def _encoded(self, run: list[Any]) -> list[np.ndarray]:
        if self.dataset.tokenizer_fingerprint is not None:
            return run
        ids, offsets = self.tokenizer.encode_documents(run, num_threads=2)
        return np.split(ids, offsets[1:-1])

    def _next_run(self) -> list[Any]:
        """Up to TEXT_RUN texts (or arrays of ids), all of one group; moves the state behind them."""
        epoch, shard, group, row = (self.state[key] for key in ("epoch", "shard", "group", "row"))
        empty_epochs = 0
        while True:
            shards = self._shards(epoch)
            if shard >= len(shards):
                epoch, shard, group, row = epoch + 1, 0, 0, 0
                empty_epochs += 1
                if empty_epochs > 1:
                    raise UserError(f"dataset {self.dataset.name}: no text to train on ({self.dataset.folder})")
            elif row == 0 and group >= self.dataset.num_groups(shards[shard], "train"):
                shard, group = shard + 1, 0
            else:
                texts = self._texts(epoch, shard, group)
                if row < len(texts):
                    run = texts[row : row + TEXT_RUN]
                    self.state = {"epoch": epoch, "shard": shard, "group": group, "row": row + len(run)}
                    return run
                group, row = group + 1, 0

    def _shards(self, epoch: int) -> list[str]:
        shards = self.dataset.shards("train")
        if epoch == 0 and self.dataset.arrives_in_order:
            return shards
        return [shards[i] for i in permutation(len(shards), self.seed, "shards", epoch)]

    def _texts(self, epoch: int, shard: int, group: int) -> list[Any]:
        """The `group`-th group of the `shard`-th shard in this epoch's order, its documents in this epoch's order."""
        key = (epoch, shard, group)
        if self._group is None or self._group[0] != key:
            shard_name = self._shards(epoch)[shard]
            name = shard_name.removesuffix(TOKENS)  # ids come in the order of their text
            order = permutation(self.dataset.num_groups(shard_name, "train"), self.seed, "groups", epoch, name)
            texts = self.dataset.read_group(shard_name, int(order[group]), "train")
            shuffled = permutation(len(texts), self.seed, "rows", epoch, name, int(order[group]))
            self._group = (key, [texts[i] for i in shuffled if len(texts[i])])
        return self._group[1]


class ConversationStream:
    """A task's conversations as documents that are never cut, each epoch in its own order; for ever, or for `num_epochs`.

    Only the tokens that the rendering marks are learnt. A conversation longer than `max_tokens` is cut there, and one without a token
    to learn from is left out; both are counted, and the counts are logged at the end of an epoch.
    """

    def __init__(self, task: Any, tokenizer: Any, seed: int, max_tokens: int, num_epochs: int | None = None) -> None:
        if len(task) == 0:
            raise ValueError("the task has no examples")
        self.task, self.tokenizer, self.seed, self.max_tokens, self.num_epochs = task, tokenizer, seed, max_tokens, num_epochs
        self.state: dict[str, Any] = {"epoch": 0, "index": 0}
        self._order: tuple[int, np.ndarray] | None = None
        self._counts = {"cut": 0, "left out": 0}

    def next_documents(self) -> list[Document]:
        epoch, index = self.state["epoch"], self.state["index"]
        empty_epochs = 0
        while self.num_epochs is None or epoch < self.num_epochs:
            stop = min(index + CONVERSATION_RUN, len(self.task))
            rendered = [self._render(int(i)) for i in self._epoch_order(epoch)[index:stop]]
            documents = [document for document in rendered if document is not None]
            epoch, index = (epoch, stop) if stop < len(self.task) else (epoch + 1, 0)
            self.state = {"epoch": epoch, "index": index}
            if index == 0:
                self._log_counts(epoch - 1)
                empty_epochs += 1
            if documents:
                return documents
            if empty_epochs > 1:
                raise UserError(
                    "no conversation has a token to learn from: is there an assistant message within the first max_seq_len tokens?"
                )
        return []

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(len(self.task), self.seed, "conversations", epoch))
        return self._order[1]

    def _render(self, index: int) -> Document | None:
        ids, mask = self.tokenizer.render_conversation(self.task[index], max_tokens=self.max_tokens + 1)  # one more, to see what is cut
        if len(ids) > self.max_tokens:
            self._counts["cut"] += 1
            ids, mask = ids[: self.max_tokens], mask[: self.max_tokens]
        if not any(mask):
            self._counts["left out"] += 1
            return None
        return Document(np.array(ids, dtype=np.int32), np.array(mask, dtype=bool), False)

    def _log_counts(self, epoch: int) -> None:
        if any(self._counts.values()):
            told = ", ".join(f"{count} {what}" for what, count in self._counts.items())
            logger.warning("epoch %d: of %d conversations %s (limit %d tokens)", epoch, len(self.task), told, self.max_tokens)
        self._counts = dict.fromkeys(self._counts, 0)


class MixedStream:
    """Several streams as one: each document comes from the stream that is furthest behind its fraction of the tokens handed out so far."""

    def __init__(self, parts: Sequence[tuple[DocumentStream, float]]) -> None:
        if not parts or min(fraction for _, fraction in parts) <= 0:
            raise ValueError("a mixture needs streams with positive fractions")
        total = sum(fraction for _, fraction in parts)
        self.fractions = [fraction / total for _, fraction in parts]
        self._streams = [stream for stream, _ in parts]
        self._readers = [DocumentReader(stream) for stream in self._streams]
        self._tokens = [0] * len(parts)

    @property
    def state(self) -> dict[str, Any]:
        return {"tokens": list(self._tokens), "positions": [reader.position for reader in self._readers]}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._tokens = list(state["tokens"])
        self._readers = [DocumentReader(stream, position) for stream, position in zip(self._streams, state["positions"], strict=True)]

    def next_documents(self) -> list[Document]:
        total = sum(self._tokens)
        deficits = [fraction * total - tokens for fraction, tokens in zip(self.fractions, self._tokens, strict=True)]
        for i in sorted(range(len(deficits)), key=lambda i: -deficits[i]):
            document = self._readers[i].next()
            if document is not None:
                self._tokens[i] += len(document.ids)
                return [document]
        return []


class DocumentReader:
    """One document at a time from a stream, with an exact position although the stream moves by runs."""

    def __init__(self, stream: DocumentStream, position: dict[str, Any] | None = None) -> None:
        self._stream = stream
        self._run: list[Document] = []
        self._taken = 0
        if position is not None:
            stream.state = position["state"]
        self._run_state = stream.state  # from where the run in hand was read
        if position is not None and position["taken"]:
            self._run = stream.next_documents()
            self._taken = position["taken"]

    @property
    def position(self) -> dict[str, Any]:
        """JSON: where the next document comes from."""
        if self._taken == len(self._run):
            return {"state": self._stream.state, "taken": 0}
        return {"state": self._run_state, "taken": self._taken}

    def next(self) -> Document | None:
        """None at the end of a finite stream."""
        if self._taken == len(self._run):
            self._run_state = self._stream.state
            self._run, self._taken = self._stream.next_documents(), 0
            if not self._run:
                return None
        self._taken += 1
        return self._run[self._taken - 1]


def permutation(n: int, *parts: Any) -> np.ndarray:
    """(n,) int64: the order that `parts` stand for, always the same."""
    return np.random.Generator(np.random.PCG64(derive_seed(*parts))).permutation(n)


# ---- packing ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Unfinished:
    number: int  # of the document in the order of reading
    position: dict[str, Any]  # reader position from which it can be read again
    document: Document
    offset: int = 0  # tokens already placed


class Packer:
    """Documents -> rows of `width` tokens, each beginning with <|bos|>, filled oldest document first.

    A splittable document fills the row and goes on, after a <|bos|>, in the next: none of its tokens is dropped. One that must not be
    cut waits for a row with room; meanwhile up to LOOK_AHEAD documents are looked at for one that fits, then the row is padded. One
    that is longer than a row is cut to it, and counted.
    """

    def __init__(self, stream: DocumentStream, *, width: int, bos: int, cursor: dict[str, Any] | None = None) -> None:
        if width < 2:
            raise ValueError(f"a row needs at least 2 tokens, not {width}")
        self.width, self.bos = width, bos
        self.truncated = 0
        self._unfinished: list[_Unfinished] = []  # in the order of reading
        self._reader = DocumentReader(stream, cursor["position"] if cursor else None)
        self._read = 0
        if cursor:
            offsets = {int(number): offset for number, offset in cursor["unfinished"]}
            for number in range(cursor["read"]):
                entry = self._next_document()
                assert entry is not None, "the stream is shorter than when the cursor was made"
                if number in offsets:
                    entry.offset = offsets[number]
                    self._unfinished.append(entry)

    @property
    def cursor(self) -> dict[str, Any]:
        """JSON: where to read again, how many documents to read there, and [number, tokens placed] of those not finished."""
        if not self._unfinished:
            return {"position": self._reader.position, "read": 0, "unfinished": []}
        oldest = self._unfinished[0]
        unfinished = [[entry.number - oldest.number, entry.offset] for entry in self._unfinished]
        return {"position": oldest.position, "read": self._read - oldest.number, "unfinished": unfinished}

    def fill(self, ids: np.ndarray, learn: np.ndarray) -> bool:
        """Fill a row: ids (W,), learn (W,) bool, True where the token is a target. False at the end of the stream: all is padding."""
        ids[:] = self.bos
        learn[:] = False
        used = 0
        while used < self.width and (entry := self._choose(self.width - used)) is not None:
            document, offset = entry.document, entry.offset
            used += offset > 0  # a continuation's <|bos|>, in place already
            taken = min(self.width - used, len(document.ids) - offset)
            ids[used : used + taken] = document.ids[offset : offset + taken]
            learn[used : used + taken] = True if document.mask is None else document.mask[offset : offset + taken]
            used += taken
            entry.offset += taken
            if entry.offset == len(document.ids):
                self._unfinished.remove(entry)
        return used > 0

    def _choose(self, room: int) -> _Unfinished | None:
        """The oldest document that may be placed into `room` tokens; reads on where none of those in hand may."""
        for entry in self._unfinished:
            if self._fits(entry, room):
                return entry
        while len(self._unfinished) < LOOK_AHEAD and (new := self._next_document()) is not None:
            self._unfinished.append(new)
            if self._fits(new, room):
                return new
        return None

    def _fits(self, entry: _Unfinished, room: int) -> bool:
        if entry.document.splittable:
            return entry.offset == 0 or room >= 2
        return len(entry.document.ids) <= room

    def _next_document(self) -> _Unfinished | None:
        position = self._reader.position
        document = self._reader.next()
        if document is None:
            return None
        self._read += 1
        if not document.splittable and len(document.ids) > self.width:
            self.truncated += 1
            logger.warning("a document of %d tokens was cut to a row's %d (%d so far)", len(document.ids), self.width, self.truncated)
            mask = None if document.mask is None else document.mask[: self.width]
            document = Document(document.ids[: self.width], mask, False)
        return _Unfinished(self._read - 1, position, document)


def first_fit(lengths: Sequence[int], width: int) -> list[int]:
    """The row of each item: the first with room for it, in the order given. Lengths must be within 1..width."""
    rows: list[int] = []
    room: list[int] = []
    for length in lengths:
        row = next((row for row, free in enumerate(room) if free >= length), len(room))
        if row == len(room):
            room.append(width)
        room[row] -= length
        rows.append(row)
    return rows


# ---- batches ------------------------------------------------------------------------------------------------------------


def packed_batches(
    stream: DocumentStream,
    *,
    rows_per_step: int,
    sequence_len: int,
    rank: int = 0,
    world_size: int = 1,
    bos: int,
    cursor: dict[str, Any] | None = None,
) -> Iterator[Batch]:
    """This rank's slice of steps of `rows_per_step` packed rows, beginning after `cursor`'s step. Closing it ends its thread."""
    if rows_per_step < 1 or rows_per_step % world_size:
        raise ValueError(f"rows_per_step ({rows_per_step}) must be a multiple of world_size ({world_size})")

    def produce() -> Iterator[Batch]:
        packer = Packer(stream, width=sequence_len + 1, bos=bos, cursor=cursor or None)
        while True:
            ids = np.empty((rows_per_step, sequence_len + 1), dtype=np.int32)
            learn = np.empty(ids.shape, dtype=bool)
            filled = [packer.fill(ids[row], learn[row]) for row in range(rows_per_step)]
            if not filled[0]:
                return
            yield _batch(ids, learn, packer.cursor, rank, world_size)

    return prefetched(produce)


def example_batches(
    task: Any,
    tokenizer: Any,
    *,
    examples_per_step: int,
    sequence_len: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    cursor: dict[str, Any] | None = None,
    num_epochs: int | None = None,
) -> Iterator[Batch]:
    """Steps of exactly `examples_per_step` conversations in the order of a ConversationStream, packed whole into as many rows as they need.

    Rows of padding make the number of rows a multiple of world_size. With `num_epochs` the batches end, the last step possibly with fewer
    conversations.
    """
    width = sequence_len + 1
    bos = tokenizer.get_bos_token_id()

    def produce() -> Iterator[Batch]:
        reader = DocumentReader(ConversationStream(task, tokenizer, seed, width, num_epochs), cursor or None)
        while True:
            documents = [document for _ in range(examples_per_step) if (document := reader.next()) is not None]
            if not documents:
                return
            rows = first_fit([len(document.ids) for document in documents], width)
            ids = np.full((-(-(max(rows) + 1) // world_size) * world_size, width), bos, dtype=np.int32)
            learn = np.zeros(ids.shape, dtype=bool)
            used = [0] * len(ids)
            for row, document in zip(rows, documents, strict=True):
                place = slice(used[row], used[row] + len(document.ids))
                ids[row, place], learn[row, place] = document.ids, document.mask
                used[row] = place.stop
            yield _batch(ids, learn, reader.position, rank, world_size)

    return prefetched(produce)


def validation_batches(
    dataset: Dataset,
    tokenizer: Any,
    sequence_len: int,
    *,
    eval_tokens: int | None = None,
    rows_per_batch: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Validation rows, the same for any packer and number of ranks: each document from its <|bos|>, at most T targets, the rest ignored.

    Documents are taken in order until they amount to `eval_tokens` targets; without that, all. Every rank gets the same number of batches
    of `rows_per_batch` rows, rows without any target filling the last.
    """
    width, rows_per_step = sequence_len + 1, rows_per_batch * world_size
    rows = _validation_rows(dataset, tokenizer, width, eval_tokens)
    while step := list(itertools.islice(rows, rows_per_step)):
        ids = np.full((rows_per_step, width), tokenizer.get_bos_token_id(), dtype=np.int32)
        learn = np.zeros(ids.shape, dtype=bool)
        for i, row in enumerate(step):
            ids[i, : len(row)], learn[i, : len(row)] = row, True
        yield _batch(ids, learn, {}, rank, world_size)


def _validation_rows(dataset: Dataset, tokenizer: Any, width: int, eval_tokens: int | None) -> Iterator[np.ndarray]:
    """<|bos|> and the first T tokens of each document."""
    bos = tokenizer.get_bos_token_id()
    tokens_left = math.inf if eval_tokens is None else eval_tokens
    for text in dataset.iter_documents("validation"):
        if tokens_left <= 0:
            return
        ids, _ = tokenizer.encode_documents([text], num_threads=1)
        row = np.concatenate([np.array([bos], dtype=np.int32), ids[: width - 1].astype(np.int32)])
        tokens_left -= len(row) - 1
        if len(row) > 1:
            yield row


def _batch(ids: np.ndarray, learn: np.ndarray, cursor: dict[str, Any], rank: int, world_size: int) -> Batch:
    """Rows (R, W) of a step -> this rank's Batch."""
    share = len(ids) // world_size
    mine = slice(rank * share, (rank + 1) * share)
    tokens = torch.from_numpy(ids[mine].astype(np.int64))
    targets = tokens[:, 1:].masked_fill(~torch.from_numpy(learn[mine, 1:]), IGNORED)
    inputs, targets = tokens[:, :-1].contiguous(), targets.contiguous()
    if torch.cuda.is_initialized():  # a GPU fetches from pinned memory by itself, while the training thread goes on
        inputs, targets = inputs.pin_memory(), targets.pin_memory()
    return Batch(inputs, targets, cursor)


def prefetched(produce: Callable[[], Iterator[Item]], depth: int = PREFETCHED_STEPS) -> Iterator[Item]:
    """The items of `produce()`, made by a thread up to `depth` ahead; its exception is raised here. Closing it ends the thread."""
    items: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                items.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in produce():
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # handed to the consumer, who raises it
            put("error", error)

    thread = threading.Thread(target=work, name="zangchat-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = items.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join(timeout=5)  # a thread that waits for a shard ends when the shard is there, or with the process
