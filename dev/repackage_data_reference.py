r"""Turn a dataset of the hub or your own corpus, of any size, into shuffled shards, in bounded
memory.

    python -m dev.repackage_data_reference --hub=HuggingFaceFW/fineweb-edu \
        --hub_config=sample-100BT --name=edu
    python -m dev.repackage_data_reference --data_path=corpus/ --name=mine
    python -m scripts.base_train --dataset=mine

Shards are parquet files of about 250 million characters, zstd, in row groups of 1,024 documents:
small enough to download one by one, large enough to read fast. Any few of them are a fair sample of
the whole. Texts need not fit into memory, so they are shuffled in two passes:

    scatter   each document goes to one of 64 files, its bucket, drawn at random
    gather    buckets are read, shuffled in memory and written, one after the other; a bucket that
              is too large is scattered again

If one machine takes too long, dev/repackage_datatrove.py runs the same two passes on many.
The first documents of the shuffled order become the validation shard. The order depends only on
--seed and on the order of the source.
"""

import contextlib
import itertools
import random
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zangchat import configurator
from zangchat.dataset import datasets_dir, find_dataset, folder_lock
from zangchat.dataset.find import name_of
from zangchat.dataset.manifest import FORMAT, building_folder, replace_folder, write_manifest
from zangchat.dataset.shards import GROUP_DOCUMENTS, record_text
from zangchat.errors import UserError, explain
from zangchat.runtime.files import expand_home, file_sha256
from zangchat.runtime.logs import print0
from zangchat.runtime.seeds import derive_seed

BUCKETS = 64
HELD_OUT = 20  # at most one document in 20 is for validation
LENGTH = struct.Struct("<I")  # precedes each document in a bucket: its number of bytes


@dataclass
class Config:
    hub: str = ""  # a dataset of the Hugging Face hub, read as a stream
    hub_config: str | None = None  # its configuration
    hub_split: str = "train"
    data_path: str | None = None  # a .parquet, .jsonl or .txt file, or a folder of them, instead
    name: str = ""  # the dataset to make, in <base>/base_data; default: the name of the source
    max_documents: int = -1  # use only the first N; -1 = all
    validation_documents: int = 10_000  # in the validation shard, but at most one in 20
    shard_chars: int = 250_000_000  # minimum characters in a shard; it ends with a whole row group
    memory: float = 2.0  # GB for the texts in memory
    seed: int = 1337
    overwrite: bool = False  # replace an existing dataset


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, repackage, argv)


