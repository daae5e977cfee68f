"""Flags of a training run: which are inherited, which may change, which values are possible.

Nothing here imports torch, so that `--dry_run` answers at once.
"""

import dataclasses
import os
import shlex
from collections.abc import Mapping
from typing import Any, TypeVar

from zangchat import configurator
from zangchat.config import COMMANDS, check_device_type, check_dtype
from zangchat.errors import UserError
from zangchat.runtime.processes import get_dist_info, ranks_here
from zangchat.training.flags import BatchSize, RunConfig

C = TypeVar("C", bound=RunConfig)

# May differ between the attempts of one run: they change neither the data nor the maths of a step.
FREE_FLAGS = {
    *("run", "model_tag", "device_type", "num_iterations", "device_batch_size", "grad_checkpoint"),
    *(
        "compile",
        "fsdp",
        "deterministic",
        "dry_run",
        "save_every",
        "keep_last",
        "keep_every",
        "resume",
    ),
    *("overwrite", "eval_every", "eval_tokens", "eval_steps", "eval_examples", "eval_samples"),
    *("sample_every", "core_metric_every", "core_metric_max_per_task"),
}
# A later stage inherits these from the model it starts from, if the user leaves them open. It never
# inherits its mixture, its own files, its length or the step to start from. The pretraining text
# (TEXT) is one choice made by two flags.
INHERITED = (
    *("max_seq_len", "total_batch_size", "device_batch_size", "grad_clip"),
    *("optimizer", "embedding_lr", "unembedding_lr", "matrix_lr"),
)
TEXT = ("dataset", "data_path")
# For a model whose own training is unknown (an imported one); base_train states the same defaults.
DEFAULTS = {
    "device_batch_size": 32,
    "optimizer": "muon",
    "embedding_lr": 0.3,
    "unembedding_lr": 0.008,
    "matrix_lr": 0.02,
    "grad_clip": 1.0,
}
NOT_NEGATIVE = (
    *("embedding_lr", "unembedding_lr", "matrix_lr", "init_lr_frac", "final_lr_frac"),
    *("weight_decay", "grad_clip"),
)
SHARES = ("warmup_ratio", "warmdown_ratio")
# SIGUSR1, which asks a run to save and stop, would otherwise kill torchrun
FORWARDED = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def fill(config: C, *sources: Mapping[str, Any]) -> C:
    """The configuration with each open flag (None; "" if it is not free) from the first source that
    has a value for it."""
    values = {}
    for name, value in configurator.to_dict(config).items():
        if value is None or (value == "" and name not in FREE_FLAGS):
            found = (source[name] for source in sources if source.get(name) is not None)
            values[name] = next(found, value)
    return dataclasses.replace(config, **values)


