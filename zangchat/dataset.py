"""Where pretraining text comes from: build it, fetch it, read it; with `verify` in front, check what is there.

    python -m zangchat.dataset --source=pydocs                the corpus made from this machine's own Python documentation
    python -m zangchat.dataset -n 8                           8 training shards of climbmix from the hub, and its validation shard
    python -m zangchat.dataset --source=fineweb-edu -n 8
    python -m zangchat.dataset verify [--dataset=NAME] [--repair]
    python -m zangchat.dataset tokenize [--dataset=NAME]      token ids in <base>/base_data/NAME-tokens (token_shards.py)

A dataset is a folder <base>/base_data/<name>/ with shards and a manifest.json that lists all planned shards from the start, in order,
each with its split, size and sha256:

    {"format": 1, "name": "climbmix", "source": "climbmix", "repo": "...", "revision": "<commit>",
     "shards": [{"name": "shard_00000.parquet", "split": "train", "bytes": 123, "sha256": "..."}, ...]}

A shard is a parquet file with a column `text`, zstd, row groups of 1,024 documents. A file or folder of one's own (`--data_path`)
gets a manifest in memory; there .jsonl and .txt are read as well. The last part of it is for validation; a single document is both
trained on and validated on, with a warning. Whatever the format, a shard consists of numbered groups of
documents, the unit of reading: the data loader needs no more than (shard, group, row) to find its place again.
"""

import hashlib
import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from zangchat import configurator
from zangchat.common import atomic_write, expand_home, file_lock, file_sha256, get_base_dir, log0
from zangchat.configurator import UserError

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
GROUP_DOCUMENTS = 1024  # documents in a parquet row group
SHARD_DOCUMENTS = 8 * GROUP_DOCUMENTS
TEXT_GROUP_BYTES = 4 << 20  # .jsonl and .txt files are read in ranges of about this size
SCAN_BYTES = 1 << 16  # read at a time in search of the beginning of a file's last line
TXT_DOCUMENT_CHARS = 8192  # .txt files without <|endoftext|> marks are cut into documents of at most this length
LONE_FILE_HOLDOUT = 20  # of a lone file too small for two groups, the last 1/20 of the documents are for validation
FORMATS = (".parquet", ".jsonl", ".txt")
TOKENS = ".tokens"  # ends the name of a shard of token ids
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
        return _as_list(self.read_arrow(shard, group, split))

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
        texts = _as_list(file.read_group(0))
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
        return file.num_groups() == 1 and len(_as_list(file.read_group(0))) == 1

    def iter_documents(self, split: str) -> Iterator[str]:
        """All documents of the split once, in manifest order. Raises UserError where they are token ids."""
        for texts in self.iter_arrow(split):
            yield from _as_list(texts)

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
        """A _File or TokenFile."""
        path = self.folder / shard
        if not path.exists():
            self._wait_for(path)
        self._check(path)
        if path.suffix == TOKENS:
            from zangchat.token_shards import TokenFile

            return TokenFile(path, self._entries[shard], self.manifest["dtype"])
        return _ParquetFile(path, self.repair_hint()) if path.suffix == ".parquet" else _LineFile(path, self.repair_hint())

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
    from zangchat.hub import HUB_REPOS

    text = name.removesuffix(TOKENS_SUFFIX)
    if text != name and text in (*present, *HUB_REPOS, "pydocs"):
        return f"make it with `python -m zangchat.dataset tokenize {shlex.quote(f'--dataset={text}')}`"
    if name in HUB_REPOS:
        return f"get it with `python -m zangchat.dataset --source={name} -n 8`"
    if name == "pydocs":
        return f"build it with `{BUILD_PYDOCS}`"
    return f"give --data_path=PATH for files of your own, or build the dataset that needs no download with `{BUILD_PYDOCS}`"


# ---- files of one's own -------------------------------------------------------------------------------------------------


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


def _as_list(texts: "pyarrow.ChunkedArray | list[Any]") -> list[Any]:
    return texts if isinstance(texts, list) else [text for text in texts.to_pylist() if text]


class _File:
    """A shard on disk: `num_groups()` groups of documents, `read_group(i)` a list or, see `Dataset.read_arrow`, an Arrow array."""

    def __init__(self, path: Path, repair_hint: str) -> None:
        self.path = path
        self.repair_hint = repair_hint

    def damaged(self, error: object) -> UserError:
        reason = " ".join(str(error).split())[:200]
        return UserError(f"{self.path} is damaged ({reason}): {self.repair_hint}")


