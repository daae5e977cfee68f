"""Datasets: manifests, files of one's own, what is present, what is damaged."""

import json
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.util import make_dataset
from zangchat.dataset import find_dataset, folder_lock, manifest
from zangchat.dataset import shards as data
from zangchat.dataset.__main__ import main
from zangchat.dataset.shards import cut_text, record_text, write_shard
from zangchat.errors import UserError
from zangchat.tokenizer import RustBPETokenizer, tokenizer_dir

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data" / "base_data"


@pytest.fixture
def base_data(base_dir):
    return base_dir / "base_data"


def write_lines(path, records):
    path.write_text(
        "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8", newline="\n"
    )
    return path


# ---- the format ----------------------------------------------------------------------------------


def test_shards_have_the_format_of_the_hub(base_data):
    dataset = make_dataset(
        base_data / "mine", [f"document {i}" for i in range(8192 + 1030)], ["held out"] * 3
    )
    assert [entry["name"] for entry in dataset.manifest["shards"]] == [
        f"shard_{i:05d}.parquet" for i in range(3)
    ]
    assert dataset.shards("train") == ["shard_00000.parquet", "shard_00001.parquet"]
    assert dataset.shards("validation") == ["shard_00002.parquet"]
    file = pyarrow.parquet.ParquetFile(dataset.folder / "shard_00001.parquet")
    assert (
        file.schema_arrow.names == ["text"]
        and file.schema_arrow.field("text").type == pyarrow.string()
    )
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [1024, 6]
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert list(dataset.iter_documents("train"))[8192 + 1029] == "document 9221"
    assert list(dataset.iter_documents("validation")) == ["held out"] * 3


def test_a_dataset_reads_the_same_from_its_manifest(base_data):
    written = make_dataset(base_data / "mine", ["one", "two"], ["three"])
    read = find_dataset("mine")
    assert read.manifest == written.manifest and read.fingerprint == written.fingerprint
    assert find_dataset(data_path=str(base_data / "mine")).fingerprint == written.fingerprint


def test_the_fingerprint_changes_with_the_text(base_data):
    first = make_dataset(base_data / "a", ["one", "two"])
    assert make_dataset(base_data / "b", ["one", "two"]).fingerprint == first.fingerprint
    assert make_dataset(base_data / "b", ["one", "Two"]).fingerprint != first.fingerprint


def test_an_unknown_split_is_refused(base_data):
    with pytest.raises(ValueError, match="split must be"):
        make_dataset(base_data / "mine", ["one"]).shards("test")


# ---- which dataset -------------------------------------------------------------------------------


def test_without_a_name_the_only_dataset_is_taken(base_data):
    with pytest.raises(UserError, match=r"no dataset in .*--source=pydocs"):
        find_dataset()
    make_dataset(base_data / "pydocs", ["one"])
    (base_data / "unfinished").mkdir()
    assert find_dataset().name == "pydocs"
    make_dataset(base_data / "climbmix", ["two"])
    with pytest.raises(UserError, match=r"several datasets .*--dataset=climbmix\|pydocs"):
        find_dataset()
    assert find_dataset("climbmix").name == "climbmix"


def test_a_name_that_is_not_there_says_how_to_get_it(base_data):
    with pytest.raises(
        UserError, match=r"--dataset=climbmix is not in .*there is none yet.*--source=climbmix -n"
    ):
        find_dataset("climbmix")
    make_dataset(base_data / "pydocs", ["one"])
    with pytest.raises(UserError, match=r"--dataset=typo is not in .*present: pydocs"):
        find_dataset("typo")


