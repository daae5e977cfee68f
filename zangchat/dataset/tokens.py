"""A pretraining dataset as token ids, read through a memory map.

`python -m zangchat.dataset tokenize` writes it once. Every rank reads the whole stream of text, so
past about 16 ranks reading ids costs much less than tokenizing again on each. Documents keep their
shards, groups and order: training on <name>-tokens gives the batches of training on <name>, bit for
bit.

    <base>/base_data/<name>-tokens/
        manifest.json                 as any dataset's, with "tokenizer" (its fingerprint), "dtype",
                                      and "text" (what it was made from)
        shard_00000.parquet.tokens    the ids of all documents end to end (little-endian, uint16 up
                                      to 65,536 tokens, else uint32), padded to 8 bytes, then
                                      (documents + 1) int64 offsets into them; no special tokens
        <validation shards>           text, which bits per byte need

A shard's entry in the manifest also has "tokens", and "groups", the number of documents in each.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zangchat.config import TOKENS
from zangchat.dataset.manifest import (
    FORMAT,
    MANIFEST,
    Dataset,
    building_folder,
    replace_folder,
    shard_entry,
    write_manifest,
)
from zangchat.dataset.shards import OFFSET_BYTES, write_shard
from zangchat.runtime.files import atomic_file
from zangchat.runtime.logs import print0


def tokenize(dataset: Dataset, tokenizer: Any, folder: Path, num_threads: int) -> Dataset:
    """Write `folder`, which appears whole or not at all. Hold its folder_lock.

    Shards that an interrupted attempt wrote are kept.
    """
    building = building_folder(folder)
    building.mkdir(parents=True, exist_ok=True)
    dtype = "<u2" if tokenizer.get_vocab_size() <= 2**16 else "<u4"
    text = {"name": dataset.name, "fingerprint": dataset.fingerprint, "flag": dataset.flag}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": folder.name,
        "source": "tokens",
        "in_order": dataset.arrives_in_order,
        "tokenizer": tokenizer.fingerprint,
        "dtype": dtype,
        "text": text,
    }
    done = _finished_shards(building, manifest)
    shards: list[dict[str, Any]] = []
    for split in ("train", "validation"):
        for shard in dataset.shards(split):
            name = shard + TOKENS if split == "train" else _validation_name(shard)
            if name not in done or not (building / name).exists():
                path = building / name
                groups = _read_groups(dataset, shard, split)
                if split == "train":
                    facts = _write_tokens(path, groups, tokenizer, dtype, num_threads)
                else:
                    write_shard(path, [text for texts in groups for text in texts])
                    facts = {}
                done[name] = {**shard_entry(path, split, **facts), "name": name}
                print0(f"{name}  {facts.get('tokens', 0):,} tokens")
            shards.append(done[name])
            write_manifest(building, {**manifest, "shards": shards})
    replace_folder(folder, building)
    return Dataset(folder, {**manifest, "shards": shards})


def _validation_name(shard: str) -> str:
    return f"validation_{shard.removesuffix('.parquet').replace('/', '_')}.parquet"


def _read_groups(dataset: Dataset, shard: str, split: str) -> Iterator[list[str]]:
    for group in range(dataset.num_groups(shard, split)):
        yield dataset.read_group(shard, group, split)


def _finished_shards(building: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of an interrupted attempt to make the same."""
    path = building / MANIFEST
    if not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    shards = before.pop("shards")
    return {entry["name"]: entry for entry in shards} if before == manifest else {}


def _write_tokens(
    path: Path, groups: Iterator[list[str]], tokenizer: Any, dtype: str, num_threads: int
) -> dict[str, Any]:
    sizes, lengths = [], [np.zeros(1, dtype=np.int64)]
    written = 0
    with atomic_file(path) as file:
        for texts in groups:
            ids, offsets = tokenizer.encode_documents(texts, num_threads=num_threads)
            file.write(ids.astype(dtype).tobytes())
            sizes.append(len(texts))
            lengths.append(np.diff(offsets))
            written += len(ids)
        file.write(bytes(-(written * np.dtype(dtype).itemsize) % OFFSET_BYTES))
        file.write(np.cumsum(np.concatenate(lengths)).astype("<i8").tobytes())
    return {"tokens": written, "groups": sizes}
