"""Repackaging: nothing lost, nothing doubled, shuffled, in the hub's format, in bounded memory; the
same on datatrove.
"""

import gzip
import json
import sys
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

from dev import repackage_data_reference as repackage
from zangchat.dataset import datasets_dir, find_dataset, load_dataset
from zangchat.dataset.__main__ import main as dataset_main
from zangchat.dataset.shards import GROUP_DOCUMENTS

DOCUMENTS = [f"{i} " + "word " * (i % 7) + ("é😀" if i % 11 == 0 else "") for i in range(5000)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three files, one of them of two thirds of the documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, (start, end) in enumerate([(0, 700), (700, 4200), (4200, 5000)]):
        lines = [json.dumps({"text": text}) + "\n" for text in DOCUMENTS[start:end]]
        (folder / f"{number}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def texts_of(name: str) -> tuple[list[str], list[str]]:
    """(training, validation) in the order of the files."""
    dataset = load_dataset(datasets_dir() / name)
    return list(dataset.iter_documents("train")), list(dataset.iter_documents("validation"))


def test_every_document_once_shuffled_and_in_shards_of_the_right_size(corpus, capsys):
    assert repackage.main([f"--data_path={corpus}", "--name=mine", "--shard_chars=30000"]) == 0
    train, held_out = texts_of("mine")
    assert len(held_out) == 250 and sorted(train + held_out) == sorted(DOCUMENTS)
    numbers = [int(text.split()[0]) for text in held_out + train]
    assert (
        sum(abs(a - b) for a, b in zip(numbers, numbers[1:], strict=False)) / len(numbers) > 1200
    )  # 1,667 on average if shuffled
    shards = find_dataset("mine").shards("train")
    assert len(shards) >= 2
    for shard in shards[:-1]:
        file = pyarrow.parquet.ParquetFile(datasets_dir() / "mine" / shard)
        assert file.metadata.row_group(0).num_rows == GROUP_DOCUMENTS
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
        assert sum(len(text) for text in file.read().column("text").to_pylist()) >= 30000
    assert dataset_main(["verify", "--dataset=mine"]) == 0
    assert not [path for path in datasets_dir().iterdir() if path.name.endswith(".building")]


def test_the_order_depends_on_the_seed_alone(corpus):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        assert repackage.main([f"--data_path={corpus}", f"--name={name}", f"--seed={seed}"]) == 0
    assert texts_of("one") == texts_of("again")
    assert texts_of("one") != texts_of("other")


def test_buckets_larger_than_the_memory_are_scattered_again(tmp_path):
    documents = [bytes([65 + i % 26]) * 50 + b"%06d" % i for i in range(20_000)]
    repackage.scatter(documents, tmp_path / "buckets", 1, buckets=2)  # of 600 kB each
    found = list(repackage.gather(repackage.bucket_files(tmp_path / "buckets"), 100_000, 1))
    assert sorted(found) == sorted(documents)
    assert list((tmp_path / "buckets").rglob("again"))
    assert not [path for path in (tmp_path / "buckets").rglob("*") if path.is_file()], (
        "buckets are emptied as they are read"
    )
    positions = {document: i for i, document in enumerate(documents)}
    order = [positions[document] for document in found]
    assert (
        sum(abs(a - b) for a, b in zip(order, order[1:], strict=False)) / len(order) > 5000
    )  # across buckets, too


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's own count")
def test_a_corpus_larger_than_the_memory_allowed(tmp_path):
    """60 MB of text with --memory=0.004: the process grows by far less than the text."""
    with (tmp_path / "big.jsonl").open("w", encoding="utf-8") as file:
        for i in range(30_000):
            file.write(
                json.dumps({"text": f"{i} " + "some words and then more of them " * 60}) + "\n"
            )
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    assert (
        repackage.main([f"--data_path={tmp_path / 'big.jsonl'}", "--name=big", "--memory=0.004"])
        == 0
    )
    assert peak() - before < 40e6
    assert sum(map(len, texts_of("big"))) == 30_000


def peak() -> int:
    return next(
        1024 * int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )


def test_a_dataset_of_the_hub_is_streamed_and_keeps_its_name(monkeypatch):
    asked = []

    def load_dataset(*arguments, **settings):
        asked.append((*arguments, settings))
        return ({"text": text} for text in DOCUMENTS[:100])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert repackage.main(["--hub=owner/text-1.5", "--hub_config=small"]) == 0
    train, held_out = texts_of("text-1.5")
    assert sorted(train + held_out) == sorted(DOCUMENTS[:100])
    assert asked == [("owner/text-1.5", "small", {"split": "train", "streaming": True})]


def test_mistakes_get_one_sentence(corpus, tmp_path, capsys):
    assert repackage.main([]) == 2 and "--hub=OWNER/NAME or --data_path" in capsys.readouterr().err
    assert repackage.main([f"--data_path={corpus}", "--name=mine", "--max_documents=1"]) == 2
    assert (
        "at least 2 are needed" in capsys.readouterr().err
        and not (datasets_dir() / "mine").exists()
    )
    (tmp_path / "lone.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    assert repackage.main([f"--data_path={tmp_path / 'lone.jsonl'}", "--name=mine"]) == 2
    assert "holds 1 document(s): at least 2 are needed" in capsys.readouterr().err
    assert repackage.main([f"--data_path={corpus}", "--name=mine", "--max_documents=40"]) == 0
    assert (
        repackage.main([f"--data_path={corpus}", "--name=mine"]) == 2
        and "--overwrite" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "flag",
    ["--name=.", "--name=..", "--name=owner/set", "--name=.hidden", "--shard_chars=0"]
    + ["--shard_chars=-1", "--validation_documents=0"],
)
def test_a_flag_that_cannot_be_meant_touches_no_dataset(corpus, flag, capsys):
    assert repackage.main([f"--data_path={corpus}", "--name=mine", "--max_documents=40"]) == 0
    kept = sorted(datasets_dir().rglob("*"))
    flags = [f"--data_path={corpus}", "--name=other", "--overwrite", "--max_documents=40", flag]
    assert repackage.main(flags) == 2
    assert flag.partition("=")[0] in capsys.readouterr().err
    assert sorted(datasets_dir().rglob("*")) == kept


@pytest.mark.parametrize("place", [".", "../corpus", "../.corpus", "../corpus.jsonl.gz"])
def test_a_dataset_is_called_as_the_folder_or_file(corpus, place, monkeypatch):
    monkeypatch.chdir(corpus)
    (corpus.parent / ".corpus").symlink_to(corpus)
    lines = b"".join(path.read_bytes() for path in sorted(corpus.iterdir()))
    (corpus.parent / "corpus.jsonl.gz").write_bytes(gzip.compress(lines))
    assert repackage.main([f"--data_path={place}", "--max_documents=40"]) == 0
    assert find_dataset(data_path=place).name == find_dataset("corpus").name == "corpus"


def test_the_same_on_datatrove(corpus, capsys):
    """Three tasks deal the documents, three tasks write the shards; a shard is the same whatever
    runs its task.
    """
    pytest.importorskip("datatrove")
    from dev import repackage_datatrove

    flags = [
        f"--data_path={corpus}",
        "--format=.jsonl",
        "--num_shards=4",
        "--tasks=3",
        "--workers=1",
    ]
    assert repackage_datatrove.main([*flags, "--name=../mine"]) == 2
    assert "--name='../mine' cannot name a folder" in capsys.readouterr().err
    assert repackage_datatrove.main([*flags, "--name=mine"]) == 0
    train, held_out = texts_of("mine")
    assert (
        sorted(train + held_out) == sorted(DOCUMENTS)
        and len(find_dataset("mine").shards("train")) == 3
    )
    numbers = [int(text.split()[0]) for text in train]
    assert sum(abs(a - b) for a, b in zip(numbers, numbers[1:], strict=False)) / len(numbers) > 1000
    assert dataset_main(["verify", "--dataset=mine"]) == 0
    assert repackage_datatrove.main([*flags, "--name=again"]) == 0 and texts_of("again") == (
        train,
        held_out,
    )
