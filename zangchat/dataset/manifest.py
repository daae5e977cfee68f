"""A dataset: a folder of shards and the manifest that lists them.

<base>/base_data/<name>/ holds the shards and a manifest.json that lists all planned shards from the
start, in order, each with its split, size and sha256:

    {"format": 1, "name": "climbmix", "source": "climbmix", "repo": "...", "revision": "<commit>",
     "shards": [{"name": "shard_00000.parquet", "split": "train", "bytes": 123, "sha256": "..."}]}

A shard is a parquet file with a column `text`, zstd, row groups of 1,024 documents. Files of your
own (`--data_path`) get a manifest in memory, see find.py. The split "both" marks a lone file: its
last group that has text is held out for validation. A single document is trained on and validated
on, with a warning.
"""

import hashlib
import json
import logging
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from zangchat.config import TOKENS
from zangchat.dataset.shards import (
    GROUP_DOCUMENTS,
    REPLACE,
    TokenFile,
    as_list,
    has_documents,
    open_shard,
    write_shard,
)
from zangchat.errors import UserError, explain
from zangchat.runtime.files import LeftOut, atomic_write, file_lock, file_sha256, get_base_dir
from zangchat.runtime.logs import log0

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT = 1
SHARD_DOCUMENTS = 8 * GROUP_DOCUMENTS
LONE_FILE_HOLDOUT = 20  # one document in so many of a lone file's only group is for validation
TOKENS_SUFFIX = "-tokens"  # ends the name of a dataset of them
# seconds until another node sees a renamed file: NFS remembers for 60 that it was absent
LATE = 90.0
BUILD_PYDOCS = "python -m zangchat.dataset --source=pydocs"
HUB_REPOS = {  # the corpora of the hub, see hub.py
    "climbmix": "karpathy/climbmix-400b-shuffle",
    "fineweb-edu": "karpathy/fineweb-edu-100b-shuffle",
    "tinystories": "karpathy/tinystories-gpt4-clean",  # one file
}
DEFAULT = "climbmix"


