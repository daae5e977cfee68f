"""Stories of a small world, made by a grammar, and questions about them.

stories.yaml is the world: animals, people, things, places, and a dozen plots of several beats, each
written in a few ways. A story is drawn as `Facts` (who, what, where), so that questions about it
have answers; `tell` writes it. The judge of a model's story knows none of the sentences: it reads
the world's words only, and asks whether characters, thing and place stay the same.

A pair of characters, or of a character and a thing, belongs to one split: a held-out request joins
two that no training story has together. Rare words, too, are trained or held out: whoever types
"a tiger and a tuba" is to get a story about both.
"""

import random
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tasks.common import Content, Conversation, GeneratedTask, chat, split_of, visible_text

WORLD = Path(__file__).with_name("stories.yaml")
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}
SHE, HE = {"she", "her", "hers", "herself"}, {"he", "him", "his", "himself"}
OPTIONAL = "?"  # among the variants of a beat: it may be left out
RARE, RARE_HELD_OUT = 1 / 3, 1 / 7  # how often a word of the user's is a rare one


@cache
def world() -> dict[str, Any]:
    found = yaml.safe_load(WORLD.read_text(encoding="utf-8"))
    lists = ("animals", "girls", "boys", "things", "foods", "colors", "traits")
    rare = {kind: listed.split() for kind, listed in found["rare"].items()}
    return found | {name: found[name].split() for name in lists} | {"rare": rare}


@cache
def words_of(*kinds: str) -> frozenset[str]:
    """The world's words of these kinds, in lower case."""
    rare = world()["rare"]
    return frozenset(w.lower() for kind in kinds for w in (*world()[kind], *rare.get(kind, ())))


@cache
def rare_words(kind: str, split: str) -> tuple[str, ...]:
    """Those of training, or those that training never sees, of which val and test have the same."""
    seen = split == "train"
    rare = world()["rare"].get(kind, ())
    return tuple(word for word in rare if (split_of("rare word", word) == "train") == seen)


def draw_word(rng: random.Random, kind: str, split: str = "") -> str:
    """A word of the world; with a split, one that its users may say."""
    rare = rare_words(kind, split) if split else ()
    share = RARE if split == "train" else RARE_HELD_OUT
    return rng.choice(rare if rare and rng.random() < share else list(world()[kind]))


def characters() -> frozenset[str]:
    return words_of("animals", "girls", "boys")


class Character(NamedTuple):
    word: str  # fox, Mia
    pronoun: str  # he or she

    @property
    def is_animal(self) -> bool:
        return self.word.islower()

    @property
    def known(self) -> str:
        return f"the {self.word}" if self.is_animal else self.word

    @property
    def asked(self) -> str:
        return f"a {self.word}" if self.is_animal else self.word

    def introduced(self, rng: random.Random) -> str:
        trait = rng.choice(world()["traits"])
        if self.is_animal:
            return f"a {trait} {self.word}"
        child = "girl" if self.pronoun == "she" else "boy"
        return rng.choice(
            (self.word, f"a {child} named {self.word}", f"a {trait} {child} named {self.word}")
        )


class Facts(NamedTuple):
    """What a story is about; `wording` seeds the choice of its sentences."""

    plot: str
    hero: Character
    friend: Character
    thing: str
    color: str
    place: str
    food: str
    skill: str
    wording: int

    def slots(self, rng: random.Random) -> dict[str, str]:
        """The values of the {slots} of stories.yaml."""
        he, him, his = PRONOUNS[self.hero.pronoun]
        fhe, fhim, fhis = PRONOUNS[self.friend.pronoun]
        slots = {"he": he, "him": him, "his": his, "fhe": fhe, "fhim": fhim, "fhis": fhis}
        slots |= {"hero": self.hero.known, "friend": self.friend.known}
        slots |= {"a_hero": self.hero.introduced(rng), "a_friend": self.friend.introduced(rng)}
        slots |= {"thing": self.thing, "color": self.color, "food": self.food, "skill": self.skill}
        slots["place"] = world()["places"][self.place]
        end = world()["plots"][self.plot]["end"]
        return slots | {"end": write(end, rng, slots)}


def draw_character(rng: random.Random, split: str = "") -> Character:
    kind = rng.choice(("animals", "animals", "girls", "boys"))
    pronoun = {"girls": "she", "boys": "he"}.get(kind) or rng.choice(("he", "she"))
    return Character(draw_word(rng, kind, split), pronoun)


