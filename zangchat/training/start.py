"""The start of a run: its tag and lock, the model it starts from, the step it is resumed at."""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import filelock

from zangchat import checkpoint_manager, configurator
from zangchat.config import RunState
from zangchat.dataset import folder_lock
from zangchat.errors import UserError
from zangchat.runtime import collectives
from zangchat.runtime.logs import DummyWandb, get_wandb, print0
from zangchat.training.flags import FinetuneConfig, RunConfig
from zangchat.training.metrics import last_step
from zangchat.training.settings import command

LOCK_WAIT = 2.0  # seconds that a process which was just killed may take to release its tag

logger = logging.getLogger(__name__)
F = TypeVar("F", bound=FinetuneConfig)


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run begins from: its own if it is resumed, else the earlier stage's."""

    directory: Path
    step: int
    meta: dict[str, Any]

    def describe(self, stage: str) -> str:
        return f"{stage} {self.directory.name} step {self.step}"

    @property
    def sha256(self) -> str:
        return self.meta["files"][checkpoint_manager.model_name(self.step)]["sha256"]

    @property
    def has_optimizer(self) -> bool:
        return any(name.startswith("optim_") for name in self.meta["files"])


# ---- tags ----------------------------------------------------------------------------------------


def choose_tags(config: F, source: str) -> F:
    """The configuration with the tags of a stage that starts from a model of stage `source`.

    The model to start from is --from_tag, else the one of the same tag, else the largest;
    --model_tag is the same tag unless given. --from_tag stays None if both are the same.
    """
    start = config.from_tag or config.model_tag
    if not start:
        folder = checkpoint_manager.checkpoints_dir(source)
        start = collectives.decided(lambda: checkpoint_manager.find_largest_model(folder))
    tag = config.model_tag or start
    from_tag = config.from_tag if config.from_tag != tag else None
    return dataclasses.replace(config, model_tag=tag, from_tag=from_tag)


def source_tag(config: Any) -> str:
    """The tag of the model that a configuration with chosen tags starts from."""
    return config.from_tag or config.model_tag


def refuse_existing(stage: str, config: RunConfig, directory: Path) -> None:
    """Raises UserError if a new run would overwrite checkpoints, or delete some of another
    format."""
    if config.overwrite:
        checkpoint_manager.refuse_other_formats(directory)
    if config.resume or config.overwrite or not any(directory.glob("meta_*.json")):
        return
    another = "choose another --model_tag"
    if stage != "base":
        another = (
            "keep it and give the new model another name: "
            f"--from_tag={source_tag(config)} --model_tag=NAME"
        )
    raise UserError(
        f"{directory} has checkpoints already: continue with "
        f"`{command(stage, config, resume='latest')}`, or put --overwrite=1 in place of "
        f"--resume=latest to start over, or {another}",
    )


# ---- the checkpoint to begin from ----------------------------------------------------------------


def find_resumed(stage: str, config: RunConfig, directory: Path) -> Origin | None:
    """The step that --resume means, with verified hashes; None for a new run. Raises UserError if
    it is damaged or does not exist."""
    if not config.resume:
        return None
    requested = None if config.resume == "latest" else int(config.resume)
    step = checkpoint_manager.find_verified_step(directory, requested)
    if step is not None:
        if requested is None:
            print0(f"{stage}: continuing from step {step} of {directory}")
        return Origin(directory, step, checkpoint_manager.read_meta(directory, step))
    if any(directory.glob("meta_*.json")):
        again = command(stage, config, resume="", overwrite=True)
        raise UserError(f"no checkpoint in {directory} is intact: start over with `{again}`")
    print0(f"{stage}: no checkpoint in {directory} yet, starting at step 0")
    return None


def find_source(stage: str, config: Any, source: str) -> Origin:
    """The model of stage `source` that a new run starts from. Raises UserError if there is none."""
    folder = checkpoint_manager.checkpoints_dir(source)
    flag, hint = "--from_tag", ""
    if not config.from_tag:
        flag, hint = "--model_tag", ", or name the model to start from with --from_tag"
    directory = checkpoint_manager.resolve_tag(folder, source_tag(config), flag, hint)
    step = config.model_step
    if step is None:
        step = collectives.decided(lambda: checkpoint_manager.find_last_step(directory))
    meta = checkpoint_manager.verify_checkpoint(directory, step)
    print0(f"{stage}: starting from step {step} of {directory}")
    return Origin(directory, step, meta)


def source_change(stage: str, config: Any, source: str, state: RunState) -> str:
    """How the model that a run started from has changed since, and the command that starts over
    from it; empty if it is the same or was deleted."""
    if not source or state.source is None:
        return ""
    directory = checkpoint_manager.checkpoints_dir(source) / source_tag(config)
    present = list(checkpoint_manager.steps(directory))
    step = config.model_step if config.model_step is not None else max(present, default=None)
    if step not in present:
        return ""
    now = Origin(directory, step, checkpoint_manager.read_meta(directory, step))
    if now.describe(source) != state.source:
        change = f"that model is at step {step} now"
    elif state.source_sha256 not in (None, now.sha256):
        change = "that model has been trained again"
    else:
        return ""
    again = command(stage, config, resume="", overwrite=True)
    return (
        f"it was started from {state.source}, and {change}: to start over from there, run `{again}`"
    )


# ---- the folder ----------------------------------------------------------------------------------


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Rank 0 holds the tag's lock inside the block: two processes that train one tag would delete
    each other's checkpoints. Raises UserError on all ranks if another process holds it."""
    lock, problem = folder_lock(directory), ""
    if collectives.world()[0] == 0:
        try:
            lock.acquire(timeout=LOCK_WAIT)
        except filelock.Timeout:
            advice = "wait for it or stop it, or choose another --model_tag"
            problem = f"another process is training {directory}: {advice}"
        except UserError as error:
            problem = str(error)
    if problem := collectives.from_rank_0(problem):
        raise UserError(problem)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def tracked(stage: str, config: RunConfig, state: RunState, directory: Path) -> Iterator[Any]:
    """Inside the block, the wandb run of --run, which a resumed run continues. Raises UserError on
    all ranks if it cannot start."""
    wandb, problem = DummyWandb(), ""
    settings, logged = configurator.to_dict(config), last_step(directory / "metrics.jsonl")
    try:
        wandb = get_wandb(config.run, settings, f"zangchat-{stage}", state.wandb, logged)
    except UserError as error:
        problem = str(error)
    if problem := collectives.from_rank_0(problem):
        raise UserError(problem)
    state.wandb = getattr(wandb, "id", None) or state.wandb
    try:
        yield wandb
    except BaseException:
        wandb.finish(exit_code=1)
        raise
    wandb.finish()


def warn_if_disk_is_small(directory: Path, size: int, keep_last: int) -> None:
    """Warn if the disk has no room for the last `keep_last` checkpoints of `size` bytes and the one
    that is being written."""
    home = next(folder for folder in (directory, *directory.parents) if folder.is_dir())
    present = sum(path.stat().st_size for path in directory.glob("*.pt"))
    count = max(keep_last, 1) + 1
    needed, free = count * size - present, shutil.disk_usage(home).free
    if needed > free:
        logger.warning(
            f"{home} has {free / 1e9:.1f} GB free, and {count} checkpoints of {size / 1e9:.2f} GB "
            f"take {needed / 1e9:.1f} GB more: make room, lower --keep_last, or set "
            "ZANGCHAT_BASE_DIR to another disk",
        )
