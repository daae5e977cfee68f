"""Stories and small talk: the grammar, the held-out parts, and the judges."""

import itertools
import re
from collections import Counter

import pytest

from tasks.common import SPLITS, plain, split_of
from tasks.registry import load_task
from tasks.smalltalk import DontKnow, SmallTalk, examples
from tasks.stories import (
    Stories,
    StoriesAgain,
    StoryFacts,
    StoryQuestions,
    characters,
    judge_answer,
    judge_story,
    words,
    words_of,
    world,
)

GENERATED = ("Stories", "StoryQuestions", "StoryFacts", "StoriesAgain", "DontKnow")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", [*GENERATED, "SmallTalk"])
def test_right_answers_are_judged_right(name: str, split: str) -> None:
    options = {"size": 300} if name in GENERATED else {}
    task = load_task(name, split, **options)
    for conversation in task:
        answer = conversation["messages"][-1]["content"]
        assert task.evaluate(conversation, answer), conversation
        assert not task.evaluate(conversation, "Somewhere else."), conversation


def test_the_plots_hold_no_word_of_the_world() -> None:
    """Else the judge would take a sentence of a plot for a second character, thing or place."""
    fixed = words_of("animals", "girls", "boys", "things", "places", "foods", "colors")
    for name, plot in world()["plots"].items():
        beats = itertools.chain.from_iterable(plot["beats"])
        asked = (text for item in plot["asks"] for text in (*item["ask"], *item["say"]))
        for template in (*beats, *asked, plot["end"], *world()["openings"]):
            written = set(words(re.sub(r"\{\w+\}", "", template)))
            assert not written & fixed, (name, template)


def test_the_lists_do_not_overlap() -> None:
    kinds = ("animals", "girls", "boys", "things", "places", "foods", "colors", "skills")
    for one, other in itertools.combinations(kinds, 2):
        assert not words_of(one) & words_of(other)


def test_stories_are_short_whole_and_varied() -> None:
    stories = [c["messages"][1]["content"] for c in Stories(size=1000)]
    assert len(set(stories)) == len(stories)
    counts = [len(re.findall(r'[.!?]["]?(?= |$)', story)) for story in stories]
    assert min(counts) >= 5 and max(counts) <= 16
    for story in stories:
        assert "{" not in story and "[" not in story and "  " not in story
        assert not re.search(r"\b[Aa] [aeiou](?!ni|ku)|\b[Aa]n u(?:ni|ku)", story), story
        assert not re.search(r"(?:^|[.!?] )[a-z]", story), story


def test_held_out_requests_join_words_that_no_training_story_has_together() -> None:
    fixed = characters() | words_of("things")
    pairs = set()
    for conversation in (*Stories(size=3000), *StoryQuestions(size=1000), *StoriesAgain(size=1000)):
        for message in conversation["messages"]:
            found = sorted(set(words(message["content"])) & fixed)
            pairs |= set(itertools.combinations(found, 2))
    for split in ("val", "test"):
        for conversation in Stories(size=500, split=split):
            wanted = tuple(sorted(word.lower() for word in conversation["wanted"]))
            assert wanted not in pairs
            assert split_of("story", *sorted(conversation["wanted"])) == split


GOOD = "A fox lived in the forest. She had a red kite. An owl took it up. They were friends for ever and ever after that day."


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (("", ""), (True, True, True)),
        (("fox", "wolf"), (False, True, True)),
        (("kite.", "drum."), (False, True, True)),
        (("They were", "The bear and the hen were"), (True, False, True)),
        (("it up", "the bell up"), (True, False, True)),
        (("it up", "it to the beach"), (True, False, True)),
        (("it up", "the blue thing"), (True, False, True)),
        (("that day.", "that"), (True, True, False)),
    ],
)
def test_judge_of_stories(change: tuple[str, str], verdict: tuple[bool, bool, bool]) -> None:
    assert judge_story(GOOD.replace(*change), ["fox", "kite"]) == verdict


def test_judge_of_stories_minds_the_pronouns_of_children() -> None:
    story = "Mia had a kite. {} liked it very much and never gave it away to anybody at all in the long years that came."
    assert judge_story(story.format("She"), ["Mia", "kite"]).consistent
    assert not judge_story(story.format("He"), ["Mia", "kite"]).consistent


def test_judge_of_answers() -> None:
    assert judge_answer("The owl took it.", ["owl"], GOOD, "owl")
    assert not judge_answer("The fox, not the owl.", ["owl"], GOOD, "owl")
    assert not judge_answer("The owl took the bell.", ["owl"], GOOD, "owl")
    assert not judge_answer("Somebody took it.", ["owl"], GOOD, "owl")
    assert judge_answer("A red kite.", ["kite"], GOOD, None)


def test_again_keeps_everything_but_the_hero() -> None:
    for conversation in StoriesAgain(size=100):
        first, second = (conversation["messages"][i]["content"] for i in (1, 3))
        new, thing = conversation["wanted"]
        assert thing in words(first) and thing in words(second)
        assert conversation["old"].lower() not in words(second)
        assert new.lower() in words(second) and new.lower() not in words(first)


def test_held_out_facts_join_words_that_no_training_fact_joins() -> None:
    def pairs(split: str) -> set[tuple[str, ...]]:
        return {
            tuple(sorted(set(words(fact)) & (characters() | words_of("things", "places", "foods"))))
            for conversation in StoryFacts(size=2000, split=split)
            for fact in conversation["story"].split(". ")
        }

    assert all(len(pair) == 2 for pair in pairs("test"))
    assert not pairs("train") & pairs("test")


def test_a_question_about_facts_has_one_answer() -> None:
    for conversation in StoryFacts(size=500):
        told = words(conversation["story"])
        for word in characters() | words_of("things", "places", "foods"):
            assert told.count(word) <= 1, conversation["story"]


def test_small_talk_holds_out_phrasings_not_meanings() -> None:
    seen = {s: {(e.intent, plain(e.question)) for e in SmallTalk(s).examples} for s in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not seen[one] & seen[other]
    assert {e.intent for e in SmallTalk("test").examples} <= {
        e.intent for e in SmallTalk("train").examples
    }
    assert {e.intent for e in examples()} == {e.intent for e in SmallTalk("train").examples}


def test_questions_it_cannot_answer_are_held_out_and_count_alike() -> None:
    asked = {s: Counter(c["messages"][0]["content"] for c in DontKnow(3000, s)) for s in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not asked[one].keys() & asked[other].keys()
    most = max(asked["test"].values())  # of about 140 questions, Chinese ones more often
    assert len(asked["test"]) > 120 and most < 0.06 * 3000


def test_no_question_of_small_talk_has_two_meanings() -> None:
    meanings: dict[str, str] = {}
    for example in examples():
        key = plain(example.question)
        assert meanings.setdefault(key, example.intent) == example.intent, example.question
