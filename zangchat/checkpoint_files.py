"""The files of one step of a checkpoint: their names, tensors in and out, the save that makes the
step exist, and whether it is whole.

Every file is written under a temporary name, synced and renamed. Rank 0 writes the meta, with the
size and the sha256 of each file, when all ranks are done. A save that is killed leaves the previous
step as it was.
"""

import contextlib
import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, Literal, cast

import torch

from zangchat.errors import UserError
from zangchat.runtime import collectives
from zangchat.runtime.files import atomic_file, atomic_write, file_sha256
from zangchat.runtime.logs import log0

FORMAT_VERSION = 1
META = re.compile(r"^meta_(\d+)\.json$")


class CheckpointError(UserError):
    """A checkpoint file is missing, damaged or not one of ours; the message names it."""


class FormatError(CheckpointError):
    """Another version of this code wrote the step: it is whole, and must not be deleted."""


def model_name(step: int) -> str:
    return f"model_{step:06d}.pt"


def optim_name(step: int, rank: int) -> str:
    return f"optim_{step:06d}_rank{rank}.pt"


def meta_name(step: int) -> str:
    return f"meta_{step:06d}.json"


class Save:
    """One step on its way to the disk: a thread writes this rank's files, then `commit` makes the
    step exist.

    The constructor and `commit` wait for the other ranks, so every rank calls both, in the same
    order and on its main thread; the writing thread talks to no other rank. With `snapshot` the
    tensors are copied first, so that training may continue while they are written. Until `commit`
    returns, the step does not exist, and `meta_data` may still be changed.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        step: int,
        model_data: Mapping[str, torch.Tensor] | None,
        optimizer_data: Any,
        meta_data: Mapping[str, Any],
        rank: int = 0,
        snapshot: bool = False,
    ) -> None:
        self.directory, self.step, self.rank = Path(checkpoint_dir), step, rank
        self.meta_data = meta_data
        self._files: dict[str, tuple[int, str]] = {}  # written so far: (size, sha256)
        self._failure: BaseException | None = RuntimeError(
            f"the writer of step {step} ended before it began",
        )
        parts: dict[str, Any] = {}
        obstacle: OSError | None = None
        if rank == 0:
            assert model_data is not None
            try:  # a step that is saved again must not be half old, half new
                (self.directory / meta_name(step)).unlink(missing_ok=True)
            except OSError as error:
                obstacle = error
            parts[model_name(step)] = _on_cpu(strip_prefix(model_data), copy=snapshot)
        if optimizer_data is not None:
            parts[optim_name(step, rank)] = _on_cpu(optimizer_data, copy=snapshot)
        # and no rank writes before the old meta is gone
        obstacle = collectives.from_rank_0(obstacle)
        arguments = (parts, obstacle)
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self._thread.name = "zangchat-save"
        self._thread.start()

    def _write(self, parts: dict[str, Any], obstacle: OSError | None) -> None:
        try:
            if obstacle is not None:
                raise obstacle
            # on every rank, since disks may be local to a node
            self.directory.mkdir(parents=True, exist_ok=True)
            for name, data in parts.items():
                self._files[name] = write_tensors(self.directory / name, data)
            self._failure = None
        except BaseException as error:  # raised by commit
            self._failure = error
        finally:
            parts.clear()  # frees the copies

    @property
    def is_writing(self) -> bool:
        return self._thread.is_alive()

    def commit(self) -> None:
        """Wait for the threads of all ranks; then rank 0 writes the meta. Raises OSError on every
        rank if any of them could not write."""
        self._thread.join()
        if self._failure is not None and not isinstance(self._failure, OSError):
            raise self._failure
        failure: BaseException | None = self._failure
        files: dict[str, tuple[int, str]] = {}
        outcomes = collectives.gather((self._failure, self._files))
        for rank, (problem, written) in enumerate(outcomes):
            if problem is not None:
                failure = failure or OSError(f"rank {rank} could not write its part: {problem}")
            files |= written
        if failure is None and self.rank == 0:
            try:
                self._write_meta(files)
            except OSError as error:
                failure = error
        failure = collectives.from_rank_0(failure)
        if failure is not None:
            for name in (model_name(self.step), optim_name(self.step, self.rank)):
                # best effort, to free space; `purge` tries again
                with contextlib.suppress(OSError):
                    (self.directory / name).unlink(missing_ok=True)
            raise failure

    def _write_meta(self, files: Mapping[str, tuple[int, str]]) -> None:
        meta = {
            **self.meta_data,
            "step": self.step,
            "files": {
                name: {"size": size, "sha256": digest}
                for name, (size, digest) in sorted(files.items())
            },
            "format_version": FORMAT_VERSION,
        }
        atomic_write(self.directory / meta_name(self.step), to_json(meta))


def strip_prefix(model_data: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as in the plain model; a compiled one puts `_orig_mod.` before each."""
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in model_data.items()}


