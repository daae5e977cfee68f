"""Small talk in English and Chinese: greetings, feelings, jokes, advice, opposites, colors, days,
simple facts; and questions that a small model should not try to answer.

smalltalk.yaml has the phrasings. Each phrasing of an intent, and each pair of a table in each of
its question forms, belongs to one split: held-out ones are new in their words, not in their
meaning.
"""

import random
import re
from collections.abc import Iterator
from functools import cache, cached_property
from itertools import islice, product
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import yaml

from tasks.common import (
    Content,
    Conversation,
    GeneratedTask,
    Task,
    chat,
    check_split,
    plain,
    split_of,
    variants,
    visible_text,
)
from zangchat.runtime.seeds import derive_seed

PHRASINGS = Path(__file__).with_name("smalltalk.yaml")
OPENINGS = ("Hey, {q}", "Oh, {q}", "Well, {q}", "So, {q}", "zangchat, {q}", "OK. {q}")
OPENINGS_ZH = ("嗯，{q}", "那么，{q}", "zangchat，{q}")


@cache
def phrasings() -> dict[str, Any]:
    return yaml.safe_load(PHRASINGS.read_text(encoding="utf-8"))


class Example(NamedTuple):
    intent: str
    question: str
    answers: tuple[str, ...]
    needed: tuple[str, ...]  # a right answer has one of them
    forbidden: tuple[str, ...] = ()


def has_word(text: str, word: str) -> bool:
    """Whether the word occurs in the text: as a whole word in a script that has spaces."""
    pattern = rf"\b{re.escape(word.lower())}\b" if word.isascii() else re.escape(word)
    return bool(re.search(pattern, text.lower()))


def examples() -> Iterator[Example]:
    """Every example of every split."""
    for intent, written in phrasings()["intents"].items():
        answers = tuple(written["say"].splitlines())
        needed, forbidden = written["need"].split(), written.get("never", "").split()
        for question in written["ask"].splitlines():
            yield Example(intent, question, answers, tuple(needed), tuple(forbidden))
    for intent, written in phrasings()["tables"].items():
        pairs = [pair.split("=") for pair in written["pairs"].split(", ")]
        for a, b in pairs:
            for form in written["ask"].splitlines():
                question = form.format(a=a)
                answers = tuple(line.format(a=a, b=b) for line in written["say"].splitlines())
                yield Example(intent, question[0].upper() + question[1:], answers, (b,))


@cache
def fillings() -> dict[str, list[str]]:
    """The names of each kind that a question about the unknown may hold."""
    return {kind: line.split(", ") for kind, line in phrasings()["unknown"]["fill"].items()}


@cache
def held_out(split: str, *forms: str) -> list[str]:
    """The questions of these forms, with all names filled in, that belong to the split."""
    questions = []
    for form in forms:
        kinds = [kind for _, kind, _, _ in Formatter().parse(form) if kind]
        for names in product(*(fillings()[kind] for kind in kinds)):
            questions.append(form.format(**dict(zip(kinds, names, strict=True))))
    return [question for question in questions if split_of("unknown", question) == split]


def drawn(rng: random.Random, forms: list[str]) -> str:
    """A question of the training split."""
    while True:
        names = {kind: rng.choice(choices) for kind, choices in fillings().items()}
        question = rng.choice(forms).format(**names)
        if split_of("unknown", question) == "train":
            return question


class SmallTalk(Task):
    """Finite: an epoch shows each phrasing as written, as hurried people type it and, in training,
    after an opening.
    """

    def __init__(self, split: str = "train", **view: int) -> None:
        super().__init__(**view)
        self.split = check_split(split)

    @cached_property
    def examples(self) -> list[Example]:
        every = list(examples())
        keys = {(example.intent, plain(example.question)) for example in every}
        split = {key: split_of("smalltalk", *key) for key in keys}
        own = {}
        shown = None if self.split == "train" else 2
        for example in every:
            if split[example.intent, plain(example.question)] != self.split:
                continue
            for question in islice(variants(example.question, OPENINGS, OPENINGS_ZH), shown):
                # "Hey, hello" may be a phrasing of its own, and held out
                if split.get((example.intent, plain(question)), self.split) == self.split:
                    own[question] = example._replace(question=question)
        chosen = list(own.values())
        random.Random(derive_seed("smalltalk", self.split)).shuffle(chosen)
        return chosen

    def num_examples(self) -> int:
        return len(self.examples)

    def get_example(self, index: int) -> Conversation:
        example = self.examples[index]
        number = derive_seed("smalltalk answer", example.question) % len(example.answers)
        judged = {"needed": example.needed, "forbidden": example.forbidden}
        return chat(example.question, example.answers[number], **judged)

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:
        text = visible_text(completion)
        return any(has_word(text, word) for word in conversation["needed"]) and not any(
            has_word(text, word) for word in conversation["forbidden"]
        )


class DontKnow(GeneratedTask):
    """Questions about today, places, people, theories: "I don't know that." is right.

    A question with its names filled in belongs to one split. Training draws the form first;
    held-out questions are equally likely, so that one without names counts no more than others.
    """

    def make(self, rng: random.Random) -> Conversation:
        written = phrasings()["unknown"]
        chinese = "_zh" if rng.random() < 0.2 else ""
        forms = written[f"ask{chinese}"].splitlines()
        trains = self.split == "train"
        question = drawn(rng, forms) if trains else rng.choice(held_out(self.split, *forms))
        return chat(question, rng.choice(written[f"say{chinese}"].splitlines()))

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:  # noqa: ARG002
        text = visible_text(completion).lower()
        return "don't know" in text or "do not know" in text or "不知道" in text
