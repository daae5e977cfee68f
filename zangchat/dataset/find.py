"""The dataset that `--dataset` or `--data_path` means, and which files of a folder are read.

A folder is read as the hub reads one: with its subfolders, and with the splits that its names say.
"""

import functools
import json
import logging
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from zangchat.dataset.manifest import (
    BUILD_PYDOCS,
    FORMAT,
    HUB_REPOS,
    LONE_FILE_HOLDOUT,
    MANIFEST,
    TOKENS_SUFFIX,
    Dataset,
    datasets_dir,
    hash_edges,
    load_dataset,
    present_datasets,
)
from zangchat.dataset.shards import FORMATS, REPLACE, open_shard, text_format
from zangchat.errors import UserError, explain, reason_of
from zangchat.runtime.files import LeftOut, expand_home, unpacked_name

logger = logging.getLogger(__name__)

EXPECTED = "give a folder or file of .parquet, .jsonl, .txt, or of these as .gz or .zst"
# https://huggingface.co/docs/hub/datasets-file-names-and-splits. If a name has words of several
# splits, the first in this order counts, so that a test file never trains.
SPLIT_WORDS = {
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "val", "dev"},
    "train": {"train", "training"},
}
SEPARATORS = re.compile(r"[-._ 0-9/]+")
# Files that probably hold text, but cannot be read.
COMPRESSED = {".xz", ".zip", ".tar", ".7z", ".rar", ".lz4"}
FOREIGN = {".json", ".csv", ".tsv", ".arrow", ".feather"}


def find_dataset(
    name: str | None = None, data_path: str | None = None, skip_bad_rows: bool = False
) -> Dataset:
    """The dataset of these flags; without them, the only one of text present. Raises UserError.

    With `skip_bad_rows`, rows of `data_path` that cannot be read are left out.
    """
    if data_path:
        if name:
            problem = f"--dataset={name} and --data_path={data_path} exclude each other"
            raise UserError(f"{problem}: give one of them")
        left_out = LeftOut() if skip_bad_rows else None
        return _local_dataset(expand_home(data_path), left_out)
    present = present_datasets()
    if name:
        if name not in present:
            have = f"present: {', '.join(present)}" if present else "there is none yet"
            problem = f"--dataset={name} is not in {datasets_dir()} ({have})"
            raise UserError(f"{problem}: {_how_to_get(name, present)}")
        return load_dataset(datasets_dir() / name)
    if not present:
        remedy = f"build the one that needs no download with `{BUILD_PYDOCS}`"
        raise UserError(f"no dataset in {datasets_dir()}: {remedy}")
    if len(present) > 1:  # token ids must be named: not every command can read them
        loaded = {name: load_dataset(datasets_dir() / name) for name in present}
        texts = [name for name in present if not loaded[name].tokenizer_fingerprint]
        present = texts if len(texts) == 1 else present
    if len(present) > 1:
        choice = f"choose one with --dataset={'|'.join(present)}"
        raise UserError(f"several datasets in {datasets_dir()}: {choice}")
    return load_dataset(datasets_dir() / present[0])


def _how_to_get(name: str, present: Sequence[str]) -> str:
    text = name.removesuffix(TOKENS_SUFFIX)
    if text != name and text in (*present, *HUB_REPOS, "pydocs"):
        flag = shlex.quote(f"--dataset={text}")
        return f"make it with `python -m zangchat.dataset tokenize {flag}`"
    if name in HUB_REPOS:
        return f"get it with `python -m zangchat.dataset --source={name} -n 8`"
    if name == "pydocs":
        return f"build it with `{BUILD_PYDOCS}`"
    return (
        "give --data_path=PATH for files of your own, "
        f"or build the dataset that needs no download with `{BUILD_PYDOCS}`"
    )


# ---- files of your own ---------------------------------------------------------------------------


class Choice(NamedTuple):
    """Which files of a folder are read; `left_out` has the reason for each of the others."""

    train: list[Path]
    validation: list[Path]
    left_out: dict[Path, str]


def _local_dataset(path: Path, left_out: LeftOut | None) -> Dataset:
    if not path.exists():
        raise UserError(f"--data_path={path} does not exist: {EXPECTED}")
    if path.is_dir() and _is_dataset(path):
        return load_dataset(path)
    if path.is_dir():
        folder, choice = path, _choose(path, left_out)
    else:
        _check_lone_file(path)
        folder, choice = path.parent, Choice([path], [], {})
    # The end of a lone file is held out by the Dataset.
    split = "train" if choice.validation else "both"
    files = {**dict.fromkeys(choice.train, split), **dict.fromkeys(choice.validation, "validation")}
    shards = [_entry(file, folder, split) for file, split in files.items()]
    manifest = {
        "format": FORMAT,
        "name": name_of(path),
        "source": "local",
        "path": str(path.absolute()),
        "shards": shards,
    }
    return Dataset(folder, manifest, left_out)


def name_of(path: Path) -> str:
    """The name of a dataset of files of your own; none begins with a dot, which would hide it."""
    return unpacked_name(Path(os.path.abspath(path))).stem.lstrip(".")


