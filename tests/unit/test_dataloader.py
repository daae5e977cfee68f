"""Packing, cursors, ranks, epochs, prefetching."""

import itertools
import json
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import packing as reference
from tests.util import ByteTokenizer, conversation, make_dataset
from zangchat.dataloader import (
    LENGTH_CLASSES,
    Packer,
    example_batches,
    first_fit,
    packed_batches,
    prefetched,
    validation_batches,
)
from zangchat.dataset import find_dataset, load_dataset
from zangchat.dataset.tokens import tokenize
from zangchat.errors import UserError
from zangchat.streams import (
    ConversationStream,
    Document,
    MixedStream,
    TextStream,
    first_cursor,
    read_documents,
)

TOKENIZER = ByteTokenizer()
BOS = TOKENIZER.get_bos_token_id()
T = 24


class ListStream:
    """A finite stream over a list, in runs of three."""

    def __init__(self, documents):
        self.documents = documents
        self.start = {"next": 0}

    def runs(self, state):
        for start in range(state["next"], len(self.documents), 3):
            run = self.documents[start : start + 3]
            yield run, {"next": start + len(run)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three training shards, the first of two row groups; documents from one byte to several
    rows.
    """
    texts = [f"<{i}>" + chr(97 + i % 26) * (i * 7 % 60) for i in range(2 * 8192 + 40)]
    held_out = [f"validation {i} " * (i % 5 + 1) for i in range(13)]
    return make_dataset(tmp_path_factory.mktemp("data") / "letters", texts, held_out)


@pytest.fixture
def small(tmp_path):
    return make_dataset(tmp_path / "small", [f"{i}:" + "x" * (i * 5 % 41) for i in range(50)])


TASK = [
    conversation(f"question {i}" + "?" * (i % 7), f"answer {i}" + "!" * (i * 3 % 5))
    for i in range(11)
]
WIDE = 48  # fits every conversation of TASK


def text_stream(dataset):
    return TextStream(dataset, TOKENIZER, seed=7)


def chat_stream():
    return ConversationStream(TASK, TOKENIZER, seed=7, max_tokens=WIDE + 1)


def mixed_stream(dataset):
    return MixedStream(
        [(TextStream(dataset, TOKENIZER, seed=7, max_tokens=20), 0.7), (chat_stream(), 0.3)]
    )


def take(batches, count):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def same(left, right):
    return (
        torch.equal(left.inputs, right.inputs)
        and torch.equal(left.targets, right.targets)
        and left.cursor == right.cursor
    )


# ---- packing -------------------------------------------------------------------------------------


def traced_documents(shapes):
    """Documents whose tokens all differ, so that each can be found again: (length, splittable) ->
    Document.
    """
    documents = []
    for i, (length, splittable) in enumerate(shapes):
        ids = np.array([0, *range(1000 * (i + 1), 1000 * (i + 1) + length - 1)], dtype=np.int32)
        mask = None if splittable else np.array([j % 3 != 0 for j in range(length)])
        documents.append(Document(ids, mask, splittable))
    return documents


def all_rows(documents, width):
    packer = Packer(ListStream(documents), width=width, bos=0)
    rows = []
    ids, learn = np.empty(width, dtype=np.int32), np.empty(width, dtype=bool)
    while packer.fill(ids, learn):
        rows.append(list(zip(ids.tolist(), learn.tolist(), strict=True)))
    return rows


SHAPES = st.lists(st.tuples(st.integers(2, 40), st.booleans()), max_size=40)


@given(SHAPES, st.integers(2, 30))
@settings(max_examples=150, deadline=None)
def test_packing_is_that_of_the_reference(shapes, width):
    documents = traced_documents(shapes)
    plain = [
        (d.ids.tolist(), [True] * len(d.ids) if d.mask is None else d.mask.tolist(), d.splittable)
        for d in documents
    ]
    assert all_rows(documents, width) == reference.pack(plain, width, 0)


@given(SHAPES, st.integers(2, 30))
@settings(max_examples=150, deadline=None)
def test_no_token_is_dropped_and_no_conversation_cut(shapes, width):
    documents = traced_documents(shapes)
    rows = all_rows(documents, width)
    assert all(row[0][0] == 0 for row in rows), "every row begins with bos"
    places = {
        token: (r, c) for r, row in enumerate(rows) for c, (token, _) in enumerate(row) if token
    }
    assert sum(token != 0 for row in rows for token, _ in row) == len(places), "no token twice"
    for document in documents:
        kept = document.ids.tolist() if document.splittable else document.ids.tolist()[:width]
        assert all(token in places for token in kept[1:])
        order = [places[token] for token in kept[1:]]
        assert order == sorted(order)
        if not document.splittable and order:
            row, start = order[0]
            assert order == [(row, start + i) for i in range(len(order))], (
                "in one row, in one piece"
            )
            assert rows[row][start - 1][0] == 0, "after its own bos"
            assert [rows[r][c][1] for r, c in order] == document.mask[1:width].tolist()


def test_a_conversation_that_does_not_fit_waits_and_others_fill_the_row():
    long, short = traced_documents([(9, False), (9, False), (3, False)])[1:]
    rows = all_rows([traced_documents([(9, False)])[0], long, short], 12)
    assert [token for token, _ in rows[0]] == [*range(0, 1), *range(1000, 1008), 0, 3000, 3001]
    assert [token for token, _ in rows[1]][:9] == [0, *range(2000, 2008)]


def test_an_oversize_conversation_is_cut_to_a_row_and_counted():
    packer = Packer(ListStream(traced_documents([(20, False)])), width=8, bos=0)
    ids, learn = np.empty(8, dtype=np.int32), np.empty(8, dtype=bool)
    assert packer.fill(ids, learn)
    assert ids.tolist() == [0, *range(1000, 1007)]
    assert packer.truncated == 1
    assert not packer.fill(ids, learn)


@given(st.lists(st.integers(1, 20), max_size=30))
def test_first_fit_is_that_of_the_reference(lengths):
    rows = reference.first_fit(lengths, 20)
    expected = {
        item: (r, sum(lengths[before] for before in row[:i]))
        for r, row in enumerate(rows)
        for i, item in enumerate(row)
    }
    assert dict(enumerate(first_fit(lengths, 20))) == expected


def test_targets_are_the_inputs_shifted_with_padding_ignored():
    documents = traced_documents([(4, True), (5, False)])
    (batch,) = packed_batches(ListStream(documents), rows_per_step=2, sequence_len=9, bos=0)
    assert batch.inputs[0].tolist() == [0, 1000, 1001, 1002, 0, 2000, 2001, 2002, 2003]
    assert batch.targets[0].tolist() == [1000, 1001, 1002, -1, 2000, 2001, -1, 2003, -1]
    assert batch.targets[1].tolist() == [-1] * 9
    assert (
        batch.inputs.is_contiguous()
        and batch.targets.is_contiguous()
        and batch.inputs.dtype == torch.int64
    )


# ---- cursors and ranks ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "chat", "mixed"])
def test_going_on_from_the_cursor_of_any_step_gives_the_same_batches(small, kind):
    def batches(cursor=None):
        stream = {
            "text": lambda: text_stream(small),
            "chat": chat_stream,
            "mixed": lambda: mixed_stream(small),
        }[kind]()
        return packed_batches(
            stream,
            rows_per_step=2,
            sequence_len=T if kind == "text" else WIDE,
            bos=BOS,
            cursor=cursor,
        )

    whole = take(batches(), 40)  # more than one epoch
    for step in range(len(whole) - 2):
        cursor = json.loads(json.dumps(whole[step].cursor))
        assert all(
            same(*pair)
            for pair in zip(take(batches(cursor), 2), whole[step + 1 : step + 3], strict=True)
        ), f"after step {step}"


def test_example_batches_go_on_from_the_cursor_of_any_step():
    def batches(cursor=None):
        return example_batches(
            TASK, TOKENIZER, examples_per_step=3, sequence_len=WIDE, seed=5, cursor=cursor
        )

    whole = take(batches(), 12)
    for step in range(10):
        cursor = json.loads(json.dumps(whole[step].cursor))
        assert all(
            same(*pair)
            for pair in zip(take(batches(cursor), 2), whole[step + 1 : step + 3], strict=True)
        )


@given(SHAPES.filter(len), st.integers(2, 20), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_a_cursor_restores_any_mix_of_unfinished_documents(shapes, sequence_len, rows_per_step):
    documents = traced_documents(shapes)

    def batches(cursor=None):
        return list(
            packed_batches(
                ListStream(documents),
                rows_per_step=rows_per_step,
                sequence_len=sequence_len,
                bos=0,
                cursor=cursor,
            )
        )

    whole = batches()
    for step in {0, len(whole) // 2}:
        rest = batches(json.loads(json.dumps(whole[step].cursor)))
        assert len(rest) == len(whole) - step - 1
        assert all(same(*pair) for pair in zip(rest, whole[step + 1 :], strict=True))


def test_a_cursor_stays_small_however_long_the_documents_are(tmp_path):
    dataset = make_dataset(tmp_path / "long", ["y" * 100_000] * 3)
    for batch in take(
        packed_batches(text_stream(dataset), rows_per_step=2, sequence_len=64, bos=BOS), 5
    ):
        assert len(json.dumps(batch.cursor)) < 300


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks(small, world_size):
    def steps(rank, size):
        return take(
            packed_batches(
                mixed_stream(small),
                rows_per_step=4,
                sequence_len=WIDE,
                rank=rank,
                world_size=size,
                bos=BOS,
            ),
            8,
        )

    def examples(rank, size):
        return take(
            example_batches(
                TASK,
                TOKENIZER,
                examples_per_step=5,
                sequence_len=WIDE,
                seed=1,
                rank=rank,
                world_size=size,
            ),
            4,
        )

    for make in (steps, examples):
        ranks = [make(rank, world_size) for rank in range(world_size)]
        for alone, *parts in zip(make(0, 1), *ranks, strict=True):
            inputs, targets = (
                torch.cat([part.inputs for part in parts]),
                torch.cat([part.targets for part in parts]),
            )
            # what is more is padding, so that all ranks have equally many rows
            count = len(alone.inputs)
            assert torch.equal(alone.inputs, inputs[:count]) and torch.equal(
                alone.targets, targets[:count]
            )
            assert len(inputs) - count < world_size and (targets[count:] == -1).all()
            assert all(part.cursor == alone.cursor for part in parts)


def test_ranks_share_the_rows_of_a_single_document(tmp_path):
    (tmp_path / "one.jsonl").write_text(
        '{"prompt": "Hello", "completion": " world"}\n', encoding="utf-8"
    )
    dataset = find_dataset(data_path=str(tmp_path / "one.jsonl"))

    def inputs(rank, world_size):
        batches = packed_batches(
            text_stream(dataset),
            rows_per_step=4,
            sequence_len=T,
            rank=rank,
            world_size=world_size,
            bos=BOS,
        )
        return take(batches, 2)[-1].inputs

    everything = inputs(0, 1)
    assert torch.equal(torch.cat([inputs(rank, 4) for rank in range(4)]), everything)
    assert TOKENIZER.decode(everything[0].tolist()).count("Hello world") >= 1
    rows = [
        batch.targets.tolist()
        for rank in range(4)
        for batch in validation(dataset, rank, 4, rows=1)
    ]
    assert [sum(token >= 0 for token in row[0]) for row in rows] == [len("Hello world"), 0, 0, 0]


def test_rows_that_do_not_divide_by_the_ranks_are_refused(small):
    with pytest.raises(ValueError, match="multiple of world_size"):
        next(
            packed_batches(
                text_stream(small), rows_per_step=3, sequence_len=8, rank=0, world_size=2, bos=BOS
            )
        )


# ---- streams -------------------------------------------------------------------------------------


def runs_of(stream):
    """The runs of documents from the stream's start on."""
    return (documents for documents, _ in stream.runs(stream.start))


def texts_of(runs, count):
    """The next `count` documents as texts."""
    texts = []
    while len(texts) < count:
        documents = next(runs)
        assert all(document.ids[0] == BOS for document in documents)
        texts += [TOKENIZER.decode(document.ids[1:].tolist()) for document in documents]
    assert len(texts) == count, "runs end with the epoch"
    return texts


def test_each_epoch_reads_every_document_once_in_an_order_of_its_own(dataset):
    everything = Counter(dataset.iter_documents("train"))
    runs = runs_of(text_stream(dataset))
    first, second = (texts_of(runs, everything.total()) for _ in range(2))
    assert Counter(first) == Counter(second) == everything
    assert first != second
    again = texts_of(runs_of(text_stream(dataset)), everything.total())
    assert first == again, "a function of data and seed"
    other = runs_of(TextStream(dataset, TOKENIZER, seed=8))
    assert first[:100] != texts_of(other, everything.total())[:100]


def test_each_epoch_shuffles_the_documents_of_a_group(tmp_path):
    single = make_dataset(tmp_path / "one", [f"{index}" for index in range(50)])
    runs = runs_of(text_stream(single))
    first, second = (texts_of(runs, 50) for _ in range(2))
    assert Counter(first) == Counter(second) and first != second


def test_shards_that_arrive_in_order_are_shuffled_from_the_second_epoch_on(tmp_path):
    texts = [f"{index}" for index in range(5 * 8192 + 10)]
    arriving = make_dataset(tmp_path / "six", texts)
    arriving = type(arriving)(arriving.folder, {**arriving.manifest, "repo": "a/b"})
    first, second = (text_stream(arriving)._shards(epoch) for epoch in range(2))
    assert first == sorted(first) == sorted(second) != second


def test_while_shards_may_still_arrive_the_first_epoch_takes_them_in_order(dataset):
    arriving = type(dataset)(dataset.folder, {**dataset.manifest, "repo": "someone/something"})
    total = sum(1 for _ in dataset.iter_documents("train"))
    runs = runs_of(text_stream(arriving))
    numbers = [int(text[1 : text.index(">")]) for text in texts_of(runs, total)]
    assert [number // 8192 for number in numbers] == sorted(number // 8192 for number in numbers)
    assert numbers[:8192] != sorted(numbers[:8192]), "within a shard they are shuffled"


def test_documents_in_pieces_add_up_to_the_documents(small):
    whole, pieces = text_stream(small), TextStream(small, TOKENIZER, seed=7, max_tokens=10)
    texts = texts_of(runs_of(whole), 50)
    runs = itertools.islice(runs_of(pieces), 2)
    parts = [TOKENIZER.decode(d.ids[1:].tolist()) for run in runs for d in run]
    assert all(len(part) <= 9 for part in parts)
    assert "".join(parts) == "".join(texts)


def test_the_border_of_a_cut_document_is_not_learned(small):
    pieces = TextStream(small, TOKENIZER, seed=7, max_tokens=10)
    documents = next(runs_of(pieces))
    begun = [d for d in documents if d.mask is None]
    assert 1 < len(begun) < len(documents)
    for document in documents:
        if document.mask is not None:
            assert document.mask.tolist() == [False] + [True] * (len(document.ids) - 1)


def test_a_dataset_without_training_text_is_a_clear_error(tmp_path):
    dataset = make_dataset(tmp_path / "empty", [""])
    with pytest.raises(UserError, match="no text to train on"):
        next(runs_of(text_stream(dataset)))


def test_a_mixture_keeps_to_its_fractions_of_tokens(small):
    tokens = Counter()
    for (document,) in itertools.islice(runs_of(mixed_stream(small)), 600):
        tokens[document.splittable] += len(document.ids)
    assert tokens[True] / tokens.total() == pytest.approx(0.7, abs=0.02)


def test_conversations_learn_only_what_the_assistant_writes():
    (batch,) = example_batches(
        [conversation("ab", "cd")],
        TOKENIZER,
        examples_per_step=1,
        sequence_len=16,
        seed=0,
        num_epochs=1,
    )
    learnt = batch.targets[batch.targets >= 0].tolist()
    assert learnt == [*b"cd", TOKENIZER.encode_special("<|assistant_end|>")]


def test_what_is_cut_or_left_out_is_logged(caplog):
    task = [conversation("q", "a" * 100), conversation("q" * 100, "a"), conversation("q", "a")]
    stream = ConversationStream(task, TOKENIZER, seed=0, max_tokens=20, num_epochs=1)
    (documents,) = runs_of(stream)
    assert sorted(len(document.ids) for document in documents) == [7, 20]
    assert "of 3 conversations 2 cut, 1 left out (limit 20 tokens)" in caplog.text


def test_conversations_without_anything_to_learn_are_a_clear_error():
    stream = ConversationStream([conversation("q" * 100, "a")], TOKENIZER, seed=0, max_tokens=20)
    with pytest.raises(UserError, match="no conversation has a token to learn from"):
        next(runs_of(stream))


@pytest.mark.parametrize("left", [9, 5], ids=["within a run", "before it"])
def test_a_cursor_beyond_shortened_conversations_is_a_clear_error(left):
    task = [conversation(f"q{index}", "a") for index in range(16)]
    whole = ConversationStream(task, TOKENIZER, seed=0, max_tokens=20)
    *_, last = itertools.islice(read_documents(whole, first_cursor(whole)), 12)
    stream = ConversationStream(task[:left], TOKENIZER, seed=0, max_tokens=20)
    with pytest.raises(UserError, match="cannot be resumed.*--overwrite"):
        next(read_documents(stream, last.next_cursor))


# ---- examples ------------------------------------------------------------------------------------


def conversations_in(batch):
    return int((batch.inputs == TOKENIZER.encode_special("<|user_start|>")).sum())


def test_each_step_has_exactly_so_many_conversations_whole():
    ends = TOKENIZER.encode_special("<|assistant_end|>")
    for batch in take(
        example_batches(TASK, TOKENIZER, examples_per_step=4, sequence_len=WIDE, seed=3), 9
    ):
        assert conversations_in(batch) == 4
        assert int((batch.targets == ends).sum()) == 4
        assert (batch.inputs[:, 0] == BOS).all()


def test_epochs_end_where_they_should():
    batches = list(
        example_batches(
            TASK, TOKENIZER, examples_per_step=4, sequence_len=WIDE, seed=3, num_epochs=2
        )
    )
    assert [conversations_in(batch) for batch in batches] == [4, 4, 4, 4, 4, 2]
    seen = Counter()
    for batch in batches:
        text = TOKENIZER.decode(batch.inputs.flatten().tolist())
        seen.update(part.partition("<|user_end|>")[0] for part in text.split("<|user_start|>")[1:])
    assert set(seen.values()) == {2} and len(seen) == len(TASK)


# ---- validation ----------------------------------------------------------------------------------


def validation(dataset, rank=0, world_size=1, rows=2, **limits):
    return list(
        validation_batches(
            dataset, TOKENIZER, T, rows_per_batch=rows, rank=rank, world_size=world_size, **limits
        )
    )


def test_validation_rows_are_the_beginnings_of_the_documents(dataset):
    beginnings = [list(text.encode())[:T] for text in dataset.iter_documents("validation")]
    for batch in validation(dataset):
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            ids = [target for target in targets if target != -1]
            assert targets == ids + [-1] * (batch.inputs.size(1) - len(ids))
            assert inputs[: len(ids)] == [BOS, *ids][: len(ids)]
            if ids:
                beginnings.remove(ids)
    assert beginnings == []


def test_validation_rows_of_one_length_share_a_batch_and_little_is_padding(tmp_path):
    """By the lengths of the documents, not by the order in which they come."""
    texts = ["x" * (1 + 37 * i % (2 * T)) for i in range(150)]
    dataset = make_dataset(tmp_path / "lengths", ["train"], texts)
    batches = validation(dataset, rows=4)
    shapes = Counter(tuple(batch.inputs.shape) for batch in batches)
    assert len(shapes) <= LENGTH_CLASSES
    assert all(rows * length <= 4 * T for rows, length in shapes)
    supervised = sum(int((batch.targets >= 0).sum()) for batch in batches)
    assert supervised == sum(min(len(text), T) for text in texts)
    read = sum(batch.targets.numel() for batch in batches)
    assert read < 1.25 * supervised < len(texts) * T  # the last: rows as long as the longest


@pytest.mark.parametrize("limits", [{}, {"eval_tokens": 100}])
def test_validation_is_the_same_for_any_number_of_ranks(dataset, limits):
    def targets(world_size):
        batches = [validation(dataset, rank, world_size, **limits) for rank in range(world_size)]
        shapes = {tuple(batch.inputs.shape for batch in rank) for rank in batches}
        assert len(shapes) == 1  # the ranks run in step
        rows = [
            row
            for step in zip(*batches, strict=True)
            for batch in step
            for row in batch.targets.tolist()
        ]
        return sorted([token for token in row if token != -1] for row in rows if max(row) >= 0)

    assert targets(1) == targets(2) == targets(4)
    supervised = sum(token >= 0 for row in targets(1) for token in row)
    if "eval_tokens" in limits:
        assert 100 <= supervised < 100 + T


# ---- prefetching ---------------------------------------------------------------------------------


def prefetch_threads():
    return {thread for thread in threading.enumerate() if thread.name == "zangchat-prefetch"}


def test_an_exception_of_the_thread_is_raised_in_its_turn():
    def produce():
        yield 1
        raise UserError("shard_00003.parquet is damaged")

    before = prefetch_threads()
    items = prefetched(produce)
    assert next(items) == 1
    with pytest.raises(UserError, match="shard_00003"):
        next(items)
    assert prefetch_threads() <= before


def test_closing_ends_the_thread_and_the_thread_does_not_run_ahead():
    made = []

    def produce():
        for i in itertools.count():
            made.append(i)
            yield i

    before = prefetch_threads()
    items = prefetched(produce, depth=2)
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert prefetch_threads() <= before
    assert len(made) <= 2 + 2 + 2  # taken, queued, in the making


def test_a_damaged_shard_ends_training_with_its_name(tmp_path):
    dataset = make_dataset(tmp_path / "broken", ["text"] * 20)
    shard = dataset.folder / "shard_00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"shard_00000\.parquet is damaged"):
        next(packed_batches(text_stream(dataset), rows_per_step=1, sequence_len=8, bos=BOS))


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_a_shard_that_goes_bad_in_the_middle_of_a_run_is_named_not_skipped(tmp_path, kind):
    dataset = make_dataset(tmp_path / "small", [f"{i}:" + "x" * (i * 5 % 41) for i in range(50)])
    if kind == "tokens":
        dataset = tokenize(dataset, TOKENIZER, tmp_path / "small-tokens", num_threads=1)
    batches = packed_batches(text_stream(dataset), rows_per_step=4, sequence_len=T, bos=BOS)
    for _ in range(3):
        next(batches)
    (shard,) = dataset.folder.glob("shard_00000*")
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 3] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(UserError, match=r"shard_00000\.parquet.* is damaged \(its sha256"):
        take(batches, 100)


@pytest.mark.parametrize("kind", ["shards", "a lone file"])
def test_token_ids_on_disk_give_the_batches_of_their_text(small, tmp_path, kind):
    """Over three epochs, and from a cursor of either."""
    if kind == "a lone file":
        lines = (json.dumps({"text": text}) + "\n" for text in small.iter_documents("train"))
        (tmp_path / "own.jsonl").write_text("".join(lines), encoding="utf-8")
        small = find_dataset(data_path=str(tmp_path / "own.jsonl"))
    tokens = tokenize(small, TOKENIZER, tmp_path / "tokens", num_threads=1)
    assert (
        tokens.manifest["dtype"] == "<u2"
        and load_dataset(tokens.folder).fingerprint == tokens.fingerprint
    )

    def batches(dataset, cursor=None):
        return packed_batches(
            text_stream(dataset), rows_per_step=4, sequence_len=T, bos=BOS, cursor=cursor
        )

    one, two = take(batches(small), 40), take(batches(tokens), 40)
    assert one[-1].cursor["position"]["state"]["epoch"] >= 2
    for left, right in zip(one, two, strict=True):
        assert (
            torch.equal(left.inputs, right.inputs)
            and torch.equal(left.targets, right.targets)
            and left.cursor == right.cursor
        )
    again = take(batches(tokens, one[20].cursor), 1)[0]
    assert torch.equal(again.inputs, one[21].inputs)
    assert list(tokens.iter_documents("validation")) == list(small.iter_documents("validation"))


def test_token_ids_of_another_tokenizer_are_refused(small, tmp_path):
    class Other(ByteTokenizer):
        fingerprint = "other"

    tokens = tokenize(small, Other(), tmp_path / "tokens", num_threads=1)
    with pytest.raises(
        UserError, match=r"another tokenizer .* tokenize --dataset=small --overwrite"
    ):
        text_stream(tokens)
    with pytest.raises(UserError, match="holds token ids: for its text give --dataset=small"):
        next(tokens.iter_documents("train"))


def test_tokenising_goes_on_where_it_was_interrupted(tmp_path):
    dataset = make_dataset(tmp_path / "three", [f"{i}" for i in range(2 * 8192 + 9)])
    folder, encoded = tmp_path / "three-tokens", []

    class Tired(ByteTokenizer):
        def encode_documents(self, texts, num_threads=1):
            if len(encoded) == stop:
                raise KeyboardInterrupt
            encoded.append(len(texts))
            return super().encode_documents(texts)

    stop = 10  # in the second shard
    with pytest.raises(KeyboardInterrupt):
        tokenize(dataset, Tired(), folder, num_threads=1)
    assert not folder.exists()
    stop = -1
    made = tokenize(dataset, Tired(), folder, num_threads=1)
    assert encoded == [1024] * 10 + [1024] * 8 + [9], (
        "the first shard is kept, the second begun anew"
    )
    assert sum(entry.get("tokens", 0) for entry in made.manifest["shards"]) == sum(
        len(f"{i}") for i in range(2 * 8192 + 9)
    )


def test_what_is_looked_at_ahead_is_bounded():
    documents = traced_documents([(10, False)] * 100)
    packer = Packer(ListStream(documents), width=11, bos=0)
    ids, learn = np.empty(11, dtype=np.int32), np.empty(11, dtype=bool)
    assert packer.fill(ids, learn)
    assert len(packer.cursor["unfinished"]) == 16
