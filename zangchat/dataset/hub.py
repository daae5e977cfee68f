"""Downloads from the Hugging Face hub: pretraining shards and the tables of tasks.

All are checked against the hub's own sha256. The transfer itself (mirrors by HF_ENDPOINT, tokens,
Xet, resuming after a broken connection) is huggingface_hub's. Shards are planned at a pinned
revision and fetched in order, each into a folder of its own, compared with the manifest, and
renamed into place: a present shard is whole. Running the same command again fetches missing ones.
"""

import contextlib
import functools
import logging
import os
import queue
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import filelock
from huggingface_hub import HfApi, HfFileSystem, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, get_session

from zangchat.dataset.manifest import (
    FORMAT,
    HUB_REPOS,
    MANIFEST,
    Dataset,
    check_shard,
    datasets_dir,
    folder_lock,
    load_dataset,
    write_manifest,
)
from zangchat.errors import UserError, disk_error
from zangchat.runtime.downloads import Failure, is_refusal, retry_after, with_retries
from zangchat.runtime.files import file_lock, file_sha256, get_base_dir
from zangchat.runtime.logs import print0
from zangchat.runtime.progress import Progress

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)
T = TypeVar("T")

MB = 1_000_000
SHARD_NAME = re.compile(r"shard_\d{5}\.parquet")
INCOMING = ".incoming"
TRIES = 5
# seconds; the loader takes the lock for an instant to see whether a download is running
LOCK_WAIT = 10.0
RETRY_WAIT = 2.0  # seconds before the second try, doubled for each further one


def download(source: str, num_shards: int, *, num_workers: int = 4) -> Dataset:
    """Fetch `num_shards` training shards (-1 = all) and the validation shard, the repository's
    last. The end of a corpus that is one file is for validation.

    Present shards stay. Raises UserError, naming a shard that cannot be fetched intact.
    """
    folder = datasets_dir() / source
    with _exclusive(folder):
        dataset = _plan(source, folder, num_shards)
        _fetch(dataset, num_workers)
    return dataset


def fetch_missing(dataset: Dataset, suspects: Collection[str] = ()) -> None:
    """Fetch the shards of the manifest that the folder lacks, and those of `suspects` that are
    damaged.
    """
    with _exclusive(dataset.folder):
        for entry in dataset.manifest["shards"]:
            path = dataset.folder / entry["name"]
            # a download that has just ended may have brought it
            if entry["name"] in suspects and check_shard(path, entry):
                path.unlink(missing_ok=True)
        _fetch(dataset, num_workers=4)


def fetch_table(repo: str, config: str, split: str) -> "datasets.Dataset":
    """One split of a dataset, from the cache of the hub's client or from the hub. An empty `config`
    means the only one.

    Of several processes that want the same dataset the first fetches it. Raises what the clients
    raise, or the OSError of a full disk.
    """
    import datasets

    lock = get_base_dir() / "tasks" / f".{repo.replace('/', '--')}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)

    def attempt() -> "datasets.Dataset":
        builder = datasets.load_dataset_builder(repo, config or None)
        if not os.path.exists(builder.cache_dir):
            with file_lock(lock):
                if not os.path.exists(builder.cache_dir):
                    _fetch_table_files(builder)
                    builder.download_and_prepare()
        return builder.as_dataset(split=split)

    return _retried(repo, attempt)


def _fetch_table_files(builder: "datasets.DatasetBuilder") -> None:
    """Download the files of a dataset into the client's cache.

    Raises OSError for one whose hash is not the hub's, and deletes it.
    """
    api, files = HfApi(endpoint=endpoint()), HfFileSystem(endpoint=endpoint())
    for url in (url for urls in (builder.config.data_files or {}).values() for url in urls):
        place: Any = files.resolve_path(url)
        where: dict[str, Any] = {
            "repo_id": place.repo_id,
            "repo_type": "dataset",
            "revision": place.revision,
        }
        listed: Any = api.get_paths_info(paths=[place.path_in_repo], **where)[0]
        path = Path(api.hf_hub_download(filename=place.path_in_repo, **where))
        if listed.lfs is not None and file_sha256(path) != listed.lfs.sha256:
            path.resolve().unlink()
            path.unlink(missing_ok=True)  # the link to it
            raise OSError(
                f"the sha256 of {place.path_in_repo} is not the one that {endpoint()} lists"
            )


