"""Pretrain a base model from nothing. One dial, --depth, sets its size; everything else follows, and can be set by hand.

    python -m scripts.base_train --depth=20
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20
    python -m scripts.base_train --depth=20 --dry_run        what that would mean: parameters, tokens, steps, FLOPs, memory

Checkpoints go to <base>/base_checkpoints/<model_tag>; --resume=latest goes on with them.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tasks.registry import training_conversations
from zangchat import configurator, flops, schedule
from zangchat.config import GPTConfig, Optimizer
from zangchat.runtime.logs import print0, print_banner
from zangchat.runtime.processes import get_dist_info
from zangchat.training.flags import BatchSize, RunConfig
from zangchat.training.run import Run, check_batch, check_rates, open_run

if TYPE_CHECKING:
    from zangchat.training.trainer import Every, Stage, Trainer


@dataclass
class Config(RunConfig):
    # the model
    depth: int = 20  # layers; the width is depth x 64, rounded up to whole heads
    n_embd: int = 0  # width, a multiple of --head_dim; 0 = from --depth
    head_dim: int = 128  # width of one attention head
    n_kv_head: int = 0  # key/value heads (grouped-query attention); 0 = as many as query heads
    max_seq_len: int = 2048  # context, tokens
    head_init_scale: float = 0.0  # start lm_head as this times the embedding (helps very small models to copy); 0 = small random numbers
    # the data
    dataset: str | None = None  # a folder of <base>/base_data; default: the only one there
    data_path: str | None = None  # a .parquet, .jsonl or .txt file, or a folder of them, instead
    mixture: str = ""  # conversations to mix in, as in mid_train: "pydocs:1,identity:4,spellingbee:4000"
    mixture_ratio: float = 0.0  # their share of the tokens, 0 to 1
    # how long, and in what batches; the first of these that is set counts, else the ratio
    num_iterations: int = -1  # optimizer steps
    target_flops: float = -1.0  # training FLOPs
    target_param_data_ratio: float = 12.0  # tokens per (matrix + lm_head) parameter
    total_batch_size: int = -1  # tokens per step, all ranks; -1 = what suits the length of the run
    device_batch_size: BatchSize = 32  # rows per rank in one pass, at most; the rest is accumulated; auto = what fits the memory
    # the optimizer; rates are those of a 12-layer model at 2^19 tokens per step, and scaled from there
    optimizer: Optimizer = "muon"  # for the matrices; the embedding and the head always take adamw (sgd: sgd)
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    matrix_lr: float = 0.02
    weight_decay: float = 0.2  # of the matrices
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    warmup_ratio: float = 0.05  # share of the run with rising rates (40 steps at most)
    warmdown_ratio: float = 0.65  # share of the run with falling rates
    final_lr_frac: float = 0.05  # of the full rate, at the end
    grad_checkpoint: bool = False  # recompute activations in the backward pass: less memory, a third more time
    fsdp: bool = False  # spread the model over the ranks, where one device cannot hold it
    # looking on
    eval_every: int = 250  # steps between validations; -1 = none
    eval_tokens: int = 20 * 524288  # validation tokens at most
    core_metric_every: int = 2000  # steps between CORE evaluations; -1 = none
    core_metric_max_per_task: int = 500  # questions per CORE task; -1 = all
    sample_every: int = 2000  # steps between samples of text; -1 = none
    dry_run: bool = False  # print the plan and leave


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, train, argv)


def train(config: Config) -> int:
    if config.dry_run:
        return dry_run(config)
    check(config)
    with open_run("base", config, config.model_tag or f"d{config.depth}") as run:
        if run.finished:
            return 0
        config = run.config
        tokenizer, dataset = run.tokenizer(), run.dataset()
        gpt, plan = make_plan(config, tokenizer.get_vocab_size(), run.world_size, saved=run.fact("plan"))
        print_banner()
        config = run.choose_batch(gpt, plan.total_batch_size // gpt.sequence_len)
        print_plan(config, gpt, plan, run.world_size)
        model = run.new_model(gpt, config.head_init_scale)
        stage = make_stage(run, gpt, plan, tokenizer, dataset)
        trainer = run.trainer(model, stage, plan, tokenizer)
        trainer.fit()
        if not trainer.exit_code:
            run.report("Base model training", trainer, dataclasses.asdict(gpt), plan._asdict(), **results(trainer, gpt))
        return trainer.exit_code


def check(config: Config) -> None:
    """What can be seen to be wrong before anything is loaded."""
    if not 0 <= config.mixture_ratio < 1 or (config.mixture_ratio > 0) != bool(config.mixture):
        raise configurator.UserError(
            f"--mixture={config.mixture!r} does not go with --mixture_ratio={config.mixture_ratio:g}: give both, with a ratio between "
            "0 and 1, or neither"
        )
    configurator.check_range(1, config, "eval_tokens")
    model_config(config, vocab_size=2**16)
    if config.total_batch_size != -1:
        check_batch(config.total_batch_size, config.max_seq_len, config.device_batch_size, get_dist_info()[3])


def make_plan(
    config: Config, vocab_size: int, world_size: int, saved: dict[str, Any] | None = None
) -> tuple[GPTConfig, schedule.TrainPlan]:
    """The model and the numbers of the run. A run that is resumed keeps those it had (`saved`), but for a new --num_iterations."""
    gpt = model_config(config, vocab_size)
    if saved is not None:
        steps = config.num_iterations if config.num_iterations > 0 else saved["num_iterations"]
        plan = schedule.TrainPlan(**{**saved, "num_iterations": steps, "tokens": steps * saved["total_batch_size"]})
    else:
        plan = schedule.plan_run(
            gpt,
            target_param_data_ratio=config.target_param_data_ratio,
            total_batch_size=config.total_batch_size,
            num_iterations=config.num_iterations,
            target_flops=config.target_flops,
        )
    check_batch(plan.total_batch_size, config.max_seq_len, config.device_batch_size, world_size)
    return gpt, plan


def model_config(config: Config, vocab_size: int) -> GPTConfig:
    """--depth, --n_embd, --head_dim and --n_kv_head as a GPTConfig; raises UserError naming the flag that does not fit."""
    if not config.n_embd:
        return schedule.model_config_for_depth(
            config.depth, config.head_dim, config.n_kv_head, vocab_size=vocab_size, sequence_len=config.max_seq_len
        )
    heads = config.n_embd // config.head_dim if config.head_dim > 0 else 0
    if heads < 1 or config.n_embd % config.head_dim:
        raise configurator.UserError(f"--n_embd={config.n_embd} is not a multiple of --head_dim={config.head_dim}: change one of them")
    try:
        return GPTConfig(config.max_seq_len, vocab_size, config.depth, heads, config.n_kv_head or heads, config.n_embd)
    except ValueError as error:
        raise configurator.UserError(f"--depth, --n_embd, --head_dim, --n_kv_head and --max_seq_len do not fit together: {error}") from None


def make_stage(run: Run, gpt: GPTConfig, plan: schedule.TrainPlan, tokenizer: Any, dataset: Any) -> "Stage":
    from zangchat.training.trainer import Stage

    config: Config = run.config
    task = None
    if config.mixture:
        task = training_conversations(config.mixture, tokenizer=tokenizer, seed=config.seed)

    multipliers = partial(
        schedule.base_multipliers,
        num_iterations=plan.num_iterations,
        warmup_ratio=config.warmup_ratio,
        warmdown_ratio=config.warmdown_ratio,
        final_lr_frac=config.final_lr_frac,
    )
    batches = run.packed(tokenizer, gpt.sequence_len, plan.total_batch_size, dataset, task, config.mixture_ratio)
    return Stage("base", batches, multipliers, make_hooks(run, gpt, tokenizer, dataset))


def make_hooks(run: Run, gpt: GPTConfig, tokenizer: Any, dataset: Any) -> list["Every"]:
    from zangchat.training import hooks

    config: Config = run.config
    found = []
    if config.eval_every > 0:
        found.append(hooks.validation_bpb(config.eval_every, run.validation(dataset, tokenizer, gpt.sequence_len)))
    if config.core_metric_every > 0:
        found += hooks.core_metric(config.core_metric_every, config.core_metric_max_per_task)
    if config.sample_every > 0:
        found.append(hooks.samples(config.sample_every))
    return found


def dry_run(config: Config) -> int:
    """The plan, without torch and without touching anything."""
    from zangchat.tokenizer import get_tokenizer

    world_size = get_dist_info()[3]
    check(config)
    check_rates(config)  # which open_run does elsewhere
    try:
        vocab_size = get_tokenizer().get_vocab_size()
    except configurator.UserError:
        vocab_size = 65536
        print0("no tokenizer yet: assuming a vocabulary of 65,536 (make one with `python -m scripts.tok_train`)")
    gpt, plan = make_plan(config, vocab_size, world_size)
    print_plan(config, gpt, plan, world_size)
    rows = plan.total_batch_size // (gpt.sequence_len * world_size)
    settings: dict[str, Any] = {
        "dtype": config.dtype or "bfloat16",
        "world_size": world_size,
        "device_type": config.device_type or "cuda",
        "optimizer": config.optimizer,
        "grad_comm_dtype": config.grad_comm_dtype,
        "fsdp": config.fsdp,
    }
    print0(f"memory         per rank, in {settings['dtype']} on {settings['device_type']}:")
    if config.device_batch_size != "auto":
        memory = flops.memory_estimate(gpt, min(config.device_batch_size, rows), grad_checkpoint=config.grad_checkpoint, **settings)
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items() if size and name != "total")
        print0(f"               {memory['total'] / 1e9:.2f} GB with --device_batch_size={config.device_batch_size}: {parts}")
    for line in flops.what_fits(gpt, rows, **settings):
        print0(f"               {line}")
    return 0


def print_plan(config: Config, gpt: GPTConfig, plan: schedule.TrainPlan, world_size: int) -> None:
    params = flops.count_params(gpt)
    rows = plan.total_batch_size // (gpt.sequence_len * world_size)
    passes = "passes of what fits" if config.device_batch_size == "auto" else f"{-(-rows // config.device_batch_size)} passes"
    total_flops = flops.flops_per_token(gpt) * plan.tokens
    print0(
        f"model          {gpt.n_layer} layers, width {gpt.n_embd}, {gpt.n_head} heads ({gpt.n_kv_head} for keys and values), "
        f"context {gpt.sequence_len}, vocabulary {gpt.vocab_size:,}\n"
        f"parameters     {params['total']:,}: embedding {params['wte']:,}, head {params['lm_head']:,}, matrices {params['matrices']:,}\n"
        f"tokens         {plan.tokens:,} ({plan.tokens / flops.scaling_params(gpt):.2f} per matrix and head parameter)\n"
        f"steps          {plan.num_iterations:,} of {plan.total_batch_size:,} tokens: {rows * world_size} rows, "
        f"{rows} on each of {world_size} ranks in {passes}\n"
        f"FLOPs          {total_flops:.3e} ({flops.flops_per_token(gpt):.3e} per token)\n"
        f"learning rates matrices {config.matrix_lr * plan.lr_scale:.2g}, embedding {config.embedding_lr * plan.adamw_lr_scale:.2g}, "
        f"head {config.unembedding_lr * plan.adamw_lr_scale:.2g}, weight decay {config.weight_decay * plan.weight_decay_scale:.2g}"
    )


def results(trainer: "Trainer", gpt: GPTConfig) -> dict[str, Any]:
    return {
        "parameters": flops.count_params(gpt)["total"],
        "training FLOPs": flops.flops_per_token(gpt) * trainer.state.tokens,
        **(trainer.state.extra.get("core") or {}),
    }


if __name__ == "__main__":
    sys.exit(main())