def inherited(config: RunConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `settings`, those of the model that a later stage starts from, that it
    inherits.
    """
    text_is_open = all(getattr(config, name, None) is None for name in TEXT)
    names = (*INHERITED, *TEXT) if text_is_open else INHERITED
    return {name: settings[name] for name in names if name in settings}


def resumed(config: C, saved: Mapping[str, Any]) -> C:
    """The configuration of a resumed run: open flags as saved, free flags as given now.

    Raises UserError naming the other flags that differ.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    before = {**defaults, **saved}  # a flag that is newer than the checkpoint had its default
    config = fill(config, before)
    values = configurator.to_dict(config)
    changed = {
        name: value
        for name, value in values.items()
        if name not in FREE_FLAGS and value != before[name]
    }
    if not changed:
        return config
    was = {name: "not given" if before[name] is None else before[name] for name in changed}
    names = ", ".join(f"--{name}={value} (was {was[name]})" for name, value in changed.items())
    given = [f"--{name}={before[name]}" for name in changed if before[name] is not None]
    absent = [f"--{name}" for name in changed if before[name] is None]
    remedies = [f"give {shlex.join(given)}"] if given else []
    remedies += [f"leave out {' and '.join(absent)}"] if absent else []
    raise UserError(
        f"a resumed run cannot change {names}: its result would be that of neither run; "
        f"{' and '.join(remedies)}, or start over with --overwrite",
    )


def check_flags(config: Any) -> None:
    """Refuse values that no training command can have, before anything is loaded. Raises
    UserError."""
    present = {field.name for field in dataclasses.fields(config)}
    configurator.check_range(0, config, *(name for name in NOT_NEGATIVE if name in present))
    configurator.check_range(0, config, *(name for name in SHARES if name in present), most=1)
    configurator.check_range(1, config, "keep_last")
    if getattr(config, "total_batch_size", -1) != -1:
        configurator.check_range(1, config, "total_batch_size")
    check_dtype(config.dtype)
    check_device_type(config.device_type)
    for name in ("model_tag", "from_tag"):
        if getattr(config, name, None) is not None:
            configurator.check_folder_name(f"--{name}", getattr(config, name))
    for flag in ("fp8", "compile"):
        if getattr(config, flag) and getattr(config, "fsdp", False):
            raise UserError(f"--{flag} and --fsdp do not go together yet: leave one of them out")
    if config.resume and config.overwrite:
        raise UserError("--resume continues a run and --overwrite starts it over: give one of them")
    is_step = config.resume.isascii() and config.resume.isdigit()
    if config.resume not in ("", "latest") and not is_step:
        problem = f"--resume={config.resume} is not understood"
        raise UserError(f"{problem}: write --resume=latest or --resume=STEP")


def check_batch(
    total_batch_size: int,
    sequence_len: int,
    device_batch_size: BatchSize,
    world_size: int,
    resume: str = "",
) -> None:
    """Raises UserError, naming the flags, if a step's tokens cannot be cut into whole rows, equally
    many on each rank and in each pass."""
    if device_batch_size == "auto":
        device_batch_size = 1  # the size that is chosen will divide the rows
    problem = f"--total_batch_size={total_batch_size}"
    if device_batch_size < 1:
        raise UserError(
            f"--device_batch_size={device_batch_size} is not possible: a pass holds at least one "
            "row",
        )
    if total_batch_size < 1 or total_batch_size % sequence_len:
        better = max(total_batch_size // sequence_len, 1) * sequence_len
        problem += f" is not a multiple of --max_seq_len={sequence_len}"
        raise UserError(f"{problem}: try --total_batch_size={better}")
    rows = total_batch_size // sequence_len
    if rows % world_size:
        better = -(-rows // world_size) * world_size * sequence_len
        problem += f" makes {rows} rows of --max_seq_len={sequence_len}"
        problem += f", which {world_size} ranks cannot share equally"
        way_out = f"try --total_batch_size={better}"
        way_out += f"; {fitting_ranks(rows, world_size)}" if resume else ""
        raise UserError(f"{problem}: {way_out}")
    per_rank = rows // world_size
    if per_rank > device_batch_size and per_rank % device_batch_size:
        sizes = range(1, device_batch_size + 1)
        better = max(size for size in sizes if per_rank % size == 0)
        problem += f" makes {per_rank} rows a rank, not a multiple of"
        problem += f" --device_batch_size={device_batch_size}"
        raise UserError(f"{problem}: try --device_batch_size={better}")


def fitting_ranks(count: int, world_size: int) -> str:
    """The way out for a run that has begun, which cannot change what its ranks share."""
    numbers = [str(ranks) for ranks in range(1, world_size) if count % ranks == 0]
    return f"a run that has begun keeps its batch: start {' or '.join(numbers)} ranks"


def memory_settings(config: Any, world_size: int, device_type: str, dtype: str) -> dict[str, Any]:
    """The settings that flops.memory_estimate takes besides the batch and grad_checkpoint."""
    return {
        "dtype": dtype,
        "world_size": world_size,
        "device_type": device_type,
        "optimizer": config.optimizer,
        "grad_comm_dtype": config.grad_comm_dtype,
        "fsdp": getattr(config, "fsdp", False),
    }


def command(stage: str, config: RunConfig, **changes: Any) -> str:
    """The shell command that runs this configuration (flags at their defaults left out), with
    `changes`."""
    flags = configurator.as_flags(dataclasses.replace(config, **changes))
    ddp, _, _, world_size = get_dist_info()
    if not ddp:
        return shlex.join(["python", "-m", COMMANDS[stage], *flags])
    on_this_node = ranks_here()
    launcher = ["torchrun", "--standalone", f"--nproc_per_node={world_size}", FORWARDED]
    note = ""
    if on_this_node < world_size:
        head = f"{os.environ.get('MASTER_ADDR', 'HEAD')}:29500"
        nodes = [f"--nnodes={world_size // on_this_node}", f"--nproc_per_node={on_this_node}"]
        launcher = ["torchrun", *nodes, "--rdzv_backend=c10d", f"--rdzv_endpoint={head}", FORWARDED]
        note = "  # on each node"
    # torchrun takes --run for an abbreviation of a flag of its own, unless `--` comes first
    separator = ["--"] if flags else []
    return shlex.join([*launcher, "-m", COMMANDS[stage], *separator, *flags]) + note
