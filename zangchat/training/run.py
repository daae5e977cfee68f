"""What the training commands share before and around the loop: where a run lives, whether it starts, goes on or is finished.

with open_run("mid", config, source="base") as run:    # base models start from nothing: no source
    if run.finished:
        return 0
    run.start_from_source()                            # not for base models
    model = run.new_model()                            # base: run.new_model(gpt_config)
    plan = run.plan(model.config)                      # base: schedule.plan_run(...)
    trainer = run.trainer(model, stage, plan, run.tokenizer())
    trainer.fit()
"""

import contextlib
import dataclasses
import functools
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zangchat import configurator, flops
from zangchat.config import GPTConfig, RunState
from zangchat.errors import UserError
from zangchat.runtime.devices import compute_init, resolve_dtype
from zangchat.runtime.files import atomic_write
from zangchat.runtime.logs import get_wandb, print0, steady_streams
from zangchat.runtime.memory import device_memory, is_out_of_memory, keep_freed_memory, peak_memory_bytes
from zangchat.runtime.processes import compute_cleanup, get_dist_info
from zangchat.runtime.seeds import derive_seed
from zangchat.training.flags import BatchSize, RunConfig

if TYPE_CHECKING:
    import torch

    from zangchat.dataloader import Batch
    from zangchat.dataset import Dataset
    from zangchat.gpt import GPT
    from zangchat.optim import OptimizerGroup
    from zangchat.schedule import TrainPlan
    from zangchat.tokenizer import RustBPETokenizer
    from zangchat.training.trainer import Stage, Trainer

