"""A dataset: a folder of shards and the manifest that lists them.

<base>/base_data/<name>/ holds the shards and a manifest.json that lists all planned shards from the start, in order, each with its
split, size and sha256:

    {"format": 1, "name": "climbmix", "source": "climbmix", "repo": "...", "revision": "<commit>",
     "shards": [{"name": "shard_00000.parquet", "split": "train", "bytes": 123, "sha256": "..."}, ...]}

A shard is a parquet file with a column `text`, zstd, row groups of 1,024 documents. A file or folder of your own (`--data_path`) gets a
manifest in memory; its files may also be .jsonl or .txt. The last part of it is for validation; a single document is both trained on
and validated on, with a warning.
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

from zangchat.dataset.shards import GROUP_DOCUMENTS, TOKENS, LineFile, ParquetFile, as_list, write_shard
from zangchat.errors import UserError
from zangchat.runtime.files import atomic_write, expand_home, file_lock, file_sha256, get_base_dir
from zangchat.runtime.logs import log0

if TYPE_CHECKING:
    import pyarrow

HUB_REPOS = {"climbmix": "karpathy/climbmix-400b-shuffle", "fineweb-edu": "karpathy/fineweb-edu-100b-shuffle"}


logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT = 1
SHARD_DOCUMENTS = 8 * GROUP_DOCUMENTS
LONE_FILE_HOLDOUT = 20  # of a lone file too small for two groups, the last 1/20 of the documents are for validation
FORMATS = (".parquet", ".jsonl", ".txt")
TOKENS_SUFFIX = "-tokens"  # ends the name of a dataset of them
BUILD_PYDOCS = "python -m zangchat.dataset --source=pydocs"


class Dataset:
    """A manifest and the folder of its shards. Splits are "train" and "validation"; groups are numbered from 0 within (shard, split)."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.name: str = manifest["name"]
        self._entries: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in manifest["shards"]}
        self._warned = False
        self._checked: dict[str, tuple[int, int]] = {}  # size and time of change of the shards that were found intact

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change whenever the text may have changed: a hash of the shards' names, splits, sizes and digests."""
        return hashlib.sha256(json.dumps(self.manifest["shards"], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def arrives_in_order(self) -> bool:
        """True where later shards may still be on their way: the hub's text is shuffled already, so the first epoch keeps its order."""
        return bool(self.manifest.get("in_order", "repo" in self.manifest))

    @property
    def tokenizer(self) -> str | None:
        """The fingerprint of the tokenizer that made the ids of the training shards; None where they hold text."""
        return self.manifest.get("tokenizer")

    def shards(self, split: str) -> list[str]:
        """Names in manifest order. The split "both" marks a lone file whose end is held out for validation."""
        if split not in ("train", "validation"):
            raise ValueError(f'split must be "train" or "validation", not {split!r}')
        return [entry["name"] for entry in self.manifest["shards"] if entry["split"] in (split, "both")]

    def num_groups(self, shard: str, split: str) -> int:
        """Waits for a shard that is being downloaded; raises UserError for one that is missing or damaged."""
        total = self._file(shard).num_groups()
        if self._entries[shard]["split"] != "both" or total < 2:
            return total
        return total - 1 if split == "train" else 1

    def read_group(self, shard: str, group: int, split: str) -> list[Any]:
        """The documents of one group, in file order: texts, or (n,) arrays of ids where the shard holds tokens."""
        return as_list(self.read_arrow(shard, group, split))

    def read_arrow(self, shard: str, group: int, split: str) -> "pyarrow.ChunkedArray | list[Any]":
        """The same as Arrow memory, without a Python str for each document, where the shard is parquet with a column `text`. There the
        array may hold nulls and empty strings, which are no documents.
        """
        file = self._file(shard)
        if self._entries[shard]["split"] != "both":
            return file.read_group(group)
        total = file.num_groups()
        if total >= 2:
            return file.read_group(group if split == "train" else total - 1)
        texts = as_list(file.read_group(0))
        if not texts:
            raise UserError(f"--data_path={file.path} holds no text: give a file with at least one document that is not empty")
        if len(texts) == 1:
            if split == "validation" and not self._warned:
                log0(f"{file.path} holds one document: training and validation both read it", logging.WARNING)
                self._warned = True
            return texts
        held_out = max(1, len(texts) // LONE_FILE_HOLDOUT)
        return texts[:-held_out] if split == "train" else texts[-held_out:]

    @property
    def holds_one_document(self) -> bool:
        """Whether this is a lone file of a single document, which both splits then consist of."""
        if [entry["split"] for entry in self.manifest["shards"]] != ["both"]:
            return False
        file = self._file(self.manifest["shards"][0]["name"])
        return file.num_groups() == 1 and len(as_list(file.read_group(0))) == 1

    def iter_documents(self, split: str) -> Iterator[str]:
        """All documents of the split once, in manifest order. Raises UserError where they are token ids."""
        for texts in self.iter_arrow(split):
            yield from as_list(texts)

    def iter_arrow(self, split: str) -> "Iterator[pyarrow.ChunkedArray | list[str]]":
        """The same, a group at a time as `read_arrow` gives it."""
        if split == "train" and self.tokenizer is not None:
            raise UserError(f"dataset {self.name} holds token ids: for its text give {self.text_flag}")
        for shard in self.shards(split):
            for group in range(self.num_groups(shard, split)):
                yield self.read_arrow(shard, group, split)

    @property
    def flag(self) -> str:
        """What names this dataset on a command line, as a shell reads it."""
        path = self.manifest.get("path")  # of files of one's own
        return shlex.quote(f"--data_path={path}" if path else f"--dataset={self.name}")

    @property
    def text_flag(self) -> str:
        """The same of the text that token ids were made from."""
        text = self.manifest["text"]
        return str(text.get("flag") or shlex.quote(f"--dataset={text['name']}"))

    def repair_hint(self) -> str:
        if self.tokenizer is not None:
            return f"make it again with `python -m zangchat.dataset tokenize {self.text_flag} --overwrite`"
        if self.manifest["source"] == "pydocs":
            return f"build it again with `{BUILD_PYDOCS} --overwrite`"
        if "repo" in self.manifest:
            return f"fetch it again with `python -m zangchat.dataset verify {self.flag} --repair`"
        return "put an intact copy in its place"

    def _file(self, shard: str) -> Any:
        """A ParquetFile, LineFile or TokenFile."""
        path = self.folder / shard
        if not path.exists():
            self._wait_for(path)
        self._check(path)
        if path.suffix == TOKENS:
            from zangchat.dataset.shards import TokenFile

            return TokenFile(path, self._entries[shard], self.manifest["dtype"])
        return ParquetFile(path, self.repair_hint()) if path.suffix == ".parquet" else LineFile(path, self.repair_hint())

    def _check(self, path: Path) -> None:
        """Compare a shard with the manifest when it is first opened, and again whenever its file has changed. Raises UserError."""
        status = path.stat()
        seen = status.st_size, status.st_mtime_ns
        if self._checked.get(path.name) != seen:
            if problem := check_shard(path, self._entries[path.name]):
                raise UserError(f"{path} is damaged ({problem}): {self.repair_hint()}")
            self._checked[path.name] = seen

    def _wait_for(self, path: Path) -> None:
        """Shards appear whole (they are renamed into place), so existence is all there is to wait for."""
        said = False
        while not path.exists():
            if not download_is_running(self.folder) and not path.exists():
                raise UserError(f"{path} is missing and nothing is fetching it: {self.repair_hint()}")
            if not said:
                logger.info("waiting for %s, which is still to be downloaded", path.name)
                said = True
            time.sleep(0.5)


def find_dataset(name: str | None = None, data_path: str | None = None) -> Dataset:
    """The dataset that `--dataset` or `--data_path` means, or the only one of text that is present. Raises UserError."""
    if data_path:
        if name:
            raise UserError(f"--dataset={name} and --data_path={data_path} exclude each other: give one of them")
        return _local_dataset(expand_home(data_path))
    present = present_datasets()
    if name:
        if name not in present:
            have = f"present: {', '.join(present)}" if present else "there is none yet"
            raise UserError(f"--dataset={name} is not in {datasets_dir()} ({have}): {_how_to_get(name, present)}")
        return load_dataset(datasets_dir() / name)
    if not present:
        raise UserError(f"no dataset in {datasets_dir()}: build the one that needs no download with `{BUILD_PYDOCS}`")
    if len(present) > 1:  # token ids are taken where they are named: not every command can use them
        texts = [name for name in present if load_dataset(datasets_dir() / name).tokenizer is None]
        present = texts if len(texts) == 1 else present
    if len(present) > 1:
        raise UserError(f"several datasets in {datasets_dir()}: choose one with --dataset={'|'.join(present)}")
    return load_dataset(datasets_dir() / present[0])


def datasets_dir() -> Path:
    return get_base_dir() / "base_data"


def present_datasets() -> list[str]:
    return sorted(path.parent.name for path in datasets_dir().glob(f"*/{MANIFEST}") if not path.parent.name.startswith("."))


def load_dataset(folder: Path) -> Dataset:
    """The dataset of a folder with a manifest. Raises UserError where the manifest cannot be understood."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT
        Dataset(folder, manifest).shards("train")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and fetch or build the dataset again") from error
    if not known:
        raise UserError(
            f"{path} has format {manifest['format']}, this version reads {FORMAT}: delete it and fetch or build the dataset again"
        )
    return Dataset(folder, manifest)


def _how_to_get(name: str, present: Sequence[str]) -> str:

    text = name.removesuffix(TOKENS_SUFFIX)
    if text != name and text in (*present, *HUB_REPOS, "pydocs"):
        return f"make it with `python -m zangchat.dataset tokenize {shlex.quote(f'--dataset={text}')}`"
    if name in HUB_REPOS:
        return f"get it with `python -m zangchat.dataset --source={name} -n 8`"
    if name == "pydocs":
        return f"build it with `{BUILD_PYDOCS}`"
    return f"give --data_path=PATH for files of your own, or build the dataset that needs no download with `{BUILD_PYDOCS}`"


def _local_dataset(path: Path) -> Dataset:
    if not path.exists():
        raise UserError(f"--data_path={path} does not exist: give a folder or file of {', '.join(FORMATS)}")
    if path.is_dir() and (path / MANIFEST).exists():
        return load_dataset(path)
    folder, candidates = (path, sorted(path.iterdir())) if path.is_dir() else (path.parent, [path])
    files = [file for file in candidates if file.suffix in FORMATS and file.is_file() and file.stat().st_size > 0]
    if not files:
        raise UserError(f"--data_path={path} holds no text: give a folder or file of {', '.join(FORMATS)}")
    shards = [{"name": file.name, "split": "train", "bytes": file.stat().st_size, "edges_sha256": _hash_edges(file)} for file in files]
    if len(shards) == 1:
        shards[0]["split"] = "both"
    # A .txt file is often a single document, so one file would be too little to validate on.
    held_out = max(1, len(shards) // LONE_FILE_HOLDOUT) if all(file.suffix == ".txt" for file in files) else 1
    for shard in shards[1:][-held_out:]:
        shard["split"] = "validation"
    return Dataset(folder, {"format": FORMAT, "name": path.stem, "source": "local", "path": str(path.absolute()), "shards": shards})


def _hash_edges(path: Path) -> str:
    """sha256 of a file's first and last 64 KiB: cheap for any size, and for parquet the footer is the table of contents."""
    edge = 1 << 16
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(edge))
        file.seek(max(0, path.stat().st_size - edge))
        digest.update(file.read(edge))
    return digest.hexdigest()


def write_dataset(folder: Path, name: str, train: Sequence[str], validation: Sequence[str], facts: dict[str, Any] | None = None) -> Dataset:
    """Write shards and manifest as <folder>, which appears whole or not at all (an older one is replaced). `facts` join the manifest.

    Two processes must not write the same one: hold its folder_lock.
    """
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    parts = [("train", train[i : i + SHARD_DOCUMENTS]) for i in range(0, len(train), SHARD_DOCUMENTS)] + [("validation", validation)]
    shards = []
    for number, (split, texts) in enumerate(parts):
        path = building / f"shard_{number:05d}.parquet"
        write_shard(path, texts)
        shards.append(
            {"name": path.name, "split": split, "bytes": path.stat().st_size, "sha256": file_sha256(path), "documents": len(texts)}
        )
    manifest = {"format": FORMAT, "name": name, "source": name, **(facts or {}), "shards": shards}
    write_manifest(building, manifest)
    replace_folder(folder, building)
    return Dataset(folder, manifest)


def replace_folder(folder: Path, finished: Path) -> None:
    """Give `finished`, which lies beside it, the name of `folder`; what had that name is deleted afterwards."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    finished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def folder_lock(folder: Path) -> Any:
    """Held by whoever builds or downloads <folder>; the lock file lies beside it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return file_lock(folder.with_name(f".{folder.name}.lock"))


def download_is_running(folder: Path) -> bool:
    import filelock

    try:
        with folder_lock(folder).acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True


def check_shard(path: Path, entry: dict[str, Any]) -> str:
    """What is wrong with a file that should be the shard of this manifest's entry; empty where nothing is."""
    if not path.exists():
        return "missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
    if "sha256" not in entry:  # a file of one's own
        return "" if _hash_edges(path) == entry["edges_sha256"] else "it has changed since the run began"
    return "" if file_sha256(path) == entry["sha256"] else "its sha256 is not the manifest's"
