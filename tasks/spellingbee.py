"""SpellingBee: how many times does a letter stand in a word? Answered by one tool call, `'
strawberry'.count('r')`.

A model copies tokens, not letters, so the call holds the word with the space that the prompt has
before it: the same tokens in the same order (a test measures it). Without a space after the quote,
many words are torn differently in prompt and call, and a small model has nothing to copy. For the
same reason every phrasing has a space before the word and no letter after it.
"""

import functools
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tasks.common import (
    Content,
    Conversation,
    GeneratedTask,
    MissingData,
    chat,
    last_number,
    split_of,
    text_part,
    tool_parts,
    visible_text,
)
from zangchat import dataset
from zangchat.runtime.files import atomic_write, get_base_dir

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORD = re.compile(r"[a-z]{3,12}")
MIN_OCCURRENCES = 3  # of a corpus word, lower-case, to count as a word
INVENTED = 1 / 3  # of the words to train on are made up
CORPUS_CHARS = 64_000_000  # enough for every word that a small model will meet

QUESTIONS = (
    "How many {letter} are in {word}?",
    "How many {letter} are in the word {word}?",
    "How many {letter}'s are in {word}?",
    "How many {letter}'s are in the word {word}?",
    "How many {letter}'s are there in {word}?",
    "How many {letter} are there in the word {word}?",
    "How many times does {letter} appear in {word}?",
    "How many times does the letter {letter} appear in {word}?",
    "How many times does {letter} occur in {word}?",
    "How often does {letter} appear in {word}?",
    "How often does the letter {letter} occur in the word {word}?",
    "How many of the letter {letter} are in {word}?",
    "How many letters {letter} does {word} have?",
    "how many {letter} in {word}",
    "how many {letter}'s in {word}",
    "how many {letter} are in {word}",
    "how many times is {letter} in {word}",
    "Count the {letter} in {word}.",
    "Count the letter {letter} in {word}.",
    "Count the letter {letter} in the word {word}",
    "Count how often {letter} is in {word}.",
    "Count {letter} in {word}",
    "count the {letter}'s in {word}",
    "Please count the {letter} in {word}.",
    "Can you count the letter {letter} in {word}?",
    "Could you tell me how many {letter} are in {word}?",
    "Tell me how many {letter} are in {word}.",
    "Tell me the number of {letter} in {word}.",
    "What is the number of {letter} in {word}?",
    "Find the number of {letter} in the word {word}.",
    "In {word}, how many {letter} are there?",
    "In the word {word}, how many times does {letter} appear?",
    "Look at the word {word}. How many {letter} does it have?",
    "Given the word {word}, count the letter {letter}.",
    "The word is {word}. How many {letter}?",
    "Does {word} have a {letter}? How many?",
    "单词 {word} 里有几个 {letter}？",
    "单词 {word} 中有多少个字母 {letter}？",
    "字母 {letter} 在 {word} 中出现了几次？",
    "请数一数 {word} 里有几个 {letter}。",
    "在单词 {word} 里, {letter} 出现几次？",
)
SPELLINGS = (
    "Spell the word {word}",
    "Spell the word {word}.",
    "Spell {word}",
    "How do you spell {word}?",
    "Please spell {word}.",
    "Spell out {word} letter by letter.",
    "Which letters make up the word {word}?",
    "What are the letters of {word}?",
    "请拼写单词 {word} 。",
)


# ---- words ---------------------------------------------------------------------------------------