class _HashingWriter:
    """A file for torch.save that counts and hashes the bytes."""

    def __init__(self, file: IO[bytes]):
        self.file, self.hash, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:  # torch replaces it by a RuntimeError
            self.error = error
            raise
        self.hash.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def write_tensors(path: Path, data: Mapping[str, Any]) -> tuple[int, str]:
    """Returns (size, sha256) of the file. After an OSError, `path` is as it was before."""
    with atomic_file(path) as file:
        sink = _HashingWriter(file)
        try:
            torch.save(data, cast(IO[bytes], sink))
        except RuntimeError:
            if sink.error is not None:
                raise sink.error from None
            raise
    return sink.size, sink.hash.hexdigest()


def _on_cpu(value: Any, copy: bool = False) -> Any:
    """Tensors detached and on the CPU (`copy`: in memory of their own). A view gets its own
    storage, since torch.save would write all of the one it shares."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        is_view = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        shares = copy and tensor.data_ptr() == value.data_ptr()
        return tensor.clone() if is_view or shares else tensor
    if isinstance(value, Mapping):
        return {key: _on_cpu(item, copy) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item, copy) for item in value)
    return value


def read_tensors(path: Path, device: torch.device | str) -> dict[str, Any]:
    """Tensors and plain containers; raises CheckpointError for a file that holds anything else or
    cannot be read."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except UnpicklingError:
        problem = "it holds more than tensors and plain containers, or is damaged"
        raise CheckpointError(f"{path} cannot be read: {problem}") from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def to_json(meta: Mapping[str, Any]) -> str:
    return json.dumps(meta, indent=1, allow_nan=False) + "\n"


# ---- is it whole? --------------------------------------------------------------------------------


def listing(folder: str | Path) -> list[Path]:
    """The content of a folder, sorted; nothing if there is no such folder."""
    return sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []


def read_meta(checkpoint_dir: str | Path, step: int) -> dict[str, Any]:
    """Raises CheckpointError, naming the file, if the step does not exist or its meta is damaged;
    FormatError if it is of another format."""
    path = Path(checkpoint_dir) / meta_name(step)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        present = ", ".join(map(str, sorted(steps(checkpoint_dir)))) or "none"
        raise CheckpointError(
            f"there is no step {step} in {checkpoint_dir} (present: {present})"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if version not in (None, FORMAT_VERSION):
        problem = f"has format version {version}, this code reads version {FORMAT_VERSION}"
        remedy = f"update zangchat, or move the files of step {step} to another folder"
        raise FormatError(f"{path} {problem}: {remedy}")
    files = meta.get("files") if version is not None else None
    if not isinstance(files, dict) or meta.get("step") != step:
        raise CheckpointError(f"{path} is damaged: it does not describe step {step}")
    return meta


def verify_checkpoint(
    checkpoint_dir: str | Path, step: int, hashes: bool = False
) -> dict[str, Any]:
    """The meta of a step whose files are all there in the right sizes (`hashes`: and unaltered);
    raises CheckpointError naming the file."""
    meta = read_meta(checkpoint_dir, step)
    for name, expected in meta["files"].items():
        path = Path(checkpoint_dir) / name
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                problem = f"{size} bytes instead of {expected['size']}"
                raise CheckpointError(f"{path} is damaged: {problem}")
            if hashes and file_sha256(path) != expected["sha256"]:
                problem = f"its sha256 is not the one in {meta_name(step)}"
                raise CheckpointError(f"{path} is damaged: {problem}")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except OSError as error:  # such as EIO
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return meta


def steps(
    checkpoint_dir: str | Path, check: Literal["", "sizes", "hashes"] = "sizes"
) -> Iterator[int]:
    """The steps of a folder, newest first: those with files of the right sizes, with the right
    hashes (reporting damaged ones), or, with an empty `check`, all that have a meta, whole or
    not."""
    found = (META.match(path.name) for path in listing(checkpoint_dir))
    for step in sorted((int(match[1]) for match in found if match), reverse=True):
        try:
            if check:
                verify_checkpoint(checkpoint_dir, step, hashes=check == "hashes")
        except CheckpointError as error:
            if check == "hashes":
                log0(f"skipping step {step}: {error}", logging.WARNING)
            continue
        yield step


def other_formats(checkpoint_dir: str | Path) -> dict[int, FormatError]:
    """The steps that another version of this code wrote, newest first, each with its refusal."""
    found = {}
    for step in steps(checkpoint_dir, check=""):
        try:
            read_meta(checkpoint_dir, step)
        except FormatError as error:
            found[step] = error
        except CheckpointError:
            pass  # damaged, whatever its format
    return found


def refuse_other_formats(checkpoint_dir: str | Path, after: int = -1) -> None:
    """Raises FormatError for the newest step of another format, if it is newer than `after`."""
    for step, refusal in other_formats(checkpoint_dir).items():
        if step > after:
            raise refusal