def endpoint() -> str:
    """The hub or its mirror, read when used and not when huggingface_hub was imported."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


@functools.lru_cache(maxsize=8)
def unreachable(url: str) -> str:
    """Why a hub does not answer within seconds, "" if it does; asked once per process. Its client,
    whose proxies and certificates count here too, would try for half a minute.
    """
    try:
        get_session().head(url, timeout=5.0)
    except Exception as error:
        return f"it cannot be reached ({_short(error)})"
    return ""


def _retried(label: str, attempt: Callable[[], T]) -> T:
    """attempt(), repeated after a temporary failure: a busy hub costs a wait, not the run.

    Raises the error of the last of TRIES, or the OSError of a full disk, which the clients wrap.
    """
    try:
        return with_retries(label, attempt, _judge, tries=TRIES, first_wait=RETRY_WAIT)
    except Exception as error:
        full = disk_error(error)
        if full is None:
            raise
    raise full


def _judge(error: Exception) -> Failure:
    """The client's errors differ between versions, but those for absent things are known to be
    final.
    """
    from datasets import config, exceptions

    response = _response(error)
    absent = (
        RepositoryNotFoundError,
        RevisionNotFoundError,
        EntryNotFoundError,
        exceptions.DatasetNotFoundError,
        ImportError,  # of a SOCKS proxy's package
        ValueError,
        UserError,
    )
    final = isinstance(error, absent) or (response is not None and is_refusal(response.status_code))
    if isinstance(error, LocalEntryNotFoundError):
        final = False  # the client raises it when it could not connect
    offline = constants.HF_HUB_OFFLINE or config.HF_HUB_OFFLINE
    final = final or offline or disk_error(error) is not None
    return Failure(
        _short(error), final, retry_after(response.headers) if response is not None else 0.0
    )


def _response(error: BaseException | None) -> Any:
    """The hub's response that caused an error, if there was one."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__ or error.__context__
    return getattr(error, "response", None)


def _exclusive(folder: Path) -> Any:
    try:
        return folder_lock(folder).acquire(timeout=LOCK_WAIT)
    except filelock.Timeout:
        raise UserError(
            f"another process is writing to {folder}: let it finish, then run this command again"
        ) from None


def _plan(source: str, folder: Path, num_shards: int) -> Dataset:
    """The manifest for so many shards: that on disk if it lists enough, else a longer one.

    Both are of the same revision.
    """
    planned = load_dataset(folder) if (folder / MANIFEST).exists() else None
    if planned is not None:
        wanted = planned.manifest["available"] if num_shards == -1 else num_shards
        if len(planned.shards("train")) >= wanted:
            return _shortened(planned, wanted)
    repo = HUB_REPOS[source]
    revision, files = _list_shards(repo, planned.manifest["revision"] if planned else None)
    *texts, last = files
    available = max(1, len(texts))
    if num_shards > available:
        raise UserError(
            f"-n {num_shards}: {repo} has {_count(available)}"
            + (" (and one for validation)" if texts else ", whose end is for validation")
        )
    chosen = texts[: available if num_shards == -1 else num_shards]
    shards = [{**file, "split": "train"} for file in chosen]
    shards.append({**last, "split": "validation" if texts else "both"})
    manifest = {
        "format": FORMAT,
        "name": source,
        "source": source,
        "repo": repo,
        "revision": revision,
        "available": available,
        "shards": shards,
    }
    write_manifest(folder, manifest)
    return Dataset(folder, manifest)


def _shortened(dataset: Dataset, wanted: int) -> Dataset:
    """Without the planned shards after the `wanted` ones and after the last that is there: those
    of a longer download that was interrupted.
    """
    trains = dataset.shards("train")
    present = [n for n, name in enumerate(trains, 1) if (dataset.folder / name).exists()]
    dropped = trains[max([wanted, *present]) :]
    if not dropped:
        return dataset
    shards = [entry for entry in dataset.manifest["shards"] if entry["name"] not in dropped]
    manifest = {**dataset.manifest, "shards": shards}
    write_manifest(dataset.folder, manifest)
    return Dataset(dataset.folder, manifest)


def _list_shards(repo: str, revision: str | None) -> tuple[str, list[dict[str, Any]]]:
    """(commit, its shards with size and sha256, in order of their names)."""
    api = HfApi(endpoint=endpoint())

    def attempt() -> tuple[str | None, list[Any]]:
        commit = revision or api.dataset_info(repo).sha
        return commit, list(api.list_repo_tree(repo, repo_type="dataset", revision=commit))

    try:
        if problem := unreachable(endpoint()):
            raise ConnectionError(problem)
        commit, tree = _retried(repo, attempt)
    except Exception as error:  # clients differ for no network, no repository, no permission
        raise UserError(
            f"{endpoint()} does not list {repo} ({_short(error)}): check the network or set "
            "HF_ENDPOINT to a mirror, "
            "or use `python -m zangchat.dataset --source=pydocs`, which needs neither"
        ) from error
    tables = [file for file in tree if file.path.endswith(".parquet")]
    found: list[Any] = sorted(
        (file for file in tables if SHARD_NAME.fullmatch(file.path)), key=lambda file: file.path
    )
    if not found and len(tables) == 1:
        found = tables
    elif len(found) < 2:
        found = []
    if commit is None or not found:
        raise UserError(
            f"{repo} at {endpoint()} holds neither several files shard_NNNNN.parquet nor a single "
            ".parquet file: is the mirror complete?"
        )
    for file in found:
        if getattr(file, "lfs", None) is None:
            raise UserError(
                f"{endpoint()} gives no sha256 for {file.path} of {repo}: choose another mirror by "
                "HF_ENDPOINT"
            )
    return commit, [
        {"name": file.path, "bytes": file.lfs.size, "sha256": file.lfs.sha256} for file in found
    ]


