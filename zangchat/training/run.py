"""The life of a training run: opened (new, resumed or finished) with its settings resolved once,
then fitted and reported.

    with Run.open("mid", config, source="base") as run:
        if run is None:  # it is finished, and Run.open said so
            return 0
        plan = run.plan._replace(num_iterations=run.steps(...))
        stage = Stage("mid", data.packed(run, ...), multipliers, hooks)
        return run.fit(stage, plan, "Midtraining")
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zangchat import checkpoint_manager, configurator, flops
from zangchat.config import TrainPlan
from zangchat.errors import UserError
from zangchat.gpt import GPT, ForwardOptions
from zangchat.nn import attention, fp8
from zangchat.optim import OptimizerGroup, build_optimizer
from zangchat.report import get_report, software
from zangchat.runtime import collectives
from zangchat.runtime.compiler import working_backend
from zangchat.runtime.devices import compute_init
from zangchat.runtime.files import atomic_write
from zangchat.runtime.logs import print0, steady_streams
from zangchat.runtime.memory import keep_freed_memory, peak_memory_bytes
from zangchat.runtime.seeds import derive_seed
from zangchat.training.batch_size import explain_memory
from zangchat.training.resolve import REPORTED, Design, Kind, Resolved, resolve
from zangchat.training.saves import SaveSchedule
from zangchat.training.settings import check_flags, command
from zangchat.training.start import (
    Origin,
    choose_tags,
    exclusive,
    refuse_existing,
    tracked,
    warn_if_disk_is_small,
)
from zangchat.training.trainer import Stage, Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run(Resolved):
    """One training command: its resolved settings, its model and its way to the end."""

    compile_backend: Any  # of torch.compile; None: do not compile
    wandb: Any

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        stage: str,
        config: Any,
        *,
        tag: str = "",
        source: str = "",
        design: Design | None = None,
        rows: int | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> Iterator["Run | None"]:
        """Set up devices and processes, resolve resume, source, defaults and batch. Yields None,
        with a message, if the run is finished.

        A base model has a `tag` and a `design`; every other stage has a `source`, the stage whose
        model it starts from. `rows` and `defaults`: see resolve.Kind.

        Raises UserError for an existing tag without --resume or --overwrite, a step that does not
        exist, a changed flag that alters the maths, another process that trains the same tag, a
        wandb that cannot start, and insufficient memory.
        """
        check_flags(config)
        device = compute_init(config.device_type, deterministic=config.deterministic)[-1]
        if source:
            config = choose_tags(config, source)
            tag = config.model_tag
        directory = checkpoint_manager.tag_folder(stage, tag)
        refuse_existing(stage, config, directory)
        kind = Kind(stage, source, design, rows, defaults or {})
        if device.type == "cpu":
            keep_freed_memory()
        check_fsdp(config)
        with exclusive(directory), steady_streams():
            resolved = resolve(kind, config, directory, device)
            if resolved is None:
                yield None
                return
            config, state = resolved.config, resolved.state
            backend = None if has_fsdp(config) else working_backend(config.compile, device)
            with (
                tracked(stage, config, state, directory) as wandb,
                explain_memory(stage, config, device),
            ):
                yield cls(**vars(resolved), compile_backend=backend, wandb=wandb)

    # ---- model and length ------------------------------------------------------------------------

    @functools.cached_property
    def model(self) -> GPT:
        """On the device; a new base model is initialised by --seed only, any other is filled by
        `fit`.
        """
        config, gpt = self.config, self.model_config
        # with --fsdp it is filled in main memory, and `fit` cuts it up
        place = torch.device("cpu") if has_fsdp(config) else self.device
        dtype = getattr(torch, config.dtype)
        backend, reason = attention.choose_backend(self.device, dtype, gpt.head_dim)
        level = logging.DEBUG if self.device.type == "cpu" else logging.INFO  # a CPU has no choice
        logger.log(level, f"attention: {reason}")
        separate = getattr(config, "block_diagonal", False)
        options = ForwardOptions(
            attention=backend,
            grad_checkpoint=getattr(config, "grad_checkpoint", False),
            document_start=self.tokenizer.get_bos_token_id() if separate else None,
            compile_backend=self.compile_backend,
        )
        model = checkpoint_manager.empty_model(gpt, place, config.dtype, options)
        if config.fp8:
            logger.info(fp8.use_fp8(model, self.device))
        if self.origin is None:
            generator = torch.Generator(place).manual_seed(derive_seed(config.seed, "init"))
            model.init_weights(config.head_init_scale, generator)
        return model

    def steps(self, derive: Callable[[], float]) -> int:
        """--num_iterations, else as planned when the run began, else `derive()`. Raises
        UserError.
        """
        requested = self.config.num_iterations
        if requested != -1 and requested < 1:
            advice = "give a positive number, or -1 to have it derived"
            raise UserError(f"--num_iterations={requested} is not possible: {advice}")
        if requested != -1:
            return requested
        return self.state.num_iterations if self.is_resumed else max(1, round(derive()))

    # ---- to the end ------------------------------------------------------------------------------

    def fit(
        self,
        stage: Stage,
        plan: TrainPlan,
        title: str,
        results: Mapping[str, Any] | None = None,
        *tables: Mapping[str, Any],
    ) -> int:
        """Train for the plan's number of steps, and write the report's card `title`, with `results`
        and further `tables`, if nothing stopped the run. Returns the exit code."""
        trainer = self._trainer(stage, plan)
        trainer.fit()
        if not trainer.exit_code:
            self._report(title, trainer.smooth_loss, results or {}, tables)
        return trainer.exit_code

    def _trainer(self, stage: Stage, plan: TrainPlan) -> Trainer:
        config = self.config
        optimizer = self._optimizer(plan)
        self._load(optimizer)
        if self.rank == 0:
            (self.directory / REPORTED).unlink(missing_ok=True)
            size = flops.checkpoint_bytes(self.model_config, config.optimizer, config.dtype)
            warn_if_disk_is_small(self.directory, size, config.keep_last)
        self.state.num_iterations, self.state.plan = plan.num_iterations, plan
        if has_fsdp(config):
            from zangchat.fsdp import FSDPGroup  # a slow import that others do not need

            optimizer = FSDPGroup(optimizer, self.model, self.device)
        settings = configurator.to_dict(config)
        again = command(self.kind.stage, config, resume="latest", overwrite=False)
        return Trainer(
            self.model,
            optimizer,
            stage,
            self.state,
            device=self.device,
            device_batch_size=config.device_batch_size,
            grad_clip=config.grad_clip,
            tokenizer=self.tokenizer,
            saves=SaveSchedule(self.directory, config, again),
            meta={"user_config": settings, "software": software() if self.rank == 0 else {}},
            wandb=self.wandb,
        )

    def _optimizer(self, plan: TrainPlan) -> OptimizerGroup:
        """Learning rates and weight decay are the flags' times the plan's scales."""
        config = self.config
        return build_optimizer(
            self.model,
            embedding_lr=config.embedding_lr * plan.adamw_lr_scale,
            unembedding_lr=config.unembedding_lr * plan.adamw_lr_scale,
            matrix_lr=config.matrix_lr * plan.lr_scale,
            weight_decay=config.weight_decay * plan.weight_decay_scale,
            kind=config.optimizer,
            comm_dtype=getattr(torch, config.grad_comm_dtype),
            rank=self.rank,
            world_size=self.world_size,
        )

    def _load(self, optimizer: OptimizerGroup) -> None:
        """Weights and optimizer state of the origin. A new run of a later stage takes the
        optimizer's state only with --load_optimizer, and only from an optimizer of the same
        kind."""
        origin = self.origin
        if origin is None:
            return
        keep = True
        if not self.is_resumed:
            same = origin.meta["user_config"].get("optimizer") == self.config.optimizer
            wanted = getattr(self.config, "load_optimizer", False)
            keep = wanted and same and origin.has_optimizer
            if wanted and not keep:
                reason = "it was another" if origin.has_optimizer else "its state was not saved"
                print0(f"{self.kind.stage}: the optimizer starts afresh ({reason})")
        load_into(self.model, optimizer if keep else None, origin)

    def _report(
        self,
        title: str,
        loss: float,
        results: Mapping[str, Any],
        tables: tuple[Mapping[str, Any], ...],
    ) -> None:
        """The card of a finished run, and the command that makes it again."""
        state = self.state
        table = {
            "started from": state.source,
            "steps": state.step,
            "tokens": state.tokens,
            "supervised tokens": state.supervised_tokens,
            "skipped steps": state.skipped_steps,
            "skipped rows": ", ".join(f"{k} {n:,}" for k, n in state.skipped_rows.items()) or None,
            "ranks": self.world_size,
            "compiled": self.compile_backend is not None,
            "training loss": loss,
            "minimum validation bpb": state.min_val_bpb,
            "final validation bpb": state.last_val_bpb,
            "training minutes": round(state.training_seconds / 60, 2),
            "peak memory MiB": round(peak_memory_bytes(self.device) / 2**20),
            **results,
        }
        for figures in state.results.values():
            table |= figures
        table = {name: value for name, value in table.items() if value is not None}
        again = command(self.kind.stage, self.config, resume="", overwrite=False)
        get_report().log(title, [table, *map(dict, tables), f"```bash\n{again}\n```"])
        if self.rank == 0:
            atomic_write(self.directory / REPORTED, str(state.step))


def has_fsdp(config: Any) -> bool:
    return getattr(config, "fsdp", False)


def check_fsdp(config: Any) -> None:
    if not has_fsdp(config):
        return
    if collectives.world()[1] == 1:
        advice = "start with torchrun, or leave the flag out"
        raise UserError(f"--fsdp spreads a model over several processes: {advice}")


def load_into(model: GPT, optimizer: OptimizerGroup | None, origin: Origin) -> None:
    """Fill model and optimizer from a checkpoint; raises UserError naming the part that does not
    fit.
    """
    directory, step = origin.directory, origin.step
    wanted = optimizer is not None
    model_data, optimizer_data, _ = checkpoint_manager.load_checkpoint(
        directory,
        step,
        model.get_device(),
        load_optimizer=wanted,
    )
    name = f"{directory}/{checkpoint_manager.model_name(step)}"
    checkpoint_manager.load_weights(model, model_data, name)
    if optimizer is not None and optimizer_data is not None:
        try:
            optimizer.load_shards(optimizer_data)
        except ValueError as error:
            raise UserError(f"{directory}, step {step}: {error}") from None