def draw_facts(rng: random.Random, split: str) -> tuple[Facts, str]:
    """A story, and the word that a user joins with its hero: its thing or its other character."""
    hero = friend = draw_character(rng, split)
    asks_thing = rng.random() < 1 / 2
    while friend.word == hero.word:
        friend = draw_character(rng, "" if asks_thing else split)
    found = world()
    facts = Facts(
        plot=rng.choice(list(found["plots"])),
        hero=hero,
        friend=friend,
        thing=draw_word(rng, "things", split if asks_thing else ""),
        color=rng.choice(found["colors"]),
        place=rng.choice(list(found["places"])),
        food=rng.choice(found["foods"]),
        skill=rng.choice(found["skills"]),
        wording=rng.randrange(2**32),
    )
    return facts, facts.thing if asks_thing else friend.word


CHOICE = re.compile(r"\[([^\[\]]*)\]")


def fill(template: str, rng: random.Random, slots: Mapping[str, str]) -> str:
    """The template with its choices made, its slots filled, and "an" before a sounded vowel."""
    while "[" in template:
        template = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
    return re.sub(r"\b([Aa]) (?=[aeiou])(?!uni|uku)", r"\1n ", template.format_map(slots))


def write(template: str, rng: random.Random, slots: Mapping[str, str]) -> str:
    """The same as sentences, each with its capital."""
    text = fill(template, rng, slots)
    return re.sub(r'(^"?|[.!?] )([a-z])', lambda match: match[1] + match[2].upper(), text)


def tell(facts: Facts) -> str:
    """The story: the same facts give the same sentences."""
    rng = random.Random(facts.wording)
    slots = facts.slots(rng)
    sentences = [write(rng.choice(world()["openings"]), rng, slots)]
    for variants in world()["plots"][facts.plot]["beats"]:
        chosen = rng.choice(variants)
        if chosen != OPTIONAL:
            sentences.append(write(chosen, rng, slots))
    return " ".join(sentences)


# ---- judging -------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    named: bool  # all that was asked for occurs
    consistent: bool  # who, what and where do not change
    ended: bool  # the last sentence is whole


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def judge_story(text: str, wanted: Iterable[str]) -> Verdict:
    """Reads the world's words and the pronouns of a story, by whomever it was written.

    Consistent: two characters at most, one thing, one place, one food and one colour at most; no
    pronoun that fits none of the characters.
    """
    said = words(text)
    found, wanted = set(said), {word.lower() for word in wanted}
    cast = found & characters()
    limits = (("things",), 1), (("places",), 1), (("foods",), 1), (("colors",), 1)
    consistent = len(cast) <= 2 and all(
        len(found & words_of(*kinds)) <= limit for kinds, limit in limits
    )
    for pronouns, kind in ((SHE, "boys"), (HE, "girls")):
        if cast and cast <= words_of(kind) and found & pronouns:
            consistent = False
    if len(cast) == 1 and found & SHE and found & HE:
        consistent = False
    ended = bool(re.search(r"""[.!?]["']?$""", text.strip())) and len(said) > 20
    return Verdict(wanted <= found, consistent, ended)


def judge_answer(text: str, needed: Iterable[str], story: str, who: str | None) -> bool:
    """Whether an answer has one of the `needed` words and names nothing that is not in the story.

    `who` is the character to be named before any other.
    """
    said = words(text)
    named = [word for word in said if word in characters()]
    if who is not None and named[:1] != [who.lower()]:
        return False
    known = characters() | words_of("things", "places", "foods")
    return any(word.lower() in text.lower() for word in needed) and (set(said) & known) <= set(
        words(story)
    )


# ---- the tasks -----------------------------------------------------------------------------------


class Stories(GeneratedTask):
    """Requests for a story about two things: a right answer names both, keeps to them, and ends."""

    def facts(self, rng: random.Random) -> tuple[Facts, str]:
        """draw_facts, of this split."""
        while True:
            facts, other = draw_facts(rng, self.split)
            if self.has(facts, other):
                return facts, other

    def has(self, facts: Facts, other: str) -> bool:
        """Whether the requested pair is of this split; in training, every pair of the story."""
        hero, friend, thing = facts.hero.word, facts.friend.word, facts.thing
        pairs = ((hero, thing), (hero, friend), (friend, thing))
        asked = pairs if self.split == "train" else ((hero, other),)
        return all(split_of("story", *sorted(pair)) == self.split for pair in asked)

    def request(self, rng: random.Random, facts: Facts, other: str) -> str:
        asked = facts.friend.asked if other == facts.friend.word else f"a {other}"
        return fill(rng.choice(world()["requests"]), rng, {"a": facts.hero.asked, "b": asked})

    def make(self, rng: random.Random) -> Conversation:
        facts, other = self.facts(rng)
        question = self.request(rng, facts, other)
        return chat(question, tell(facts), wanted=[facts.hero.word, other])

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:
        return all(judge_story(visible_text(completion), conversation["wanted"]))