class Dataset:
    """A manifest and the folder of its shards.

    Splits are "train" and "validation"; groups are numbered from 0 within (shard, split). A row
    that cannot be read raises UserError, unless there is a `left_out` for it.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], left_out: LeftOut | None = None
    ) -> None:
        self.folder, self.left_out = folder, left_out
        self.manifest = manifest
        self.name: str = manifest["name"]
        self._entries: dict[str, dict[str, Any]] = {
            entry["name"]: entry for entry in manifest["shards"]
        }
        self._warned = False
        self._held_out_groups: dict[str, tuple[int, bool]] = {}  # of lone files
        self._checked: dict[str, tuple[int, int]] = {}  # size and mtime of intact shards

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change whenever the text may have changed.

        A hash of the shards' names, splits, sizes and digests.
        """
        shards = json.dumps(self.manifest["shards"], sort_keys=True)
        return hashlib.sha256(shards.encode()).hexdigest()[:16]

    @property
    def arrives_in_order(self) -> bool:
        """Whether later shards may still be downloading.

        The hub's text is shuffled already, so the first epoch keeps its order.
        """
        return bool(self.manifest.get("in_order", "repo" in self.manifest))

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Of the tokenizer that made the ids of the training shards; None if they hold text."""
        return self.manifest.get("tokenizer")

    def shards(self, split: str) -> list[str]:
        """Names in manifest order."""
        if split not in ("train", "validation"):
            raise ValueError(f'split must be "train" or "validation", not {split!r}')
        entries = self.manifest["shards"]
        return [entry["name"] for entry in entries if entry["split"] in (split, "both")]

    def num_groups(self, shard: str, split: str) -> int:
        """Waits for a shard that is downloading; raises UserError for a missing or damaged one."""
        total = self._file(shard).num_groups()
        if self._entries[shard]["split"] != "both":
            return total
        _, others = self._held_out(shard)
        return total - 1 if others and split == "train" else 1

    def read_group(self, shard: str, group: int, split: str) -> list[Any]:
        """The documents of a group, in file order: texts, or (n,) arrays of ids."""
        return as_list(self.read_arrow(shard, group, split))

    def read_arrow(self, shard: str, group: int, split: str) -> "pyarrow.ChunkedArray | list[Any]":
        """The same, as Arrow memory if the shard is parquet with a column `text`.

        That array may hold nulls and empty strings, which are not documents.
        """
        file = self._file(shard)
        if self._entries[shard]["split"] != "both":
            return file.read_group(group)
        held_out, others = self._held_out(shard)
        if split == "validation" or not others:
            texts = file.read_group(held_out)
            return texts if others else self._part(file.path, as_list(texts), split)
        return file.read_group(group if group < held_out else group + 1)

    def _held_out(self, shard: str) -> tuple[int, bool]:
        """(the last group with text of a lone file, whether another group has text)."""
        if shard not in self._held_out_groups:
            file = self._file(shard)
            with_text = (
                group
                for group in reversed(range(file.num_groups()))
                if has_documents(file.read_group(group))
            )
            last = next(with_text, None)
            if last is None:
                remedy = "give a file with at least one document that is not empty"
                raise UserError(f"--data_path={file.path} holds no text: {remedy}")
            others = any(has_documents(file.read_group(group)) for group in range(last))
            self._held_out_groups[shard] = last, others
        return self._held_out_groups[shard]

    def _part(self, path: Path, texts: list[Any], split: str) -> list[Any]:
        """The split's part of a lone file whose text is in one group."""
        if len(texts) == 1:
            if split == "validation" and not self._warned:
                log0(
                    f"{path} holds one document: training and validation both read it",
                    logging.WARNING,
                )
                self._warned = True
            return texts
        held_out = max(1, len(texts) // LONE_FILE_HOLDOUT)
        return texts[:-held_out] if split == "train" else texts[-held_out:]

    def count_left_out(self) -> int:
        """Read all rows of --data_path once to count those that --skip_bad_rows leaves out."""
        if self.left_out is None or self.manifest["source"] != "local":
            return 0
        for shard in self.manifest["shards"]:
            file = self._file(shard["name"])
            for group in range(file.num_groups()):
                file.read_group(group)
        if self.left_out:
            counts = f"{self.name}: left out {len(self.left_out)} rows that cannot be read"
            log0(f"{counts}, the first: {self.left_out.first}", logging.WARNING)
        return len(self.left_out)

    @property
    def holds_one_document(self) -> bool:
        """Whether this is a lone file of a single document, which both splits then consist of."""
        if [entry["split"] for entry in self.manifest["shards"]] != ["both"]:
            return False
        shard = self.manifest["shards"][0]["name"]
        group, others = self._held_out(shard)
        return not others and len(as_list(self._file(shard).read_group(group))) == 1

    def iter_documents(self, split: str) -> Iterator[str]:
        """All documents of the split once, in manifest order.

        Raises UserError if they are token ids, or if there is nothing to validate on.
        """
        empty = True
        for texts in self.iter_arrow(split):
            documents = as_list(texts)
            empty = empty and not documents
            yield from documents
        if empty and split == "validation":
            problem = f"dataset {self.name} has no document to validate on ({self.folder})"
            raise UserError(f"{problem}: build it again with some")

    def iter_arrow(self, split: str) -> "Iterator[pyarrow.ChunkedArray | list[str]]":
        """The same, a group at a time as `read_arrow` gives it."""
        if split == "train" and self.tokenizer_fingerprint is not None:
            remedy = f"for its text give {self.text_flag}"
            raise UserError(f"dataset {self.name} holds token ids: {remedy}")
        for shard in self.shards(split):
            for group in range(self.num_groups(shard, split)):
                yield self.read_arrow(shard, group, split)

    @property
    def flag(self) -> str:
        """The flag that names this dataset, quoted for a shell."""
        path = self.manifest.get("path")  # of files of your own
        return shlex.quote(f"--data_path={path}" if path else f"--dataset={self.name}")

    @property
    def text_flag(self) -> str:
        """The flag that names the text from which token ids were made."""
        text = self.manifest["text"]
        return str(text.get("flag") or shlex.quote(f"--dataset={text['name']}"))

    def repair_hint(self) -> str:
        if self.tokenizer_fingerprint is not None:
            command = f"python -m zangchat.dataset tokenize {self.text_flag} --overwrite"
            return f"make it again with `{command}`"
        if self.manifest["source"] == "pydocs":
            return f"build it again with `{BUILD_PYDOCS} --overwrite`"
        if "repo" in self.manifest:
            return f"fetch it again with `python -m zangchat.dataset verify {self.flag} --repair`"
        return REPLACE

    def _file(self, shard: str) -> Any:
        """A ParquetFile, LineFile or TokenFile."""
        path = self.folder / shard
        if not path.exists():
            self._wait_for(path)
        self._check(shard, path)
        if path.suffix == TOKENS:
            return TokenFile(path, self._entries[shard], self.manifest["dtype"])
        return open_shard(path, self.repair_hint(), self.left_out)

    def _check(self, shard: str, path: Path) -> None:
        """Compare a shard with the manifest when it is first opened, and again after each change.

        Raises UserError.
        """
        status = path.stat()
        seen = status.st_size, status.st_mtime_ns
        if self._checked.get(shard) != seen:
            if problem := check_shard(path, self._entries[shard]):
                raise UserError(f"{path} is damaged ({problem}): {self.repair_hint()}")
            self._checked[shard] = seen

    def _wait_for(self, path: Path) -> None:
        """Wait until a shard exists; it is renamed into place, so it is whole then."""
        last_seen = None  # when a download was running
        while not path.exists():
            if download_is_running(self.folder):
                if last_seen is None:
                    logger.info("waiting for %s, which is still to be downloaded", path.name)
                last_seen = time.monotonic()
            elif (last_seen is None or time.monotonic() - last_seen > LATE) and not path.exists():
                problem = f"{path} is missing and nothing is fetching it"
                raise UserError(f"{problem}: {self.repair_hint()}")
            time.sleep(0.5)


def datasets_dir() -> Path:
    return get_base_dir() / "base_data"


def present_datasets() -> list[str]:
    names = (path.parent.name for path in datasets_dir().glob(f"*/{MANIFEST}"))
    return sorted(name for name in names if not name.startswith("."))


def load_dataset(folder: Path) -> Dataset:
    """The dataset of a folder with a manifest. Raises UserError if it cannot be understood."""
    path = folder / MANIFEST
    remedy = "delete it and fetch or build the dataset again"
    with explain(f"{path} is damaged", remedy, ValueError, KeyError, TypeError):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
        dataset = Dataset(folder, manifest)
        dataset.shards("train")
    if found != FORMAT:
        raise UserError(f"{path} has format {found}, this version reads {FORMAT}: {remedy}")
    return dataset


def hash_edges(path: Path) -> str:
    """sha256 of a file's first and last 64 KiB: cheap for any size.

    For parquet the last bytes are the footer, its table of contents.
    """
    edge = 1 << 16
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(edge))
        file.seek(max(0, path.stat().st_size - edge))
        digest.update(file.read(edge))
    return digest.hexdigest()