# Flags that may differ between the attempts of one run: they change neither the data nor the maths of a step.
FREE_FLAGS = set(
    """
    run model_tag device_type num_iterations device_batch_size grad_checkpoint fsdp deterministic dry_run
    save_every keep_last keep_every resume overwrite
    eval_every eval_tokens eval_steps eval_examples eval_samples sample_every core_metric_every core_metric_max_per_task
    """.split()
)
# What a later stage takes over from the model it starts from, where the user left it open. Its mixture, its own files, its length and the
# step to start from are never taken over: they are what the stage is about. The pretraining text (TEXT) is one choice made by two flags.
TAKEN_OVER = (
    *("max_seq_len", "total_batch_size", "device_batch_size"),
    *("optimizer", "embedding_lr", "unembedding_lr", "matrix_lr", "grad_clip"),
)
TEXT = ("dataset", "data_path")
NOT_NEGATIVE = (
    *("embedding_lr", "unembedding_lr", "matrix_lr", "init_lr_frac", "warmup_ratio", "warmdown_ratio", "final_lr_frac"),
    *("weight_decay", "grad_clip"),
)
REPORTED = "reported"  # in the folder of a run: the step whose card is in the report
LOCK_WAIT = 2.0  # seconds: a process that was just killed may take that long to let go of its tag
# For a model whose own training is not known (an imported one); base_train spells the same out.
DEFAULTS = {
    "device_batch_size": 32,
    "optimizer": "muon",
    "embedding_lr": 0.3,
    "unembedding_lr": 0.008,
    "matrix_lr": 0.02,
    "grad_clip": 1.0,
}
logger = logging.getLogger(__name__)
C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class Source:
    """The checkpoint that a new run starts from."""

    directory: Path
    step: int
    meta: dict[str, Any]

    def describe(self, stage: str) -> str:
        return f"{stage} {self.directory.name} step {self.step}"

    @property
    def sha256(self) -> str:
        from zangchat import checkpoint_manager

        return self.meta["files"][checkpoint_manager.model_name(self.step)]["sha256"]


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
    source_stage: str = ""  # the stage whose model this one starts from; empty: base models
    source: "Source | None" = None  # the model that a new run starts from, see start_from_source

    @property
    def fsdp(self) -> bool:
        return getattr(self.config, "fsdp", False)

    @property
    def finished(self) -> bool:
        """Whether a resumed run has nothing left to do, its last evaluation and its card in the report included; says so."""
        if self.meta is None:
            return False
        planned = self.config.num_iterations if self.config.num_iterations > 0 else self.state.num_iterations
        if self.state.step < planned or self.state.extra.get("hooks_done") != self.state.step or not self._is_reported():
            return False
        tag, moved = self.checkpoint_dir.name, self.moved_source()
        if moved:
            print0(f"{self.stage}: {tag} is at step {self.state.step} of {planned}, but {moved}")
        else:
            print0(f"{self.stage}: {tag} is finished at step {self.state.step} of {planned}; nothing to do")
        return True

    def moved_source(self) -> str:
        """What became of this run's source since the run began, and the command that starts again from there; empty if it is unchanged."""
        from zangchat import checkpoint_manager

        began = self.fact("source")
        if not self.source_stage or began is None:
            return ""
        directory = checkpoint_manager.checkpoints_dir(self.source_stage) / source_tag(self.config)
        steps = checkpoint_manager.valid_steps(directory)
        step = self.config.model_step if self.config.model_step is not None else max(steps, default=None)
        if step not in steps:
            return ""  # it was deleted: what came from it stands by itself
        now = Source(directory, step, checkpoint_manager.read_meta(directory, step))
        if now.describe(self.source_stage) != began:
            change = f"that model is at step {step} now"
        elif self.fact("source_sha256") not in (None, now.sha256):
            change = "that model has been trained anew"
        else:
            return ""
        again = command(self.stage, self.config, resume="", overwrite=True)
        return f"it was started from {began}, and {change}: to start over from there, run `{again}`"

    def start_from_source(self) -> None:
        """A new run takes the model that it starts from, and TAKEN_OVER and TEXT of its settings if the user left them open.

        A run that is resumed has all this already; it says if the model that it started from has changed. Raises UserError if there is
        no such model.
        """
        from zangchat import checkpoint_manager

        if self.meta is not None:
            if moved := self.moved_source():
                logger.warning(f"{self.stage}: {self.checkpoint_dir.name} is resumed, but {moved}")
            return
        config = self.config
        folder = checkpoint_manager.checkpoints_dir(self.source_stage)
        flag, hint = ("--from_tag", "") if config.from_tag else ("--model_tag", ", or name the model to start from with --from_tag")
        directory = checkpoint_manager.resolve_tag(folder, source_tag(config), flag, hint)
        step = checkpoint_manager.find_last_step(directory) if config.model_step is None else config.model_step
        self.source = Source(directory, step, checkpoint_manager.verify_checkpoint(directory, step))
        self.config = take_over(config, self.source.meta["user_config"])
        self.state.extra["facts"] = {"source": self.source.describe(self.source_stage), "source_sha256": self.source.sha256}
        print0(f"{self.stage}: starting from step {step} of {directory}")

    def tokenizer(self) -> "RustBPETokenizer":
        """That of the model that is gone on with; for a new base model the one of the base directory."""
        from zangchat import checkpoint_manager, tokenizer

        if self.meta is not None:
            return checkpoint_manager.load_tokenizer(self.checkpoint_dir, self.meta)
        if self.source is not None:
            return checkpoint_manager.load_tokenizer(self.source.directory, self.source.meta)
        chosen = {name: getattr(self.config, name) for name in TEXT}
        return tokenizer.get_tokenizer(*(f"--{name}={value}" for name, value in chosen.items() if value))

    def dataset(self) -> "Dataset":
        """The pretraining text that --dataset or --data_path means. Raises UserError where it is not the one that the run began with."""
        from zangchat.dataset import find_dataset

        dataset = find_dataset(self.config.dataset, self.config.data_path)
        before = self.fact("dataset")
        if before is not None and before != dataset.fingerprint:
            changed = f"dataset {dataset.name} has other shards than when this run began"
            if not dataset.arrives_in_order:
                raise UserError(
                    f"{changed}, so its text would go on in another order: bring the old ones back, or start over with --overwrite"
                )
            logger.warning(f"{changed}: the order of its text changes after the first pass")
        self.state.extra.setdefault("facts", {}).setdefault("dataset", dataset.fingerprint)
        return dataset

    def new_model(self, config: GPTConfig | None = None, head_init_scale: float = 0.0) -> "GPT":
        """The model, on the device. A new base model (`config`) is initialised by --seed alone; any other is filled in by `trainer`."""
        import torch

        from zangchat import checkpoint_manager
        from zangchat.nn import attention, fp8

        meta = self.meta or (self.source.meta if self.source else None)
        if meta is not None:
            config = checkpoint_manager.model_config(meta, self.checkpoint_dir)
        assert config is not None
        # with --fsdp the model is filled in main memory, and cut up by `trainer`
        place = torch.device("cpu") if self.fsdp else self.device
        model = checkpoint_manager.empty_model(config, place, self.config.dtype)
        level = logging.DEBUG if self.device.type == "cpu" else logging.INFO  # a CPU has no choice
        model.attention_backend, reason = attention.choose_backend(self.device, model.compute_dtype, config.head_dim)
        logger.log(level, f"attention: {reason}")
        if self.config.fp8:
            logger.info(fp8.use_fp8(model, self.device))
        if meta is None:
            model.init_weights(head_init_scale, torch.Generator(place).manual_seed(derive_seed(self.config.seed, "init")))
        model.grad_checkpoint = getattr(self.config, "grad_checkpoint", False)
        return model

    def optimizer(self, model: "GPT", plan: "TrainPlan") -> "OptimizerGroup":
        """Learning rates and weight decay are the flags' times the plan's scales."""
        import torch

        from zangchat.optim import build_optimizer

        config = self.config
        return build_optimizer(
            model,
            embedding_lr=config.embedding_lr * plan.adamw_lr_scale,
            unembedding_lr=config.unembedding_lr * plan.adamw_lr_scale,
            matrix_lr=config.matrix_lr * plan.lr_scale,
            weight_decay=config.weight_decay * plan.weight_decay_scale,
            kind=config.optimizer,
            comm_dtype=getattr(torch, config.grad_comm_dtype),
            rank=self.rank,
            world_size=self.world_size,
        )

    def packed(
        self, tokenizer: "RustBPETokenizer", sequence_len: int, total_batch_size: int, dataset: "Dataset | None", task: Any, ratio: float
    ) -> Callable[[dict[str, Any] | None], Iterator["Batch"]]:
        """Stage.batches: packed rows of text with `ratio` of the tokens from the conversations of `task`."""
        from zangchat.dataloader import ConversationStream, MixedStream, TextStream, packed_batches

        def batches(cursor: dict[str, Any] | None) -> Iterator["Batch"]:
            parts: list[tuple[Any, float]] = []
            if ratio < 1:
                assert dataset is not None
                # Where conversations are mixed in, text comes in grains of a row: else one long document shuts them out for many rows.
                grain = sequence_len + 1 if ratio > 0 else None
                parts.append((TextStream(dataset, tokenizer, self.config.seed, max_tokens=grain), 1 - ratio))
            if ratio > 0:
                parts.append((ConversationStream(task, tokenizer, self.config.seed, max_tokens=sequence_len + 1), ratio))
            return packed_batches(
                parts[0][0] if len(parts) == 1 else MixedStream(parts),
                rows_per_step=total_batch_size // sequence_len,
                sequence_len=sequence_len,
                rank=self.rank,
                world_size=self.world_size,
                bos=tokenizer.get_bos_token_id(),
                cursor=cursor,
            )

        return batches

    def examples(self, task: Any, tokenizer: "RustBPETokenizer", examples_per_step: int, **where: Any) -> Iterator["Batch"]:
        """Steps of so many whole conversations; `where` is seed and cursor, or num_epochs, as in dataloader.example_batches."""
        from zangchat.dataloader import example_batches

        return example_batches(
            task,
            tokenizer,
            examples_per_step=examples_per_step,
            sequence_len=self.config.max_seq_len,
            rank=self.rank,
            world_size=self.world_size,
            **where,
        )

    def validation(self, dataset: "Dataset", tokenizer: "RustBPETokenizer", sequence_len: int) -> Callable[[], Iterator["Batch"]]:
        """The validation rows of a dataset, anew at each call; at most --eval_tokens of them."""
        from zangchat.dataloader import validation_batches

        return functools.partial(
            validation_batches,
            dataset,
            tokenizer,
            sequence_len,
            eval_tokens=self.config.eval_tokens,
            rows_per_batch=self.config.device_batch_size,
            rank=self.rank,
            world_size=self.world_size,
        )

    def restore(self, model: "GPT", optimizer: "OptimizerGroup", keep_optimizer: bool) -> None:
        """Weights and optimizer state of the checkpoint that is gone on with; nothing for a new base model.

        A new run of a later stage takes over the optimizer's state of the earlier one if `keep_optimizer`, and if it is of the same kind.
        """
        if self.meta is not None:
            load_into(model, optimizer, self.checkpoint_dir, self.state.step)
        elif self.source:
            there = any(name.startswith("optim_") for name in self.source.meta["files"])
            same = self.source.meta["user_config"].get("optimizer") == self.config.optimizer
            if keep_optimizer and not (there and same):
                print0(f"{self.stage}: the optimizer starts anew ({'it was another' if there else 'its state was not saved'})")
            load_into(model, optimizer if keep_optimizer and there and same else None, self.source.directory, self.source.step)

    def trainer(
        self,
        model: "GPT",
        stage: "Stage",
        plan: "TrainPlan",
        tokenizer: "RustBPETokenizer",
        *,
        keep_optimizer: bool = True,
        compile: bool | None = None,
    ) -> "Trainer":
        """The loop, ready to `fit` for the plan's number of steps; the plan is kept with the run. Compiles on CUDA by default.

        Model and optimizer are those of the checkpoint that is gone on with (see `restore`).
        """
        from zangchat.report import software
        from zangchat.training.trainer import Trainer

        config = self.config
        optimizer = self.optimizer(model, plan)
        self.restore(model, optimizer, keep_optimizer)
        if self.rank == 0:
            (self.checkpoint_dir / REPORTED).unlink(missing_ok=True)
            size = flops.checkpoint_bytes(model.config, config.optimizer, config.dtype)
            warn_if_disk_is_small(self.checkpoint_dir, size, config.keep_last)
        self.state.num_iterations = plan.num_iterations
        self.state.extra.setdefault("facts", {})["plan"] = plan._asdict()
        if self.fsdp:
            from zangchat.fsdp import ShardedGroup

            optimizer, compile = ShardedGroup(optimizer, model, self.device), False
        return Trainer(
            model,
            optimizer,
            stage,
            self.state,
            device=self.device,
            device_batch_size=config.device_batch_size,
            grad_clip=config.grad_clip,
            checkpoint_dir=self.checkpoint_dir,
            tokenizer=tokenizer,
            user_config=configurator.to_dict(config),
            run_config=config,
            software=software() if self.rank == 0 else None,
            overwrite=config.overwrite,
            wandb=get_wandb(config.run, configurator.to_dict(config), project=f"zangchat-{self.stage}"),
            compile=self.device.type == "cuda" if compile is None else compile,
            resume_command=command(self.stage, config, resume="latest", overwrite=False),
        )

    def fact(self, name: str) -> Any:
        """What this run derived when it was new (its batch, its planned steps, ...); None for a new run."""
        return self.state.extra.get("facts", {}).get(name)

    def plan(self, model_config: GPTConfig) -> "TrainPlan":
        """The numbers of a run that starts from another, or is resumed: the batch and the scales of the rates as they were there.

        Another --total_batch_size brings the rates of its own. The length is left to the caller.
        """
        from zangchat import schedule

        saved = self.fact("plan")
        if saved is not None:
            return schedule.TrainPlan(**saved)
        assert self.source is not None
        before = self.source.meta["run_state"].get("extra", {}).get("facts", {}).get("plan")
        plan = schedule.TrainPlan(**before) if before else schedule.plan_run(model_config)
        batch = getattr(self.config, "total_batch_size", None)  # stages whose steps are counted in conversations have none
        if not batch or batch == -1 or batch == plan.total_batch_size:
            return plan
        lr_scale, adamw_lr_scale = schedule.rate_scales(model_config, batch)
        return plan._replace(total_batch_size=batch, lr_scale=lr_scale, adamw_lr_scale=adamw_lr_scale)

    def settle(self, model_config: GPTConfig, **defaults: Any) -> Any:
        """The configuration with what is still open filled in: rows as long as the model's context, `defaults`, then DEFAULTS.

        Raises UserError for rows that are longer than the context.
        """
        defaults = {**DEFAULTS, "max_seq_len": model_config.sequence_len, **defaults}
        still_open = [name for name, value in configurator.to_dict(self.config).items() if value is None and name in defaults]
        self.config = dataclasses.replace(self.config, **{name: defaults[name] for name in still_open})
        if not 1 <= self.config.max_seq_len <= model_config.sequence_len:
            raise UserError(
                f"--max_seq_len={self.config.max_seq_len} does not suit a model with a context of {model_config.sequence_len}: "
                "give that or less"
            )
        return self.config

    def choose_batch(self, model_config: GPTConfig, rows: int, even: bool = True) -> Any:
        """The configuration with --device_batch_size=auto replaced by the rows that fit this device, of a step's `rows` on all ranks.

        `even` as in flops.fitting_batch. The rank with the least memory decides. Raises UserError where not even one row fits.
        """
        config, size = self.config, self.config.device_batch_size
        if size != "auto":
            configurator.check_range(1, config, "device_batch_size")
            return config
        from zangchat.runtime import collectives

        memory = -collectives.max_over_ranks([-device_memory(self.device)])[0]
        length = getattr(config, "max_seq_len", None) or model_config.sequence_len
        settings = {
            "dtype": config.dtype,
            "world_size": self.world_size,
            "device_type": self.device.type,
            "optimizer": config.optimizer,
            "grad_checkpoint": getattr(config, "grad_checkpoint", False),
            "grad_comm_dtype": config.grad_comm_dtype,
            "fsdp": self.fsdp,
        }
        gpt, share = dataclasses.replace(model_config, sequence_len=length), max(rows // self.world_size, 1)
        size = flops.fitting_batch(gpt, share, memory, even=even, **settings)
        if not size:
            needed = flops.memory_estimate(gpt, 1, **settings)["total"]
            raise UserError(
                f"--device_batch_size=auto: one row takes about {needed / 1e9:.1f} GB, {self.device} has {memory / 1e9:.1f}: "
                f"{', or '.join(_smaller(self))}"
            )
        needed = flops.memory_estimate(gpt, size, **settings)["total"]
        print0(
            f"{self.stage}: --device_batch_size={size}, so {-(-share // size)} passes a step: about {needed / 1e9:.1f} GB "
            f"of the {memory / 1e9:.1f} that {self.device} has"
        )
        self.config = dataclasses.replace(config, device_batch_size=size)
        return self.config

    def steps(self, derive: Callable[[], float]) -> int:
        """How many: --num_iterations, else as planned when the run began, else `derive()`. Raises UserError."""
        asked = self.config.num_iterations
        if asked != -1 and asked < 1:
            raise UserError(f"--num_iterations={asked} is not possible: give a positive number, or -1 to have it derived")
        if asked == -1:
            asked = self.state.num_iterations if self.meta is not None else max(1, round(derive()))
        return asked

    def report(self, section: str, trainer: "Trainer", *more: Mapping[str, Any], **results: Any) -> None:
        """The card of a finished run: what it took and gave, `more` tables, and the command that makes it again."""
        from zangchat.report import get_report

        state = trainer.state
        common_results = {
            "started from": self.fact("source"),
            "steps": state.step,
            "tokens": state.tokens,
            "supervised tokens": state.supervised_tokens,
            "skipped steps": state.skipped_steps,
            "ranks": self.world_size,
            "training loss": trainer.smooth_loss,
            "minimum validation bpb": state.min_val_bpb,
            "final validation bpb": state.last_val_bpb,
            "training minutes": round(state.training_seconds / 60, 2),
            "peak memory MiB": round(peak_memory_bytes(self.device) / 2**20),
        }
        table = {name: value for name, value in {**common_results, **results}.items() if value is not None}
        again = command(self.stage, self.config, resume="", overwrite=False)
        get_report().log(section, [table, *map(dict, more), f"```bash\n{again}\n```"])
        if self.rank == 0:
            atomic_write(self.checkpoint_dir / REPORTED, str(state.step))

    def _is_reported(self) -> bool:
        """Whether `report` has written the card of the step that the run is at: a process may be killed before it comes to that."""
        mark = self.checkpoint_dir / REPORTED
        return mark.exists() and mark.read_text(encoding="utf-8") == str(self.state.step)


def choose_tags(config: Any, source: str) -> Any:
    """The configuration with the tags of a stage that starts from a model of stage `source`.

    The model to start from is --from_tag, else the one of the same tag, else the largest; --model_tag is the same tag unless given.
    --from_tag stays None if both are the same. Raises UserError for what cannot be a tag.
    """
    from zangchat import checkpoint_manager

    if config.from_tag is not None:
        checkpoint_manager.tag_folder(source, config.from_tag, "--from_tag")
    start = config.from_tag or config.model_tag or checkpoint_manager.find_largest_model(checkpoint_manager.checkpoints_dir(source))
    tag = config.model_tag or start
    return dataclasses.replace(config, model_tag=tag, from_tag=config.from_tag if config.from_tag != tag else None)


def source_tag(config: Any) -> str:
    """The tag of the model that a configuration with chosen tags starts from."""
    return config.from_tag or config.model_tag


def take_over(config: C, settings: Mapping[str, Any]) -> C:
    """The configuration of a later stage with what is left open (None) filled in from `settings`, those of the model it starts from."""
    values = configurator.to_dict(config)
    names = [*TAKEN_OVER, *(TEXT if all(values.get(name) is None for name in TEXT) else ())]
    return dataclasses.replace(config, **{name: settings[name] for name in names if values.get(name, 0) is None and name in settings})


def check_batch(total_batch_size: int, sequence_len: int, device_batch_size: BatchSize, world_size: int) -> None:
    """Raises UserError, naming the flags, if a step's tokens cannot be cut into whole rows, equally many on each rank and in each pass."""
    if device_batch_size == "auto":
        device_batch_size = 1  # what is chosen will divide the rows
    if device_batch_size < 1:
        raise UserError(f"--device_batch_size={device_batch_size} is not possible: a pass holds at least one row")
    if total_batch_size < 1 or total_batch_size % sequence_len:
        below = max(total_batch_size // sequence_len, 1) * sequence_len
        raise UserError(
            f"--total_batch_size={total_batch_size} is not a multiple of --max_seq_len={sequence_len}: try --total_batch_size={below}"
        )
    rows = total_batch_size // sequence_len
    if rows % world_size:
        better = -(-rows // world_size) * world_size * sequence_len
        raise UserError(
            f"--total_batch_size={total_batch_size} makes {rows} rows of --max_seq_len={sequence_len}, which {world_size} ranks cannot "
            f"share equally: try --total_batch_size={better}"
        )
    per_rank = rows // world_size
    if per_rank > device_batch_size and per_rank % device_batch_size:
        better = max(size for size in range(1, device_batch_size + 1) if per_rank % size == 0)
        raise UserError(
            f"--total_batch_size={total_batch_size} makes {per_rank} rows a rank, not a multiple of "
            f"--device_batch_size={device_batch_size}: try --device_batch_size={better}"
        )


def check_rates(config: Any) -> None:
    """Raises UserError for a rate or a share below zero."""
    configurator.check_range(0, config, *(name for name in NOT_NEGATIVE if hasattr(config, name)))


@contextlib.contextmanager
def open_run(stage: str, config: C, tag: str = "", source: str = "") -> Iterator[Run]:
    """Set up devices and processes, and decide from --resume and --overwrite where the run begins; cleans up afterwards.

    A base model has a `tag`, any other stage a `source`, the stage that it starts from, and chooses its tag itself (see choose_tags).
    Raises UserError for an existing tag without either flag, a step that is not there, a changed flag that alters the maths, another
    process that trains the same tag, and for memory that does not suffice.
    """
    from zangchat import checkpoint_manager

    check_rates(config)
    if source:
        config = choose_tags(config, source)
        tag = config.model_tag or ""
    directory = checkpoint_manager.tag_folder(stage, tag)
    refuse_existing(stage, config, directory)
    _, rank, _, world_size, device = compute_init(config.device_type, deterministic=config.deterministic)
    if device.type == "cpu":
        keep_freed_memory()
    try:
        if getattr(config, "fsdp", False):
            if config.fp8:
                raise UserError("--fp8 and --fsdp do not go together yet: leave one of them out")
            if world_size == 1:
                raise UserError("--fsdp spreads a model over several processes: start with torchrun, or leave the flag out")
        with _alone(directory, rank):
            step = _resume_step(stage, config, directory)
            meta = None
            if step is not None:
                meta = checkpoint_manager.read_meta(directory, step)
                config = inherit(config, meta["user_config"])
            dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
            config = dataclasses.replace(config, model_tag=tag, dtype=dtype)
            state = RunState.from_dict(meta["run_state"]) if meta else RunState()
            run = Run(stage, config, directory, device, rank, world_size, state, meta, source)
            with _memory_in_words(run), steady_streams():
                yield run
    finally:
        compute_cleanup()


@contextlib.contextmanager
def _alone(directory: Path, rank: int) -> Iterator[None]:
    """Rank 0 holds the tag's lock inside the block: two processes that train one tag would delete each other's checkpoints."""
    import filelock

    from zangchat.dataset import folder_lock
    from zangchat.runtime import collectives

    lock, problem = folder_lock(directory), ""
    if rank == 0:
        try:
            lock.acquire(timeout=LOCK_WAIT)
        except filelock.Timeout:
            problem = f"another process is training {directory}: wait for it or stop it, or choose another --model_tag"
        except UserError as error:
            problem = str(error)
    if problem := collectives.from_rank_0(problem):
        raise UserError(problem)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _memory_in_words(run: Run) -> Iterator[None]:
    """Where memory runs out inside the block, one sentence with the flags that change how much is needed."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        size = run.config.device_batch_size
        fewer = f"lower --device_batch_size={size} (more passes, the same result)"
        fewer += "" if size == "auto" else " or let it be chosen by =auto"
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{run.stage}: the memory of {run.device} does not suffice ({reason}): {', or '.join([fewer, *_smaller(run)])}"
        ) from error


def _smaller(run: Run) -> list[str]:
    """What makes a pass of a row take less memory."""
    checkpoint = [] if getattr(run.config, "grad_checkpoint", True) else ["give --grad_checkpoint=1"]
    return [*checkpoint, "choose a smaller --depth or --max_seq_len" if run.stage == "base" else "choose a smaller --max_seq_len"]


def warn_if_disk_is_small(directory: Path, size: int, keep_last: int) -> None:
    """While one more checkpoint of `size` bytes is written, the last `keep_last` are there as well: say so where they will not fit."""
    home = next(folder for folder in (directory, *directory.parents) if folder.is_dir())
    present = sum(path.stat().st_size for path in directory.glob("*.pt"))
    count = max(keep_last, 1) + 1
    needed, free = count * size - present, shutil.disk_usage(home).free
    if needed > free:
        logger.warning(
            f"{home} has {free / 1e9:.1f} GB free, and {count} checkpoints of {size / 1e9:.2f} GB take {needed / 1e9:.1f} GB more: "
            "make room, lower --keep_last, or set ZANGCHAT_BASE_DIR to another disk"
        )


def refuse_existing(stage: str, config: RunConfig, directory: Path) -> None:
    """Raises UserError if a new run would write over checkpoints."""
    if config.resume and config.overwrite:
        raise UserError("--resume goes on with a run and --overwrite starts it over: give one of them")
    if config.resume and config.resume != "latest" and not config.resume.isdigit():
        raise UserError(f"--resume={config.resume} is not understood: write --resume=latest or --resume=STEP")
    if not config.resume and not config.overwrite and any(directory.glob("meta_*.json")):
        another = "choose another --model_tag"
        if stage != "base":
            another = f"keep it and give the new model another name: --from_tag={source_tag(config)} --model_tag=NAME"
        raise UserError(
            f"{directory} has checkpoints already: go on with `{command(stage, config, resume='latest')}`, "
            f"or put --overwrite=1 in place of --resume=latest to start over, or {another}"
        )


def _resume_step(stage: str, config: RunConfig, directory: Path) -> int | None:
    from zangchat import checkpoint_manager

    if not config.resume:
        return None
    if config.resume != "latest":
        return checkpoint_manager.find_verified_step(directory, int(config.resume))
    step = checkpoint_manager.find_verified_step(directory)
    if step is not None:
        print0(f"{stage}: going on from step {step} of {directory}")
    elif any(directory.glob("meta_*.json")):
        raise UserError(f"no checkpoint in {directory} is intact: start over with `{command(stage, config, resume='', overwrite=True)}`")
    else:
        print0(f"{stage}: no checkpoint in {directory} yet, starting at step 0")
    return step


def inherit(config: C, saved: Mapping[str, Any]) -> C:
    """The configuration to go on with: what the user left open (None or "") as saved, free flags as given now.

    Raises UserError naming the flags that differ although they alter the maths.
    """
    now = configurator.to_dict(config)
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    filled, changed = {}, []
    for name, value in now.items():
        before = saved.get(name, defaults[name])  # a flag that is newer than the checkpoint had its default
        if value is None or (value == "" and name not in FREE_FLAGS):
            filled[name] = before
        elif name in FREE_FLAGS:
            continue
        elif value != before:
            changed.append((name, value, before))
    if changed:
        names = ", ".join(f"--{name}={value} (was {'not given' if before is None else before})" for name, value, before in changed)
        given = shlex.join(f"--{name}={before}" for name, _, before in changed if before is not None)
        left_out = " and ".join(f"--{name}" for name, _, before in changed if before is None)
        restored = " and ".join(part for part in (given and f"give {given}", left_out and f"leave out {left_out}") if part)
        raise UserError(
            f"a resumed run cannot change {names}: its result would be that of neither run; {restored}, or start over with --overwrite"
        )
    return dataclasses.replace(config, **filled)


def command(stage: str, config: RunConfig, **changes: Any) -> str:
    """The shell command that runs this configuration (the flags that are not at their defaults), with `changes`."""
    from zangchat import checkpoint_manager

    module = checkpoint_manager.COMMANDS[stage]
    flags = configurator.as_flags(dataclasses.replace(config, **changes))
    ddp, _, _, world_size = get_dist_info()
    if not ddp:
        return shlex.join(["python", "-m", module, *flags])
    on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    launcher, note = ["torchrun", "--standalone", f"--nproc_per_node={world_size}"], ""
    if on_this_node < world_size:
        head = f"{os.environ.get('MASTER_ADDR', 'HEAD')}:29500"
        nodes = [f"--nnodes={world_size // on_this_node}", f"--nproc_per_node={on_this_node}"]
        launcher = ["torchrun", *nodes, "--rdzv_backend=c10d", f"--rdzv_endpoint={head}"]
        note = "  # on each node"
    # torchrun takes --run for an abbreviation of a flag of its own, unless `--` comes first
    return shlex.join([*launcher, "-m", module, *(["--", *flags] if flags else [])]) + note


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
