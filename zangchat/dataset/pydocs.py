"""The corpus `pydocs`: English prose and code that every Python installation carries, so that the
whole pipeline runs without a download.

Prose: pydoc's language topics, docstrings of the standard library and of the installed packages,
those of built-in functions, long
comments, READMEs. Code: source files without their docstrings, cut between top-level definitions.
Everything is cleaned, de-duplicated by paragraph, shuffled with a fixed seed, and written as a
dataset. The same environment gives the same bytes.
"""

import hashlib
import os
import random
import re
import signal
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from zangchat.dataset.documents import (
    Extract,
    built_in_docstrings,
    capped,
    clean_markup,
    documents_of,
    first_bytes,
    from_source,
    language_topics,
)
from zangchat.dataset.manifest import MANIFEST, folder_lock, load_dataset, write_dataset
from zangchat.dataset.shards import GROUP_DOCUMENTS
from zangchat.runtime.logs import print0
from zangchat.runtime.progress import Progress
from zangchat.runtime.seeds import derive_seed

PROSE_BYTES = 28_000_000  # at most
CODE_SHARE = 0.35  # of all text, at most: a chat model needs prose first
# of the largest packages only this much source is read: time, and no package should dominate
PACKAGE_SOURCE_BYTES = 10_000_000
CODE_ONE_FILE_IN = 5  # of the packages' files; of the standard library every file gives code
VALIDATION_SHARE = 20  # one document in so many, at most one row group, in whole files

SKIPPED_FOLDERS = {
    "__pycache__",
    "_vendor",
    "ensurepip",
    "licenses",
    "node_modules",
    "site-packages",
    "dist-packages",
}
SKIPPED_FOLDERS |= {"test", "testing", "tests"}
SKIPPED_FILES = re.compile(
    r"test_.*|.*_tests?|.*_pb2(_grpc)?|conftest|_version|licen[cs]e.*|copying.*|notice.*|authors.*|changelog.*|history.*",
    re.I,
)


def build(folder: Path, *, overwrite: bool = False, workers: int | None = None) -> int:
    """Make the corpus as a dataset at `folder`. Returns an exit code."""
    with folder_lock(folder):
        if (folder / MANIFEST).exists() and not overwrite:
            dataset = load_dataset(folder)
            print0(
                f"pydocs is in {folder} already (fingerprint {dataset.fingerprint}); --overwrite "
                "builds it again"
            )
            return 0
        train, validation, facts = collect(library_roots(), workers or min(8, os.cpu_count() or 1))
        dataset = write_dataset(folder, "pydocs", train, validation, facts)
    sizes = (
        f"{facts['prose_bytes'] / 1e6:.1f} MB of prose, {facts['code_bytes'] / 1e6:.1f} MB of code"
    )
    print0(
        f"pydocs: {len(train):,} training and {len(validation):,} validation documents, {sizes}, "
        f"in {folder} (fingerprint {dataset.fingerprint})"
    )
    return 0


def library_roots() -> list[Path]:
    """The standard library, then the folders of installed packages."""
    installed = [
        Path(entry)
        for entry in sys.path
        if Path(entry).name in ("site-packages", "dist-packages") and Path(entry).is_dir()
    ]
    return list(dict.fromkeys([Path(sysconfig.get_path("stdlib")), *installed]))


def collect(roots: Sequence[Path], workers: int) -> tuple[list[str], list[str], dict[str, Any]]:
    """(training documents, validation documents, facts for the manifest), shuffled."""
    extracts = [*language_topics(), *built_in_docstrings()]
    jobs = list(find_files(roots))
    with Progress("pydocs, files", len(jobs)) as progress:
        for done, extract in enumerate(_in_parallel(jobs, workers), 1):
            extracts.append(extract)
            if done % 100 == 0 or done == len(jobs):
                progress.update(done, extract.key.partition("/")[0])
    seen: set[bytes] = set()

    def new_texts(kind: str) -> list[tuple[str, str]]:
        texts = ((text, extract.key) for extract in extracts for text in getattr(extract, kind))
        return _shuffled([pair for pair in texts if is_new(pair[0], seen)], kind)

    prose, code = new_texts("prose"), new_texts("code")
    prose, prose_bytes = first_bytes(prose, PROSE_BYTES)
    code, code_bytes = first_bytes(code, int(prose_bytes * CODE_SHARE / (1 - CODE_SHARE)))
    train, validation = split_by_key(_shuffled(prose + code, "all"))
    facts = {
        "python": sys.version.split()[0],
        "files": len(jobs),
        "prose_bytes": prose_bytes,
        "code_bytes": code_bytes,
    }
    return train, validation, facts