class _ParquetFile(_File):
    def num_groups(self) -> int:
        return self._open().num_row_groups

    def read_group(self, group: int) -> "pyarrow.ChunkedArray | list[str]":
        import pyarrow

        file = self._open()
        try:
            if "text" in file.schema_arrow.names:
                texts = file.read_row_group(group, columns=["text"]).column("text")
                texts = texts if texts.type in (pyarrow.string(), pyarrow.large_string()) else texts.cast(pyarrow.string())
                texts.validate(full=True)  # that it is UTF-8: readers do not look
                return texts
            rows = file.read_row_group(group).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise self.damaged(error) from error
        return [text for row in rows if (text := record_text(row, f"{self.path}, row group {group}"))]

    def _open(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise self.damaged(error) from error


class _LineFile(_File):
    """.jsonl or .txt, in byte ranges that begin and end at line ends: random access without an index.

    The last range is the one in which the last line begins, so that it never is empty.
    """

    def num_groups(self) -> int:
        with self.path.open("rb") as file:
            return _last_line_start(file) // TEXT_GROUP_BYTES + 1

    def read_group(self, group: int) -> list[str]:
        with self.path.open("rb") as file:
            start = _line_start(file, group * TEXT_GROUP_BYTES)
            end = _line_start(file, (group + 1) * TEXT_GROUP_BYTES)
            file.seek(start)
            raw = file.read(max(0, end - start))
        try:
            text = raw.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise self.damaged(f"byte {start + error.start} is not UTF-8") from error
        return cut_text(text) if self.path.suffix == ".txt" else self._records(text, start)

    def _records(self, text: str, start: int) -> list[str]:
        texts = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{self.path}, line {number}" + (f" after byte {start}" if start else "")
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{where} is not JSON ({error}): correct the line") from error
                texts.append(record_text(record, where))
        return [text for text in texts if text]


def _line_start(file: Any, position: int) -> int:
    """The first beginning of a line at or after `position`, or the end of the file."""
    if position == 0:
        return 0
    file.seek(position - 1)
    file.readline()
    return file.tell()


def _last_line_start(file: Any) -> int:
    """Where the last line that is not blank begins; 0 if there is none."""
    end, found = file.seek(0, os.SEEK_END), False
    while end > 0:
        start = max(0, end - SCAN_BYTES)
        file.seek(start)
        block = file.read(end - start)
        if not found:
            block = block.rstrip()  # blank lines at the end of the file
            found = bool(block)
        if (newline := block.rfind(b"\n")) >= 0:
            return start + newline + 1
        end = start
    return 0


def cut_text(text: str, limit: int = TXT_DOCUMENT_CHARS) -> list[str]:
    """Plain text -> documents: cut at <|endoftext|>; what is still longer than `limit` at a blank line, else a line end, else anywhere."""
    documents = []
    for piece in text.split("<|endoftext|>"):
        piece = piece.strip()
        while len(piece) > limit:
            cut = max(piece.rfind("\n\n", 1, limit), 0) or max(piece.rfind("\n", 1, limit), 0) or limit
            documents.append(piece[:cut].rstrip())
            piece = piece[cut:].lstrip()
        documents.append(piece)
    return [document for document in documents if document]


def record_text(record: Any, where: str) -> str:
    """One record as plain text: `text`, else prompt + completion, else the messages, one paragraph each. UserErrors name `where`."""
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return record["text"]
        if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
            gap = "" if record["prompt"][-1:].isspace() or record["completion"][:1].isspace() else "\n"
            return record["prompt"] + gap + record["completion"]
        if isinstance(record.get("messages"), list):
            try:
                return "\n\n".join(f"{message['role'].capitalize()}: {_content_text(message['content'])}" for message in record["messages"])
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{where} has a message without role or text ({error}): see the README for the format") from error
    raise UserError(f"{where} has no text: a record needs `text`, `prompt` and `completion`, or `messages`")


def _content_text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


# ---- writing ------------------------------------------------------------------------------------------------------------


def write_shard(path: Path, texts: Sequence[str]) -> None:
    """Documents -> one parquet shard in the hub's format."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": pyarrow.array(texts, type=pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=GROUP_DOCUMENTS, compression="zstd", use_dictionary=False)


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


# ---- locks --------------------------------------------------------------------------------------------------------------


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


# ---- checking -----------------------------------------------------------------------------------------------------------


def check_shard(path: Path, entry: dict[str, Any]) -> str:
    """What is wrong with a file that should be the shard of this manifest's entry; empty where nothing is."""
    if not path.exists():
        return "missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
    if "sha256" not in entry:  # a file of one's own
        return "" if _hash_edges(path) == entry["edges_sha256"] else "it has changed since the run began"
    return "" if file_sha256(path) == entry["sha256"] else "its sha256 is not the manifest's"


def tokenize(config: "TokenizeConfig") -> int:
    from zangchat.token_shards import tokenize
    from zangchat.tokenizer import get_tokenizer

    dataset = find_dataset(config.dataset, config.data_path)
    if dataset.tokenizer is not None:
        raise UserError(f"--dataset={dataset.name} holds token ids already: give {dataset.text_flag}")
    folder = datasets_dir() / f"{dataset.name}{TOKENS_SUFFIX}"
    train = shlex.quote(f"--dataset={folder.name}")
    with folder_lock(folder):
        if (folder / MANIFEST).exists() and not config.overwrite:
            raise UserError(f"{folder} is there already: train with {train}, or give --overwrite to make it again")
        made = tokenize(dataset, get_tokenizer(), folder, config.num_threads or os.cpu_count() or 1)
    tokens = sum(entry.get("tokens", 0) for entry in made.manifest["shards"])
    print(f"{folder}: {tokens:,} tokens; train on them with {train}")
    return 0


def verify(config: "VerifyConfig") -> int:
    dataset = find_dataset(config.dataset)
    bad = {}
    for entry in dataset.manifest["shards"]:
        problem = check_shard(dataset.folder / entry["name"], entry)
        print(f"{entry['name']}  {entry['split']:<10}  {problem or 'ok'}", flush=True)
        if problem:
            bad[entry["name"]] = problem
    if not bad:
        print(f"{dataset.name}: {len(dataset.manifest['shards'])} shards are what the manifest says (fingerprint {dataset.fingerprint})")
        return 0
    if config.repair and (dataset.manifest["source"] == "pydocs" or "repo" in dataset.manifest):
        for name in bad:
            (dataset.folder / name).unlink(missing_ok=True)
        if dataset.manifest["source"] == "pydocs":
            return build(Config(source="pydocs", overwrite=True))
        from zangchat import hub

        hub.fetch_missing(dataset)
        return 0
    worst = ", ".join(f"{name} ({problem})" for name, problem in bad.items())
    raise UserError(f"{dataset.folder}: {worst}: {dataset.repair_hint()}")


# ---- command ------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    source: str = ""  # pydocs | climbmix | fineweb-edu; with -n alone: climbmix
    num_shards: Annotated[int, tyro.conf.arg(aliases=["-n"])] = -1  # training shards to fetch from the hub; -1 = all of them
    num_workers: Annotated[int, tyro.conf.arg(aliases=["-w"])] = 4  # downloads at a time
    overwrite: bool = False  # pydocs: build it again although it is there


@dataclass
class VerifyConfig:
    dataset: str | None = None  # which dataset; default: the only one present
    repair: bool = False  # fetch or build again what is missing or damaged, where it came from the hub or is pydocs


@dataclass
class TokenizeConfig:
    dataset: str | None = None  # whose text; default: the only one present
    data_path: str | None = None  # a .parquet, .jsonl or .txt file, or a folder of them, instead
    num_threads: int = 0  # 0 = one per core
    overwrite: bool = False  # make it again although it is there


def build(config: Config) -> int:
    from zangchat import hub

    if not config.source and config.num_shards < 0:
        raise UserError(
            f"--source is missing: `{BUILD_PYDOCS}` needs no download, `python -m zangchat.dataset -n 8` fetches text from the hub"
        )
    source = config.source or hub.DEFAULT
    if source == "pydocs":
        from zangchat import pydocs

        return pydocs.build(datasets_dir() / "pydocs", overwrite=config.overwrite)
    if source not in hub.HUB_REPOS:
        raise UserError(f"--source={source} is unknown: choose one of pydocs, {', '.join(hub.HUB_REPOS)}")
    if config.num_shards == 0 or config.num_shards < -1 or config.num_workers < 1:
        raise UserError(f"-n {config.num_shards} -w {config.num_workers}: both must be at least 1 (-n -1 fetches all shards)")
    hub.download(source, config.num_shards, num_workers=config.num_workers)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["verify"]:
        return configurator.run(VerifyConfig, verify, arguments[1:])
    if arguments[:1] == ["tokenize"]:
        return configurator.run(TokenizeConfig, tokenize, arguments[1:])
    return configurator.run(Config, build, arguments)


if __name__ == "__main__":
    sys.exit(main())
