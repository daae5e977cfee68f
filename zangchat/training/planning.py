"""The plan of a pretraining run, from base_train's flags: the model, the plan, and their printout.

Nothing here imports torch, so that `--dry_run` answers at once.
"""

from collections.abc import Callable
from typing import Any

from zangchat import configurator, flops, schedule
from zangchat.config import ARCHITECTURES, GPTConfig, TrainPlan
from zangchat.errors import UserError
from zangchat.runtime.logs import print0
from zangchat.runtime.processes import get_dist_info
from zangchat.training.settings import check_batch, check_flags, memory_settings


def check(config: Any) -> None:
    """Refuse flags that are wrong in themselves, before anything is loaded. Raises UserError."""
    check_flags(config)
    configurator.check_range(-1, config, "target_param_data_ratio", most=1e9)
    configurator.check_range(-1, config, "target_flops", most=1e33)
    model_config(config, vocab_size=2**16)
    if config.total_batch_size != -1:
        size, world_size = config.total_batch_size, get_dist_info()[3]
        check_batch(size, config.max_seq_len, config.device_batch_size, world_size, config.resume)


def model_config(config: Any, vocab_size: int) -> GPTConfig:
    """--depth, --n_embd, --head_dim, --n_kv_head and --arch as a GPTConfig; raises UserError naming
    the flag that does not fit."""
    configurator.check_range(1, config, "depth", "max_seq_len")
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "sequence_len": config.max_seq_len}
    sizes |= ARCHITECTURES[config.arch]
    head_dim = config.head_dim
    if not config.n_embd:
        try:
            return schedule.model_config_for_depth(
                config.depth, head_dim, config.n_kv_head, **sizes
            )
        except ValueError as error:  # it begins with the parameter's name, which is the flag's
            raise UserError(f"--{error}") from None
    heads = config.n_embd // head_dim if head_dim > 0 else 0
    if heads < 1 or config.n_embd % head_dim:
        problem = f"--n_embd={config.n_embd} is not a multiple of --head_dim={head_dim}"
        raise UserError(f"{problem}: change one of them")
    try:
        return GPTConfig(
            n_layer=config.depth,
            n_head=heads,
            n_kv_head=config.n_kv_head or heads,
            n_embd=config.n_embd,
            **sizes,
        )
    except ValueError as error:
        names = "--depth, --n_embd, --head_dim, --n_kv_head and --max_seq_len"
        raise UserError(f"{names} do not fit together: {error}") from None


def train_plan(config: Any, gpt: GPTConfig) -> TrainPlan:
    """The length, batch and rates of a new run; raises UserError naming an impossible flag."""
    try:
        return schedule.plan_run(
            gpt,
            target_param_data_ratio=config.target_param_data_ratio,
            total_batch_size=config.total_batch_size,
            num_iterations=config.num_iterations,
            target_flops=config.target_flops,
        )
    except ValueError as error:  # it begins with the parameter's name, which is the flag's
        raise UserError(f"--{error}") from None


def costs(gpt: GPTConfig, plan: TrainPlan) -> dict[str, int]:
    return {
        "parameters": flops.count_params(gpt)["total"],
        "training FLOPs": flops.flops_per_token(gpt) * plan.tokens,
    }


def dry_run(
    config: Any,
    make_plan: Callable[[Any, int], tuple[GPTConfig, TrainPlan]],
) -> int:
    """Print the plan without touching anything."""
    from zangchat.tokenizer import get_tokenizer  # a slow import that --help does not need

    world_size = get_dist_info()[3]
    try:
        vocab_size = get_tokenizer().get_vocab_size()
    except UserError:
        vocab_size = 65536
        advice = "make one with `python -m scripts.tok_train`"
        print0(f"no tokenizer yet: assuming a vocabulary of {vocab_size:,} ({advice})")
    gpt, plan = make_plan(config, vocab_size)
    check_batch(plan.total_batch_size, gpt.sequence_len, config.device_batch_size, world_size)
    print_plan(config, gpt, plan, world_size)
    print_memory(config, gpt, plan, world_size)
    return 0


def print_plan(config: Any, gpt: GPTConfig, plan: TrainPlan, world_size: int) -> None:
    params, per_token = flops.count_params(gpt), flops.flops_per_token(gpt)
    rows = plan.total_batch_size // (gpt.sequence_len * world_size)
    passes, size = "passes of what fits", config.device_batch_size
    if size != "auto":
        passes = f"{-(-rows // size)} passes"
    ratio = plan.tokens / flops.scaling_params(gpt)
    matrix_lr, decay = (
        config.matrix_lr * plan.lr_scale,
        config.weight_decay * plan.weight_decay_scale,
    )
    embedding_lr = config.embedding_lr * plan.adamw_lr_scale
    head_lr = config.unembedding_lr * plan.adamw_lr_scale
    print0(
        f"model          {gpt.n_layer} layers, width {gpt.n_embd}, {gpt.n_head} heads "
        f"({gpt.n_kv_head} for keys and values), context {gpt.sequence_len}, "
        f"vocabulary {gpt.vocab_size:,}\n"
        f"parameters     {params['total']:,}: embedding {params['wte']:,}, "
        f"head {params['lm_head']:,}, matrices {params['matrices']:,}\n"
        f"tokens         {plan.tokens:,} ({ratio:.2f} per matrix and head parameter)\n"
        f"steps          {plan.num_iterations:,} of {plan.total_batch_size:,} tokens: "
        f"{rows * world_size} rows, {rows} on each of {world_size} ranks in {passes}\n"
        f"FLOPs          {per_token * plan.tokens:.3e} ({per_token:.3e} per token)\n"
        f"learning rates matrices {matrix_lr:.2g}, embedding {embedding_lr:.2g}, "
        f"head {head_lr:.2g}, weight decay {decay:.2g}",
    )


def print_memory(config: Any, gpt: GPTConfig, plan: TrainPlan, world_size: int) -> None:
    """The memory that each rank needs, and the batches that fit common cards."""
    rows = plan.total_batch_size // (gpt.sequence_len * world_size)
    device_type, dtype = config.device_type or "cuda", config.dtype or "bfloat16"
    settings = memory_settings(config, world_size, device_type, dtype)
    print0(f"memory         per rank, in {dtype} on {device_type}:")
    size = config.device_batch_size
    if size != "auto":
        checkpoint = config.grad_checkpoint
        memory = flops.memory_estimate(gpt, min(size, rows), grad_checkpoint=checkpoint, **settings)
        parts = ((name, part) for name, part in memory.items() if part and name != "total")
        listed = ", ".join(f"{name} {part / flops.GIB:.2f}" for name, part in parts)
        total = f"{memory['total'] / flops.GIB:.2f} GiB"
        print0(f"               {total} with --device_batch_size={size}: {listed}")
    for line in flops.what_fits(gpt, rows, **settings):
        print0(f"               {line}")
