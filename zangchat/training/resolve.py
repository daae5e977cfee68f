"""Resolve the settings of a run once: the checkpoint to begin from, and every flag left open."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zangchat import checkpoint_manager, schedule
from zangchat.config import GPTConfig, RunState, TrainPlan
from zangchat.errors import UserError
from zangchat.runtime import collectives
from zangchat.runtime.devices import resolve_dtype
from zangchat.runtime.logs import print0
from zangchat.tokenizer import RustBPETokenizer, get_tokenizer
from zangchat.training.batch_size import choose_batch
from zangchat.training.settings import DEFAULTS, TEXT, check_batch, fill, inherited, resumed
from zangchat.training.start import Origin, find_resumed, find_source, source_change

REPORTED = "reported"  # in the folder of a run: the step whose card is in the report

Design = Callable[[Any, int], tuple[GPTConfig, TrainPlan]]  # from (config, vocabulary size)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """How the runs of a stage differ before their loop (see Stage for the loop)."""

    stage: str  # base | mid | sft | rl
    source: str  # the stage whose model it starts from; empty: base models
    design: Design | None  # of a base model
    rows: int | None  # of a step; None: from the plan's tokens, and cut evenly
    defaults: Mapping[str, Any]  # of flags that are still open then


@dataclass(frozen=True)
class Resolved:
    """All settings of a run. Only `state` changes while it trains."""

    kind: Kind
    config: Any  # the command's dataclass; no flag that matters is open any more
    directory: Path  # of its checkpoints
    device: torch.device
    rank: int
    world_size: int
    state: RunState
    origin: Origin | None  # the checkpoint to load; None for a new base model
    is_resumed: bool
    tokenizer: RustBPETokenizer
    model_config: GPTConfig
    plan: TrainPlan  # batch and rates; later stages derive the length from their data


def resolve(kind: Kind, config: Any, directory: Path, device: torch.device) -> Resolved | None:
    """Settings in the order of precedence: flags, the resumed run, the model that it starts from,
    defaults. None, with a message, if the run is finished."""
    stage, state = kind.stage, RunState()
    origin = find_resumed(stage, config, directory)
    is_resumed = origin is not None
    if origin is not None:
        config = resumed(config, origin.meta["user_config"])
        state = RunState.from_dict(origin.meta["run_state"])
    dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    config = dataclasses.replace(config, model_tag=directory.name, dtype=dtype)
    if is_resumed:
        change = source_change(stage, config, kind.source, state)
        if is_finished(stage, config, directory, state, change):
            return None
        if change:
            logger.warning(f"{stage}: {directory.name} is resumed, but {change}")
    elif kind.source:
        origin = find_source(stage, config, kind.source)
        state.source, state.source_sha256 = origin.describe(kind.source), origin.sha256
        config = fill(config, inherited(config, origin.meta["user_config"]))
    keep_threads(stage, state, device)
    tokenizer = find_tokenizer(config, origin)
    if origin is None:
        assert kind.design is not None
        model_config, plan = kind.design(config, tokenizer.get_vocab_size())
    else:
        model_config = checkpoint_manager.model_config(origin.meta, origin.directory)
        context = {"max_seq_len": model_config.sequence_len}
        config = fill(config, context, DEFAULTS, kind.defaults)
        plan = continued_plan(kind, config, model_config, state, origin)
    config = resolve_batch(kind, config, model_config, plan, device)
    rank, world_size = collectives.world()
    return Resolved(
        kind=kind,
        config=config,
        directory=directory,
        device=device,
        rank=rank,
        world_size=world_size,
        state=state,
        origin=origin,
        is_resumed=is_resumed,
        tokenizer=tokenizer,
        model_config=model_config,
        plan=plan,
    )


def is_finished(stage: str, config: Any, directory: Path, state: RunState, change: str) -> bool:
    """Whether a resumed run has nothing left to do, its last evaluation and its card in the report
    included; prints so, with the `change` of its source if there is one."""
    planned = config.num_iterations if config.num_iterations > 0 else state.num_iterations
    # it may be missing: a process may be killed before it writes its card
    mark = directory / REPORTED
    is_reported = collectives.from_rank_0(
        mark.exists() and mark.read_text(encoding="utf-8") == str(state.step)
    )
    if state.step < planned or state.hooks_done != state.step or not is_reported:
        return False
    if change:
        print0(f"{stage}: {directory.name} is at step {state.step} of {planned}, but {change}")
    else:
        done = f"finished at step {state.step} of {planned}"
        print0(f"{stage}: {directory.name} is {done}; nothing to do")
    return True


def keep_threads(stage: str, state: RunState, device: torch.device) -> None:
    """Note the number of threads with which the run computes on a CPU; warn if it has changed."""
    if device.type != "cpu":
        return
    now = torch.get_num_threads()
    state.threads = state.threads or now
    if state.threads != now and collectives.world()[0] == 0:
        logger.warning(
            f"{stage}: the run began with {state.threads} threads on each rank and has {now} now, "
            "so the last bits of its results may differ from the uninterrupted run's: "
            f"OMP_NUM_THREADS={state.threads} keeps them",
        )


def find_tokenizer(config: Any, origin: Origin | None) -> RustBPETokenizer:
    """That of the origin; for a new base model the one of the base directory."""
    if origin is not None:
        return checkpoint_manager.load_tokenizer(origin.directory, origin.meta)
    texts = ((name, getattr(config, name)) for name in TEXT)
    return get_tokenizer(*(f"--{name}={value}" for name, value in texts if value))


def continued_plan(
    kind: Kind,
    config: Any,
    model_config: GPTConfig,
    state: RunState,
    origin: Origin,
) -> TrainPlan:
    """The plan of the resumed run, or the batch and rates of the model that a new run starts from.

    A resumed base model may get another length by --num_iterations; another --total_batch_size of a
    new run brings the rates of its own.
    """
    if state.plan is not None:
        steps = config.num_iterations
        if kind.design is None or steps < 1:
            return state.plan
        tokens = steps * state.plan.total_batch_size
        return state.plan._replace(num_iterations=steps, tokens=tokens)
    before = RunState.from_dict(origin.meta["run_state"]).plan
    plan = before or schedule.plan_run(model_config)
    # stages whose steps are counted in conversations have no total_batch_size
    batch = getattr(config, "total_batch_size", None)
    if not batch or batch == -1 or batch == plan.total_batch_size:
        return plan
    lr_scale, adamw_lr_scale = schedule.rate_scales(model_config, batch)
    return plan._replace(
        total_batch_size=batch,
        lr_scale=lr_scale,
        adamw_lr_scale=adamw_lr_scale,
    )


def resolve_batch(
    kind: Kind,
    config: Any,
    model_config: GPTConfig,
    plan: TrainPlan,
    device: torch.device,
) -> Any:
    """The configuration with the rows of a pass chosen. Raises UserError for
    rows that are longer than the model's context, or a batch that cannot be cut evenly."""
    length, context = config.max_seq_len, model_config.sequence_len
    if not 1 <= length <= context:
        problem = f"--max_seq_len={length} does not suit a model with a context of {context}"
        raise UserError(f"{problem}: give that or less")
    if kind.rows is not None:
        return choose_batch(kind.stage, config, model_config, device, kind.rows, even=False)
    world_size = collectives.world()[1]
    total, size = plan.total_batch_size, config.device_batch_size
    check_batch(total, length, size, world_size, config.resume)
    rows = total // length
    return choose_batch(kind.stage, config, model_config, device, rows, even=True)
