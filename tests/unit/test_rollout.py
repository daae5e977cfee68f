"""Rollouts: which prompts, which samples, which advantages; what of them is learnt."""

from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tasks.common import Task, chat, visible_text
from tests.util import ByteTokenizer, lively_model
from zangchat.gpt import GPT
from zangchat.runtime import collectives
from zangchat.runtime.seeds import derive_seed
from zangchat.training.rollout import (
    Sample,
    Sampling,
    prompt_order,
    rollout,
    rollout_batches,
    to_batch,
)
from zangchat.training.step import sum_loss

TOKENIZER = ByteTokenizer()
SAMPLING = Sampling(num_samples=4, max_new_tokens=6, temperature=1.0, top_k=None)


class Short(Task):
    """Rewards answers by the share of plain letters in them."""

    rewarded = True

    def num_examples(self) -> int:
        return 10

    def get_example(self, index: int) -> Any:
        return chat("q" * (index + 1), "a")

    def reward(self, conversation: Any, completion: Any) -> float:
        said = visible_text(completion)
        return sum(char.isascii() for char in said) / max(len(said), 1)


@pytest.fixture
def model() -> GPT:
    return lively_model(TOKENIZER.get_vocab_size(), sequence_len=32, n_layer=1, n_embd=16, seed=7)


def batches(
    model: GPT, cursor: dict[str, Any] | None = None, examples: int = 4, **settings: Any
) -> Any:
    return rollout_batches(
        model,
        TOKENIZER,
        Short(),
        examples_per_step=examples,
        sampling=SAMPLING,
        seed=3,
        cursor=cursor,
        **settings,
    )


def test_advantages_are_rewards_minus_the_mean_of_the_prompt(model):
    groups = rollout(model, TOKENIZER, Short(), [0, 5], [1, 2], SAMPLING)
    assert [len(group) for group in groups] == [4, 4]
    for group in groups:
        mean = sum(sample.reward for sample in group) / 4
        assert [sample.advantage for sample in group] == pytest.approx(
            [sample.reward - mean for sample in group]
        )
        assert sum(sample.advantage for sample in group) == pytest.approx(0, abs=1e-6)
    assert any(sample.advantage for group in groups for sample in group)


def test_a_sample_is_prompt_continuation_and_its_end(model):
    endings = set()
    ends = {TOKENIZER.encode_special("<|assistant_end|>"), TOKENIZER.get_bos_token_id()}
    model.lm_head.weight.data[list(ends)] += 1.0  # some samples do end
    for index, group in zip(
        range(6), rollout(model, TOKENIZER, Short(), range(6), range(6), SAMPLING), strict=True
    ):
        prompt = TOKENIZER.render_for_completion(Short()[index])
        for sample in group:
            assert sample.tokens[: len(prompt)] == prompt and sample.sampled[: len(prompt)] == [
                0
            ] * len(prompt)
            assert len(sample.tokens) == len(sample.sampled) <= len(prompt) + 7
            if sample.tokens[-1] in ends and sample.sampled[-1] == 1:
                endings.add(sample.tokens[-1])
    assert endings == ends


def test_a_prompt_that_fills_the_context_gives_no_samples(model):
    class Long(Short):
        def get_example(self, index: int) -> Any:
            return chat("q" * 10 * (index + 1), "a")

    groups = rollout(model, TOKENIZER, Long(), range(4), range(4), SAMPLING)
    assert [len(group) for group in groups] == [4, 4, 0, 0]
    batch = to_batch([], {"step": 1})
    assert batch.inputs.shape == batch.targets.shape == (1, 1) and bool((batch.targets == -1).all())


def test_only_sampled_tokens_are_targets_and_carry_the_advantage():
    # 3 and 4 were put in by a tool
    tool = Sample([9, 1, 2, 3, 4, 5], [0, 0, 1, 0, 0, 1], 1.0, 0.75)
    short = Sample([9, 1, 7], [0, 0, 1], 0.0, -0.25)
    batch = to_batch([tool, short], {"step": 1})
    assert batch.inputs.tolist() == [[9, 1, 2, 3, 4], [9, 1, 0, 0, 0]]
    assert batch.targets.tolist() == [[-1, 2, -1, -1, 5], [-1, 7, -1, -1, -1]]
    assert batch.loss_weights is not None
    assert [
        weight
        for weight, target in zip(
            batch.loss_weights.flatten(), batch.targets.flatten(), strict=True
        )
        if target >= 0
    ] == [
        0.75,
        0.75,
        -0.25,
    ]


