"""`--data_path`: the splits of a folder, validation that is never empty, and odd files of text."""

import itertools
import json
import logging
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from zangchat.dataset import find_dataset
from zangchat.dataset import shards as data
from zangchat.dataset.find import split_of_name
from zangchat.dataset.shards import cut_text, record_text, write_shard
from zangchat.errors import UserError
from zangchat.runtime.files import PACKED, read_jsonl

BOM = b"\xef\xbb\xbf"


def put(path: Path, texts: list[str | None], group: int = 1024) -> Path:
    """A file of the kind that its name says, with these documents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".parquet":
        table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
        pyarrow.parquet.write_table(table, path, row_group_size=group)
    elif path.suffix.lower() == ".txt":
        path.write_text("<|endoftext|>".join(map(str, texts)), encoding="utf-8")
    else:
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        path.write_text("".join(lines), encoding="utf-8")
    return path


def documents(path: Path, split: str) -> list[str]:
    return list(find_dataset(data_path=str(path)).iter_documents(split))


def splits(path: Path) -> tuple[Counter[str], Counter[str]]:
    """How often each first word stands in (training, validation)."""
    dataset = find_dataset(data_path=str(path))
    train, validation = (
        Counter(text.split()[0] for text in dataset.iter_documents(split))
        for split in ("train", "validation")
    )
    return train, validation


# ---- the splits that names say -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("data/test-00000-of-00001.parquet", "test"),
        ("TinyStories-valid.txt", "validation"),
        ("wiki.test.txt", "test"),
        ("Validation.jsonl", "validation"),
        ("dev.jsonl", "validation"),
        ("my_eval_set.txt", "test"),
        ("default/validation/0000.parquet", "validation"),
        ("auxiliary_train-00000.parquet", "train"),
        ("train/unit-test-notes.txt", "train"),
        ("train-test.txt", "test"),
        ("test2.txt", "test"),
        ("latest.txt", ""),
        ("contest/developers.txt", ""),
        ("shard_00000.parquet", ""),
    ],
)
def test_splits_are_read_from_names_as_on_the_hub(name, split):
    assert split_of_name(name) == split


def test_test_files_are_never_read(tmp_path, caplog):
    put(tmp_path / "train-00000-of-00001.parquet", ["TRAIN text"] * 40)
    put(tmp_path / "test-00000-of-00001.parquet", ["TEST text"] * 40)
    with caplog.at_level(logging.INFO, "zangchat"):
        assert splits(tmp_path) == ({"TRAIN": 38}, {"TRAIN": 2})
    assert "validating on the end of train-00000-of-00001.parquet" in caplog.text
    assert "not read: test-00000-of-00001.parquet (test)" in caplog.text


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "txt"])
@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_validation_files_validate(tmp_path, caplog, name, ending):
    for split in ("train", "test", name):
        put(tmp_path / f"{split}.{ending}", [f"{split} text"] * 5)
    with caplog.at_level(logging.INFO, "zangchat"):
        assert splits(tmp_path) == ({"train": 5}, {name: 5})
    assert f"validating on {name}.{ending}" in caplog.text


def test_folders_below_are_read_and_unnamed_files_leave_room_for_named_ones(tmp_path, caplog):
    put(tmp_path / "LICENSE.txt", ["LICENCE"])
    put(tmp_path / "data" / "train-00000-of-00002.parquet", ["TRAIN a"] * 3)
    put(tmp_path / "data" / "train-00001-of-00002.parquet", ["TRAIN b"] * 3)
    put(tmp_path / "data" / "test-00000-of-00001.parquet", ["TEST"] * 3)
    put(tmp_path / ".cache" / "huggingface" / "train-old.parquet", ["OLD"])
    with caplog.at_level(logging.INFO, "zangchat"):
        assert splits(tmp_path) == ({"TRAIN": 3}, {"TRAIN": 3})
    assert "validating on data/train-00001-of-00002.parquet" in caplog.text
    assert "LICENSE.txt (not named train)" in caplog.text


def test_unnamed_files_train_if_none_is_named_train(tmp_path):
    put(tmp_path / "a.parquet", ["A"] * 3)
    put(tmp_path / "b.parquet", ["B"] * 3)
    put(tmp_path / "test.parquet", ["TEST"] * 3)
    assert splits(tmp_path) == ({"A": 3}, {"B": 3})


def test_a_rarer_format_is_not_what_validates(tmp_path):
    put(tmp_path / "part-0.jsonl", ["ZERO"] * 3)
    put(tmp_path / "part-1.jsonl", ["ONE"] * 3)
    put(tmp_path / "urls.txt", ["URL"])
    assert splits(tmp_path) == ({"URL": 1, "ZERO": 3}, {"ONE": 3})


def test_linked_folders_are_read_once(tmp_path):
    put(tmp_path / "elsewhere" / "wiki.jsonl", ["WIKI"] * 3)
    put(tmp_path / "texts" / "own.jsonl", ["OWN"] * 3)
    (tmp_path / "texts" / "wiki").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "texts")
    assert splits(tmp_path / "texts") == ({"OWN": 3}, {"WIKI": 3})


def test_a_manifest_of_another_program_is_no_dataset(tmp_path):
    put(tmp_path / "a.jsonl", ["A"] * 10)
    for manifest in ("[]", '{"name": "app", "icons": []}'):
        (tmp_path / "manifest.json").write_text(manifest)
        assert splits(tmp_path) == ({"A": 9}, {"A": 1})


def test_a_file_that_is_named_itself_is_read_whatever_its_name(tmp_path):
    assert splits(put(tmp_path / "test.parquet", ["TEST"] * 2)) == ({"TEST": 1}, {"TEST": 1})


def test_a_folder_without_training_files_says_which_there_are(tmp_path):
    put(tmp_path / "test.jsonl", ["TEST"])
    put(tmp_path / "dev.jsonl", ["DEV"])
    with pytest.raises(
        UserError, match=r"no text to train on \(dev.jsonl \(validation\), test.jsonl"
    ):
        find_dataset(data_path=str(tmp_path))


def test_shards_of_folders_below_are_tokenized_in_the_same_order(tmp_path):
    from tests.util import ByteTokenizer
    from zangchat.dataset.tokens import tokenize
    from zangchat.streams import TextStream

    for folder in "ab":
        put(tmp_path / "text" / folder / "train.parquet", [f"{folder} {i}" for i in range(9)], 2)
        put(tmp_path / "text" / folder / "validation.parquet", [f"held out {folder}"])
    text = find_dataset(data_path=str(tmp_path / "text"))
    ids = tokenize(text, ByteTokenizer(), tmp_path / "text-tokens", 1)
    assert list(ids.iter_documents("validation")) == ["held out a", "held out b"]
    streams = [TextStream(dataset, ByteTokenizer(), seed=1) for dataset in (text, ids)]
    pairs = zip(*(stream.runs(stream.start) for stream in streams), strict=True)
    for (ours, _), (theirs, _) in itertools.islice(pairs, 20):
        assert [d.ids.tolist() for d in ours] == [d.ids.tolist() for d in theirs]


# ---- validation is never empty -------------------------------------------------------------------


def test_an_empty_last_part_is_left_out(tmp_path):
    for number, texts in enumerate((["a"] * 4, ["b"] * 4, [])):
        put(tmp_path / f"part-0000{number}.snappy.parquet", [*texts])
    assert splits(tmp_path) == ({"a": 4}, {"b": 4})


def test_the_only_part_with_text_holds_out_its_own_end(tmp_path):
    for name, texts in {"0": [], "1": ["a"] * 4, "2": [None, ""]}.items():
        put(tmp_path / f"{name}.parquet", [*texts])
    assert splits(tmp_path) == ({"a": 3}, {"a": 1})


def test_an_empty_validation_file_does_not_count(tmp_path):
    put(tmp_path / "train.parquet", ["a"] * 4)
    put(tmp_path / "validation.parquet", [None, ""])
    assert splits(tmp_path) == ({"a": 3}, {"a": 1})


@pytest.mark.parametrize("last", [[None] * 4, [""] * 4])
def test_an_empty_last_group_of_a_lone_file_is_passed_over(tmp_path, last):
    path = put(tmp_path / "lone.parquet", [*["a"] * 4, *["b"] * 4, *last], 4)
    assert splits(path) == ({"a": 4}, {"b": 4})
    path = put(tmp_path / "one.parquet", [*["a"] * 4, *last], 4)
    assert splits(path) == ({"a": 3}, {"a": 1})


def test_a_long_line_before_short_ones_leaves_some_to_validate_on(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TEXT_GROUP_BYTES", 64)
    path = put(tmp_path / "long.jsonl", ["long " * 200, *["short"] * 3])
    train, validation = splits(path)
    assert train + validation == {"long": 1, "short": 3} and validation


def test_a_dataset_without_validation_text_is_refused_before_it_is_measured(base_dir):
    from tests.util import make_dataset

    dataset = make_dataset(base_dir / "base_data" / "mine", ["text"], [])
    with pytest.raises(UserError, match="dataset mine has no document to validate on"):
        next(dataset.iter_documents("validation"))


# ---- odd files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bom.jsonl", "bom.txt"])
def test_a_byte_order_mark_is_not_text(tmp_path, name):
    path = put(tmp_path / name, ["first words", "second words"])
    path.write_bytes(BOM + path.read_bytes())
    dataset = find_dataset(data_path=str(path))
    assert list(dataset.iter_documents("train")) == ["first words"]


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.TXT", "a.Parquet"])
def test_endings_are_known_in_any_case(tmp_path, name):
    assert splits(put(tmp_path / name, ["a", "b"])) == ({"a": 1}, {"b": 1})


def test_surrogates_of_a_careless_exporter_are_repaired(tmp_path):
    lines = (r'{"text": "cut \ud83d"}', r'{"prompt": "\ud83d\ude00", "completion": "!"}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert documents(tmp_path / "a.jsonl", "train") == ["cut \ufffd"]
    assert documents(tmp_path / "a.jsonl", "validation") == ["\U0001f600\n!"]


def test_null_in_jsonl_is_skipped_as_in_parquet(tmp_path):
    for name in ("null.jsonl", "null.parquet"):
        assert splits(put(tmp_path / name, ["a", None, "b"])) == ({"a": 1}, {"b": 1})
    nothing = ({"text": None}, {"prompt": "x", "completion": None}, {"messages": None})
    assert [record_text(record, "here") for record in nothing] == ["", "", ""]


def test_files_of_macos_beside_the_real_ones_are_left_out(tmp_path):
    for number in range(2):
        put(tmp_path / f"shard_{number:05d}.parquet", [f"s{number}"] * 3)
        (tmp_path / f"._shard_{number:05d}.parquet").write_bytes(b"\0\5\x16\7Mac OS X")
    assert splits(tmp_path) == ({"s0": 3}, {"s1": 3})


@pytest.mark.parametrize(
    ("column", "complaint"),
    [
        (pyarrow.array([1, 2]), "its column `text` holds int64, not strings"),
        (pyarrow.array([["a"], ["b"]]), "its column `text` holds list<.*>, not strings"),
        (pyarrow.array([{"a": "b"}] * 2), "its column `text` holds struct<.*>, not strings"),
    ],
)
def test_a_column_of_something_else_is_named(tmp_path, column, complaint):
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=complaint):
        list(find_dataset(data_path=str(tmp_path / "x.parquet")).iter_documents("train"))


def test_strings_of_every_kind_are_text(tmp_path):
    texts = pyarrow.array(["one", "two", None])
    columns = (texts.dictionary_encode(), texts.cast(pyarrow.binary()), pyarrow.nulls(3))
    for column in columns[:2]:
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
        assert splits(tmp_path / "x.parquet") == ({"one": 1}, {"two": 1})
    pyarrow.parquet.write_table(pyarrow.table({"text": columns[2]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="holds no text"):
        splits(tmp_path / "x.parquet")


def test_two_columns_of_text_are_named(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a", "b"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "two.parquet")
    with pytest.raises(UserError, match="has 2 columns `text`: rename all but one"):
        splits(tmp_path / "two.parquet")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": %s}' % (b"7" * 5000), r"odd\.jsonl:2 is not JSON \(Exceeds the limit"),
        (b'{"text": %s}' % (b"[" * 100_000), r"odd\.jsonl:2 is not JSON \(maximum recursion depth"),
        (b'{"text": "\xe9"}', r"odd\.jsonl:2 is not UTF-8 text"),
        (b"[", r"odd\.jsonl:2 is not JSON .*; of a JSON array, each item goes on a line"),
        (b"3", r"odd\.jsonl:2 is a JSON int; each line must be one JSON object"),
        (b'{"text": 5}', r"odd\.jsonl:2 has no text \(its `text` is a JSON int\): a record needs"),
    ],
)
def test_a_line_that_cannot_be_read_is_one_sentence(tmp_path, line, complaint):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=complaint):
        splits(path)


def test_a_place_after_the_first_range_names_the_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TEXT_GROUP_BYTES", 16)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' * 3 + b"3\n")
    with pytest.raises(UserError, match=r"x\.jsonl:1 after byte 51 is a JSON int"):
        splits(path)


def test_lines_are_read_from_any_range(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(BOM + b'{"a": 1}\r\n\n{"a": 2}\n{"a": 3}')
    assert list(read_jsonl(path)) == [
        (f"{path}:{n}", {"a": a}) for n, a in ((1, 1), (3, 2), (4, 3))
    ]
    assert list(read_jsonl(path, start=14, end=23)) == [(f"{path}:1 after byte 14", {"a": 2})]


def pack(path: Path, kind: str) -> Path:
    """Replace a file by its compressed form."""
    packed = path.with_name(f"{path.name}{kind}")
    with pyarrow.output_stream(str(packed), compression=PACKED[kind.lower()]) as stream:
        stream.write(path.read_bytes())
    path.unlink()
    return packed


@pytest.mark.parametrize("kind", [".gz", ".zst", ".bz2", ".GZ"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.txt", "a.parquet"])
def test_compressed_text_is_read_as_it_is_unpacked(tmp_path, base_dir, name, kind):
    texts = [f"document {index} with words" for index in range(60)]
    put(tmp_path / name, texts)
    plain = {split: documents(tmp_path / name, split) for split in ("train", "validation")}
    packed = pack(tmp_path / name, kind)
    for path in (packed, tmp_path):
        assert {split: documents(path, split) for split in plain} == plain
    assert plain["train"] and plain["validation"]
    assert len(list((base_dir / "unpacked").glob("[!.]*"))) == 1


def test_split_names_are_seen_through_the_compression(tmp_path):
    for split in ("train", "test"):
        put(tmp_path / f"{split}.jsonl", [f"{split} {index}" for index in range(40)])
        pack(tmp_path / f"{split}.jsonl", ".zst")
    assert all(text.startswith("train") for text in documents(tmp_path, "train"))


@pytest.mark.parametrize("name", ["corpus.jsonl", "train.parquet"])
def test_a_packed_copy_is_not_read_beside_its_original(tmp_path, base_dir, caplog, name):
    pack(put(tmp_path / name, [f"T{index}" for index in range(10)]), ".zst")
    put(tmp_path / name, [f"T{index}" for index in range(10)])
    with caplog.at_level(logging.INFO, "zangchat"):
        train, validation = splits(tmp_path)
    assert len(train) == 9 and len(validation) == 1 and not train & validation
    assert f"{name}.zst (also there unpacked)" in caplog.text


def test_large_compressed_file_is_read_in_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TEXT_GROUP_BYTES", 1000)
    texts = [f"document {index} with words" for index in range(200)]
    put(tmp_path / "a.jsonl", texts)
    packed = pack(tmp_path / "a.jsonl", ".gz")
    dataset = find_dataset(data_path=str(packed))
    assert dataset.num_groups(packed.name, "train") > 5
    both = [text for split in ("train", "validation") for text in dataset.iter_documents(split)]
    assert sorted(both) == sorted(texts)


def test_damaged_compressed_file_is_named(tmp_path, base_dir):
    put(tmp_path / "a.jsonl", [f"document {index}" for index in range(2000)])
    packed = pack(tmp_path / "a.jsonl", ".gz")
    packed.write_bytes(packed.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be unpacked .*intact copy"):
        documents(packed, "train")
    assert not list((base_dir / "unpacked").glob("*.jsonl"))


def test_other_archives_and_foreign_files_are_named(tmp_path, caplog):
    (tmp_path / "a.jsonl.xz").write_bytes(b"\xfd7zXZ")
    (tmp_path / "b.csv").write_text("text\nx\n")
    with pytest.raises(UserError, match=r"no text to train on \(a\.jsonl\.xz \(compressed: unpack"):
        find_dataset(data_path=str(tmp_path))
    with pytest.raises(UserError, match="is compressed: unpack it first"):
        find_dataset(data_path=str(tmp_path / "a.jsonl.xz"))
    put(tmp_path / "c.txt", ["one", "two"])
    with caplog.at_level(logging.INFO, "zangchat"):
        find_dataset(data_path=str(tmp_path))
    assert "a.jsonl.xz (compressed: unpack it first), b.csv (.csv is not read)" in caplog.text


BAD_LINES = ["{not json", '{"other": 1}', '["a list"]', '{"text": 3}']


def test_bad_rows_are_refused_by_default_and_else_left_out_with_a_count(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"document {index}"}) for index in range(60)]
    lines[10:10] = BAD_LINES
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl:11 is not JSON"):
        documents(path, "train")
    dataset = find_dataset(data_path=str(path), skip_bad_rows=True)
    for _ in range(2):  # a row that is read again counts once
        assert dataset.count_left_out() == 4
    assert "left out 4 rows that cannot be read, the first: " in caplog.text
    found = [text for split in ("train", "validation") for text in dataset.iter_documents(split)]
    assert found == [f"document {index}" for index in range(60)]


def test_bad_rows_of_parquet_are_counted_too(tmp_path):
    contents = [f"text {index}" if index % 5 else None for index in range(20)]
    rows = [{"messages": [{"role": "user", "content": content}]} for content in contents]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row group 0, row 0 has a message without"):
        documents(tmp_path / "a.parquet", "train")
    assert find_dataset(data_path=str(tmp_path), skip_bad_rows=True).count_left_out() == 4


def test_one_long_line_becomes_documents():
    text = "anarchism originated as a term of abuse " * 100_000
    documents = cut_text(text)
    assert len(documents) == len(text) // 8192 + 1
    assert "".join(documents).replace(" ", "") == text.replace(" ", "")


def test_a_conversation_of_text_parts_is_text(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert record_text({"messages": [{"role": "user", "content": parts}]}, "here") == "User: ab"
    write_shard(tmp_path / "x.parquet", ["one", "two"])
    assert splits(tmp_path / "x.parquet") == ({"one": 1}, {"two": 1})
