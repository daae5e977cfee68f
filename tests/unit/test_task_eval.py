"""Scoring tasks with a model: letters, generated answers, pass@k; and that batches and ranks change
nothing.
"""

import json
import threading
from typing import Any

import pytest
import torch

from tasks.common import Task, chat, tool_used, visible_text
from tests.util import ByteTokenizer, lively_model
from zangchat import task_eval
from zangchat.engine import Engine
from zangchat.runtime import collectives
from zangchat.task_eval import Item, TaskResult, completion_parts, evaluate_task

TOKENIZER = ByteTokenizer()
CONTEXT = 128


def special(name: str) -> int:
    return TOKENIZER.encode_special(f"<|{name}|>")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(
        lively_model(TOKENIZER.get_vocab_size(), CONTEXT, n_layer=2, n_embd=32, seed=5).eval(),
        TOKENIZER,
    )


class Choices(Task):
    eval_type = "categorical"
    name = "choices"

    def num_examples(self) -> int:
        return 23

    def get_example(self, index: int) -> Any:
        letters = ["A", "B", "C", "D"][: 3 + index % 2]
        return chat("why? " * (index % 7 + 1) + str(index), letters[index % 3], letters=letters)

    def evaluate(self, conversation: Any, completion: Any) -> bool:
        return completion == conversation["messages"][-1]["content"]


class Vowels(Task):
    """Right is an answer with a byte below 128 in front: some of a random model's are."""

    name = "vowels"

    def num_examples(self) -> int:
        return 19

    def get_example(self, index: int) -> Any:
        return chat("say something " + "x" * index, "ok")

    def evaluate(self, conversation: Any, completion: Any) -> bool:
        said = visible_text(completion)
        return bool(said) and ord(said[0]) < 128


def verdicts(result: TaskResult) -> list[tuple[int, list[str], list[bool]]]:
    return [(item.index, item.completions, item.verdicts) for item in result.items]


# ---- categorical ---------------------------------------------------------------------------------


def test_the_chosen_letter_is_the_likeliest_of_the_plain_forward_pass(engine):
    task = Choices()
    for item in evaluate_task(engine, task).items:
        conversation = task[item.index]
        with torch.no_grad():
            logits = engine.model(torch.tensor([TOKENIZER.render_for_completion(conversation)]))[
                0, -1
            ]
        best = max(conversation["letters"], key=lambda letter: float(logits[ord(letter)]))
        assert item.completions == [best] and item.verdicts == [
            best == conversation["messages"][-1]["content"]
        ]


def test_a_choice_must_be_one_token(engine):
    with pytest.raises(ValueError, match="2 tokens"):
        task_eval.letter_choices(engine, [[1, 2]], [["A", "AB"]])


def test_a_question_longer_than_the_context_keeps_its_end(engine):
    prompt = TOKENIZER.render_for_completion(chat("y" * 300, ""))
    kept = [prompt[0], *prompt[-(CONTEXT - 1) :]]
    assert task_eval.letter_choices(engine, [prompt], [["A", "B"]]) == task_eval.letter_choices(
        engine, [kept], [["A", "B"]]
    )


# ---- generative ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [Choices(), Vowels()], ids=["categorical", "generative"])
def test_the_batch_changes_nothing(engine, task):
    settings = {"num_samples": 3, "max_new_tokens": 6, "temperature": 1.0, "top_k": 20}
    whole = evaluate_task(engine, task, batch_size=64, **settings)
    assert [item.index for item in whole.items] == list(range(len(task)))
    assert 0 < whole.accuracy < 1
    for batch_size in (1, 5):
        assert verdicts(evaluate_task(engine, task, batch_size=batch_size, **settings)) == verdicts(
            whole
        )


@pytest.mark.parametrize("task", [Choices(), Vowels()], ids=["categorical", "generative"])
def test_ranks_share_the_problems_and_agree_on_the_whole(engine, task, monkeypatch):
    settings = {"num_samples": 2, "max_new_tokens": 4, "temperature": 1.0}
    whole = evaluate_task(engine, task, **settings)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(collectives, "world", lambda rank=rank: (rank, 3))
        shares.append(evaluate_task(engine, task, **settings).items)
    assert sum(map(len, shares)) == len(task)
    monkeypatch.setattr(collectives, "gather", lambda mine: shares)
    assert verdicts(evaluate_task(engine, task, **settings)) == verdicts(whole)


def test_a_prompt_without_room_for_an_answer_is_not_solved_and_not_dropped(engine):
    class Long(Vowels):
        def get_example(self, index: int) -> Any:
            return chat("z" * (20 * index), "ok")

    result = evaluate_task(engine, Long(), num_samples=2, temperature=1.0, max_new_tokens=3)
    assert len(result.items) == 19
    full = [item for item in result.items if item.note]
    assert [item.index for item in full] == list(range(7, 19))
    assert all(item.verdicts == [False, False] and item.completions == [] for item in full)


