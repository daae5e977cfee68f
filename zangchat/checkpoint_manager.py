"""Checkpoints on disk: save, find, verify, load.

    <base>/<stage>_checkpoints/<model_tag>/
        model_NNNNNN.pt           {parameter name: tensor}
        optim_NNNNNN_rank<r>.pt   {parameter name: {"shape", "slice", "tensors"}}: what rank r keeps
                                  of the optimizer's state; a loop of your own may save another form
        meta_NNNNNN.json          step val_bpb model_config user_config run_state files format_version; written last
        metrics.jsonl  tokenizer.json  token_bytes.pt

A step exists if its meta does: every file is written beside its name, synced and renamed, and rank 0 writes the meta, with the size and the
sha256 of each file, when all ranks are done. Whatever kills a save leaves the previous step as it was.

Files hold tensors and plain containers, and are read with weights_only=True.
"""

import contextlib
import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, TYPE_CHECKING, Any, cast

import torch

from zangchat.config import SOURCES, GPTConfig
from zangchat.errors import UserError
from zangchat.optim import is_shards, merge_shards
from zangchat.runtime import collectives
from zangchat.runtime.devices import resolve_dtype
from zangchat.runtime.files import atomic_file, atomic_write, file_sha256, get_base_dir
from zangchat.runtime.logs import log0

if TYPE_CHECKING:
    from zangchat.gpt import GPT
    from zangchat.tokenizer import RustBPETokenizer

FORMAT_VERSION = 1
COMMANDS = {"base": "scripts.base_train", "mid": "scripts.mid_train", "sft": "scripts.chat_sft", "rl": "scripts.chat_rl"}
META = re.compile(r"^meta_(\d+)\.json$")
STEP_FILE = re.compile(r"^(?:model|optim|meta)_(\d+)(?:_rank\d+)?\.(?:pt|json)$")

logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint file that is missing, damaged or from another world; the message names it."""


def checkpoints_dir(source: str) -> Path:
    """The folder of a stage's checkpoints; raises UserError for an unknown stage."""
    if source not in SOURCES:
        raise UserError(f"--source={source} is no stage: choose one of {', '.join(SOURCES)}")
    return Path(get_base_dir()) / SOURCES[source]


def tag_folder(source: str, model_tag: str, flag: str = "--model_tag") -> Path:
    """The folder of a stage's model, which need not be there; raises UserError, naming the flag, for a tag that cannot name one."""
    if not re.fullmatch(r"[\w.+-]+", model_tag) or model_tag in (".", ".."):
        raise UserError(f"{flag}={model_tag!r} cannot name a folder: use letters, digits and . _ + -")
    return checkpoints_dir(source) / model_tag


def model_name(step: int) -> str:
    return f"model_{step:06d}.pt"


def optim_name(step: int, rank: int) -> str:
    return f"optim_{step:06d}_rank{rank}.pt"


def meta_name(step: int) -> str:
    return f"meta_{step:06d}.json"


# ---- save -----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    checkpoint_dir: str | Path,
    step: int,
    model_data: Mapping[str, torch.Tensor] | None,
    optimizer_data: Any,
    meta_data: Mapping[str, Any],
    rank: int = 0,
) -> None:
    """Write one step; every rank calls it. `model_data` and `meta_data` count on rank 0.

    `optimizer_data` is each rank's own: the group's state_shards(), tensors in other plain containers,
    as [opt.state_dict() for opt in optimizers], or None.

    Raises OSError on every rank if any of them could not write (a full disk, say): then the step does not exist; older ones are untouched.
    """
    Save(checkpoint_dir, step, model_data, optimizer_data, meta_data, rank).commit()