def _fetch(dataset: Dataset, num_workers: int) -> None:
    """Validation first, then the training shards in order, several at a time. Daemon threads:
    Ctrl-C leaves at once, whole shards stay.
    """
    # of a process that was killed; we hold the lock
    shutil.rmtree(dataset.folder / INCOMING, ignore_errors=True)
    entries = sorted(dataset.manifest["shards"], key=lambda entry: entry["split"] == "train")
    todo: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    missing = [entry for entry in entries if not _is_there(dataset.folder / entry["name"], entry)]
    for entry in missing:
        todo.put(entry)
    trains = dataset.shards("train")
    counts = _count(len(trains)) + (
        "" if trains == dataset.shards("validation") else " and the validation shard"
    )
    if not missing:
        print0(
            f"{dataset.name}: {counts} in {dataset.folder} already (fingerprint "
            f"{dataset.fingerprint}); "
            f"`python -m zangchat.dataset verify {dataset.flag}` checks them"
        )
        return
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                _fetch_shard(dataset, todo.get_nowait())
                done.put(None)
        except queue.Empty:
            return
        except BaseException as error:  # raised again by the main thread
            done.put(error)

    for _ in range(min(num_workers, len(missing))):
        threading.Thread(target=work, name="zangchat-download", daemon=True).start()
    try:
        _follow(dataset, missing, done)
    finally:
        stop.set()
    shutil.rmtree(dataset.folder / INCOMING, ignore_errors=True)
    print0(f"{dataset.name}: {counts} in {dataset.folder} (fingerprint {dataset.fingerprint})")


def _follow(
    dataset: Dataset, missing: list[dict[str, Any]], done: "queue.SimpleQueue[BaseException | None]"
) -> None:
    """Show progress until all of `missing` are done; raise the first failure."""
    total = sum(entry["bytes"] for entry in missing)
    with Progress(f"{dataset.name}, MB", max(1, total // MB)) as progress:
        finished = 0
        while finished < len(missing):
            try:
                error = done.get(timeout=0.5)
                if error is not None:
                    raise error
                finished += 1
            except queue.Empty:
                pass
            arrived = sum(
                entry["bytes"] for entry in missing if (dataset.folder / entry["name"]).exists()
            )
            progress.update(
                min(total, arrived + _size_below(dataset.folder / INCOMING)) // MB,
                f"{finished}/{len(missing)} shards",
            )


def _fetch_shard(dataset: Dataset, entry: dict[str, Any]) -> None:
    disable_progress_bars()  # one bar for all shards is shown instead
    manifest, name = dataset.manifest, entry["name"]

    def attempt() -> None:
        incoming = dataset.folder / INCOMING / uuid.uuid4().hex
        where: dict[str, Any] = {
            "repo_type": "dataset",
            "revision": manifest["revision"],
            "endpoint": endpoint(),
        }
        try:
            path = Path(hf_hub_download(manifest["repo"], name, local_dir=incoming, **where))
            if problem := check_shard(path, entry):
                raise OSError(problem)
            os.replace(path, dataset.folder / name)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    try:
        _retried(name, attempt)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(
            f"{name}: {endpoint()} no longer serves {manifest['repo']} at {manifest['revision']} "
            f"({_short(error)})"
        ) from error
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(
                f"{name} is not in {manifest['repo']} at {endpoint()}: is the mirror complete?"
            ) from error
        if disk_error(error):
            raise
        raise UserError(
            f"{name} could not be fetched intact from {endpoint()} in {TRIES} tries "
            f"({_short(error)}): run the same command again later, "
            "or with HF_ENDPOINT set to another mirror; shards that are there stay"
        ) from error


def _count(number: int) -> str:
    return f"{number} training shard{'' if number == 1 else 's'}"


def _is_there(path: Path, entry: dict[str, Any]) -> bool:
    if path.exists() and path.stat().st_size != entry["bytes"]:
        logger.warning("%s has the wrong size and is fetched again", path)
        path.unlink()
    return path.exists()


def _size_below(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                total += os.stat(os.path.join(path, name)).st_size
    return total


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
