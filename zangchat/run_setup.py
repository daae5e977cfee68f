"""What the training commands share before and around the loop: where a run lives, whether it starts, goes on or is finished.

    with open_run("mid", config, tag) as run:
        if run.finished:
            return 0
        model = run.start_from("base", ...)  or  run.new_model(gpt_config)
        ...
        trainer = run.trainer(model, optimizer, stage, tokenizer=tokenizer, num_iterations=...)
        trainer.fit()
"""

import contextlib
import dataclasses
import logging
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zangchat import common, configurator
from zangchat.config import GPTConfig, RunConfig, RunState
from zangchat.configurator import UserError

if TYPE_CHECKING:
    import torch

    from zangchat.gpt import GPT
    from zangchat.optim import OptimizerGroup
    from zangchat.tokenizer import RustBPETokenizer
    from zangchat.trainer import Stage, Trainer

# Flags that may differ between the attempts of one run: they change neither the data nor the maths of a step.
FREE_FLAGS = frozenset(
    "run model_tag device_type num_iterations device_batch_size save_every keep_last resume overwrite dry_run grad_checkpoint eval_every"
    " eval_tokens eval_steps eval_examples eval_metrics_every eval_metrics_max_problems core_metric_every core_metric_max_per_task sample_every".split()
)
C = TypeVar("C", bound=RunConfig)

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """One training command, set up: its folder, its device, and the checkpoint it goes on from (`meta`, None for a new run)."""

    stage: str
    config: Any  # the command's dataclass; what the user left open is filled in from the run that is resumed
    checkpoint_dir: Path
    device: "torch.device"
    rank: int
    world_size: int
    state: RunState
    meta: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether a resumed run has nothing left to do, its last evaluation included; says so."""
        if self.meta is None:
            return False
        planned = self.config.num_iterations if self.config.num_iterations > 0 else self.state.num_iterations
        if self.state.step < planned or self.state.extra.get("hooks_done") != self.state.step:
            return False
        common.print0(f"{self.stage}: {self.checkpoint_dir.name} is finished at step {self.state.step} of {planned}; nothing to do")
        return True

    def tokenizer(self) -> "RustBPETokenizer":
        """That of the run that is resumed, else the one that new base models use."""
        from zangchat import checkpoint_manager, tokenizer

        return tokenizer.get_tokenizer() if self.meta is None else checkpoint_manager.load_tokenizer(self.checkpoint_dir)

    def new_model(self, config: GPTConfig, head_init_scale: float = 0.0) -> "GPT":
        """A freshly initialised model, the same for the same --seed whatever ran before; or the resumed run's, without its weights."""
        import torch

        from zangchat import checkpoint_manager

        if self.meta is not None:
            config = GPTConfig.from_dict(self.meta["model_config"])
        model = checkpoint_manager.empty_model(config, self.device, self.config.dtype)
        generator = torch.Generator(self.device).manual_seed(common.derive_seed(self.config.seed, "init"))
        if self.meta is None:
            model.init_weights(head_init_scale, generator)
        return model

    def restore(self, model: "GPT", optimizer: "OptimizerGroup") -> None:
        """Weights and optimizer state of the checkpoint that the run goes on from; nothing for a new run."""
        if self.meta is not None:
            load_into(model, optimizer, self.checkpoint_dir, self.state.step)

    def trainer(
        self,
        model: "GPT",
        optimizer: "OptimizerGroup",
        stage: "Stage",
        *,
        tokenizer: "RustBPETokenizer",
        num_iterations: int,
        compile: bool | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> "Trainer":
        """The loop, ready to `fit`. `facts` is what the run derived and needs again when resumed (see `fact`)."""
        from zangchat.trainer import Trainer

        config = self.config
        self.state.num_iterations = num_iterations
        self.state.extra.setdefault("facts", dict(facts or {}))
        return Trainer(
            model,
            optimizer,
            stage,
            self.state,
            device=self.device,
            device_batch_size=config.device_batch_size,
            grad_clip=getattr(config, "grad_clip", 1.0),
            checkpoint_dir=self.checkpoint_dir,
            tokenizer=tokenizer,
            user_config=configurator.to_dict(config),
            run_config=config,
            overwrite=config.overwrite,
            wandb=common.get_wandb(config.run, config, project=f"zangchat-{self.stage}"),
            compile=self.device.type == "cuda" if compile is None else compile,
            resume_command=command(self.stage, config, resume="latest", overwrite=False),
        )

    def fact(self, name: str) -> Any:
        """What the run being resumed derived when it was new (its batch, its planned steps, ...); None for a new run."""
        return self.state.extra.get("facts", {}).get(name)


@contextlib.contextmanager
def open_run(stage: str, config: C, tag: str) -> Iterator[Run]:
    """Set up devices and processes, and decide from --resume and --overwrite where the run begins; cleans up afterwards.

    Raises UserError for an existing tag without either flag, a step that is not there, a changed flag that alters the maths.
    """
    directory = _folder(stage, tag)
    refuse_existing(stage, config, directory)
    _, rank, _, world_size, device = common.compute_init(config.device_type)
    try:
        step = _resume_step(stage, config, directory)
        meta = None
        if step is not None:
            from zangchat import checkpoint_manager

            meta = checkpoint_manager.read_meta(directory, step)
            config = inherit(config, meta["user_config"], command(stage, config))
        config = dataclasses.replace(config, model_tag=tag, dtype=str(common.resolve_dtype(config.dtype, device)).removeprefix("torch."))
        state = RunState.from_dict(meta["run_state"]) if meta else RunState()
        yield Run(stage, config, directory, device, rank, world_size, state, meta)
    finally:
        common.compute_cleanup()


def _folder(stage: str, tag: str) -> Path:
    from zangchat import checkpoint_manager

    if not re.fullmatch(r"[\w.+-]+", tag) or tag in (".", ".."):
        raise UserError(f"--model_tag={tag!r} cannot name a folder: use letters, digits and . _ + -")
    return checkpoint_manager.checkpoints_dir(stage) / tag


def refuse_existing(stage: str, config: RunConfig, directory: Path) -> None:
    """Raises UserError if a new run would write over checkpoints."""
    if config.resume and config.overwrite:
        raise UserError("--resume goes on with a run and --overwrite starts it over: give one of them")
    if config.resume and config.resume != "latest" and not config.resume.isdigit():
        raise UserError(f"--resume={config.resume} is not understood: write --resume=latest or --resume=STEP")
    if not config.resume and not config.overwrite and any(directory.glob("meta_*.json")):
        raise UserError(
            f"{directory} has checkpoints already: go on with `{command(stage, config, resume='latest')}`, "
            f"start over with `{command(stage, config, overwrite=True)}`, or choose another --model_tag"
        )


def _resume_step(stage: str, config: RunConfig, directory: Path) -> int | None:
    from zangchat import checkpoint_manager

    if not config.resume:
        return None
    if config.resume != "latest":
        return checkpoint_manager.find_verified_step(directory, int(config.resume))
    step = checkpoint_manager.find_verified_step(directory)
    if step is not None:
        common.print0(f"{stage}: going on from step {step} of {directory}")
    elif any(directory.glob("meta_*.json")):
        raise UserError(f"no checkpoint in {directory} is intact: start over with `{command(stage, config, resume='', overwrite=True)}`")
    else:
        common.print0(f"{stage}: no checkpoint in {directory} yet, starting at step 0")
    return step


def inherit(config: C, saved: Mapping[str, Any], given_command: str) -> C:
    """The configuration to go on with: what the user left open (None or "") as saved, free flags as given now.

    Raises UserError naming the flags that differ although they alter the maths.
    """
    now = configurator.to_dict(config)
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    filled, changed = {}, []
    for name, value in now.items():
        if name in FREE_FLAGS:
            continue
        before = saved.get(name, defaults[name])  # a flag that is newer than the checkpoint had its default
        if value is None or value == "":
            filled[name] = before
        elif value != before:
            changed.append((name, value, before))
    if changed:
        names = ", ".join(f"--{name}={value} (was {before})" for name, value, before in changed)
        restored = " ".join(f"--{name}={before}" for name, _, before in changed)
        raise UserError(
            f"a resumed run cannot change {names}: its result would be that of neither run; give {restored}, or --overwrite to start over"
        )
    return dataclasses.replace(config, **filled)


def command(stage: str, config: RunConfig, **changes: Any) -> str:
    """The shell command that runs this configuration (the flags that are not at their defaults), with `changes`."""
    from zangchat import checkpoint_manager

    config = dataclasses.replace(config, **changes)
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    flags = [
        f"--{name}={int(value) if isinstance(value, bool) else value}"
        for name, value in configurator.to_dict(config).items()
        if value != defaults[name] and value is not None
    ]
    ddp, _, _, world_size = common.get_dist_info()
    launcher = f"torchrun --standalone --nproc_per_node={world_size} -m" if ddp else "python -m"
    return f"{launcher} {shlex.join([checkpoint_manager.COMMANDS[stage], *flags])}"


def load_into(model: "GPT", optimizer: "OptimizerGroup | None", checkpoint_dir: Path, step: int) -> None:
    """Fill model and optimizer from a checkpoint; raises UserError naming what does not fit."""
    from zangchat import checkpoint_manager

    model_data, optimizer_data, _ = checkpoint_manager.load_checkpoint(
        checkpoint_dir, step, model.get_device(), load_optimizer=optimizer is not None
    )
    checkpoint_manager.load_weights(model, model_data, f"{checkpoint_dir}/{checkpoint_manager.model_name(step)}")
    if optimizer is not None and optimizer_data is not None:
        try:
            optimizer.load_shards(optimizer_data)
        except ValueError as error:
            raise UserError(f"{checkpoint_dir}, step {step}: {error}") from None
