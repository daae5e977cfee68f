"""Identity: conversations that teach the model who it is, in English and Chinese, and ordinary
questions that are not about it.

identity.yaml has the phrasings. Every answer about itself begins with the name and stays short
enough for a model of a few million parameters. A question and its variants (lower case, with a
greeting) belong to one split, so that held-out ones are really new.
"""

import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import yaml

from tasks.common import (
    Content,
    Conversation,
    Task,
    chat,
    check_split,
    plain,
    split_of,
    variants,
    visible_text,
)
from zangchat.runtime.seeds import derive_seed

NAME = "zangchat"
PHRASINGS = Path(__file__).with_name("identity.yaml")
HELDOUT = Path(__file__).with_name("identity_heldout.txt")

GREETINGS = (
    "Hi, {q}",
    "Hello! {q}",
    "Hey, {q}",
    "Please tell me: {q}",
    "I have a question. {q}",
    "So, {q}",
    "Excuse me, {q}",
    "OK. {q}",
)
GREETINGS_ZH = ("你好，{q}", "您好！{q}", "请问，{q}", "我想知道，{q}")


class Example(NamedTuple):
    intent: str  # of identity.yaml, or "ordinary"
    base: str  # the question that this is a variant of
    question: str
    answer: str


def examples() -> Iterator[Example]:
    """Every example of every split."""
    phrasings = yaml.safe_load(PHRASINGS.read_text(encoding="utf-8"))
    for intent, languages in phrasings["intents"].items():
        for written in languages.values():
            for base in _with_names(written["questions"].splitlines(), written.get("names", ())):
                for question in variants(base, GREETINGS, GREETINGS_ZH):
                    yield Example(intent, base, question, written["answer"])
    for line in phrasings["ordinary"].splitlines():
        base, answer = line.split(" | ")
        for question in list(variants(base, GREETINGS, GREETINGS_ZH))[:2]:
            yield Example("ordinary", base, question, answer)


def _with_names(questions: Sequence[str], names: Sequence[str]) -> list[str]:
    """The questions, those with {name} once for each of the names and before the others."""
    templates = [question for question in questions if "{name}" in question]
    return [template.format(name=name) for name in names for template in templates] + [
        q for q in questions if q not in templates
    ]


def heldout_questions() -> list[str]:
    """The phrasings of the test: written separately from identity.yaml, and never in training."""
    lines = HELDOUT.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


class Identity(Task):
    """Who zangchat is: 2,200 phrasings over 16 intents, a seventh ordinary questions; finite: an
    epoch shows each once.

    The test split has only heldout_questions(); the val split holds out phrasings of identity.yaml
    and ordinary questions.
    """

    def __init__(self, split: str = "train", **view: int) -> None:
        super().__init__(**view)
        self.split = check_split(split)

    @cached_property
    def examples(self) -> list[Example]:
        if self.split == "test":
            return [
                Example("heldout", question, question, f"I am {NAME}.")
                for question in heldout_questions()
            ]
        reserved = {plain(question) for question in heldout_questions()}
        # the other two splits share what would be a third one's
        wanted = ("train", "test") if self.split == "train" else ("val",)
        unique = {
            example.question: example
            for example in examples()
            if split_of("identity", plain(example.base)) in wanted
            and not {plain(example.base), plain(example.question)} & reserved
        }
        chosen = list(unique.values())
        random.Random(derive_seed("identity", self.split)).shuffle(chosen)
        return chosen

    def num_examples(self) -> int:
        return len(self.examples)

    def get_example(self, index: int) -> Conversation:
        example = self.examples[index]
        return chat(example.question, example.answer, intent=example.intent)

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:
        """A question about itself: the answer says its name. Another question: it does not."""
        return (NAME in visible_text(completion).lower()) == (conversation["intent"] != "ordinary")