class Save:
    """One step on its way to the disk: a thread writes this rank's files, and `commit` makes the step exist.

    Making one and committing it wait for the other ranks, so every rank does both, in the same order and on its main thread; the writer
    talks to no other rank. With `snapshot` the tensors are copied first, so that training may go on while they are written.
    Until `commit` returns, the step does not exist, and `meta_data` may still be changed.
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
        self.directory, self.step, self.rank, self.meta_data = Path(checkpoint_dir), step, rank, meta_data
        self._files: dict[str, tuple[int, str]] = {}  # written so far: (size, sha256)
        self._failure: BaseException | None = RuntimeError(f"the writer of step {step} ended before it began")
        parts: dict[str, Any] = {}
        obstacle: OSError | None = None
        if rank == 0:
            assert model_data is not None
            try:
                (self.directory / meta_name(step)).unlink(missing_ok=True)  # a step that is saved again must not be half old, half new
            except OSError as error:
                obstacle = error
            parts[model_name(step)] = _on_cpu(strip_prefix(model_data), copy=snapshot)
        if optimizer_data is not None:
            parts[optim_name(step, rank)] = _on_cpu(optimizer_data, copy=snapshot)
        obstacle = collectives.from_rank_0(obstacle)  # also: nobody writes before the old meta is gone
        self._writer = threading.Thread(target=self._write, args=(parts, obstacle), name="zangchat-save", daemon=True)
        self._writer.start()

    def _write(self, parts: dict[str, Any], obstacle: OSError | None) -> None:
        try:
            if obstacle is not None:
                raise obstacle
            self.directory.mkdir(parents=True, exist_ok=True)  # on every rank: disks may be local to a node
            for name, data in parts.items():
                self._files[name] = _write_tensors(self.directory / name, data)
            self._failure = None
        except BaseException as error:  # raised by commit
            self._failure = error
        finally:
            parts.clear()  # the copies are not needed any longer

    @property
    def writing(self) -> bool:
        return self._writer.is_alive()

    def commit(self) -> None:
        """Wait for the writers of all ranks, and let rank 0 write the meta. Raises OSError on every rank if any of them could not write."""
        self._writer.join()
        if self._failure is not None and not isinstance(self._failure, OSError):
            raise self._failure
        failure: BaseException | None = self._failure
        files: dict[str, tuple[int, str]] = {}
        for rank, (problem, written) in enumerate(collectives.gather((self._failure, self._files))):
            if problem is not None:
                failure = failure or OSError(f"rank {rank} could not write its part: {problem}")
            files |= written
        if failure is None and self.rank == 0:
            listed = {name: {"size": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
            meta = {**self.meta_data, "step": self.step, "files": listed, "format_version": FORMAT_VERSION}
            try:
                atomic_write(self.directory / meta_name(self.step), _json(meta))
            except OSError as error:
                failure = error
        failure = collectives.from_rank_0(failure)
        if failure is not None:
            for name in (model_name(self.step), optim_name(self.step, self.rank)):
                with contextlib.suppress(OSError):  # best effort: the space is wanted back, and purging looks again
                    (self.directory / name).unlink(missing_ok=True)
            raise failure


def strip_prefix(model_data: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as in the plain model: a compiled one says `_orig_mod.` before each."""
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in model_data.items()}


class _HashingWriter:
    """A file that torch.save can write to, which counts and hashes what passes."""

    def __init__(self, file: IO[bytes]):
        self.file, self.hash, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:  # torch replaces it by a RuntimeError of its own
            self.error = error
            raise
        self.hash.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _write_tensors(path: Path, data: Mapping[str, Any]) -> tuple[int, str]:
    """(size, sha256) of the file; OSError leaves whatever was at `path`."""
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
    """Tensors detached and on the CPU (`copy`: in memory of their own), without the rest of a storage they only look at (torch.save
    would write all of it)."""
    if isinstance(value, torch.Tensor):
        here = value.detach().cpu()
        part = here.untyped_storage().nbytes() != here.numel() * here.element_size()
        return here.clone() if part or (copy and here.data_ptr() == value.data_ptr()) else here
    if isinstance(value, Mapping):
        return {key: _on_cpu(item, copy) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item, copy) for item in value)
    return value


def update_meta(checkpoint_dir: str | Path, step: int, changes: Mapping[str, Any]) -> None:
    """Replace some entries of a step's meta, at once or not at all (rank 0 only): what was measured after the save. Raises OSError."""
    meta = {**read_meta(checkpoint_dir, step), **changes}
    atomic_write(Path(checkpoint_dir) / meta_name(step), _json(meta))


def _json(meta: Mapping[str, Any]) -> str:
    return json.dumps(meta, indent=1, allow_nan=False) + "\n"


def purge(checkpoint_dir: str | Path, keep_last: int, keep_every: int = -1) -> None:
    """Delete all but the newest `keep_last` steps and the multiples of `keep_every` (where that is positive), and what no step owns.

    The newest never goes. A file that stays put is only reported.
    """
    steps = valid_steps(checkpoint_dir)
    if steps:
        keep = {*steps[-max(keep_last, 1) :], *(step for step in steps if keep_every > 0 and step % keep_every == 0)}
        _delete(checkpoint_dir, lambda step: step not in keep)