# ---- what to read --------------------------------------------------------------------------------


class Job(NamedTuple):
    path: Path
    key: str  # path below its root, "/" between the parts
    with_code: bool


def find_files(roots: Sequence[Path]) -> Iterator[Job]:
    """Sources and documentation below the roots, in a fixed order; of each package at most
    PACKAGE_SOURCE_BYTES, drawn by hash.
    """
    for number, root in enumerate(roots):
        packages: dict[str, list[tuple[str, Path]]] = {}
        for path in _walk(root):
            key = path.relative_to(root).as_posix()
            packages.setdefault("" if number == 0 else key.partition("/")[0], []).append(
                (key, path)
            )
        for package in sorted(packages):
            left = PACKAGE_SOURCE_BYTES
            chosen = []
            for key, path in sorted(packages[package], key=lambda item: _digest(item[0])):
                left -= path.stat().st_size
                if left < 0:
                    break
                chosen.append(
                    Job(path, key, number == 0 or _digest(key)[0] % CODE_ONE_FILE_IN == 0)
                )
            yield from sorted(chosen, key=lambda job: job.key)


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith(".")
        ]
        for name in names:
            stem, suffix = os.path.splitext(name)
            wanted = suffix in (".py", ".md", ".rst") and not SKIPPED_FILES.fullmatch(stem)
            wanted = wanted or (name == "METADATA" and folder.endswith(".dist-info"))
            if wanted and (path := Path(folder, name)).is_file():  # no link to nothing
                yield path


def _in_parallel(jobs: list[Job], workers: int) -> Iterator[Extract]:
    if workers == 1:
        yield from map(extract, jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _leave_ctrl_c_to_the_parent) as pool:
        try:
            yield from pool.map(extract, jobs, chunksize=32)
        except BaseException:  # Ctrl-C: drop queued files rather than finish them
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _leave_ctrl_c_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def extract(job: Job) -> Extract:
    """The documents of a file; none if it is not UTF-8, not valid Python, generated, or data."""
    try:
        text = job.path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return Extract(job.key, [], [])
    if job.path.suffix == ".py":
        return Extract(job.key, *from_source(text, job.key, job.with_code))
    if job.path.name == "METADATA":
        text = text.partition("\n\n")[2]
    return Extract(job.key, capped(documents_of([clean_markup(text)])), [])


# ---- choosing ------------------------------------------------------------------------------------


def is_new(text: str, seen: set[bytes]) -> bool:
    """Whether at least half of the text lies in paragraphs not seen before; if so they are seen
    from now on.
    """
    paragraphs = [" ".join(paragraph.split()).lower() for paragraph in text.split("\n\n")]
    keys = {_digest(paragraph): len(paragraph) for paragraph in paragraphs if len(paragraph) >= 30}
    if (
        2 * sum(length for key, length in keys.items() if key in seen) > sum(keys.values())
        or not keys
    ):
        return False
    seen.update(keys)
    return True


def split_by_key(documents: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """(training, validation) texts of (text, key) pairs in their order; texts of one key, i.e. of
    one file, stay together.
    """
    target = min(GROUP_DOCUMENTS, max(1, len(documents) // VALIDATION_SHARE))
    sizes: dict[str, int] = {}
    for _, key in documents:
        sizes[key] = sizes.get(key, 0) + 1
    held_out: set[str] = set()
    for key in sizes:  # in the order of a shuffled list, hence drawn at random
        if sizes[key] <= target:
            held_out.add(key)
            target -= sizes[key]
    return [text for text, key in documents if key not in held_out], [
        text for text, key in documents if key in held_out
    ]


def _shuffled(items: list[tuple[str, str]], purpose: str) -> list[tuple[str, str]]:
    items = list(items)
    random.Random(derive_seed("pydocs", purpose)).shuffle(items)
    return items


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
