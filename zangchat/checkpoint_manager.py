"""Checkpoints on disk: save, find, verify, load.

    <base>/<stage>_checkpoints/<model_tag>/
        model_NNNNNN.pt           {parameter name: tensor}
        optim_NNNNNN_rank<r>.pt   {parameter name: {"shape", "slice", "tensors"}}: rank r's part of
                                  the optimizer's state; a loop of your own may save another form
        meta_NNNNNN.json          step val_bpb model_config user_config run_state files
                                  format_version
        metrics.jsonl  tokenizer.json  token_bytes.pt

A step exists if its meta does, which is written last (checkpoint_files.py). Files hold tensors and
plain containers, and are read with weights_only=True. A step in the format of another version of
this code is refused by name, and never deleted.
"""

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zangchat.checkpoint_files import (
    META,
    CheckpointError,
    Save,
    listing,
    meta_name,
    model_name,
    optim_name,
    other_formats,
    read_meta,
    read_tensors,
    refuse_other_formats,
    steps,
    strip_prefix,
    to_json,
    verify_checkpoint,
)
from zangchat.config import COMMANDS, SOURCES, GPTConfig
from zangchat.configurator import check_folder_name
from zangchat.errors import UserError
from zangchat.optim import is_shards, merge_shards
from zangchat.runtime import collectives
from zangchat.runtime.devices import resolve_dtype
from zangchat.runtime.files import atomic_write, file_sha256, get_base_dir
from zangchat.runtime.logs import log0

if TYPE_CHECKING:
    from zangchat.gpt import GPT, ForwardOptions
    from zangchat.tokenizer import RustBPETokenizer

STEP_FILE = re.compile(r"^(?:model|optim|meta)_(\d+)(?:_rank\d+)?\.(?:pt|json)$")

logger = logging.getLogger(__name__)


def checkpoints_dir(source: str) -> Path:
    """The folder of a stage's checkpoints; raises UserError for an unknown stage."""
    if source not in SOURCES:
        raise UserError(f"--source={source} is no stage: choose one of {', '.join(SOURCES)}")
    return Path(get_base_dir()) / SOURCES[source]


def tag_folder(source: str, model_tag: str, flag: str = "--model_tag") -> Path:
    """The folder of a stage's model, whether it exists or not; raises UserError, naming the flag,
    for a tag that cannot be a folder's name."""
    check_folder_name(flag, model_tag)
    return checkpoints_dir(source) / model_tag


# ---- save ----------------------------------------------------------------------------------------


def save_checkpoint(
    checkpoint_dir: str | Path,
    step: int,
    model_data: Mapping[str, torch.Tensor] | None,
    optimizer_data: Any,
    meta_data: Mapping[str, Any],
    rank: int = 0,
) -> None:
    """Write one step; every rank calls it. Only rank 0's `model_data` and `meta_data` are used.

    `optimizer_data` is each rank's own: the group's state_shards(), tensors in other plain
    containers, as [opt.state_dict() for opt in optimizers], or None.

    Raises OSError on every rank if any of them could not write (a full disk, say): then the step
    does not exist, and older ones are untouched.
    """
    Save(checkpoint_dir, step, model_data, optimizer_data, meta_data, rank).commit()


def update_meta(checkpoint_dir: str | Path, step: int, changes: Mapping[str, Any]) -> None:
    """Replace some entries of a step's meta, all or none of them; for rank 0 only. Raises
    OSError.
    """
    meta = {**read_meta(checkpoint_dir, step), **changes}
    atomic_write(Path(checkpoint_dir) / meta_name(step), to_json(meta))


def purge(checkpoint_dir: str | Path, keep_last: int, keep_every: int = -1) -> None:
    """Delete all steps but the newest `keep_last` and the multiples of `keep_every` (if positive),
    and files that belong to no step. At least one step stays. Files that cannot be deleted are
    reported."""
    present = list(steps(checkpoint_dir))
    if present:
        kept = set(present[: max(keep_last, 1)])
        kept |= {step for step in present if keep_every > 0 and step % keep_every == 0}
        _delete(checkpoint_dir, lambda step: step not in kept)