def discard_after(checkpoint_dir: str | Path, step: int) -> list[int]:
    """Delete the steps that lie beyond `step` (-1: all of them): a run that goes on from there makes them anew. Returns which."""
    later = [later for later in valid_steps(checkpoint_dir) if later > step]
    _delete(checkpoint_dir, lambda other: other > step)
    return later


def remove_temporary_files(checkpoint_dir: str | Path) -> None:
    """Delete what a killed save left half written."""
    for path in Path(checkpoint_dir).glob(".*.tmp"):
        _unlink(path)


def _delete(checkpoint_dir: str | Path, unwanted: Callable[[int], bool]) -> None:
    paths = [path for path in _listing(checkpoint_dir) if (match := STEP_FILE.match(path.name)) and unwanted(int(match[1]))]
    for path in sorted(paths, key=lambda path: not META.match(path.name)):  # metas first: a step never exists in part
        _unlink(path)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning(f"could not delete {path}: {error}")


def _listing(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []


# ---- find and verify ------------------------------------------------------------------------------------------------


def read_meta(checkpoint_dir: str | Path, step: int) -> dict[str, Any]:
    """Raises CheckpointError, naming the file, if there is no such step or its meta cannot be understood."""
    path = Path(checkpoint_dir) / meta_name(step)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        present = ", ".join(map(str, valid_steps(checkpoint_dir))) or "none"
        raise CheckpointError(f"there is no step {step} in {checkpoint_dir} (present: {present})") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("files"), dict) or meta.get("step") != step:
        raise CheckpointError(f"{path} is damaged: it does not describe step {step}")
    if meta.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {meta.get('format_version')}, this code reads version {FORMAT_VERSION}")
    return meta


def verify_checkpoint(checkpoint_dir: str | Path, step: int, hashes: bool = False) -> dict[str, Any]:
    """The meta of a step whose files are all there in the right sizes (`hashes`: and unaltered); raises CheckpointError naming the file."""
    meta = read_meta(checkpoint_dir, step)
    for name, expected in meta["files"].items():
        path = Path(checkpoint_dir) / name
        try:
            size = path.stat().st_size
        except OSError:
            raise CheckpointError(f"{path} is missing") from None
        if size != expected["size"]:
            raise CheckpointError(f"{path} is damaged: {size} bytes instead of {expected['size']}")
        if hashes and file_sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its sha256 is not the one in {meta_name(step)}")
    return meta


def valid_steps(checkpoint_dir: str | Path) -> list[int]:
    """The steps whose meta can be read and whose files have the right sizes, ascending."""
    steps = []
    for step in _begun_steps(checkpoint_dir):
        with contextlib.suppress(CheckpointError):
            verify_checkpoint(checkpoint_dir, step)
            steps.append(step)
    return steps


def _begun_steps(checkpoint_dir: str | Path) -> list[int]:
    """The steps that have a meta, whole or not, ascending."""
    return sorted(int(match[1]) for path in _listing(checkpoint_dir) if (match := META.match(path.name)))


def find_last_step(checkpoint_dir: str | Path) -> int:
    """The newest step that is whole (by size); raises UserError if there is none, naming what is damaged."""
    steps = valid_steps(checkpoint_dir)
    if not steps:
        for step in reversed(_begun_steps(checkpoint_dir)):
            try:
                verify_checkpoint(checkpoint_dir, step)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; no step there is whole: copy it anew, or take another --model_tag") from None
        raise UserError(f"no checkpoint in {checkpoint_dir}: {_next_command(checkpoint_dir)}")
    return steps[-1]


def find_verified_step(checkpoint_dir: str | Path, step: int | None = None) -> int | None:
    """The newest step that verifies, hashes included, reporting those it skips; None if there is none. All ranks get rank 0's answer.

    With `step`, that one alone: raises CheckpointError if it does not verify.
    """
    if step is not None:
        verify_checkpoint(checkpoint_dir, step, hashes=True)
        return step
    found = -1
    if collectives.world()[0] == 0:
        for candidate in reversed(_begun_steps(checkpoint_dir)):
            try:
                verify_checkpoint(checkpoint_dir, candidate, hashes=True)
                found = candidate
                break
            except CheckpointError as error:
                log0(f"skipping step {candidate}: {error}", logging.WARNING)
    found = collectives.from_rank_0(found)
    return found if found >= 0 else None


