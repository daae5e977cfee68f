"""Tasks that need no download: questions, accepted answers, and splits without leaks."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tasks import arithmetic, identity, pydocs, spellingbee
from tasks.arithmetic import Arithmetic
from tasks.common import SPLITS, MissingData, is_chinese, plain, split_of, tool_parts
from tasks.identity import Identity
from tasks.medley import LONG, Medley
from tasks.pydocs import PyDocs
from tasks.registry import build_mixture, load_task
from tasks.smalltalk import SmallTalk, has_word
from tasks.spellingbee import (
    SimpleSpelling,
    SpellingBee,
    count_words,
    stem,
    word_list,
    word_split,
    words_of,
)
from zangchat.dataset.manifest import write_dataset
from zangchat.engine.tools import use_calculator
from zangchat.tokenizer import RustBPETokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = Path(spellingbee.__file__).read_text(encoding="utf-8") + Path(identity.__file__).read_text(
    encoding="utf-8"
)


@pytest.fixture
def words(base_dir: Path) -> list[str]:
    """A word list in the base directory: 3,000 words of an artificial language."""
    generated = sorted(
        {
            a + b + c
            for a in ("pro", "st", "gr", "di", "m", "re", "fil")
            for b in LETTERS
            for c in ("ent", "ight", "ab", "ow", "rect", "een", "s", "ing")
        }
    )
    folder = base_dir / "tasks" / "words"
    folder.mkdir(parents=True)
    (folder / "words.txt").write_text(
        "\n".join([*generated, "Capital", "it's", "xy", "muchtoolongaword"]), encoding="utf-8"
    )
    return generated


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(iter([TEXT] * 2), 1000)


def user_and_answer(conversation):
    user, assistant = conversation["messages"]
    return user["content"], assistant["content"]


@pytest.mark.parametrize(
    "name", ["Arithmetic", "SpellingBee", "SimpleSpelling", "PyDocs", "Identity"]
)
def test_examples_are_deterministic_and_accept_their_own_answers(words, name):
    task, again = load_task(name, "test"), load_task(name, "test")
    count = min(100, len(task))
    for i in range(count):
        assert task[i] == again[i]
        assert task.evaluate(task[i], task[i]["messages"][-1]["content"]) is True
    assert len({str(task[i]) for i in range(count)}) > 0.9 * count


def test_splits_are_fixed_shares_that_depend_only_on_the_item():
    counts = Counter(split_of("thing", i) for i in range(5000))
    assert set(counts) == set(SPLITS)
    assert 0.77 < counts["train"] / 5000 < 0.83 and 0.08 < counts["test"] / 5000 < 0.12
    assert split_of("thing", 1) == split_of("thing", 1)


# ---- arithmetic ----------------------------------------------------------------------------------


def test_calculator_calls_give_the_answers():
    for conversation in Arithmetic(400, "train"):
        question, (call, output, text) = user_and_answer(conversation)
        a, op, b = conversation["operands"]
        assert use_calculator(call["text"]) == output["text"] == str(conversation["result"])
        assert text["text"] == f"The answer is {output['text']}."
        assert conversation["result"] == {"+": a + b, "-": a - b, "*": a * b}[op] >= 0
        assert {str(a), str(b)} <= set(re.findall(r"\d+", question))


def test_operand_pairs_belong_to_one_split():
    pairs = {
        split: {frozenset(c["operands"][::2]) for c in Arithmetic(1500, split)} for split in SPLITS
    }
    assert (
        not pairs["train"] & pairs["test"]
        and not pairs["train"] & pairs["val"]
        and not pairs["val"] & pairs["test"]
    )


def test_both_phrasings_of_a_difference_have_the_same_result(words):
    task = Arithmetic(3000, "train")
    questions = [user_and_answer(c)[0] for c in task if c["operands"][1] == "-"]
    assert any(question.startswith("Subtract") for question in questions) and any(
        question.startswith("Take") for question in questions
    )
    for conversation in task:
        question, _ = user_and_answer(conversation)
        if question.startswith(("Subtract", "Take")):
            smaller, larger = map(int, re.findall(r"\d+", question))
            assert conversation["result"] == larger - smaller


def test_arithmetic_requires_the_number_and_rewards_the_tool():
    task = Arithmetic(1)
    conversation = task[0]
    result = conversation["result"]
    right = f"The answer is {result}."
    for answer, verdict in (
        (right, True),
        (str(result), True),
        (f"{result + 1}", False),
        ("", False),
        (f"{result}{result}", result == 0 and False),
    ):
        assert task.evaluate(conversation, answer) is verdict
    assert task.reward(conversation, right) == 0
    assert (
        task.reward(conversation, [*tool_parts("1+1", "2"), {"type": "text", "text": right}]) == 1
    )
    assert (
        task.reward(
            conversation, [*tool_parts("1+1", "2"), {"type": "text", "text": "The answer is -1."}]
        )
        == 0
    )


def test_phrasings_separate_numbers_from_letters():
    """`x5` has other tokens than `5`. A sum without spaces has only digits and signs."""
    for question in (*arithmetic.QUESTIONS, *sum(arithmetic.IN_WORDS.values(), ())):
        assert not re.search(r"[A-Za-z\u4e00-\u9fff]\{|\}[A-Za-z\u4e00-\u9fff]", question)


# ---- spelling ------------------------------------------------------------------------------------


def test_word_follows_a_space_and_precedes_no_letter():
    for question in (*spellingbee.QUESTIONS, *spellingbee.SPELLINGS):
        assert re.search(r" \{word\}(?![A-Za-z\u4e00-\u9fff'])", question), question
        assert not re.search(r"\{letter\}[A-Za-z\u4e00-\u9fff]|[A-Za-z]\{letter\}", question), (
            question
        )
    assert len(set(spellingbee.QUESTIONS)) >= 40


def test_tool_call_counts_the_letter_of_the_question(words):
    inside = 0
    for conversation in SpellingBee(600, "train"):
        question, (call, output, text) = user_and_answer(conversation)
        word, letter = conversation["word"], conversation["letter"]
        assert f" {word}" in question and letter in question
        assert call["text"] == f"' {word}'.count('{letter}')"
        assert (
            use_calculator(call["text"])
            == output["text"]
            == str(word.count(letter))
            == str(conversation["count"])
        )
        assert text["text"] == f"The answer is {word.count(letter)}."
        inside += letter in word
    assert inside > 350


def audit(tokenizer: RustBPETokenizer, n: int = 1000, split: str = "test") -> float:
    """The share of `n` conversations whose prompt and gold call both contain the word's tokens."""
    good = 0
    task = SpellingBee(size=n, split=split)
    for conversation in map(task.get_example, range(n)):
        prompt, answer = (message["content"] for message in conversation["messages"])
        word = tokenizer.encode(" " + conversation["word"])
        good += contains(tokenizer.encode(prompt), word) and contains(
            tokenizer.encode(answer[0]["text"]), word
        )
    return good / n