def discard_after(checkpoint_dir: str | Path, step: int) -> list[int]:
    """Delete the steps after `step` (-1: all of them), ascending; a run that continues from there
    makes them again. Returns them."""
    later = sorted(other for other in steps(checkpoint_dir) if other > step)
    _delete(checkpoint_dir, lambda other: other > step)
    return later


def remove_temporary_files(checkpoint_dir: str | Path) -> None:
    """Delete files that a killed save left half written."""
    for path in Path(checkpoint_dir).glob(".*.tmp"):
        _unlink(path)


def _delete(checkpoint_dir: str | Path, is_unwanted: Callable[[int], bool]) -> None:
    kept = other_formats(checkpoint_dir)
    files = ((path, STEP_FILE.match(path.name)) for path in listing(checkpoint_dir))
    found = [(path, int(match[1])) for path, match in files if match]
    paths = [path for path, step in found if step not in kept and is_unwanted(step)]
    # metas first, so that a step never exists in part
    for path in sorted(paths, key=lambda path: not META.match(path.name)):
        _unlink(path)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning(f"could not delete {path}: {error}")


# ---- find and verify -----------------------------------------------------------------------------


def find_last_step(checkpoint_dir: str | Path) -> int:
    """The newest whole step (by size); raises UserError if there is none, naming a damaged file, or
    if a later one has another format."""
    newest = next(steps(checkpoint_dir), -1)
    refuse_other_formats(checkpoint_dir, after=newest)
    if newest >= 0:
        return newest
    for step in steps(checkpoint_dir, check=""):
        try:
            verify_checkpoint(checkpoint_dir, step)
        except CheckpointError as error:
            advice = "copy it again, or take another --model_tag"
            raise CheckpointError(f"{error}; no step there is whole: {advice}") from None
    raise UserError(f"no checkpoint in {checkpoint_dir}: {_next_command(checkpoint_dir)}")


def find_verified_step(checkpoint_dir: str | Path, step: int | None = None) -> int | None:
    """The newest step that verifies, hashes included, reporting those it skips; None if there is
    none. All ranks get rank 0's answer.

    With `step`, only that one: raises CheckpointError if it does not verify. Raises FormatError for
    a later step of another format, which a run that continues from here would make again.
    """

    def find() -> int | None:
        found = step
        if step is None:
            found = next(steps(checkpoint_dir, check="hashes"), None)
        else:
            verify_checkpoint(checkpoint_dir, step, hashes=True)
        refuse_other_formats(checkpoint_dir, after=-1 if found is None else found)
        return found

    return collectives.decided(find)


def find_largest_model(checkpoints_dir: str | Path) -> str:
    """The default tag: the deepest `d<number>`, else the newest. Raises UserError if there is
    none.
    """
    tags = model_tags(checkpoints_dir)
    if not tags:
        raise UserError(f"no checkpoint in {checkpoints_dir}: {_next_command(checkpoints_dir)}")
    depths = [(int(match[1]), tag) for tag in tags if (match := re.fullmatch(r"d(\d+)", tag))]
    metas = {tag: (Path(checkpoints_dir) / tag).glob("meta_[0-9]*.json") for tag in tags}
    ages = [(max(path.stat().st_mtime for path in paths), tag) for tag, paths in metas.items()]
    chosen = max(depths or ages)[1]
    if len(tags) > 1:
        log0(f"model_tag {chosen}, out of {', '.join(tags)} (choose with --model_tag)")
    return chosen


def model_tags(checkpoints_dir: str | Path) -> list[str]:
    """Folders that hold at least one whole step, whatever its format."""
    folders = (path for path in listing(checkpoints_dir) if path.is_dir())
    return [path.name for path in folders if any(True for _ in steps(path)) or other_formats(path)]


