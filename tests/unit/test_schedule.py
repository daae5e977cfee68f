"""The arithmetic of a run, with the numbers that the README states."""

import math

import pytest

from zangchat.flops import count_params, flops_per_token
from zangchat.schedule import (
    base_multipliers,
    finetune_multipliers,
    model_config_for_depth,
    plan_run,
)


def model(depth: int, vocab_size: int = 65536, sequence_len: int = 2048, **kwargs):
    return model_config_for_depth(depth, vocab_size=vocab_size, sequence_len=sequence_len, **kwargs)


# -- depth -> model --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "width", "heads", "total"),
    [(12, 768, 6, 185.6e6), (20, 1280, 10, 561e6), (26, 1664, 13, 1.08e9), (32, 2048, 16, 1.88e9)],
)
def test_sizes_at_the_usual_vocabulary(depth, width, heads, total):
    config = model(depth)
    assert (config.n_embd, config.n_head, config.n_kv_head, config.n_layer) == (
        width,
        heads,
        heads,
        depth,
    )
    assert count_params(config)["total"] == pytest.approx(total, rel=2e-3)


def test_width_is_rounded_up_to_whole_heads():
    assert model(5).n_embd == 384  # 320 -> 3 heads of 128
    assert model(1).n_embd == 128
    assert model(5, head_dim=64).n_embd == 320
    assert model(3, head_dim=32).n_head == 6


def test_key_value_heads():
    assert model(20, n_kv_head=None).n_kv_head == model(20, n_kv_head=0).n_kv_head == 10
    assert model(20, n_kv_head=2).n_kv_head == 2
    with pytest.raises(
        ValueError,
        match=r"^n_kv_head=3 does not divide the 10 heads of depth 20: choose one of 1, 2, 5, 10",
    ):
        model(20, n_kv_head=3)


@pytest.mark.parametrize(
    ("kwargs", "problem"),
    [
        ({"depth": 0}, "^depth=0 is"),
        ({"depth": 2, "head_dim": 33}, "^head_dim=33 is"),
        ({"depth": 2, "sequence_len": 0}, "^sequence_len must"),
    ],
)
def test_impossible_models_name_the_parameter(kwargs, problem):
    with pytest.raises(ValueError, match=problem):
        model(**kwargs)


# -- model -> run ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "tokens", "batch"),
    [(12, 1.62e9, 2**19), (20, 5.73e9, 2**20), (26, 11.7e9, 2**20), (32, 20.9e9, 2**20)],
)
def test_tokens_and_batch_at_the_usual_vocabulary(depth, tokens, batch):
    plan = plan_run(model(depth), target_param_data_ratio=12)
    assert plan.tokens == pytest.approx(tokens, rel=3e-3)
    assert plan.total_batch_size == batch
    assert plan.num_iterations * plan.total_batch_size == plan.tokens


def test_the_reference_run_is_scaled_by_nothing():
    plan = plan_run(model(12), num_iterations=-1)
    assert plan.lr_scale == plan.adamw_lr_scale == 1.0
    assert plan.weight_decay_scale == pytest.approx(
        1.0, rel=1e-3
    )  # the length is rounded to whole steps


def test_factors_of_d20_by_hand():
    plan = plan_run(model(20))
    assert plan.lr_scale == pytest.approx(math.sqrt(2))
    assert plan.adamw_lr_scale == pytest.approx(math.sqrt(2) * math.sqrt(768 / 1280))
    assert plan.weight_decay_scale == pytest.approx(math.sqrt(2) * 1.6232 / 5.7253, rel=1e-3)


def test_weight_decay_stays_near_what_was_tuned():
    tiny = plan_run(model(2, vocab_size=512), num_iterations=10)
    assert tiny.weight_decay_scale == pytest.approx(4 * math.sqrt(tiny.total_batch_size / 2**19))
    endless = plan_run(model(2, vocab_size=512), num_iterations=10**7)
    assert endless.weight_decay_scale == pytest.approx(
        0.1 * math.sqrt(endless.total_batch_size / 2**19)
    )


def test_what_is_given_is_kept():
    plan = plan_run(model(20), total_batch_size=2**18, num_iterations=100)
    assert (plan.total_batch_size, plan.num_iterations, plan.tokens) == (2**18, 100, 100 * 2**18)
    assert plan.lr_scale == 1.0
    assert plan.adamw_lr_scale == pytest.approx(math.sqrt(0.5 * 768 / 1280))
    for batch in (2**17, 2**14, 512):
        plan = plan_run(model(4), total_batch_size=batch, num_iterations=150)
        assert (plan.lr_scale, plan.adamw_lr_scale) == (
            1.0,
            pytest.approx(0.5 * math.sqrt(768 / 256)),
        )


def test_iterations_come_before_flops_before_the_ratio():
    config = model(12)
    flops = 200 * 2**19 * flops_per_token(config)
    assert plan_run(config, target_flops=flops, total_batch_size=2**19).num_iterations == 200
    assert plan_run(config, target_flops=flops, num_iterations=7).num_iterations == 7
    assert plan_run(config, target_param_data_ratio=-1, num_iterations=7).num_iterations == 7