def contains(tokens: Sequence[int], run: Sequence[int]) -> bool:
    """Whether `run` is in `tokens` without a gap."""
    return any(
        list(tokens[i : i + len(run)]) == list(run) for i in range(len(tokens) - len(run) + 1)
    )


def test_prompt_and_call_share_the_tokens_of_every_word(words, tokenizer):
    assert audit(tokenizer, 300) == 1.0
    assert audit(tokenizer, 300, split="train") == 1.0


def test_audit_detects_a_call_without_the_space(words, tokenizer, monkeypatch):
    """The audit detects a form of the call that splits words differently."""
    monkeypatch.setattr(spellingbee, "call", lambda word, letter: f"'{word}'.count('{letter}')")
    assert audit(tokenizer, 300) < 0.8


def test_contains():
    assert (
        contains([1, 2, 3, 4], [2, 3]) and not contains([1, 2, 3, 4], [2, 4]) and contains([1], [1])
    )


def test_examples_are_short(words, tokenizer):
    lengths = [len(tokenizer.render_conversation(c)[0]) for c in SpellingBee(200, "test")]
    assert sorted(lengths)[100] <= 45 and max(lengths) <= 80


def test_words_and_their_inflected_forms_belong_to_one_split(words):
    for a, b in (
        ("count", "counting"),
        ("make", "making"),
        ("stop", "stopped"),
        ("city", "cities"),
        ("box", "boxes"),
        ("quick", "quickly"),
    ):
        assert stem(a) == stem(b) and word_split(a) == word_split(b)
    parts = [set(words_of(split)) for split in SPLITS]
    assert sum(map(len, parts)) == len(words) and set.union(*parts) == set(words)
    seen = {c["word"] for c in SpellingBee(3000, "train")}
    assert not {stem(word) for word in seen} & {stem(word) for word in words_of("test")}
    assert not {stem(word) for word in seen} & {stem(word) for word in words_of("val")}