def _next_command(folder: str | Path) -> str:
    """How to make the checkpoints that are missing in `folder` (a stage's or a tag's)."""
    for source, name in SOURCES.items():
        if name in (Path(folder).name, Path(folder).parent.name):
            return f"run `python -m {COMMANDS[source]}` first"
    return "train a model first"


# ---- load ----------------------------------------------------------------------------------------


def load_checkpoint(
    checkpoint_dir: str | Path,
    step: int,
    device: torch.device | str,
    load_optimizer: bool = False,
    rank: int = 0,
) -> tuple[dict[str, torch.Tensor], Any, dict[str, Any]]:
    """(model tensors on `device`, optimizer state or None, meta); checks sizes, not hashes.

    The optimizer state is merged over the ranks that saved it, and on the CPU: each rank cuts its
    own part out of it, whatever their number (see optim.py). State of another form, such as torch's
    state dicts, is returned as `rank` saved it.
    """
    meta = verify_checkpoint(checkpoint_dir, step)
    model_data = strip_prefix(read_tensors(Path(checkpoint_dir) / model_name(step), device))
    if not load_optimizer:
        return model_data, None, meta
    optimizer_data = _load_optimizer(Path(checkpoint_dir), step, list(meta["files"]), rank)
    return model_data, optimizer_data, meta


def _load_optimizer(directory: Path, step: int, files: list[str], rank: int) -> Any:
    names = [name for name in files if name.startswith("optim_")]
    names.sort(key=lambda name: int(name.removesuffix(".pt").rpartition("rank")[2]))
    if not names:
        limit = "the model can be used, but its training cannot be resumed"
        raise CheckpointError(f"step {step} in {directory} holds no optimizer state: {limit}")
    shards = [read_tensors(directory / name, "cpu") for name in names]
    if not all(map(is_shards, shards)):
        own = optim_name(step, rank)
        if own not in names:
            saved_by = f"{len(names)} ranks, each for itself"
            problem = f"the optimizer state of step {step} was saved by {saved_by}"
            raise CheckpointError(f"{directory / own} is missing: {problem}")
        return shards[names.index(own)]
    try:
        return merge_shards(shards)
    except (ValueError, KeyError) as error:
        problem = f"the optimizer files of step {step} do not make one state"
        raise CheckpointError(f"{directory}: {problem}: {error}") from None


def build_model(
    checkpoint_dir: str | Path,
    step: int,
    device: torch.device | str,
    phase: str,
    dtype: str = "",
) -> tuple["GPT", "RustBPETokenizer", dict[str, Any]]:
    """(model, tokenizer, meta) of a step; `phase` is "train" or "eval", `dtype` the compute dtype
    (empty: the one that is fast on the device)."""
    if phase not in ("train", "eval"):
        raise ValueError(f"phase is 'train' or 'eval', not {phase!r}")
    model_data, _, meta = load_checkpoint(checkpoint_dir, step, device)
    model = empty_model(model_config(meta, checkpoint_dir), device, dtype)
    load_weights(model, model_data, f"{checkpoint_dir}/{model_name(step)}")
    if phase == "eval":
        model.set_compute_dtype(model.compute_dtype, keep_masters=False)
    model.train(phase == "train")
    return model, load_tokenizer(checkpoint_dir, meta), meta


def empty_model(
    config: GPTConfig,
    device: torch.device | str,
    dtype: str = "",
    options: "ForwardOptions | None" = None,
) -> "GPT":
    """A model on `device`, to be filled by `init_weights` or `load_weights`.

    It is not made on the meta device: GPT only reserves memory anyway, and operations on meta
    tensors import torch's compiler, which takes seconds.
    """
    from zangchat.gpt import GPT

    with torch.device(device):
        return GPT(config, resolve_dtype(dtype, torch.device(device)), options)