def test_a_damaged_manifest_is_named(base_data):
    make_dataset(base_data / "mine", ["one"])
    (base_data / "mine" / "manifest.json").write_text('{"format": 1, "shards"', encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        find_dataset("mine")
    (base_data / "mine" / "manifest.json").write_text(
        '{"format": 9, "name": "mine", "shards": []}', encoding="utf-8"
    )
    with pytest.raises(UserError, match="has format 9, this version reads 1"):
        find_dataset("mine")


# ---- files of one's own --------------------------------------------------------------------------


def test_a_folder_of_shards_holds_out_the_last(tmp_path):
    for i in range(3):
        write_shard(
            tmp_path / f"shard_{i:05d}.parquet", [f"shard {i} document {j}" for j in range(5)]
        )
    dataset = find_dataset(data_path=str(tmp_path))
    assert dataset.shards("train") == ["shard_00000.parquet", "shard_00001.parquet"]
    assert list(dataset.iter_documents("validation")) == [f"shard 2 document {j}" for j in range(5)]
    write_shard(tmp_path / "shard_00000.parquet", ["other text"])
    assert find_dataset(data_path=str(tmp_path)).fingerprint != dataset.fingerprint


@pytest.mark.parametrize("documents", [3000, 30])
def test_of_a_lone_file_the_end_is_held_out(tmp_path, documents):
    texts = [f"document {i}" for i in range(documents)]
    write_shard(tmp_path / "all.parquet", texts)
    dataset = find_dataset(data_path=str(tmp_path / "all.parquet"))
    train, validation = (
        list(dataset.iter_documents("train")),
        list(dataset.iter_documents("validation")),
    )
    assert train + validation == texts
    assert len(validation) == (3000 - 2048 if documents == 3000 else 1)


@pytest.mark.parametrize("name", ["lone.jsonl", "lone.txt", "lone.parquet"])
def test_a_lone_document_is_both_trained_on_and_validated_on(tmp_path, caplog, monkeypatch, name):
    path = tmp_path / name
    if path.suffix == ".parquet":
        write_shard(path, ["Hello world"])
    else:
        line = (
            '{"prompt": "Hello", "completion": " world"}'
            if path.suffix == ".jsonl"
            else "Hello world"
        )
        path.write_text(line + "\n", encoding="utf-8")
    dataset = find_dataset(data_path=str(path))
    assert list(dataset.iter_documents("train")) == ["Hello world"] and not caplog.text
    for _ in range(2):
        assert list(dataset.iter_documents("validation")) == ["Hello world"]
    assert caplog.messages == [f"{path} holds one document: training and validation both read it"]
    caplog.clear()
    for variable, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(variable, value)
    assert (
        list(find_dataset(data_path=str(path)).iter_documents("validation")) == ["Hello world"]
        and not caplog.messages
    )


def test_two_documents_are_one_for_each_split(tmp_path, caplog):
    dataset = find_dataset(
        data_path=str(write_lines(tmp_path / "two.jsonl", [{"text": "a"}, {"text": "b"}]))
    )
    assert [list(dataset.iter_documents(split)) for split in ("train", "validation")] == [
        ["a"],
        ["b"],
    ] and not caplog.messages


@pytest.mark.parametrize("end", ["", "\n", "\n\n \r\n" * 9])
def test_a_last_line_longer_than_a_range_is_held_out_all_the_same(tmp_path, monkeypatch, end):
    monkeypatch.setattr(data, "TEXT_GROUP_BYTES", 16)
    monkeypatch.setattr(data, "SCAN_BYTES", 5)
    path = tmp_path / "words.txt"  # one line, as text8 is
    path.write_text("many words " * 2000 + end, encoding="utf-8", newline="")
    dataset = find_dataset(data_path=str(path))
    train, validation = (
        list(dataset.iter_documents("train")),
        list(dataset.iter_documents("validation")),
    )
    assert (len(train), len(validation)) == (2, 1)
    assert "".join(train + validation).replace(" ", "") == "manywords" * 2000
    lines = write_lines(tmp_path / "long.jsonl", [{"text": "short"}, {"text": "long " * 50}])
    lines.write_text(lines.read_text(encoding="utf-8") + end, encoding="utf-8", newline="")
    dataset = find_dataset(data_path=str(lines))
    assert [list(dataset.iter_documents(split)) for split in ("train", "validation")] == [
        ["short"],
        ["long " * 50],
    ]


def test_jsonl_records_of_each_kind_become_text(tmp_path):
    messages = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
        },
    ]
    records = [
        {"text": "plain — ü"},
        {"prompt": "Q", "completion": "A"},
        {"prompt": "Q: ", "completion": "A"},
        {"messages": messages},
    ]
    path = write_lines(tmp_path / "mine.jsonl", [*records, {"text": ""}, {"text": "held out"}])
    dataset = find_dataset(data_path=str(path))
    assert list(dataset.iter_documents("train")) == [
        "plain — ü",
        "Q\nA",
        "Q: A",
        "User: Hi\n\nAssistant: Hello",
    ]
    assert list(dataset.iter_documents("validation")) == ["held out"]


def test_parquet_without_a_text_column_is_read_like_jsonl(tmp_path):
    table = pyarrow.table({"prompt": ["a", "b"], "completion": ["1", "2"]})
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    assert list(
        find_dataset(data_path=str(tmp_path / "pairs.parquet")).iter_documents("train")
    ) == ["a\n1"]


def test_text_that_is_not_utf8_is_damage(tmp_path):
    pieces = [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")]
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, pieces)})
    pyarrow.parquet.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=r"bad\.parquet is damaged"):
        list(find_dataset(data_path=str(tmp_path / "bad.parquet")).iter_documents("train"))