def test_a_word_list_may_begin_with_a_bom(words, base_dir):
    path = base_dir / "tasks" / "words" / "words.txt"
    path.write_text("\n".join(words), encoding="utf-8-sig")
    assert word_list() == words


def test_a_third_of_the_training_words_is_invented(words, tokenizer):
    known = set(words)
    for extra in ({}, {"tokenizer": tokenizer}):
        invented = [c["word"] not in known for c in SpellingBee(900, "train", **extra)]
        assert 0.25 < sum(invented) / 900 < 0.4
    assert all(c["word"] in known for c in SpellingBee(300, "test", tokenizer=tokenizer))
    pieces = spellingbee.vocabulary_pieces(tokenizer)
    assert (
        set(LETTERS) <= set(pieces)
        and all(re.fullmatch("[a-z]+", piece) for piece in pieces)
        and len(pieces) > 200
    )


def test_spelling_requires_the_letters_in_order(words):
    task = SimpleSpelling(1, "test")
    conversation = task[0]
    word = conversation["word"]
    assert user_and_answer(conversation)[1] == ",".join(word)
    for answer in (
        ",".join(word),
        " ".join(word),
        "-".join(word),
        ", ".join(word) + ".",
        ",".join(word).upper(),
    ):
        assert task.evaluate(conversation, answer), answer
    for answer in (word, ",".join(word[:-1]), ",".join(word[::-1] + "q"), ""):
        assert not task.evaluate(conversation, answer), answer


def test_spelling_bee_rewards_the_tool(words):
    task = SpellingBee(1, "test")
    conversation = task[0]
    right = f"The answer is {conversation['count']}."
    assert task.evaluate(conversation, right) and task.reward(conversation, right) == 0
    assert task.reward(conversation, [*tool_parts("1", "1"), {"type": "text", "text": right}]) == 1
    assert not task.evaluate(conversation, f"The answer is {conversation['count'] + 1}.")


def test_words_come_from_the_corpus_without_a_list(base_dir):
    invented = [
        a + b
        for a in ("bra", "clo", "dru", "fla", "gri")
        for b in ("mble", "nder", "sting") + tuple(f"{x}ent" for x in LETTERS)
    ]
    text = " ".join(invented)
    manifest = {"tokenizer": "of these token ids"}
    write_dataset(
        base_dir / "base_data" / "a-tokens", "a-tokens", ["1 2 3"], ["validation"], manifest
    )
    write_dataset(
        base_dir / "base_data" / "own",
        "own",
        [f"{text} onlyonce", f"{text}. Upper_case x1y", text],
        ["validation"],
    )
    found = [word for split in SPLITS for word in words_of(split)]
    assert sorted(found) == sorted(invented)
    cached = list((base_dir / "tasks" / "corpus_words").glob("*.json"))
    assert [path.name for path in cached] == ["own.json"]
    assert count_words(["aaa aaa aaa bbb bbb ccc_ ccc_ ccc_ ddd1 ddd1 ddd1 don't don't don't"]) == [
        "aaa"
    ]


def corpus_of(base_dir: Path, name: str, beginning: str) -> None:
    words = " ".join(beginning + a + b for a in LETTERS for b in LETTERS)
    write_dataset(base_dir / "base_data" / name, name, [words] * 3, ["validation"])