def repackage(config: Config) -> int:
    if bool(config.hub) == bool(config.data_path):
        raise UserError("give either --hub=OWNER/NAME or --data_path=FOLDER: the text to repackage")
    configurator.check_range(1, config, "shard_chars", "validation_documents")
    own = name_of(expand_home(config.data_path)) if config.data_path else ""
    name = config.name or own or config.hub.rpartition("/")[2]
    configurator.check_folder_name("--name", name)
    folder = datasets_dir() / name
    with folder_lock(folder):
        if folder.exists() and not config.overwrite:
            raise UserError(
                f"{folder} is there already: choose another --name, or give --overwrite to make it "
                "again"
            )
        building = building_folder(folder)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        documents = itertools.islice(
            source(config), config.max_documents if config.max_documents >= 0 else None
        )
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(shutil.rmtree, building, ignore_errors=True)
            buckets = building / "buckets"
            count = scatter(
                (text.encode("utf-8", "replace") for text in documents), buckets, config.seed
            )
            print0(f"{count:,} documents in {BUCKETS} buckets")
            if count < 2:
                raise UserError(
                    f"{config.hub or config.data_path} holds {count} document(s): at least 2 are "
                    "needed, one for validation"
                )
            shuffled = gather(bucket_files(buckets), round(config.memory * 1e9), config.seed)
            held_out = max(1, min(config.validation_documents, count // HELD_OUT))
            shards = [
                write_shards(
                    itertools.islice(shuffled, held_out), building, "validation", sys.maxsize
                )[0]
            ]
            shards = [*write_shards(shuffled, building, "train", config.shard_chars), *shards]
            shutil.rmtree(buckets)
            write_manifest(
                building,
                {
                    "format": FORMAT,
                    "name": name,
                    "source": config.hub or "repackaged",
                    "shards": shards,
                },
            )
            replace_folder(folder, building)
    print0(f"{folder}: {len(shards)} shards; train on them with --dataset={name}")
    return 0


def source(config: Config) -> Iterator[str]:
    """The documents of the source that contain text, in its order."""
    if config.data_path:
        dataset = find_dataset(data_path=config.data_path)
        yield from dataset.iter_documents("train")
        if not dataset.holds_one_document:
            yield from dataset.iter_documents("validation")
        return
    import datasets

    remedy = "check the name, --hub_config and --hub_split, the network, or set HF_ENDPOINT"
    with explain(f"--hub={config.hub} cannot be read", remedy, ValueError, OSError):
        rows = datasets.load_dataset(
            config.hub, config.hub_config, split=config.hub_split, streaming=True
        )
    for number, row in enumerate(rows):
        if text := record_text(row, f"{config.hub}, record {number}"):
            yield text


# ---- shuffling -----------------------------------------------------------------------------------


def scatter(
    documents: Iterable[bytes], folder: Path, *seed: Any, part: int = 0, buckets: int = BUCKETS
) -> int:
    """Deal documents to <folder>/<bucket>/<part>; returns their number. Each process writes its own
    part.
    """
    draw = random.Random(derive_seed("scatter", part, *seed))
    count = 0
    with contextlib.ExitStack() as stack:
        files = []
        for bucket in range(buckets):
            (folder / f"{bucket:05d}").mkdir(parents=True, exist_ok=True)
            files.append(stack.enter_context(open(folder / f"{bucket:05d}" / f"{part:05d}", "wb")))
        for document in documents:
            files[draw.randrange(buckets)].write(LENGTH.pack(len(document)) + document)
            count += 1
    return count


def bucket_files(folder: Path) -> list[list[Path]]:
    """The parts of each bucket."""
    return [sorted(bucket.iterdir()) for bucket in sorted(folder.iterdir())]


def gather(buckets: Iterable[Sequence[Path]], memory: int, *seed: Any) -> Iterator[bytes]:
    """Yield all documents of the buckets in random order, in about `memory` bytes. Empties the
    buckets.
    """
    for number, files in enumerate(buckets):
        size = sum(path.stat().st_size for path in files)
        if size <= memory // 2:  # the rest is for Python's overhead and the row group being written
            documents = [document for path in files for document in _read(path)]
            random.Random(derive_seed("gather", number, *seed)).shuffle(documents)
            yield from documents
            del documents
        else:
            again = files[0].parent / "again"
            count = scatter(
                (document for path in files for document in _read(path)), again, number, *seed
            )
            if count < 2:
                raise UserError(
                    f"one document of {size / 1e9:.2f} GB does not fit into "
                    f"--memory={memory / 1e9:g}: allow more, or cut it"
                )
            yield from gather(bucket_files(again), memory, number, *seed)
        for path in files:
            path.unlink(missing_ok=True)


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while head := file.read(LENGTH.size):
            yield file.read(LENGTH.unpack(head)[0])


# ---- writing -------------------------------------------------------------------------------------


def write_shards(
    documents: Iterator[bytes], folder: Path, split: str, shard_chars: int, first: int = 0
) -> list[dict[str, Any]]:
    """Fill shards numbered from `first` (or the one validation shard); return their manifest
    entries.
    """
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema({"text": pyarrow.string()})
    entries: list[dict[str, Any]] = []
    group = list(itertools.islice(documents, GROUP_DOCUMENTS))
    while group:
        path = folder / (
            f"shard_{first + len(entries):05d}.parquet" if split == "train" else f"{split}.parquet"
        )
        chars = count = 0
        with pyarrow.parquet.ParquetWriter(
            path, schema, compression="zstd", use_dictionary=False
        ) as writer:
            while group and chars < shard_chars:
                texts = [document.decode("utf-8") for document in group]
                writer.write_table(pyarrow.table({"text": texts}, schema=schema))
                chars, count = chars + sum(map(len, texts)), count + len(texts)
                group = list(itertools.islice(documents, GROUP_DOCUMENTS))
        entries.append(
            {
                "name": path.name,
                "split": split,
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
                "documents": count,
            }
        )
        print0(f"{path.name}  {count:,} documents, {chars:,} characters")
    return entries


if __name__ == "__main__":
    sys.exit(main())
