"""The numbers of a run as pure functions: depth -> model; model -> tokens, batch, rate factors;
step -> multipliers.

Layer 0: nothing here imports torch. The scaling rules were tuned at one reference, 12 layers of
width 768 with a batch of 2^19 tokens, and scale from there to other sizes. Parameters bear the
names of their flags, and the ValueErrors about them begin with the name.
"""

import math

from zangchat.config import GPTConfig, StepMultipliers, TrainPlan
from zangchat.flops import flops_per_token, scaling_params

WIDTH_PER_LAYER = 64
REFERENCE_DEPTH = 12
REFERENCE_WIDTH = 768
REFERENCE_BATCH = 2**19  # tokens per step
REFERENCE_RATIO = 12.0  # tokens per (matrix + lm_head) parameter
# Short runs of small batches want more than the root of the batch would give them (dev/LOG.md).
SMALLEST_LR_SCALE, SMALLEST_ADAMW_LR_SCALE = 1.0, 0.5
BATCH_EXPONENT = 0.383  # the best batch grows with the tokens D as D^0.383
# of D_ref / D in the weight decay: runs far from the reference stay near the range that was tuned
DECAY_FACTOR_RANGE = (0.1, 4.0)

MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END = 0.85, 0.97, 0.90
# also in a run that ends before the rise does: high momentum slows the first steps, see dev/LOG.md
MOMENTUM_STEPS = 400
WARMUP_STEPS = 40