def test_a_corpus_that_is_added_later_changes_no_words(base_dir):
    corpus_of(base_dir, "pydocs", "word")
    before = spellingbee.word_list()
    corpus_of(base_dir, "another", "other")
    assert spellingbee.word_list() == before


def test_the_fingerprint_of_a_word_task_changes_with_the_words(base_dir):
    folder = base_dir / "tasks" / "words"
    folder.mkdir(parents=True)
    listed = [f"word{a}{b}" for a in LETTERS for b in LETTERS]
    found = set()
    for words in (listed, [word.replace("word", "other") for word in listed], listed):
        (folder / "own.txt").write_text("\n".join(words), encoding="utf-8")
        spellingbee._split_words.cache_clear()
        found.add(SpellingBee(10).fingerprint())
    assert len(found) == 2


def test_missing_words_are_reported_with_a_remedy(base_dir):
    with pytest.raises(MissingData, match=r"zangchat\.dataset"):
        build_mixture("spellingbee:4")
    (base_dir / "tasks" / "words").mkdir(parents=True)
    (base_dir / "tasks" / "words" / "few.txt").write_text("one\ntwo\n", encoding="utf-8")
    with pytest.raises(MissingData, match="only 2 words"):
        build_mixture("spellingbee:4")


# ---- identity ------------------------------------------------------------------------------------


def test_there_are_many_phrasings_of_many_intents_in_two_languages():
    about_itself = [example for example in identity.examples() if example.intent != "ordinary"]
    bases = {example.base for example in about_itself}
    assert len({example.intent for example in about_itself}) >= 15 and len(bases) >= 300
    assert sum(is_chinese(base) for base in bases) >= 80
    train = Identity("train")
    share = sum(c["intent"] == "ordinary" for c in train) / len(train)
    assert 0.1 < share < 0.3 and len(train) > 1000


def test_answers_about_itself_begin_with_its_name_and_are_short(tokenizer):
    for example in identity.examples():
        if example.intent == "ordinary":
            assert "zangchat" not in example.answer.lower()
        else:
            assert re.match(r"I am zangchat\b|我是 zangchat", example.answer), example
            assert len(tokenizer.encode(example.answer)) <= 40, example
            assert is_chinese(example.answer) == is_chinese(example.base)


def test_question_and_its_variants_belong_to_one_split():
    seen = {split: {plain(e.base) for e in Identity(split).examples} for split in SPLITS}
    questions = {split: {e.question for e in Identity(split).examples} for split in SPLITS}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not seen[a] & seen[b] and not questions[a] & questions[b]
    for split in SPLITS:
        own_questions = [e.question for e in Identity(split).examples]
        assert len(own_questions) == len(set(own_questions))


def test_no_question_has_two_different_answers():
    answers: dict[str, set[str]] = {}
    for example in identity.examples():
        answers.setdefault(plain(example.question), set()).add(example.answer)
    assert {question: found for question, found in answers.items() if len(found) > 1} == {}


def test_small_talk_has_no_question_of_identity_held_out_or_answered_otherwise():
    """The laptop's model learns both."""
    talk = {plain(e.question): (split, e) for split in SPLITS for e in SmallTalk(split).examples}
    for example in Identity("train").examples:
        if plain(example.question) in talk:
            split, other = talk[plain(example.question)]
            assert split != "test", example
            assert any(has_word(example.answer, word) for word in other.needed), example


def test_identity_requires_the_name_only_in_answers_about_itself():
    task = Identity("train")
    about = next(c for c in task if c["intent"] == "name")
    other = next(c for c in task if c["intent"] == "ordinary")
    assert task.evaluate(about, "My name is Zangchat!") and not task.evaluate(
        about, "I am ChatGPT."
    )
    assert task.evaluate(other, "Paris.") and not task.evaluate(other, "I am zangchat.")


def test_frozen_phrasings_are_only_in_the_test_split():
    frozen = identity.heldout_questions()
    assert [example.question for example in Identity("test").examples] == frozen and len(
        frozen
    ) == 40
    learned = {
        plain(text)
        for split in ("train", "val")
        for e in Identity(split).examples
        for text in (e.question, e.base)
    }
    assert not learned & {plain(question) for question in frozen}