def stem(word: str) -> str:
    """Roughly the part that a word shares with its inflected forms, so that `counted` is not held
    out while `counting` is trained on.
    """
    for suffix in ("ing", "ed", "es", "ly", "s"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word.removesuffix(suffix)
            break
    if len(word) > 3 and word[-1] == word[-2]:  # stopp(ed) -> stop
        word = word[:-1]
    if len(word) > 3 and word[-1] == "e":  # make, mak(ing)
        word = word[:-1]
    return word[:-1] + "i" if word.endswith("y") else word  # city, citi(es)


def word_split(word: str) -> str:
    """The one split that a word and its inflected forms belong to."""
    return split_of("word", stem(word))


def word_list() -> list[str]:
    """All usable words, sorted: of <base>/tasks/words/*.txt, else those of a corpus with three
    occurrences or more (the first corpus that was counted, else the first by name).
    """
    home = get_base_dir() / "tasks"
    files = sorted((home / "words").glob("[!.]*.txt"))
    words = _words_of_files(files) if files else _words_of_corpus(home / "corpus_words")
    if len(words) < 100:
        source = ", ".join(map(str, files)) if files else "the corpus"
        raise MissingData(
            f"{source} holds only {len(words)} words of 3 to 12 letters a-z: put a word list, one "
            f"a line, into {home / 'words'}/"
        )
    return words


def _words_of_files(files: Sequence[Path]) -> list[str]:
    lines = (
        line.strip() for path in files for line in path.read_text(encoding="utf-8-sig").splitlines()
    )
    return sorted({line for line in lines if WORD.fullmatch(line)})


def _words_of_corpus(cache: Path) -> list[str]:
    present = map(dataset.find_dataset, dataset.present_datasets())
    corpora = [corpus for corpus in present if corpus.tokenizer_fingerprint is None]  # else ids
    if not corpora:
        raise MissingData(
            "no words for the spelling tasks: put a list, one a line, into "
            f"{cache.parent / 'words'}/, "
            f"or build a corpus with `{dataset.BUILD_PYDOCS}`"
        )
    files = {cache / f"{corpus.folder.name}.json": corpus for corpus in corpora}
    # A corpus that was counted comes first: one that is added later must not change the tasks.
    for path, corpus in files.items():
        if path.is_file():
            cached = json.loads(path.read_text(encoding="utf-8"))
            if cached["fingerprint"] == corpus.fingerprint:
                return cached["words"]
    path, corpus = next(iter(files.items()))
    words = count_words(corpus.iter_documents("train"))
    atomic_write(path, json.dumps({"fingerprint": corpus.fingerprint, "words": words}))
    return words


def count_words(documents: Iterable[str]) -> list[str]:
    """The words that stand at least MIN_OCCURRENCES times, in lower case and free of digits and
    underscores, in the documents; sorted.
    """
    counts: Counter[str] = Counter()
    read = 0
    for text in documents:
        counts.update(re.findall(r"(?<![\w'])[a-z]{3,12}(?![\w'])", text, flags=re.ASCII))
        read += len(text)
        if read > CORPUS_CHARS:
            break
    return sorted(word for word, count in counts.items() if count >= MIN_OCCURRENCES)


@functools.lru_cache(maxsize=8)
def _split_words(_base: Path, split: str) -> tuple[str, ...]:
    return tuple(word for word in word_list() if word_split(word) == split)


def words_of(split: str) -> tuple[str, ...]:
    """The words of one split, sorted. Raises MissingData if there is neither a word list nor a
    corpus.
    """
    return _split_words(get_base_dir(), split)


def vocabulary_pieces(tokenizer: Any) -> list[str]:
    """The tokens of only a-z, after an optional space: the pieces of made-up words."""
    texts = {
        tokenizer.decode([i]).removeprefix(" ")
        for i in range(tokenizer.get_vocab_size() - len(tokenizer.get_special_tokens()))
    }
    return sorted(text for text in texts if re.fullmatch("[a-z]{1,9}", text))


class _WordTask(GeneratedTask):
    """Draws words; in training a third of them are made-up strings of vocabulary pieces (of letters
    without a tokenizer), so that rare tokens are copied as often as common ones."""

    @functools.cached_property
    def _pieces(self) -> list[str]:
        return list(LETTERS) if self.tokenizer is None else vocabulary_pieces(self.tokenizer)

    def num_examples(self) -> int:
        words_of(self.split)  # raises MissingData before training starts if there are none
        return super().num_examples()

    def fingerprint(self) -> str:
        words = "\n".join([super().fingerprint(), *words_of(self.split)])
        return hashlib.sha256(words.encode()).hexdigest()[:16]

    def word(self, rng: random.Random) -> str:
        if rng.random() >= INVENTED or self.split != "train":
            return rng.choice(words_of(self.split))
        while True:
            word = "".join(
                rng.choice(self._pieces)
                for _ in range(rng.randint(1, 4) if len(self._pieces) > 26 else rng.randint(3, 8))
            )
            # a real held-out word may come about by chance
            if WORD.fullmatch(word) and word_split(word) == self.split:
                return word


# ---- the tasks -----------------------------------------------------------------------------------


def call(word: str, letter: str) -> str:
    return f"' {word}'.count('{letter}')"


class SpellingBee(_WordTask):
    """How many {letter} are in {word}? Two letters of three are drawn from the word itself."""

    rewarded = needs_tool = True

    def make(self, rng: random.Random) -> Conversation:
        word = self.word(rng)
        letter = rng.choice(word if rng.random() < 2 / 3 else LETTERS)
        count = word.count(letter)
        answer = [*tool_parts(call(word, letter), str(count)), text_part(f"The answer is {count}.")]
        return chat(
            rng.choice(QUESTIONS).format(word=word, letter=letter),
            answer,
            word=word,
            letter=letter,
            count=count,
        )

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:
        """Whether the last number said is the count."""
        return last_number(visible_text(completion)) == conversation["count"]


class SimpleSpelling(_WordTask):
    """Spell the word apple: a,p,p,l,e"""

    def make(self, rng: random.Random) -> Conversation:
        word = self.word(rng)
        return chat(rng.choice(SPELLINGS).format(word=word), ",".join(word), word=word)

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:
        """Whether the letters are right, with any separator."""
        said = visible_text(completion).strip().rstrip(".").lower()
        return re.sub(r"[\s,\-]+", ",", said) == ",".join(conversation["word"])