def test_twice_the_ratio_is_twice_the_tokens_with_the_same_batch():
    short, long = (plan_run(model(20), target_param_data_ratio=ratio) for ratio in (10, 20))
    assert long.tokens == pytest.approx(2 * short.tokens, rel=1e-3)
    assert long.total_batch_size == short.total_batch_size


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("vocab_size", [300, 2048, 8192])
def test_laptop_sizes_are_sane(depth, vocab_size):
    config = model(depth, vocab_size=vocab_size, sequence_len=256, head_dim=32)
    plan = plan_run(config)
    assert plan.total_batch_size % 256 == 0
    assert plan.total_batch_size & (plan.total_batch_size - 1) == 0
    assert 10 <= plan.num_iterations <= 10_000
    assert all(0 < scale < 10 for scale in plan[3:])


def test_a_batch_holds_at_least_a_row_and_a_run_a_step():
    plan = plan_run(model(1, vocab_size=300, sequence_len=3000), target_flops=1.0)
    assert plan.total_batch_size == 3000
    assert plan.num_iterations == 1


def test_a_context_that_is_no_power_of_two_still_gives_whole_rows():
    plan = plan_run(model(12, sequence_len=1536))
    assert plan.total_batch_size == 1536 * 256  # 393,216: nearer to 2^19 than twice as much


@pytest.mark.parametrize(
    "kwargs",
    [
        {"total_batch_size": 0},
        {"num_iterations": -5},
        {"target_flops": 0.0},
        {"target_param_data_ratio": 0.0},
    ],
)
def test_impossible_runs_name_the_parameter(kwargs):
    with pytest.raises(ValueError, match=f"^{next(iter(kwargs))}="):
        plan_run(model(2), **kwargs)


# -- step -> multipliers ---------------------------------------------------------------------------


def test_the_shape_of_a_long_run():
    n = 3000  # warm-up 40, warm-down from 1,050
    lr = [base_multipliers(step, n).lr for step in range(n)]
    assert lr[0] == pytest.approx(1 / 40)
    assert lr[39] == 1.0
    assert all(value == 1.0 for value in lr[39:1050])
    assert lr[1050] < 1.0
    assert lr[-1] == 0.05
    assert all(a >= b for a, b in zip(lr[39:], lr[40:], strict=False))


def test_momentum_rises_and_then_falls_with_the_rate():
    n = 6000
    momentum = [base_multipliers(step, n).momentum for step in range(n)]
    assert momentum[0] == 0.85
    assert momentum[200] == pytest.approx(0.91)
    assert momentum[400] == momentum[2000] == 0.97
    assert momentum[-1] == pytest.approx(0.90)
    assert max(momentum) == 0.97
    short = [base_multipliers(step, 150).momentum for step in range(150)]
    assert short == sorted(short)  # which ends while it still rises
    assert short[-1] == pytest.approx(0.85 + 0.12 * 149 / 400)


def test_weight_decay_falls_over_the_run():
    decay = [base_multipliers(step, 100).weight_decay for step in range(100)]
    assert decay[0] == 1.0
    assert decay[50] == pytest.approx(0.5)
    assert all(a > b > 0 for a, b in zip(decay, decay[1:], strict=False))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 40, 100, 333])
def test_short_runs_behave(n):
    multipliers = [base_multipliers(step, n) for step in range(n)]
    lr = [m.lr for m in multipliers]
    peak = lr.index(max(lr))
    assert max(lr) <= 1.0
    assert max(lr) > 0.9
    assert lr[:peak] == sorted(lr[:peak])
    assert lr[peak:] == sorted(lr[peak:], reverse=True)
    assert all(0.85 <= m.momentum <= 0.97 for m in multipliers)
    if n > 1:
        assert lr[-1] == 0.05


@pytest.mark.parametrize("schedule", [base_multipliers, finetune_multipliers])
def test_nothing_is_negative_past_the_end(schedule):
    for step in (99, 100, 101, 1000):
        m = schedule(step, 100)
        assert m.lr >= 0 and m.weight_decay >= 0 and 0 < m.momentum < 1


def test_settings_of_the_base_schedule():
    m = base_multipliers(0, 10, warmup_ratio=0.0, warmdown_ratio=0.0)
    assert (m.lr, base_multipliers(9, 10, warmup_ratio=0.0, warmdown_ratio=0.0).lr) == (1.0, 1.0)
    assert base_multipliers(9, 10, final_lr_frac=0.0).lr == 0.0
    assert base_multipliers(0, 1000, warmup_ratio=0.01).lr == pytest.approx(
        0.1
    )  # 10 steps are less than 40


def test_finetuning_falls_linearly_and_wastes_no_step():
    lr = [finetune_multipliers(step, 4, init_lr_frac=0.02).lr for step in range(5)]
    assert lr == pytest.approx([0.02, 0.015, 0.01, 0.005, 0.0])


def test_finetuning_may_stay_constant_first():
    lr = [
        finetune_multipliers(step, 10, warmdown_ratio=0.2, final_lr_frac=0.5).lr
        for step in range(11)
    ]
    assert lr == pytest.approx([1.0] * 9 + [0.75, 0.5])
    assert finetune_multipliers(9, 10, warmdown_ratio=0.0).lr == 1.0


@pytest.mark.parametrize(("step", "n"), [(-1, 10), (0, 0)])
def test_a_step_outside_any_run_is_a_programming_error(step, n):
    with pytest.raises(ValueError, match="a step counts from 0"):
        base_multipliers(step, n)