@given(
    st.lists(
        st.text(min_size=1, max_size=30).filter(lambda text: text.strip()), min_size=2, max_size=40
    ),
    st.integers(5, 200),
)
@settings(max_examples=60, deadline=None)
def test_byte_ranges_lose_and_double_no_line(tmp_path_factory, texts, group_bytes):
    path = write_lines(
        tmp_path_factory.mktemp("lines") / "x.jsonl", [{"text": text} for text in texts]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TEXT_GROUP_BYTES", group_bytes)
        dataset = find_dataset(data_path=str(path))
        train, validation = (
            list(dataset.iter_documents("train")),
            list(dataset.iter_documents("validation")),
        )
        assert train + validation == texts and train and validation


def test_text_files_are_documents(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"file {i}\r\nline two\n", encoding="utf-8", newline="")
    dataset = find_dataset(data_path=str(tmp_path))
    assert list(dataset.iter_documents("train")) == ["file 0\nline two", "file 1\nline two"]
    assert list(dataset.iter_documents("validation")) == ["file 2\nline two"]


def test_long_text_is_cut_where_it_hurts_least():
    assert cut_text("one<|endoftext|>\ntwo\n<|endoftext|>") == ["one", "two"]
    assert cut_text("aaa\n\nbbb\nccc", limit=9) == ["aaa", "bbb\nccc"]
    assert cut_text("aaaa\nbbbb", limit=6) == ["aaaa", "bbbb"]
    assert cut_text("a" * 10, limit=4) == ["aaaa", "aaaa", "aa"]


def test_wrong_input_is_named(tmp_path):
    cases = {
        "no.jsonl": (None, "does not exist"),
        "empty.txt": ("", "holds no text"),
        "broken.jsonl": ('{"text": "a"}\n{"text": \n', r"broken\.jsonl:2 is not JSON"),
        "fields.jsonl": ('{"body": "a"}\n', r"fields\.jsonl:1 has no text: a record needs `text`"),
        "roles.jsonl": (
            '{"messages": [{"content": "a"}]}\n',
            r"roles\.jsonl:1 has a message without role or text",
        ),
        "blank.jsonl": ("\n \n", r"blank\.jsonl holds no text"),
        "none.jsonl": ('{"text": ""}\n', r"none\.jsonl holds no text"),
        "binary.txt": (b"ab\xff\xfe", r"binary\.txt is damaged \(byte 2 is not UTF-8\)"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=message):
            list(find_dataset(data_path=str(path)).iter_documents("train"))
    with pytest.raises(UserError, match="exclude each other"):
        find_dataset("a", "b")


def test_a_record_that_is_no_object_has_no_text():
    with pytest.raises(UserError, match="here has no text"):
        record_text(["text"], "here")


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the development data is not here")
def test_real_shards_can_be_read_as_they_are():
    dataset = find_dataset(data_path=str(SHARED_DATA))
    assert len(dataset.shards("train")) == 7 and dataset.shards("validation") == [
        "shard_00007.parquet"
    ]
    assert len(dataset.read_group("shard_00007.parquet", 0, "validation")) == 1024


# ---- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["footer", "data"])
def test_a_damaged_shard_is_named_and_never_skipped(base_data, where):
    dataset = make_dataset(base_data / "pydocs", [f"{i} some text" * 50 for i in range(100)])
    shard = dataset.folder / "shard_00000.parquet"
    raw = bytearray(shard.read_bytes())
    raw[slice(-8, None) if where == "footer" else slice(10, 60)] = b"\0" * (
        8 if where == "footer" else 50
    )
    shard.write_bytes(raw)
    with pytest.raises(
        UserError, match=r"shard_00000\.parquet is damaged .*--source=pydocs --overwrite"
    ):
        list(dataset.iter_documents("train"))


def test_verify_names_what_is_wrong(base_data, capsys):
    dataset = make_dataset(base_data / "mine", ["some text"] * 10)
    assert main(["verify"]) == 0
    assert "2 shards are what the manifest says" in capsys.readouterr().out
    shard = dataset.folder / "shard_00000.parquet"
    raw = bytearray(shard.read_bytes())
    raw[20] ^= 1
    shard.write_bytes(raw)
    (dataset.folder / "shard_00001.parquet").unlink()
    assert main(["verify", "--dataset=mine"]) == 2
    error = capsys.readouterr().err
    assert (
        "shard_00000.parquet (its sha256 is not the manifest's), shard_00001.parquet (missing)"
        in error
    )
    assert main(["verify", "--dataset=mine", "--repair"]) == 2
    assert "put an intact copy in its place" in capsys.readouterr().err
    assert shard.exists(), "nothing is deleted that cannot be had again"


def test_ids_of_other_text_or_another_tokenizer_are_not_taken_for_these(
    base_data, tmp_path, capsys
):
    texts = tmp_path / "mine"
    texts.mkdir()
    (texts / "a.txt").write_text("some text " * 100)
    RustBPETokenizer.train_from_iterator(iter(["some text"]), 270).save(tokenizer_dir())
    command = ["tokenize", f"--data_path={texts}"]
    assert main(command) == 0
    assert main(command) == 2 and "train with --dataset=mine-tokens" in capsys.readouterr().err
    RustBPETokenizer.train_from_iterator(iter(["other text"]), 271).save(tokenizer_dir())
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "another tokenizer" in error and "train with" not in error and "--overwrite" in error
    (texts / "a.txt").write_text("another text " * 100)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "other text" in error and "train with" not in error and "--overwrite" in error
    assert main([*command, "--overwrite"]) == 0
    assert main(command) == 2 and "train with --dataset=mine-tokens" in capsys.readouterr().err


def test_a_dataset_is_tokenised_and_verified(base_data, capsys):
    make_dataset(base_data / "mine", ["some text"] * 10)
    RustBPETokenizer.train_from_iterator(iter(["some text"]), 270).save(tokenizer_dir())
    assert main(["tokenize"]) == 0
    assert "train on them with --dataset=mine-tokens" in capsys.readouterr().out
    assert find_dataset().name == "mine", "the ids of a text are taken only by their name"
    assert main(["tokenize", "--dataset=mine"]) == 2 and "--overwrite" in capsys.readouterr().err
    assert (
        main(["tokenize", "--dataset=mine-tokens"]) == 2
        and "give --dataset=mine" in capsys.readouterr().err
    )
    assert main(["verify", "--dataset=mine-tokens"]) == 0
    shard = base_data / "mine-tokens" / "shard_00000.parquet.tokens"
    shard.write_bytes(shard.read_bytes()[:-8])
    assert main(["verify", "--dataset=mine-tokens", "--repair"]) == 2
    assert "tokenize --dataset=mine --overwrite" in capsys.readouterr().err
    assert (
        main(["tokenize", "--dataset=mine", "--overwrite"]) == 0
        and main(["verify", "--dataset=mine-tokens"]) == 0
    )


def test_a_folder_that_is_a_link_to_another_disk_stays_one(base_data, tmp_path):
    base_data.mkdir()
    (tmp_path / "disk").mkdir()
    RustBPETokenizer.train_from_iterator(iter(["some text"]), 270).save(tokenizer_dir())
    for name in ("mine", "mine-tokens"):
        (base_data / name).symlink_to(tmp_path / "disk" / name)
    for _ in range(3):
        make_dataset(base_data / "mine", ["some text"] * 10)
        assert main(["tokenize", "--dataset=mine", "--overwrite"]) == 0
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["mine", "mine-tokens"]
    assert all((base_data / name).is_symlink() for name in ("mine", "mine-tokens"))
    assert main(["verify", "--dataset=mine-tokens"]) == 0


def test_a_missing_shard_is_waited_for_only_while_it_is_on_its_way(base_data):
    dataset = make_dataset(base_data / "mine", ["some text"])
    shard = dataset.folder / "shard_00000.parquet"
    aside = shard.rename(shard.with_suffix(".aside"))
    with pytest.raises(
        UserError, match=r"shard_00000\.parquet is missing and nothing is fetching it"
    ):
        list(dataset.iter_documents("train"))

    def download():
        with folder_lock(dataset.folder):
            started.set()
            time.sleep(0.3)
            aside.rename(shard)

    started = threading.Event()
    thread = threading.Thread(target=download)
    thread.start()
    started.wait()
    assert list(dataset.iter_documents("train")) == ["some text"]
    thread.join()


def test_a_shard_that_this_node_sees_late_is_waited_for(base_data, monkeypatch):
    dataset = make_dataset(base_data / "mine", ["some text"])
    shard = dataset.folder / "shard_00000.parquet"
    aside = shard.rename(shard.with_suffix(".aside"))
    looks = []

    def is_running(folder):
        looks.append(folder)
        if len(looks) == 3:
            aside.rename(shard)
        return len(looks) == 1

    monkeypatch.setattr(manifest, "download_is_running", is_running)
    assert list(dataset.iter_documents("train")) == ["some text"]
    shard.rename(aside)
    looks.clear()
    monkeypatch.setattr(manifest, "LATE", 0.0)
    with pytest.raises(UserError, match="nothing is fetching it"):
        dataset.num_groups(shard.name, "train")


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--source is missing: `python -m zangchat.dataset --source=pydocs` needs no download"),
        (
            ["--source=pile"],
            "--source=pile is unknown: choose one of pydocs, climbmix, fineweb-edu, tinystories",
        ),
        (["-n", "0"], "must be at least 1"),
        (["verify", "--dataset=none"], "--dataset=none is not in"),
        (["--sauce=pydocs"], "--sauce"),
    ],
)
def test_mistakes_on_the_command_line_get_one_sentence(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
