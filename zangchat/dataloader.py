"""Documents -> packed (inputs, targets) batches: one global order of text, cut into rows, sliced
over ranks, resumable at any step.

    stream    endless documents in an order that is a function of (data, seed); see documents.py
    packer    documents -> rows of T+1 tokens, each beginning with <|bos|>
    batches   step s is rows [s*R, (s+1)*R) of the packer's output, rank r takes the r-th slice of
              them; made ahead by a thread

Every rank reads and packs the whole stream, so that a step's rows depend neither on the number of
ranks nor on interruptions. A cursor says from where documents must be read again and which of them
are unfinished, so it stays small whatever is pending.
Legend: R rows of a step, T targets in a row, W = T + 1 tokens in a row.
"""

import itertools
import logging
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from zangchat.streams import ConversationStream, DocumentStream, Read, first_cursor, read_documents

if TYPE_CHECKING:
    from zangchat.dataset import Dataset

logger = logging.getLogger(__name__)
Item = TypeVar("Item")

LOOK_AHEAD = 16  # unfinished documents that the packer holds while it looks for one that fits
PREFETCHED_STEPS = 2
LENGTH_CLASSES = 8  # of validation rows
IGNORED = -1  # target without loss


@dataclass
class Batch:
    """One rank's rows of one optimizer step."""

    inputs: torch.Tensor  # (R / world_size, T) int64
    targets: torch.Tensor  # (R / world_size, T) int64, -1 = ignored
    cursor: dict[str, Any]  # JSON: where the next step begins, equal on all ranks
    loss_weights: torch.Tensor | None = None  # (R / world_size, T) float32, of each token's loss
    metrics: dict[str, float] = field(default_factory=dict)  # about its data (RL: rewards), to log


@dataclass(eq=False)
class _Unfinished:
    number: int  # of the document in the order of reading
    read: Read
    offset: int = 0  # tokens already placed

    def fits(self, room: int) -> bool:
        if self.read.document.splittable:
            return self.offset == 0 or room >= 2
        return len(self.read.document.ids) <= room


class Packer:
    """Documents -> rows of `width` tokens, each beginning with <|bos|>, oldest documents first.

    A splittable document fills the row and continues, after a <|bos|>, in the next: none of its
    tokens is dropped. One that must not be split waits for a row with room; meanwhile up to
    LOOK_AHEAD documents are searched for one that fits, then the row is padded. One that is longer
    than a row is cut to it, and counted.
    """

    def __init__(
        self, stream: DocumentStream, *, width: int, bos: int, cursor: dict[str, Any] | None = None
    ) -> None:
        if width < 2:
            raise ValueError(f"a row needs at least 2 tokens, not {width}")
        self.width, self.bos, self.truncated = width, bos, 0
        self._unfinished: list[_Unfinished] = []  # in the order of reading
        self._position = cursor["position"] if cursor else first_cursor(stream)  # of the next
        self._documents = read_documents(stream, self._position)
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
        """JSON: where to read again, how many documents to read there, and [number, tokens placed]
        of the unfinished ones."""
        position, first = self._position, self._read
        if self._unfinished:
            position, first = self._unfinished[0].read.cursor, self._unfinished[0].number
        unfinished = [[entry.number - first, entry.offset] for entry in self._unfinished]
        return {"position": position, "read": self._read - first, "unfinished": unfinished}

    def fill(self, ids: np.ndarray, learn: np.ndarray) -> bool:
        """Fill a row: ids (W,), learn (W,), True for a target. False at the end: all is padding."""
        ids[:], learn[:], used = self.bos, False, 0
        while used < self.width and (entry := self._choose(self.width - used)) is not None:
            document, offset = entry.read.document, entry.offset
            used += offset > 0  # a continuation's <|bos|>, in place already
            taken = min(self.width - used, len(document.ids) - offset)
            ids[used : used + taken] = document.ids[offset : offset + taken]
            mask = document.mask
            learn[used : used + taken] = True if mask is None else mask[offset : offset + taken]
            used += taken
            entry.offset += taken
            if entry.offset == len(document.ids):
                self._unfinished.remove(entry)
        return used > 0

    def _choose(self, room: int) -> _Unfinished | None:
        """The oldest document that fits `room` tokens; reads more if no unfinished one does."""
        for entry in self._unfinished:
            if entry.fits(room):
                return entry
        while len(self._unfinished) < LOOK_AHEAD and (new := self._next_document()) is not None:
            self._unfinished.append(new)
            if new.fits(room):
                return new
        return None

    def _next_document(self) -> _Unfinished | None:
        read = next(self._documents, None)
        if read is None:
            return None
        self._position = read.next_cursor
        self._read += 1
        ids, mask, splittable = read.document
        if not splittable and len(ids) > self.width:
            self.truncated += 1
            cut = f"a document of {len(ids)} tokens was cut to a row's {self.width}"
            logger.warning(f"{cut} ({self.truncated} so far)")
            kept = None if mask is None else mask[: self.width]
            read = read._replace(document=read.document._replace(ids=ids[: self.width], mask=kept))
        return _Unfinished(self._read - 1, read)