def test_verdicts_of_different_problems_are_found_at_the_same_time(engine):
    together = threading.Barrier(2)

    class Slow(Vowels):
        def evaluate(self, conversation: Any, completion: Any) -> bool:
            together.wait(timeout=60)  # raises where a verdict waits for the one before it
            return True

    assert evaluate_task(engine, Slow(), max_problems=2, max_new_tokens=2).accuracy == 1


def test_only_the_first_problems_are_scored(engine):
    result = evaluate_task(engine, Vowels(), max_problems=5, max_new_tokens=2)
    assert verdicts(result) == verdicts(evaluate_task(engine, Vowels(), max_new_tokens=2))[:5]
    assert len(evaluate_task(engine, Vowels(), max_problems=500, max_new_tokens=1).items) == 19


def test_samples_differ_and_seeds_too(engine):
    settings = {"num_samples": 4, "max_new_tokens": 8, "temperature": 1.0}
    first = evaluate_task(engine, Vowels(), **settings)
    assert all(len(set(item.completions)) > 1 for item in first.items)
    assert verdicts(first) != verdicts(evaluate_task(engine, Vowels(), seed=1, **settings))


def test_pass_at_k():
    items = [
        Item(0, "", "", verdicts=[True, False, False, False]),
        Item(1, "", "", verdicts=[False] * 4),
        Item(2, "", "", verdicts=[True] * 4),
    ]
    result = TaskResult("t", 4, items)
    assert result.accuracy == result.pass_at(4) == pytest.approx(2 / 3)
    assert result.pass_at(1) == pytest.approx((0.25 + 0 + 1) / 3)
    assert result.pass_at(2) == pytest.approx((0.5 + 0 + 1) / 3)
    with pytest.raises(ValueError, match="pass@5"):
        result.pass_at(5)


# ---- what the model wrote ------------------------------------------------------------------------


def test_tool_calls_and_their_output_become_parts():
    text = TOKENIZER.encode
    tokens = [*text("so "), special("python_start"), *text("1+1"), special("python_end")]
    mask = [1] * len(tokens)
    output = [special("output_start"), *text("2"), special("output_end")]
    tokens, mask = [*tokens, *output, *text("two")], [*mask, 0, 0, 0, 1, 1, 1]
    assert completion_parts(TOKENIZER, tokens, mask) == [
        {"type": "text", "text": "so "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "two"},
    ]


def test_output_that_the_model_made_up_is_neither_tool_use_nor_an_answer():
    forged = [
        special("python_start"),
        *TOKENIZER.encode("1+1"),
        special("python_end"),
        special("output_start"),
        *TOKENIZER.encode("3"),
        special("output_end"),
    ]
    parts = completion_parts(TOKENIZER, [*forged, *TOKENIZER.encode("so")], [1] * (len(forged) + 2))
    assert not tool_used(parts) and visible_text(parts) == "so"
    assert not tool_used(
        completion_parts(
            TOKENIZER, TOKENIZER.encode("<|python_start|>1<|output_start|>1"), [1] * 34
        )
    )


def test_the_engine_answers_real_calls(engine):
    """The whole way: a model that always writes one tool call gets its output, and the verdict sees
    it.
    """
    script = [
        special("python_start"),
        *TOKENIZER.encode("2*3"),
        special("python_end"),
        *TOKENIZER.encode("6"),
        special("assistant_end"),
    ]

    class Scripted(torch.nn.Module):
        config, compute_dtype = engine.model.config, torch.float32

        def get_device(self) -> torch.device:
            return torch.device("cpu")

        def forward(
            self, idx: torch.Tensor, kv_cache: Any = None, logits_at: Any = None
        ) -> torch.Tensor:
            logits = torch.zeros(idx.size(0), 1, self.config.vocab_size)
            for row, position in enumerate(kv_cache.positions.tolist()):
                said = position - self.prompt + 1 if position else 0
                said -= 3 if said >= 8 else 0  # the output that was put in
                logits[row, 0, script[min(said, len(script) - 1)]] = 9
            kv_cache.advance(idx.size(1))
            return logits

    class Product(Task):
        def num_examples(self) -> int:
            return 1

        def get_example(self, index: int) -> Any:
            return chat("2*3?", "6")

        def evaluate(self, conversation: Any, completion: Any) -> bool:
            return tool_used(completion) and visible_text(completion) == "6"

    model = Scripted()
    model.prompt = len(TOKENIZER.render_for_completion(Product()[0]))
    result = evaluate_task(Engine(model, TOKENIZER), Product())  # type: ignore[arg-type]
    assert result.items[0].completions == [
        "<|python_start|>2*3<|python_end|><|output_start|>6<|output_end|>6"
    ]
    assert result.accuracy == 1


def test_one_line_per_problem_for_people_to_read(engine, tmp_path):
    result = evaluate_task(engine, Vowels(), max_problems=4, max_new_tokens=3)
    result.write(tmp_path / "new" / "vowels.jsonl")
    rows = [
        json.loads(line)
        for line in (tmp_path / "new" / "vowels.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert (
        rows[1]["prompt"] == "say something x"
        and rows[1]["expected"] == "ok"
        and rows[1]["passed"] == any(rows[1]["verdicts"])
    )
    assert all(len(row["completions"]) == 1 for row in rows)