def find_largest_model(checkpoints_dir: str | Path) -> str:
    """The tag to take where the user names none: the deepest `d<number>`, else the newest with a checkpoint. Raises UserError if none."""
    tags = model_tags(checkpoints_dir)
    if not tags:
        raise UserError(f"no checkpoint in {checkpoints_dir}: {_next_command(checkpoints_dir)}")
    depths = [(int(match[1]), tag) for tag in tags if (match := re.fullmatch(r"d(\d+)", tag))]
    chosen = max(depths)[1] if depths else max(tags, key=lambda tag: (_newest_meta(Path(checkpoints_dir) / tag), tag))
    if len(tags) > 1:
        log0(f"model_tag {chosen}, out of {', '.join(tags)} (choose with --model_tag)")
    return chosen


def model_tags(checkpoints_dir: str | Path) -> list[str]:
    """Folders that hold at least one whole step."""
    return [path.name for path in _listing(checkpoints_dir) if path.is_dir() and valid_steps(path)]


def _newest_meta(directory: Path) -> float:
    return max(path.stat().st_mtime for path in _listing(directory) if META.match(path.name))


def _next_command(folder: str | Path) -> str:
    """What makes the checkpoints that are missing in `folder` (a stage's folder or a tag's)."""
    for source, name in SOURCES.items():
        if name in (Path(folder).name, Path(folder).parent.name):
            return f"run `python -m {COMMANDS[source]}` first"
    return "train a model first"


# ---- load -----------------------------------------------------------------------------------------------------------


def load_checkpoint(
    checkpoint_dir: str | Path, step: int, device: torch.device | str, load_optimizer: bool = False, rank: int = 0
) -> tuple[dict[str, torch.Tensor], Any, dict[str, Any]]:
    """(model tensors on `device`, the optimizer's state merged over the ranks that saved it, meta); sizes are checked, hashes are not.

    The merged state is what one rank alone would have saved (see optim.py), on the CPU: each rank cuts
    its own part out of it, whatever their number. State of another form, such as torch's state dicts,
    comes back as `rank` saved it.
    """
    meta = verify_checkpoint(checkpoint_dir, step)
    model_data = strip_prefix(read_tensors(Path(checkpoint_dir) / model_name(step), device))
    if not load_optimizer:
        return model_data, None, meta
    names = sorted((name for name in meta["files"] if name.startswith("optim_")), key=lambda name: int(name[:-3].rpartition("rank")[2]))
    if not names:
        raise CheckpointError(f"step {step} in {checkpoint_dir} holds no optimizer state: it can be used, but not gone on from")
    shards = [read_tensors(Path(checkpoint_dir) / name, "cpu") for name in names]
    if not all(map(is_shards, shards)):
        own = optim_name(step, rank)
        if own not in names:
            saved_by = f"the optimizer state of step {step} was saved by {len(names)} ranks, each for itself"
            raise CheckpointError(f"{Path(checkpoint_dir) / own} is missing: {saved_by}")
        return model_data, shards[names.index(own)], meta
    try:
        return model_data, merge_shards(shards), meta
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint_dir}: the optimizer files of step {step} do not make one state: {error}") from None


