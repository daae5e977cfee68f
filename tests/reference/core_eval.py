"""CORE item by item, row by row, with whole logits in float64; the twin of
zangchat/core_eval.py.
"""

import json
import random
from typing import Any

import torch


def score_task(model: Any, tokenizer: Any, task: Any) -> float:
    """Accuracy of a CoreTask, 0 to 1: the mean over its categories if it has any."""
    with open(task.path, encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    categories = sorted({item["category"] for item in items}) if task.has_categories else [None]
    means = []
    for category in categories:
        members = [item for item in items if category is None or item["category"] == category]
        verdicts = [
            answered_rightly(model, tokenizer, task, members, index)
            for index in range(len(members))
        ]
        means.append(sum(verdicts) / len(verdicts))
    return sum(means) / len(means)


def answered_rightly(
    model: Any, tokenizer: Any, task: Any, items: list[dict[str, Any]], index: int
) -> bool:
    others = list(range(index)) + list(range(index + 1, len(items)))
    shown = random.Random(1234 + index).sample(others, min(task.num_fewshot, len(others)))
    before = ""
    for i in shown:
        context, answer = pairs(task.kind, items[i])[items[i].get("gold", 0)]
        before += ("\n" if before else "") + context + task.delimiter + answer
    best, best_loss = -1, float("inf")
    for number, (context, answer) in enumerate(pairs(task.kind, items[index])):
        question = ("\n" if before else "") + context
        if before or task.kind != "schema":
            question += task.delimiter
        head = (tokenizer.encode(before) if before else []) + tokenizer.encode(question.rstrip())
        tail = tokenizer.encode(" " + answer)
        while len(head) + len(tail) > model.config.sequence_len:
            head = head[1:]
        tokens = [tokenizer.get_bos_token_id(), *head, *tail]
        with torch.no_grad():
            scores = model(torch.tensor([tokens[:-1]]))[0].double().log_softmax(dim=-1)
        places = range(1 + len(head), len(tokens))
        if task.kind == "language_modeling":
            return all(int(scores[place - 1].argmax()) == tokens[place] for place in places)
        loss = -sum(float(scores[place - 1, tokens[place]]) for place in places) / len(places)
        if loss < best_loss:
            best, best_loss = number, loss
    return best == items[index]["gold"]


def pairs(kind: str, item: dict[str, Any]) -> list[tuple[str, str]]:
    if kind == "multiple_choice":
        return [(item["query"].strip(), choice) for choice in item["choices"]]
    if kind == "schema":
        return [(context, item["continuation"].strip()) for context in item["context_options"]]
    return [(item["context"].strip(), item["continuation"].strip())]