def first_fit(lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """(row, first column) of each item, in the order given: the first row with room for it."""
    places, used = list[tuple[int, int]](), list[int]()
    for length in lengths:
        row = next((row for row, end in enumerate(used) if end + length <= width), len(used))
        if row == len(used):
            used.append(0)
        places.append((row, used[row]))
        used[row] += length
    return places


# ---- batches -------------------------------------------------------------------------------------


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
    """This rank's slice of steps of `rows_per_step` packed rows, beginning after `cursor`'s step.
    Closing it ends its thread."""
    if rows_per_step < 1 or rows_per_step % world_size:
        multiple = f"a multiple of world_size ({world_size})"
        raise ValueError(f"rows_per_step ({rows_per_step}) must be {multiple}")

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
    """Steps of exactly `examples_per_step` conversations in the order of a ConversationStream,
    packed whole into as many rows as they need.

    Rows of padding make the number of rows a multiple of world_size. With `num_epochs` the batches
    end, the last step possibly with fewer conversations.
    """
    width = sequence_len + 1
    bos = tokenizer.get_bos_token_id()

    def produce() -> Iterator[Batch]:
        stream = ConversationStream(task, tokenizer, seed, width, num_epochs)
        reader = read_documents(stream, cursor or first_cursor(stream))
        while step := list(itertools.islice(reader, examples_per_step)):
            documents = [read.document for read in step]
            places = first_fit([len(document.ids) for document in documents], width)
            height = -(-(max(places)[0] + 1) // world_size) * world_size
            ids = np.full((height, width), bos, dtype=np.int32)
            learn = np.zeros(ids.shape, dtype=bool)
            for (row, start), document in zip(places, documents, strict=True):
                place = slice(start, start + len(document.ids))
                ids[row, place], learn[row, place] = document.ids, document.mask
            yield _batch(ids, learn, step[-1].next_cursor, rank, world_size)

    return prefetched(produce)


def validation_batches(
    dataset: "Dataset",
    tokenizer: Any,
    sequence_len: int,
    *,
    eval_tokens: int | None = None,
    rows_per_batch: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Validation rows, for any number of ranks: each document from <|bos|>, at most T targets.

    Documents are taken in order until they amount to `eval_tokens` targets; without that, all. Rows
    of about the same length share a batch, which is cut to that length and holds more of them:
    `rows_per_batch` x T positions, few of them padding. Every rank gets batches of the same shapes,
    of which there are at most LENGTH_CLASSES; rows without targets fill the last.
    """
    unit = -(-sequence_len // LENGTH_CLASSES)
    bos = tokenizer.get_bos_token_id()
    waiting: dict[int, list[np.ndarray]] = {}  # by the targets in a row, rounded up

    def size(length: int) -> int:
        return rows_per_batch * sequence_len // length * world_size

    def batch(rows: Sequence[np.ndarray], length: int) -> Batch:
        ids = np.full((size(length), length + 1), bos, dtype=np.int32)
        learn = np.zeros(ids.shape, dtype=bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)], learn[i, : len(row)] = row, True
        return _batch(ids, learn, {}, rank, world_size)

    for row in _validation_rows(dataset, tokenizer, sequence_len + 1, eval_tokens):
        length = min(-(-(len(row) - 1) // unit) * unit, sequence_len)
        rows = waiting.setdefault(length, [])
        rows.append(row)
        if len(rows) == size(length):
            yield batch(waiting.pop(length), length)
    rows = []
    for length in sorted(waiting):  # the rest goes to longer rows as long as there are any
        rows += waiting[length]
        while rows and (len(rows) >= size(length) or length == max(waiting)):
            yield batch(rows[: size(length)], length)
            rows = rows[size(length) :]


def _validation_rows(
    dataset: "Dataset", tokenizer: Any, width: int, eval_tokens: int | None
) -> Iterator[np.ndarray]:
    """<|bos|> and the first T tokens of each document."""
    bos = tokenizer.get_bos_token_id()
    tokens_left = math.inf if eval_tokens is None else eval_tokens
    for text in dataset.iter_documents("validation"):
        if tokens_left <= 0:
            return
        ids, _ = tokenizer.encode_documents([text], num_threads=1)
        row = np.concatenate([[bos], ids[: width - 1]], dtype=np.int32)
        tokens_left -= len(row) - 1
        if len(row) > 1:
            yield row


def _batch(
    ids: np.ndarray, learn: np.ndarray, cursor: dict[str, Any], rank: int, world_size: int
) -> Batch:
    """Rows (R, W) of a step -> this rank's Batch."""
    share = len(ids) // world_size
    own_rows = slice(rank * share, (rank + 1) * share)
    tokens = torch.from_numpy(ids[own_rows].astype(np.int64))
    targets = tokens[:, 1:].masked_fill(~torch.from_numpy(learn[own_rows, 1:]), IGNORED)
    inputs, targets = tokens[:, :-1].contiguous(), targets.contiguous()
    if torch.cuda.is_initialized():  # a GPU copies from pinned memory while training continues
        inputs, targets = inputs.pin_memory(), targets.pin_memory()
    return Batch(inputs, targets, cursor)


def prefetched(
    produce: Callable[[], Iterator[Item]], depth: int = PREFETCHED_STEPS
) -> Iterator[Item]:
    """The items of `produce()`, made by a thread up to `depth` ahead, and its exception. Closing it
    ends the thread."""
    items: queue.SimpleQueue[tuple[Item] | BaseException | None] = queue.SimpleQueue()
    room, stop = threading.Semaphore(depth), threading.Event()

    def work() -> None:
        try:
            for item in produce():
                items.put((item,))
                room.acquire()
                if stop.is_set():
                    return
            items.put(None)  # the end
        except BaseException as error:  # for the consumer to raise
            items.put(error)

    thread = threading.Thread(target=work, name="zangchat-prefetch", daemon=True)
    thread.start()
    try:
        while isinstance(item := items.get(), tuple):
            room.release()
            yield item[0]
        if item is not None:
            raise item
    finally:
        stop.set()
        room.release()
        # a thread that waits for a shard ends when the shard arrives, or with the process
        thread.join(timeout=5)