def read_tensors(path: Path, device: torch.device | str) -> dict[str, Any]:
    """Tensors and plain containers; raises CheckpointError for a file that holds anything else, or cannot be read."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except UnpicklingError:
        raise CheckpointError(f"{path} cannot be read: it holds more than tensors and plain containers, or is damaged") from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def build_model(
    checkpoint_dir: str | Path, step: int, device: torch.device | str, phase: str, dtype: str = ""
) -> tuple["GPT", "RustBPETokenizer", dict[str, Any]]:
    """(model, tokenizer, meta) of a step; `phase` is "train" or "eval", `dtype` the compute dtype (empty: what the device is fast with)."""
    if phase not in ("train", "eval"):
        raise ValueError(f"phase is 'train' or 'eval', not {phase!r}")
    model_data, _, meta = load_checkpoint(checkpoint_dir, step, device)
    model = empty_model(model_config(meta, checkpoint_dir), device, dtype)
    load_weights(model, model_data, f"{checkpoint_dir}/{model_name(step)}")
    if phase == "eval":
        model.set_compute_dtype(model.compute_dtype, keep_masters=False)
    model.train(phase == "train")
    return model, load_tokenizer(checkpoint_dir, meta), meta


def empty_model(config: GPTConfig, device: torch.device | str, dtype: str = "") -> "GPT":
    """A model on `device` whose weights `init_weights` or `load_weights` fills.

    Not by way of the meta device: GPT only reserves memory anyway, and what is done to meta tensors imports torch's compiler, which
    costs seconds of every launch.
    """
    from zangchat.gpt import GPT

    with torch.device(device):
        return GPT(config, resolve_dtype(dtype, torch.device(device)))


def model_config(meta: Mapping[str, Any], checkpoint_dir: str | Path) -> GPTConfig:
    """Raises CheckpointError for an architecture that this code does not know."""
    try:
        return GPTConfig.from_dict(meta["model_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint_dir}/{meta_name(meta['step'])} describes no model that this code knows: {error}") from None


def load_weights(model: torch.nn.Module, model_data: Mapping[str, torch.Tensor], where: str) -> None:
    """Copy the tensors into the model; raises CheckpointError naming what is missing or foreign."""
    try:
        model.load_state_dict(dict(model_data), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{where} does not fit the model that its meta describes: {error}") from None


def load_tokenizer(checkpoint_dir: str | Path, meta: Mapping[str, Any]) -> "RustBPETokenizer":
    """The tokenizer that the model was trained with: the copy beside its checkpoint. Raises CheckpointError for another one."""
    from zangchat.tokenizer import RustBPETokenizer

    path = Path(checkpoint_dir) / "tokenizer.json"
    advice = "copy there the tokenizer that this model was trained with"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {advice}")
    tokenizer = RustBPETokenizer.from_directory(str(checkpoint_dir))
    size, rows = tokenizer.get_vocab_size(), meta["model_config"]["vocab_size"]
    if size > rows:
        raise CheckpointError(f"{path} has {size} tokens, the model of step {meta['step']} only {rows}: {advice}")
    if meta.get("tokenizer", digest := file_sha256(path)) != digest:
        raise CheckpointError(f"{path} is not the one that step {meta['step']} was trained with (its sha256 differs): {advice}")
    return tokenizer


def load_model_from_dir(
    checkpoints_dir: str | Path,
    device: torch.device | str,
    phase: str,
    model_tag: str | None = None,
    step: int | None = None,
    dtype: str = "",
) -> tuple["GPT", "RustBPETokenizer", dict[str, Any]]:
    """build_model on `model_tag` (default: find_largest_model) and `step` (default: the newest that is whole)."""
    directory = resolve_tag(checkpoints_dir, model_tag)
    step = find_last_step(directory) if step is None else step
    log0(f"loading {directory.parent.name}/{directory.name}, step {step}")
    return build_model(directory, step, device, phase, dtype)


def resolve_tag(checkpoints_dir: str | Path, model_tag: str | None, flag: str = "--model_tag", hint: str = "") -> Path:
    """The folder of a tag; if it is not there, raises UserError that names the flag, lists those present and ends with `hint`."""
    tag = model_tag or find_largest_model(checkpoints_dir)
    directory = Path(checkpoints_dir) / tag
    if not directory.is_dir():
        tags = model_tags(checkpoints_dir)
        if not tags:
            raise UserError(f"no checkpoint in {checkpoints_dir}: {_next_command(checkpoints_dir)}")
        raise UserError(f"{flag}={tag} is not in {checkpoints_dir}: choose one of {', '.join(tags)}{hint}")
    return directory


def load_model(
    source: str, device: torch.device | str, phase: str, model_tag: str | None = None, step: int | None = None, dtype: str = ""
) -> tuple["GPT", "RustBPETokenizer", dict[str, Any]]:
    """(model, tokenizer, meta) of a stage: base, mid, sft or rl. A `model_tag` that is no tag but names a stage is taken as the source."""
    if model_tag in SOURCES and not (checkpoints_dir(source) / model_tag).is_dir():
        log0(f"--model_tag={model_tag} names a stage: loading --source={model_tag}", logging.WARNING)
        source, model_tag = model_tag, None
    return load_model_from_dir(checkpoints_dir(source), device, phase, model_tag, step, dtype)