def model_config_for_depth(
    depth: int,
    head_dim: int = 128,
    n_kv_head: int | None = None,
    *,
    vocab_size: int,
    sequence_len: int,
    **architecture: bool,
) -> GPTConfig:
    """The model of one dial: width = 64 x depth, rounded up to whole heads. n_kv_head None or 0 =
    as many as query heads; `architecture`: see config.ARCHITECTURES. Raises ValueError."""
    if depth < 1:
        raise ValueError(f"depth={depth} is not possible: a model has at least one layer")
    if head_dim < 2 or head_dim % 2:
        advice = "rotary positions need an even head dimension, such as 64"
        raise ValueError(f"head_dim={head_dim} is not possible: {advice}")
    if architecture.get("key_offset") and head_dim % 4:
        advice = "the modern architecture needs a multiple of 4"
        raise ValueError(f"head_dim={head_dim} is not possible: {advice}")
    n_head = -(-depth * WIDTH_PER_LAYER // head_dim)
    if n_kv_head and (n_kv_head < 0 or n_head % n_kv_head):
        divisors = ", ".join(str(n) for n in range(1, n_head + 1) if n_head % n == 0)
        problem = f"n_kv_head={n_kv_head} does not divide the {n_head} heads of depth {depth}"
        raise ValueError(f"{problem}: choose one of {divisors}")
    return GPTConfig(
        sequence_len=sequence_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=n_head,
        n_kv_head=n_kv_head or n_head,
        n_embd=n_head * head_dim,
        **architecture,
    )


def plan_run(
    config: GPTConfig,
    *,
    target_param_data_ratio: float = REFERENCE_RATIO,
    total_batch_size: int = -1,
    num_iterations: int = -1,
    target_flops: float = -1,
) -> TrainPlan:
    """Length and batch of a run, and factors on the tuned rates; -1 = derive. Raises ValueError.

    The length is num_iterations, else target_flops, else target_param_data_ratio x (matrix +
    lm_head parameters) tokens. The batch is the power of two (times one row) nearest to 2^19 (D /
    D_ref)^0.383. D_ref are the tokens of the 12-layer model at the same ratio and vocabulary. Rates
    grow with the root of the batch; but those of the matrices do not fall with it, and the others
    not below a half (`rate_scales`). Weight decay grows with the root of the batch and shrinks with
    the length of the run, so that the share forgotten at the end is the same.
    """
    lengths = {"num_iterations": num_iterations, "target_flops": target_flops}
    for name, value in {"total_batch_size": total_batch_size, **lengths}.items():
        if value != -1 and value <= 0:
            advice = "give a positive number, or -1 to have it derived"
            raise ValueError(f"{name}={value:g} is not possible: {advice}")
    if target_param_data_ratio <= 0 and num_iterations == target_flops == -1:
        problem = f"target_param_data_ratio={target_param_data_ratio:g} is not possible"
        raise ValueError(f"{problem}: give a positive one, or the number of steps")
    ratio = target_param_data_ratio if target_param_data_ratio > 0 else REFERENCE_RATIO
    tokens = ratio * scaling_params(config)
    if target_flops > 0:
        tokens = target_flops / flops_per_token(config)
    reference = model_config_for_depth(
        REFERENCE_DEPTH, vocab_size=config.vocab_size, sequence_len=config.sequence_len
    )
    reference_tokens = ratio * scaling_params(reference)
    if total_batch_size == -1:
        total_batch_size = _best_batch(tokens / reference_tokens, config.sequence_len)
    if num_iterations == -1:
        num_iterations = max(1, round(tokens / total_batch_size))
    tokens = num_iterations * total_batch_size

    lr_scale, adamw_lr_scale = rate_scales(config, total_batch_size)
    low, high = DECAY_FACTOR_RANGE
    length_factor = min(max(reference_tokens / tokens, low), high)
    return TrainPlan(
        tokens=tokens,
        total_batch_size=total_batch_size,
        num_iterations=num_iterations,
        lr_scale=lr_scale,
        adamw_lr_scale=adamw_lr_scale,
        weight_decay_scale=_batch_factor(total_batch_size) * length_factor,
    )


def rate_scales(config: GPTConfig, total_batch_size: int) -> tuple[float, float]:
    """Factors on the tuned rates for a batch in tokens: (of matrices, of embedding and head)."""
    factor = _batch_factor(total_batch_size)
    width_factor = (config.n_embd / REFERENCE_WIDTH) ** -0.5
    return max(factor, SMALLEST_LR_SCALE), max(factor, SMALLEST_ADAMW_LR_SCALE) * width_factor


def _batch_factor(total_batch_size: int) -> float:
    return math.sqrt(total_batch_size / REFERENCE_BATCH)


def _best_batch(relative_tokens: float, sequence_len: int) -> int:
    """Tokens per step: whole rows, a power of two of them, so that ranks and passes share them."""
    best = REFERENCE_BATCH * relative_tokens**BATCH_EXPONENT
    return sequence_len * 2 ** max(0, round(math.log2(best / sequence_len)))


# ---- within a run --------------------------------------------------------------------------------


def base_multipliers(
    step: int,
    num_iterations: int,
    *,
    warmup_ratio: float = 0.05,
    warmdown_ratio: float = 0.65,
    final_lr_frac: float = 0.05,
) -> StepMultipliers:
    """Pretraining, update `step` (from 0): warm-up, constant, linear warm-down to final_lr_frac.

    Warm-up takes WARMUP_STEPS or warmup_ratio of the run, whichever is less. Momentum rises to its
    peak and falls during the warm-down; weight decay falls linearly over the whole run. Past the
    end nothing falls further.
    """
    _check_horizon(step, num_iterations)
    warmup = int(min(WARMUP_STEPS, warmup_ratio * num_iterations))
    down = _warmdown_progress(step + 1, num_iterations, warmdown_ratio)
    lr = (1 - down) + final_lr_frac * down
    if step < warmup:
        lr = min(lr, (step + 1) / warmup)
    rise = min(1.0, step / MOMENTUM_STEPS)
    momentum = MOMENTUM_START + (MOMENTUM_PEAK - MOMENTUM_START) * rise
    momentum = min(momentum, MOMENTUM_PEAK - (MOMENTUM_PEAK - MOMENTUM_END) * down)
    decay = max(0.0, 1 - step / num_iterations)
    return StepMultipliers(lr=lr, momentum=momentum, weight_decay=decay)


def finetune_multipliers(
    step: int,
    num_iterations: int,
    *,
    init_lr_frac: float = 1.0,
    warmdown_ratio: float = 1.0,
    final_lr_frac: float = 0.0,
) -> StepMultipliers:
    """Midtraining, SFT and RL: constant at init_lr_frac, then linear over the last warmdown_ratio
    of the run (1: all of it) towards final_lr_frac x init_lr_frac, which is reached one step past
    the last, so that no update is wasted on a rate of zero."""
    _check_horizon(step, num_iterations)
    down = _warmdown_progress(step, num_iterations, warmdown_ratio)
    return StepMultipliers(lr=init_lr_frac * ((1 - down) + final_lr_frac * down))


def _warmdown_progress(step: int, num_iterations: int, warmdown_ratio: float) -> float:
    """0 before the warm-down, 1 at its end, num_iterations, and after it."""
    length = int(warmdown_ratio * num_iterations)
    if length == 0:
        return 0.0
    return min(1.0, max(0.0, (step - (num_iterations - length)) / length))


def _check_horizon(step: int, num_iterations: int) -> None:
    if step < 0 or num_iterations < 1:
        advice = "a step counts from 0, a run has at least one"
        raise ValueError(f"step {step} of {num_iterations}: {advice}")