def test_the_loss_is_that_of_the_policy_gradient(model):
    groups = rollout(model, TOKENIZER, Short(), [0, 3, 6], [1, 2, 3], SAMPLING)
    samples = [sample for group in groups for sample in group]
    batch = to_batch(samples, {"step": 1})
    sum_loss(model, batch).backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros(())
    for sample in samples:
        scores = F.log_softmax(model(torch.tensor([sample.tokens[:-1]]))[0], dim=-1)
        for place in range(1, len(sample.tokens)):
            if sample.sampled[place]:
                total = total - sample.advantage * scores[place - 1, sample.tokens[place]]
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_step_along_the_gradient_raises_the_reward(model):
    """What RL is for, in the small: after a few steps the same task earns more."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    steps = batches(model, examples=8)
    rewards = []
    for batch in islice(steps, 9):
        rewards.append(batch.metrics["reward"])
        optimizer.zero_grad()
        (sum_loss(model, batch) / int((batch.targets >= 0).sum())).backward()
        optimizer.step()
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1


def test_prompts_come_in_order_each_once_an_epoch():
    whole = prompt_order(10, 3, 0, 30)
    assert all(sorted(whole[start : start + 10]) == list(range(10)) for start in (0, 10, 20))
    assert whole[:10] != whole[10:20]
    assert prompt_order(10, 3, 7, 9) == whole[7:16]
    assert prompt_order(10, 4, 0, 30) != whole


def equal(a: Any, b: Any) -> bool:
    return (
        a.cursor == b.cursor
        and a.metrics == b.metrics
        and all(
            torch.equal(getattr(a, name), getattr(b, name))
            for name in ("inputs", "targets", "loss_weights")
        )
    )


def test_a_resumed_run_samples_what_the_uninterrupted_one_does(model):
    whole = list(islice(batches(model), 5))
    for done in (1, 3):
        resumed = list(islice(batches(model, cursor=whole[done - 1].cursor), 5 - done))
        assert all(equal(a, b) for a, b in zip(resumed, whole[done:], strict=True))
    assert [batch.cursor["step"] for batch in whole] == [1, 2, 3, 4, 5]
    assert not torch.equal(whole[0].inputs, whole[1].inputs)


def test_samples_come_from_the_weights_of_the_moment(model):
    """No step is sampled ahead."""
    still = list(islice(batches(model), 2))
    steps = batches(model)
    first = next(steps)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
            parameter.mul_(1.5)
    assert equal(first, still[0]) and not equal(next(steps), still[1])


def test_ranks_share_the_prompts_of_a_step(model, monkeypatch):
    whole = next(batches(model))
    parts = []
    for rank in range(2):
        monkeypatch.setattr(collectives, "world", lambda rank=rank: (rank, 2))
        parts.append(next(batches(model)))
    rows = [row[row >= 0].tolist() for batch in parts for row in batch.targets]
    assert rows == [row[row >= 0].tolist() for row in whole.targets]
    with pytest.raises(ValueError, match="shared equally"):
        next(batches(model, examples=3))


def test_the_metrics_of_a_batch_say_how_the_step_went(model):
    batch = next(batches(model))
    assert set(batch.cursor) == {"step"} and set(batch.metrics) == {
        "reward",
        "sample_tokens",
        "solved",
    }
    assert batch.metrics["sample_tokens"] == pytest.approx(int((batch.targets >= 0).sum()) / 16)
    drawn = batches(model)
    for step in range(2):
        seeds = [derive_seed(3, "rollout", step, place) for place in range(4)]
        examples = prompt_order(10, 3, 4 * step, 4)
        groups = rollout(model, TOKENIZER, Short(), examples, seeds, SAMPLING)
        rewards = [[sample.reward for sample in group] for group in groups]
        metrics = next(drawn).metrics
        assert metrics["reward"] == pytest.approx(sum(map(sum, rewards)) / 16)
        assert metrics["solved"] == sum(map(any, rewards)) / 4