class StoryQuestions(Stories):
    """A question after a story: who, what, where, why, how it ends; or the story once more with
    somebody else.
    """

    def make(self, rng: random.Random) -> Conversation:
        facts, other = self.facts(rng)
        story = tell(facts)
        conversation = chat(self.request(rng, facts, other), story)
        for _ in range(rng.choice((1, 2, 3)) if self.split == "train" else 1):
            question, answer, judged = self.question(rng, facts)
            conversation["messages"] += chat(question, answer)["messages"]
        return conversation | judged | {"story": story}

    def question(self, rng: random.Random, facts: Facts) -> tuple[str, str, dict[str, Any]]:
        """(question, answer, what the judge needs)."""
        slots = facts.slots(rng)
        own = world()["plots"][facts.plot]["asks"]
        item = rng.choice(own if rng.random() < 0.7 else world()["common"])
        answer = write(rng.choice(item["say"]), rng, slots)
        named = {"hero": facts.hero.word, "friend": facts.friend.word, "thing": facts.thing}
        named |= {"place": facts.place, "food": facts.food, "skill": facts.skill}
        need = item.get("need")
        if need == "end":
            needed = [word for word in (facts.thing, facts.friend.word) if word in slots["end"]]
        else:
            kinds = item.get("any", [need] if need else [])
            needed = [item["word"]] if "word" in item else [named[kind] for kind in kinds]
        asks_who = need in ("hero", "friend") and item["ask"][0].startswith("Who")
        judged = {"needed": needed, "who": named[need] if asks_who else None}
        return write(rng.choice(item["ask"]), rng, slots), answer, judged

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:
        text = visible_text(completion)
        return judge_answer(
            text, conversation["needed"], conversation["story"], conversation["who"]
        )


class StoriesAgain(Stories):
    """A story, and then the same with another hero: "Tell it again, but with an owl." """

    def make(self, rng: random.Random) -> Conversation:
        facts, other = self.facts(rng)
        while True:
            hero = draw_character(rng, self.split)
            if hero.word in (facts.hero.word, facts.friend.word):
                continue
            if self.has(facts._replace(hero=hero), facts.thing):
                break
        conversation = chat(self.request(rng, facts, other), tell(facts))
        again = fill(rng.choice(world()["again"]), rng, {"a": hero.asked})
        conversation["messages"] += chat(again, tell(facts._replace(hero=hero)))["messages"]
        return conversation | {"wanted": [hero.word, facts.thing], "old": facts.hero.word}

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:
        text = visible_text(completion)
        return super().evaluate(conversation, completion) and (
            conversation["old"].lower() not in words(text)
        )


class StoryFacts(StoryQuestions):
    """A few facts that the user states, and questions about them: who, what, where.

    After the toy tasks of Weston et al., 2015 (https://arxiv.org/abs/1502.05698). Almost every word
    of an answer is copied from the facts, so a model learns early to copy.
    """

    def make(self, rng: random.Random) -> Conversation:
        stated = self.state(rng)
        told = " ".join(written[0] for written in stated)
        conversation: Conversation = {"messages": []}
        for turn in range(rng.choice((1, 2, 3)) if self.split == "train" else 1):
            _, who, what, answer, name, value = rng.choice(stated)
            asks_who = rng.random() < 0.5
            question = who if asks_who else what
            asked = chat(question if turn else f"{told} {question}", answer)
            conversation["messages"] += asked["messages"]
            judged = (
                {"needed": [name], "who": name} if asks_who else {"needed": [value], "who": None}
            )
        return conversation | judged | {"story": told}

    def state(self, rng: random.Random) -> list[tuple[str, ...]]:
        """(fact, who?, what?, answer, character, value) for 2 to 4 different characters."""
        stated: list[tuple[str, ...]] = []
        for _ in range(rng.choice((2, 3, 4))):
            known = {word for written in stated for word in written[-2:]}
            while True:
                character = draw_character(rng, self.split)
                kind = rng.choice(world()["facts"])
                value = draw_word(rng, kind["of"], self.split)
                new = not known & {character.word, value}
                if new and split_of("story", *sorted((character.word, value))) == self.split:
                    break
            slots = {"x": character.known, "value": world()["places"].get(value, value)}
            written = (
                write(rng.choice(kind[k]), rng, slots) for k in ("tell", "who", "what", "say")
            )
            stated.append((*written, character.word, value))
        return stated