def model_config(meta: Mapping[str, Any], checkpoint_dir: str | Path) -> GPTConfig:
    """Raises CheckpointError for an architecture that this code does not know."""
    try:
        return GPTConfig.from_dict(meta["model_config"])
    except (KeyError, TypeError, ValueError) as error:
        path = f"{checkpoint_dir}/{meta_name(meta['step'])}"
        raise CheckpointError(f"{path} describes no model that this code knows: {error}") from None


def load_weights(model: torch.nn.Module, model_data: Mapping[str, torch.Tensor], name: str) -> None:
    """Fill the model; raises CheckpointError with the file's `name` if names or shapes differ."""
    try:
        model.load_state_dict(dict(model_data), strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{name} does not fit the model that its meta describes: {error}"
        ) from None


def load_tokenizer(checkpoint_dir: str | Path, meta: Mapping[str, Any]) -> "RustBPETokenizer":
    """The tokenizer in the checkpoint's folder; raises CheckpointError if it is not the model's."""
    from zangchat.tokenizer import RustBPETokenizer

    path, step = Path(checkpoint_dir) / "tokenizer.json", meta["step"]
    advice = "copy there the tokenizer that this model was trained with"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {advice}")
    tokenizer = RustBPETokenizer.from_directory(str(checkpoint_dir))
    size, rows = tokenizer.get_vocab_size(), meta["model_config"]["vocab_size"]
    if size > rows:
        problem = f"has {size} tokens, the model of step {step} only {rows}"
        raise CheckpointError(f"{path} {problem}: {advice}")
    if meta.get("tokenizer") not in (None, file_sha256(path)):
        problem = f"is not the one that step {step} was trained with (its sha256 differs)"
        raise CheckpointError(f"{path} {problem}: {advice}")
    return tokenizer


def load_model_from_dir(
    checkpoints_dir: str | Path,
    device: torch.device | str,
    phase: str,
    model_tag: str | None = None,
    step: int | None = None,
    dtype: str = "",
) -> tuple["GPT", "RustBPETokenizer", dict[str, Any]]:
    """build_model on `model_tag` (default: find_largest_model) and `step` (default:
    find_last_step); rank 0 chooses for all.
    """

    def choose() -> tuple[Path, int]:
        directory = resolve_tag(checkpoints_dir, model_tag)
        return directory, find_last_step(directory) if step is None else step

    directory, step = collectives.decided(choose)
    log0(f"loading {directory.parent.name}/{directory.name}, step {step}")
    return build_model(directory, step, device, phase, dtype)


def resolve_tag(
    checkpoints_dir: str | Path,
    model_tag: str | None,
    flag: str = "--model_tag",
    hint: str = "",
) -> Path:
    """The folder of a tag; raises UserError with the flag, the tags present and `hint` if it is
    missing.
    """
    tag = model_tag or find_largest_model(checkpoints_dir)
    directory = Path(checkpoints_dir) / tag
    if not directory.is_dir():
        tags = model_tags(checkpoints_dir)
        if not tags:
            raise UserError(f"no checkpoint in {checkpoints_dir}: {_next_command(checkpoints_dir)}")
        advice = f"choose one of {', '.join(tags)}{hint}"
        raise UserError(f"{flag}={tag} is not in {checkpoints_dir}: {advice}")
    return directory


def load_model(
    source: str,
    device: torch.device | str,
    phase: str,
    model_tag: str | None = None,
    step: int | None = None,
    dtype: str = "",
) -> tuple["GPT", "RustBPETokenizer", dict[str, Any]]:
    """(model, tokenizer, meta) of a stage: base, mid, sft or rl. A `model_tag` that does not exist
    but is the name of a stage is taken as the source."""
    if model_tag in SOURCES and not (checkpoints_dir(source) / model_tag).is_dir():
        log0(
            f"--model_tag={model_tag} names a stage: loading --source={model_tag}", logging.WARNING
        )
        source, model_tag = model_tag, None
    return load_model_from_dir(checkpoints_dir(source), device, phase, model_tag, step, dtype)