def _is_dataset(folder: Path) -> bool:
    """Whether it has a manifest of ours, damaged or not, and not one of another program."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return isinstance(manifest, dict) and bool({"format", "shards"} & manifest.keys())


def _entry(file: Path, folder: Path, split: str) -> dict[str, Any]:
    with explain(f"{file} cannot be read", "correct its permissions", OSError):
        return {
            "name": file.relative_to(folder).as_posix(),
            "split": split,
            "bytes": file.stat().st_size,
            "edges_sha256": hash_edges(file),
        }


def _check_lone_file(path: Path) -> None:
    if path.suffix.lower() in COMPRESSED:
        raise UserError(f"--data_path={path} is compressed: unpack it first")
    if text_format(path) not in FORMATS or not path.stat().st_size:
        raise UserError(f"--data_path={path} holds no text: {EXPECTED}")


def _choose(folder: Path, left_out_rows: LeftOut | None) -> Choice:
    """Choose the files of a folder by the splits that their names say, and log the choice."""
    files, left_out = _text_files(folder)
    by_split: dict[str, list[Path]] = {"": [], "train": [], "validation": [], "test": []}
    for file in files:
        by_split[split_of_name(file.relative_to(folder).as_posix())].append(file)
    train, validation = by_split["train"] or by_split[""], by_split["validation"]
    left_out |= dict.fromkeys(by_split["test"], "test")
    if by_split["train"]:
        left_out |= dict.fromkeys(by_split[""], "not named train")
    if not train:
        problem = f"--data_path={folder} holds no text to train on"
        if validation or left_out:
            problem += (
                f" ({_list_names(folder, {**dict.fromkeys(validation, 'validation'), **left_out})})"
            )
        raise UserError(f"{problem}: {EXPECTED}")
    has_text = functools.partial(_has_text, left_out=left_out_rows)
    if validation and not any(map(has_text, validation)):
        left_out |= dict.fromkeys(validation, "empty")
        validation = []
    if not validation:
        # A list of sources beside the texts is not what to validate on: rarer formats first.
        formats = Counter(map(text_format, train))
        files = sorted(train, key=lambda file: formats[text_format(file)])
        train, validation = _hold_out(files, has_text)
        left_out |= {file: "empty" for file in files if file not in (*train, *validation)}
    _log_choice(folder, choice := Choice(train, validation, left_out))
    return choice


def split_of_name(name: str) -> str:
    """The split that a path says, folders before the file's own name; "" if none.

    As on the hub, a keyword counts between separators: `test-00000.parquet`, not `latest.parquet`.
    """
    folders, _, file = name.lower().rpartition("/")
    for part in (folders, file):
        words = set(SEPARATORS.split(part))
        for split, keywords in SPLIT_WORDS.items():
            if words & keywords:
                return split
    return ""


def _text_files(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """(the files of FORMATS below a folder that are not empty, {other files with text: reason}).

    Hidden files are skipped, also macOS's `._name`. Links are followed, to each folder once.
    """
    found, left_out = [], {}
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            suffix = text_format(path)
            if suffix in FORMATS and path.is_file():
                if path.stat().st_size:
                    found.append(path)
            elif path.suffix.lower() in COMPRESSED:
                left_out[path] = "compressed: unpack it first"
            elif suffix in FOREIGN:
                left_out[path] = f"{suffix} is not read"
    for path in set(found):
        if unpacked_name(path) != path and unpacked_name(path) in found:
            found.remove(path)  # zstd and `gunzip -k` keep both
            left_out[path] = "also there unpacked"
    return sorted(found), dict(sorted(left_out.items()))


def _refuse(error: OSError) -> NoReturn:
    raise UserError(
        f"{error.filename} cannot be read ({reason_of(error)}): correct its permissions"
    )


def _hold_out(files: list[Path], has_text: Callable[[Path], bool]) -> tuple[list[Path], list[Path]]:
    """(train, validation): the last file that has text validates, and empty ones after it are left
    out.

    If only one file has text, there is no validation file: its own end is held out.
    """
    while len(files) > 1 and not has_text(files[-1]):
        files = files[:-1]
    # A .txt file is often a single document, so one file would be too little to validate on.
    all_txt = all(text_format(file) == ".txt" for file in files)
    count = max(1, len(files) // LONE_FILE_HOLDOUT) if all_txt else 1
    if len(files) > 1 and not any(map(has_text, files[:-count])):
        files, count = [file for file in files[-count:] if has_text(file)], 1
    return (files, []) if len(files) == 1 else (files[:-count], files[-count:])


def _has_text(path: Path, left_out: LeftOut | None) -> bool:
    return open_shard(path, REPLACE, left_out).has_text()


def _log_choice(folder: Path, choice: Choice) -> None:
    validation = ", ".join(
        _shorten([file.relative_to(folder).as_posix() for file in choice.validation])
    )
    train = _shorten([file.relative_to(folder).as_posix() for file in choice.train])
    ends = validation or f"the end of {train[0]}"
    message = f"{folder}: training on {', '.join(train)}; validating on {ends}"
    if choice.left_out:
        message += f"; not read: {_list_names(folder, choice.left_out)}"
    logger.info(message)


def _list_names(folder: Path, reasons: dict[Path, str]) -> str:
    names = [
        f"{path.relative_to(folder).as_posix()} ({reason})" for path, reason in reasons.items()
    ]
    return ", ".join(_shorten(names))


def _shorten(names: list[str], most: int = 6) -> list[str]:
    """At most `most` names; of more, the first, the last and their number."""
    return names if len(names) <= most else [*names[:2], f"... ({len(names)} in all)", names[-1]]