def write_dataset(
    folder: Path,
    name: str,
    train: Sequence[str],
    validation: Sequence[str],
    facts: dict[str, Any] | None = None,
) -> Dataset:
    """Write shards and manifest as <folder>, which appears whole or not at all.

    An older one is replaced. `facts` join the manifest. Two processes must not write the same
    folder: hold its folder_lock.
    """
    building = building_folder(folder)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    starts = range(0, len(train), SHARD_DOCUMENTS)
    parts = [("train", train[start : start + SHARD_DOCUMENTS]) for start in starts]
    shards = []
    for number, (split, texts) in enumerate([*parts, ("validation", validation)]):
        path = building / f"shard_{number:05d}.parquet"
        write_shard(path, texts)
        shards.append(shard_entry(path, split, documents=len(texts)))
    manifest = {"format": FORMAT, "name": name, "source": name, **(facts or {}), "shards": shards}
    write_manifest(building, manifest)
    replace_folder(folder, building)
    return Dataset(folder, manifest)


def shard_entry(path: Path, split: str, **facts: Any) -> dict[str, Any]:
    """The manifest's entry of a shard that is on disk."""
    size = path.stat().st_size
    return {"name": path.name, "split": split, "bytes": size, "sha256": file_sha256(path), **facts}


def building_folder(folder: Path) -> Path:
    """Where to build a new <folder>: next to the old one, on its disk if it is a link to one."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.building")


def replace_folder(folder: Path, finished: Path) -> None:
    """Rename `finished`, its building_folder, to `folder`, and delete the old one afterwards."""
    folder = folder.resolve()
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    finished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def folder_lock(folder: Path) -> Any:
    """Held by the process that builds or downloads <folder>; the lock file lies next to it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return file_lock(folder.with_name(f".{folder.name}.lock"))


def download_is_running(folder: Path) -> bool:
    try:
        with folder_lock(folder).acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True


def check_shard(path: Path, entry: dict[str, Any]) -> str:
    """Compare a file with the manifest's entry of it; returns the problem, "" if there is none."""
    if not path.exists():
        return "missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
    if "sha256" not in entry:  # a file of your own
        unchanged = hash_edges(path) == entry["edges_sha256"]
        return "" if unchanged else "it has changed since the run began"
    return "" if file_sha256(path) == entry["sha256"] else "its sha256 is not the manifest's"
