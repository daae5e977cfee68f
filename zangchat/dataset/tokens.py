"""A pretraining dataset as token ids: written once by `python -m zangchat.dataset tokenize`, then read through a memory map.

Every rank reads the whole stream of text, so past about 16 ranks reading ids costs much less than tokenising again on each. Documents
keep their shards, groups and order: training on <name>-tokens gives the batches of training on <name>, bit for bit.

    <base>/base_data/<name>-tokens/
        manifest.json                  as any dataset's, with "tokenizer" (its fingerprint), "dtype", "text" (what it was made from)
        shard_00000.parquet.tokens     ids of all documents end to end (little-endian, uint16 up to 65,536 tokens, else uint32), padding
                                       to 8 bytes, then (documents + 1) int64 offsets into them; no special tokens
        <validation shards>            as they were: bits per byte need the text

A shard's entry in the manifest has, beside name, split, bytes and sha256: "tokens", and "groups", the number of documents in each.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zangchat.dataset.manifest import FORMAT, MANIFEST, Dataset, replace_folder, write_manifest
from zangchat.dataset.shards import OFFSET_BYTES, TOKENS, write_shard
from zangchat.runtime.files import atomic_file, file_sha256


def tokenize(dataset: Dataset, tokenizer: Any, folder: Path, num_threads: int) -> Dataset:
    """Write `folder`, which appears whole or not at all; what an interrupted attempt wrote is kept. Hold its folder_lock."""
    building = folder.with_name(f".{folder.name}.building")
    building.mkdir(parents=True, exist_ok=True)
    dtype = "<u2" if tokenizer.get_vocab_size() <= 2**16 else "<u4"
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": folder.name,
        "source": "tokens",
        "in_order": dataset.arrives_in_order,
        "tokenizer": tokenizer.fingerprint,
        "dtype": dtype,
        "text": {"name": dataset.name, "fingerprint": dataset.fingerprint, "flag": dataset.flag},
    }
    done = _begun(building, manifest)
    shards: list[dict[str, Any]] = []
    for split in ("train", "validation"):
        for shard in dataset.shards(split):
            name = shard + TOKENS if split == "train" else f"validation_{Path(shard).stem}.parquet"
            if name not in done or not (building / name).exists():
                groups = (dataset.read_group(shard, group, split) for group in range(dataset.num_groups(shard, split)))
                if split == "train":
                    facts = _write_tokens(building / name, groups, tokenizer, dtype, num_threads)
                else:
                    write_shard(building / name, [text for texts in groups for text in texts])
                    facts = {}
                size, digest = (building / name).stat().st_size, file_sha256(building / name)
                done[name] = {"name": name, "split": split, "bytes": size, "sha256": digest, **facts}
                print(f"{name}  {facts.get('tokens', 0):,} tokens", flush=True)
            shards.append(done[name])
            write_manifest(building, {**manifest, "shards": shards})
    replace_folder(folder, building)
    return Dataset(folder, {**manifest, "shards": shards})


def _begun(building: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries that an interrupted attempt to make the same left behind."""
    path = building / MANIFEST
    if not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    shards = before.pop("shards")
    return {entry["name"]: entry for entry in shards} if before == manifest else {}


def _write_tokens(path: Path, groups: Iterator[list[str]], tokenizer: Any, dtype: str, num_threads: int) -> dict[str, Any]:
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
