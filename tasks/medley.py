"""Conversations that go from one subject to the next, as people's do: a greeting, a story with
questions about it, a sum, thanks.

Each part is an example of another task, of the same split. The last one is judged.
"""

import random
from functools import cached_property

from tasks.common import Content, Conversation, GeneratedTask, Task
from tasks.registry import load_task

LONG = ("Stories", "StoryQuestions", "StoryFacts", "SpellingBee", "Arithmetic")
SHORT = ("SmallTalk", "SmallTalk", "SmallTalk", "Identity", "DontKnow", "Arithmetic")


class Medley(GeneratedTask):
    """One long part at most, since two stories do not fit a small model's context, among one to
    three short ones, in any order.
    """

    @cached_property
    def parts(self) -> dict[str, Task]:
        tasks = {name: load_task(name, self.split) for name in {*LONG, *SHORT}}
        for task in tasks.values():
            if isinstance(task, GeneratedTask):
                task.tokenizer = self.tokenizer
        return tasks

    def num_examples(self) -> int:
        for task in self.parts.values():
            task.num_examples()  # raises MissingData before training starts
        return super().num_examples()

    def draw(self, name: str, rng: random.Random) -> Conversation:
        task = self.parts[name]
        return task.make(rng) if isinstance(task, GeneratedTask) else task[rng.randrange(len(task))]

    def make(self, rng: random.Random) -> Conversation:
        names = [rng.choice(LONG), *rng.choices(SHORT, k=rng.choice((1, 2, 3)))]
        rng.shuffle(names)
        drawn = [self.draw(name, rng) for name in names]
        messages = [message for part in drawn for message in part["messages"]]
        return {**drawn[-1], "messages": messages, "judge": names[-1]}

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:
        return self.parts[conversation["judge"]].evaluate(conversation, completion)