# ---- pydocs --------------------------------------------------------------------------------------


def test_answers_are_the_first_sentences_of_docstrings():
    docs = {doc.name: doc for doc in pydocs.all_docs()}
    assert len(docs) > 2000
    assert (
        docs["json.dumps"].answer.startswith("Serialize ``obj``".replace("`", ""))
        and docs["json.dumps"].kind == "function"
    )
    assert docs["len"].answer == "Return the number of items in a container."
    assert docs["math.sqrt"].answer == "Return the square root of x."
    assert (
        docs["str.join"].kind == "function"
        and docs["argparse.ArgumentParser"].kind == "class"
        and docs["textwrap"].kind == "module"
    )
    for doc in docs.values():
        assert (
            pydocs.MIN_ANSWER <= len(doc.answer) <= pydocs.MAX_ANSWER + 1
            and "\n" not in doc.answer
            and doc.answer[-1] in ".!?"
        )
        assert not any(part.startswith("_") for part in doc.name.split("."))


@pytest.mark.parametrize(
    ("docstring", "answer"),
    [
        ("Return the sum. And more.\n\nDetails.", "Return the sum."),
        ("Return a\n    longer thing, e.g. this one\n", "Return a longer thing, e.g. this one."),
        ("f(x) -> y\n\nReturn the value of f.", "Return the value of f."),
        ("f(x[, y]) -- Return the value of f.", "Return the value of f."),
        ("D.pop(k) -> v, remove it", None),
        ("Return ``x`` as :class:`~a.B` does.", "Return x as a.B does."),
        ("Short.", None),
        ("lower case words only", None),
        ("Takes these arguments:", None),
        ("Retourne la clé donnée.", None),
        ("", None),
    ],
)
def test_first_sentence(docstring, answer):
    assert pydocs.first_sentence(docstring) == answer


def test_name_belongs_to_one_split_and_is_in_its_question():
    names = {split: [c["name"] for c in PyDocs(split)] for split in SPLITS}
    assert (
        sum(map(len, names.values())) == len(set().union(*names.values())) == len(pydocs.all_docs())
    )
    for conversation in PyDocs("test"):
        assert conversation["name"] in user_and_answer(conversation)[0]


def test_pydocs_accepts_most_of_the_words():
    task = PyDocs("train")
    conversation = next(c for c in task if len(user_and_answer(c)[1].split()) > 5)
    answer = user_and_answer(conversation)[1]
    assert task.evaluate(conversation, answer.upper()) and task.evaluate(
        conversation, answer.rsplit(" ", 1)[0]
    )
    assert not task.evaluate(
        conversation, "Nothing of the kind, sorry about that"
    ) and not task.evaluate(conversation, "")


# ---- medley --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_a_medley_joins_parts_of_its_split_and_judges_the_last(words, split):
    conversations = list(Medley(size=200, split=split))
    assert {c["judge"] for c in conversations} == set(Medley(split=split).parts)
    for conversation in conversations:
        *before, asked, answer = conversation["messages"]
        assert before and [m["role"] for m in before] == ["user", "assistant"] * (len(before) // 2)
        task = Medley(split=split)
        assert task.evaluate(conversation, answer["content"]), conversation
        if conversation["judge"] != "Identity":  # which accepts any answer to another question
            assert not task.evaluate(conversation, "Hm."), conversation
        if conversation["judge"] == "SmallTalk":
            held = {example.question for example in task.parts["SmallTalk"].examples}
            assert asked["content"] in held


def test_a_medley_has_one_story_at_most(words):
    stories = [
        [m for m in conversation["messages"] if len(str(m["content"])) > 300]
        for conversation in Medley(size=200)
    ]
    assert max(map(len, stories)) == 1 and len(LONG) > 1


def test_a_medley_without_words_is_an_error(base_dir):
    with pytest.raises(MissingData):
        build_mixture("medley:4")
