"""The crate splits, trains and encodes like the slow reference and tiktoken, and never panics."""

import contextlib
import copy
import functools
import gc
import inspect
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

import rustbpe
from tests.reference import bpe
from zangchat.tokenizer import SPLIT_PATTERN

pytestmark = pytest.mark.skipif(
    not hasattr(rustbpe.Tokenizer, "from_ranks"),
    reason="PyPI's rustbpe stands in for the crate here",
)

BYTES = [(bytes([i]), i) for i in range(256)]
# Every two ASCII characters are a token, so that the ids show where pieces end.
PAIRS = BYTES + [(bytes([i >> 7, i & 127]), 256 + i) for i in range(1 << 14)]
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SLOW_PATTERN = GPT2_PATTERN + "|(?!)"  # not one of those split by hand: the regex engine's
ODD_CHARACTERS = "aZſé中한1٣²½ \t\n\r\u00a0\u3000\u0085'lLvVeErRsStTdDmMkK!?.-_\"\u0301😀\u200d"
odd_texts = st.text(alphabet=ODD_CHARACTERS, max_size=40) | st.text(max_size=40).filter(
    lambda s: not any("\ud800" <= c < "\ue000" for c in s)
)
few_letters = st.text(alphabet="ab ", max_size=30)


def train(texts: list[Any], vocab_size: int, **options: Any) -> rustbpe.Tokenizer:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **options)
    return tokenizer


def tokens_of(tokenizer: rustbpe.Tokenizer) -> list[bytes]:
    return [token for token, _ in tokenizer.get_mergeable_ranks()]


def as_tiktoken(tokenizer: rustbpe.Tokenizer) -> tiktoken.Encoding:
    ranks = dict(tokenizer.get_mergeable_ranks())
    return tiktoken.Encoding(
        name="test", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens={}
    )


# ---- splitting


@pytest.mark.parametrize(
    ("before", "after"), [("", ""), ("a", "b"), (" ", "a"), ("'", "l"), ("1", " \n"), ("!", "\r\n")]
)
def test_splits_every_code_point_in_context_like_regex(before: str, after: str) -> None:
    # regex and the crate may know different Unicode versions: skip code points new to this Python
    known = [
        chr(c)
        for c in range(sys.maxunicode + 1)
        if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")
    ]
    splitter = rustbpe.Tokenizer.from_ranks(BYTES, SPLIT_PATTERN)
    pattern = regex.compile(SPLIT_PATTERN)
    for start in range(0, len(known), 4096):
        text = "\n-a".join(f"{before}{c}{after}" for c in known[start : start + 4096])
        assert splitter.split(text) == pattern.findall(text)


@pytest.mark.parametrize("character_class", [r"\p{L}", r"\p{N}", r"\s", r"(?i:[sdmt])"])
def test_character_classes_equal_those_of_tiktoken(character_class: str) -> None:
    text = "".join(chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    ours = rustbpe.Tokenizer.from_ranks(BYTES, character_class)
    assert ours.encode(text) == as_tiktoken(ours).encode_ordinary(text)


@settings(max_examples=300, deadline=None)
@given(odd_texts)
def test_splits_odd_texts_like_regex(text: str) -> None:
    text = "".join(c for c in text if unicodedata.category(c) != "Cn")
    for digits in ("{1,1}", "{1,2}", "{1,3}"):
        pattern = SPLIT_PATTERN.replace("{1,2}", digits)
        assert rustbpe.Tokenizer.from_ranks(BYTES, pattern).split(text) == regex.findall(
            pattern, text
        )


# ---- training


@settings(max_examples=60, deadline=None)
@given(st.lists(few_letters | odd_texts, max_size=8), st.integers(256, 330))
def test_merges_equal_the_reference(texts: list[str], vocab_size: int) -> None:
    texts = ["".join(c for c in text if unicodedata.category(c) != "Cn") for text in texts]
    trained = train(texts, vocab_size, pattern=SPLIT_PATTERN)
    assert tokens_of(trained) == bpe.train(texts, vocab_size, SPLIT_PATTERN)


def test_merges_on_python_source_equal_the_reference() -> None:
    texts = [inspect.getsource(module)[:12_000] for module in (random, signal, threading)]
    assert tokens_of(train(texts, 600, pattern=SPLIT_PATTERN)) == bpe.train(
        texts, 600, SPLIT_PATTERN
    )


def test_merges_equal_the_package_on_pypi() -> None:
    """Recorded from rustbpe 0.1.0: ties go to the smallest pair of ids.

    Training ends when no pair is left.
    """
    merges = [b"el", b"hel", b"lo", b"hello", b" \xc3", b" hello", b" \xc3\xa9"]
    trained = train(["hello hello é"], 270)
    assert trained.get_mergeable_ranks()[256:] == [
        (token, 256 + i) for i, token in enumerate(merges)
    ]
    assert trained.vocab_size == 263
    assert trained.encode("hello hello") == [259, 261]
    assert trained.batch_encode(["ab", "hello"]) == [[97, 98], [259]]
    assert trained.decode([259, 261]) == "hello hello"
    assert trained.get_pattern() == SPLIT_PATTERN.replace("{1,2}", "{1,3}")


WITHOUT_THREADS = """
import rustbpe
texts = [f"the cat {i % 97} sat on the mat {i} " * 50 for i in range(3000)]
tokenizer = rustbpe.Tokenizer()
tokenizer.train_from_iterator(iter(texts), 1000, num_threads=2)
ids, offsets = tokenizer.encode_documents(texts, num_threads=2)
text, _ = tokenizer.decode_documents(ids, offsets, num_threads=2)
assert text.tobytes().decode() == "".join(texts)
print(len(tokenizer.get_mergeable_ranks()), ids.sum())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="another system may grant a stack of any size")
def test_caller_does_all_the_work_without_threads() -> None:
    """No thread can start if its stack is larger than the address space."""
    results = set()
    for stack in ({}, {"RUST_MIN_STACK": str(1 << 47)}):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_THREADS],
            env={**os.environ, **stack},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        results.add(done.stdout)
    assert len(results) == 1


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_result_depends_only_on_the_documents(data: st.DataObject) -> None:
    texts = data.draw(st.lists(few_letters | odd_texts, max_size=30))
    expected = tokens_of(train(texts, 300))
    shuffled = data.draw(st.permutations(texts))
    items: list[Any] = []  # the same documents, as str or in Arrow arrays of any kind
    while shuffled:
        group = [shuffled.pop() for _ in range(min(len(shuffled), data.draw(st.integers(1, 5))))]
        kinds = [pa.string(), pa.large_string(), pa.string_view()]
        array = pa.array([None, *group, None], data.draw(st.sampled_from(kinds)))
        forms = (
            [*group],
            [array],
            [array[1:], pa.array([], pa.string())],
            [pa.chunked_array([array[:1], array[1:2], array[2:]])],
        )
        items += data.draw(st.sampled_from(forms))
    options = {
        "num_threads": data.draw(st.integers(0, 4)),
        "buffer_size": data.draw(st.sampled_from([1, 2, 7, 8192])),
    }
    assert tokens_of(train(items, 300, **options)) == expected


def test_long_documents_are_counted_in_parts() -> None:
    rng = random.Random(2)
    lines = [
        "".join(rng.choices("abcde  \n\t1é中", k=60)) + "\n" + rng.choice("ab!")
        for _ in range(40_000)
    ]
    text = "".join(lines)  # 3 MB
    # by the regex engine, in one part
    expected = tokens_of(train([text], 300, pattern=f"(?:{SPLIT_PATTERN})", num_threads=1))
    assert tokens_of(train([text], 300, pattern=SPLIT_PATTERN)) == expected
    assert (
        tokens_of(train([pa.array(["a", text])], 300, pattern=SPLIT_PATTERN, num_threads=3))
        == expected
    )
    assert tokens_of(train(["a" * 5_000_000], 260)) == [
        *(bytes([i]) for i in range(256)),
        b"a" * 2,
        b"a" * 4,
        b"a" * 8,
        b"a" * 16,
    ]


def test_training_on_one_document_of_100_megabytes() -> None:
    part = "It was the best of times, it was the worst of times;\n"
    count = 100_000_000 // len(part)
    assert tokens_of(train([part * count], 290)) == tokens_of(train([part], 290))


def test_arrow_memory_is_kept_while_in_use_and_then_released() -> None:
    gc.collect()
    before = pa.total_allocated_bytes()
    words = [f"word{i}" for i in range(1000)]

    def groups() -> Iterator[Any]:
        for start in range(0, 1000, 10):
            yield pa.array(words[start : start + 10] * 50)  # no other reference keeps it alive

    trained = rustbpe.Tokenizer()
    trained.train_from_iterator(groups(), 600, num_threads=2)
    assert tokens_of(trained) == tokens_of(train([word for word in words for _ in range(50)], 600))
    with pytest.raises(TypeError, match="text 50000 is a int"):
        trained.train_from_iterator(itertools.chain(groups(), [1]), 600)
    gc.collect()
    assert pa.total_allocated_bytes() <= before


def test_custom_pattern() -> None:
    texts = ["it's 12345 o'clock", "and all is well"]
    trained = train(texts, 280, pattern=GPT2_PATTERN)
    assert tokens_of(trained) == bpe.train(texts, 280, GPT2_PATTERN)
    assert trained.split("it's 12345") == ["it", "'s", " 12345"]


def test_training_on_no_text_yields_the_bytes() -> None:
    for texts in ([], [""], ["", "a"]):
        assert tokens_of(train(texts, 300)) == [bytes([i]) for i in range(256)]


def test_new_tokenizer_has_the_bytes() -> None:
    assert rustbpe.Tokenizer().encode("hé") == [104, 0xC3, 0xA9]


def in_a_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return work(*arguments), run in a fresh process, so that its memory can be measured.

    In a used process a thread gets one of glibc's arenas by chance, and each keeps up to 3 MB.
    """
    arenas = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
    with (
        mock.patch.dict(os.environ, arenas),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        return pool.submit(work, *arguments).result()


def memory(field: str) -> int:
    """Memory of this process in bytes: VmRSS is the current one, VmHWM the peak.

    ru_maxrss would include the parent process.
    """
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


reads_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="read from Linux's /proc"
)


def sizes_over_trainings(as_arrow: bool) -> list[int]:
    rng = random.Random(3)
    # 0.5 MB
    texts = [" ".join(f"{rng.randrange(10_000)}é" for _ in range(20_000)) for _ in range(4)]
    tokenizer = rustbpe.Tokenizer()
    sizes = []
    for _ in range(40):
        tokenizer.train_from_iterator(
            [pa.array(texts)] if as_arrow else iter(texts), 1000, num_threads=2
        )
        with pytest.raises(UnicodeEncodeError):
            tokenizer.train_from_iterator([*texts, "\ud800"], 1000)
        sizes.append(memory("VmRSS"))
    return sizes


@reads_proc
@pytest.mark.parametrize("as_arrow", [False, True])
def test_memory_does_not_grow_over_repeated_trainings(as_arrow: bool) -> None:
    sizes = in_a_fresh_process(sizes_over_trainings, as_arrow)
    # a leak of one text per training would add 10 MB
    assert max(sizes[20:]) - max(sizes[5:20]) < 2_000_000


def test_encoding_does_not_grow_the_texts() -> None:
    """Python would keep a UTF-8 copy with each text."""
    texts = [f"{i} élan vital " * 4000 for i in range(10)]
    before = [sys.getsizeof(text) for text in texts]
    rustbpe.Tokenizer().encode_documents(texts)
    assert [sys.getsizeof(text) for text in texts] == before


def growth_over_a_long_text() -> int:
    text = "the same words again and again\n" * 40_000  # 1.2 MB
    train([text], 260)
    before = memory("VmHWM")
    rustbpe.Tokenizer().train_from_iterator((text + str(i) for i in range(150)), 260)
    return memory("VmHWM") - before


@reads_proc
def test_memory_does_not_grow_with_the_text() -> None:
    assert in_a_fresh_process(growth_over_a_long_text) < 100_000_000  # the text is 180 MB long


# ---- encoding


@settings(max_examples=150, deadline=None)
@given(st.lists(few_letters | odd_texts, max_size=6), odd_texts | few_letters)
def test_encodes_like_tiktoken_and_the_reference(texts: list[str], text: str) -> None:
    trained = train([*texts, text[::2]], 290, pattern=SPLIT_PATTERN)
    ids = trained.encode(text)
    assert ids == as_tiktoken(trained).encode_ordinary(text)
    if all(unicodedata.category(c) != "Cn" for c in text):
        assert ids == bpe.encode(text, dict(trained.get_mergeable_ranks()), SPLIT_PATTERN)
    assert trained.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(alphabet="abc", min_size=2, max_size=6), unique=True, max_size=20),
    st.lists(st.integers(0, 200), max_size=300),
)
def test_encodes_with_any_ranks_like_the_reference(tokens: list[str], letters: list[int]) -> None:
    """Tokens that no merge yields only match whole pieces.

    Long and short pieces use different code paths.
    """
    text = "".join("abc"[i % 3] if i else " " for i in letters)
    ranks = dict(BYTES) | {token.encode(): 256 + i for i, token in enumerate(tokens)}
    encoder = rustbpe.Tokenizer.from_ranks(list(ranks.items()), SPLIT_PATTERN)
    assert encoder.encode(text) == bpe.encode(text, ranks, SPLIT_PATTERN)
    assert encoder.encode(text) == as_tiktoken(encoder).encode_ordinary(text)


def test_encodes_random_texts_with_random_ranks_like_tiktoken() -> None:
    """Pieces of all lengths, cached and not; words repeat, as in real text.

    Run it with FUZZ_CASES=1000000 from time to time.
    """
    rng = random.Random(int(os.environ.get("FUZZ_SEED", "1")))
    alphabets = ["ab", "abc ", "aA1 \n'", ODD_CHARACTERS, "的一是不了人我在有他 "]

    def word(longest: int) -> str:
        letters = rng.choice(alphabets)
        return "".join(
            rng.choice(letters) * rng.choice((1, 1, 1, 2, 3, 9))
            for _ in range(rng.randint(1, longest))
        )

    for _ in range(int(os.environ.get("FUZZ_CASES", "8000")) // 1000):
        tokens = {word(6).encode()[: rng.randint(1, 18)] for _ in range(rng.choice((3, 30, 300)))}
        new = sorted(tokens - dict(BYTES).keys())
        ranks = BYTES + list(zip(rng.sample(new, len(new)), itertools.count(256)))
        tokenizer = rustbpe.Tokenizer.from_ranks(ranks, SPLIT_PATTERN)
        words = [word(rng.choice((3, 8, 20, 150))) for _ in range(200)]
        texts = ["".join(rng.choices(words, k=rng.randint(0, 5))) for _ in range(1000)]
        expected = as_tiktoken(tokenizer).encode_ordinary_batch(texts, num_threads=1)
        assert tokenizer.batch_encode(texts, num_threads=1) == expected
        ids, offsets = tokenizer.encode_documents(texts, num_threads=2)
        assert [document.tolist() for document in np.split(ids, offsets[1:-1])] == expected
        data, ends = tokenizer.decode_documents(ids, offsets, num_threads=2)
        assert [document.tobytes().decode() for document in np.split(data, ends[1:-1])] == texts


def test_golden_ids() -> None:
    trained = train(["low lower lowest newer wider 2024 的的的"] * 3, 275, pattern=SPLIT_PATTERN)
    merges = "er lo _ 的 low .low 的的 .n .w .的的 20 24 der es ew ider .lower .lowes .new".replace(
        ".", "\0"
    ).split()
    expected = [
        b"\x9a\x84" if merge == "_" else merge.replace("\0", " ").encode() for merge in merges
    ]
    assert tokens_of(trained)[256:] == expected
    assert trained.split("lower 20241的") == ["lower", " ", "20", "24", "1", "的"]
    assert trained.encode("lower newest 20241 的的\n") == [
        260,
        256,
        274,
        269,
        116,
        32,
        266,
        267,
        49,
        265,
        10,
    ]


def test_encoding_a_megabyte_of_one_letter() -> None:
    trained = train(["a" * 1000], 270)
    ids = trained.encode("a" * 1_000_003)
    assert trained.decode(ids) == "a" * 1_000_003
    assert len(ids) < 10_000
    assert rustbpe.Tokenizer().encode(" " * 1_000_000) == [32] * 1_000_000


@pytest.mark.slow
def test_encoding_a_document_of_100_megabytes() -> None:
    trained = train(["the same words again and again"], 290)
    text = "the same words again, a\0b and again\n" * 3_000_000
    ids, offsets = trained.encode_documents([text])
    assert offsets.tolist() == [0, len(ids)]
    assert trained.decode_documents(ids, offsets)[0].tobytes() == text.encode()
    letters = trained.encode_documents(["a" * 30_000_000])[0]
    assert trained.decode_documents(letters, [0, len(letters)])[0].tobytes() == b"a" * 30_000_000


def test_documents_are_returned_as_arrays_in_order() -> None:
    trained = train(["some words and more words"], 280)
    texts = [f"words {i} more " * (i % 40) for i in range(3_000)]
    # split among several threads
    texts.append("some é\u00a0words 12, and\n\n more 的的\n words " * 40_000)
    expected = [trained.encode(text) for text in texts]
    for threads in (1, 3, None):
        ids, offsets = trained.encode_documents(texts, num_threads=threads)
        assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
        assert ids.tolist() == [i for document in expected for i in document]
        assert offsets.tolist() == list(itertools.accumulate(map(len, expected), initial=0))
        assert trained.batch_encode(texts, num_threads=threads) == expected
    ids, offsets = trained.encode_documents([])
    assert (ids.tolist(), offsets.tolist()) == ([], [0])


def test_str_of_every_width_is_read_like_its_utf8() -> None:
    """Python stores a str in units of 1, 2 or 4 bytes, as its largest character needs."""
    tokenizer, rng = rustbpe.Tokenizer.from_ranks(PAIRS), random.Random(1)
    letters = [*"ab c" * 12, "\x80", "\xff", "\u0100", "\uffff", "\U00010000", "\U0010ffff"]
    texts = [
        "".join(rng.choices(letters[: len(letters) - rng.choice([0, 2, 4, 6])], k=length))
        for length in [*range(70)] * 8
    ]
    texts += ["words and 中文 " * 50_000, "é" * 600_000]  # are cut into parts
    ids, offsets = tokenizer.encode_documents(texts)
    parts = np.split(ids, offsets[1:-1])
    assert [tokenizer.decode(part) for part in parts] == texts
    assert [part.tolist() for part in parts] == tokenizer.batch_encode(texts)
    assert [part.tolist() for part in parts] == [tokenizer.encode(text) for text in texts]
    texts.append(texts[-2] * 6)  # is cut when it is counted, too
    assert tokens_of(train(texts, 400)) == tokens_of(train([pa.array(texts)], 400))
    for surrogate in "\ud800", "\udfff", "\ud83d\ude00", "\U00010000\ud800":
        for wrong in surrogate, "a" * 20 + surrogate, surrogate + "a" * 20, surrogate * 999_999:
            with pytest.raises(UnicodeEncodeError, match="surrogates"):
                tokenizer.batch_encode([*texts[:100], wrong])
            with pytest.raises(UnicodeEncodeError, match="surrogates"):
                train([*texts[:100], wrong], 400)


def test_buffer_with_offsets_is_encoded_like_its_texts() -> None:
    trained = train(["some words and more words"], 280)
    texts = ["some words", "", "é 的\0", "and more words" * 20]
    expected = [array.tolist() for array in trained.encode_documents(texts)]
    data = [text.encode() for text in texts]
    offsets = [0, *itertools.accumulate(map(len, data))]
    for buffer in (
        b"".join(data),
        bytearray(b"".join(data)),
        np.frombuffer(b"".join(data), dtype=np.uint8),
    ):
        assert [
            array.tolist() for array in trained.encode_documents(buffer, 2, offsets)
        ] == expected
    assert trained.encode_documents(b"", offsets=[0])[1].tolist() == [0]
    with pytest.raises(ValueError, match="text 0, incomplete utf-8"):
        trained.encode_documents("aé".encode(), offsets=[0, 2, 3])
    with pytest.raises(ValueError, match="ascend from 0 to 3"):
        trained.encode_documents(b"abc", offsets=[0, 2])
    with pytest.raises(TypeError):
        trained.encode_documents(["abc"], offsets=[0, 3])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_arrow_strings_are_encoded_like_str(kind: pa.DataType) -> None:
    trained = train(["some words and more words"], 280)
    texts = ["left out", "some words", "", "é 的\0", "and more words" * 20]
    expected = [array.tolist() for array in trained.encode_documents(texts[1:])]
    array = pa.array(texts, kind)[1:]
    for strings in (
        array,
        pa.chunked_array([array[:2], array[2:]]),
        pa.chunked_array([array[:0], array]),
    ):
        assert [
            part.tolist() for part in trained.encode_documents(strings, num_threads=2)
        ] == expected
        assert trained.batch_encode(strings) == trained.batch_encode(texts[1:])
    assert trained.encode_documents(pa.array([], kind))[1].tolist() == [0]
    with pytest.raises(ValueError, match="nulls"):
        trained.encode_documents(pa.array(["a", None], kind))
    with pytest.raises(TypeError, match="strings"):
        trained.encode_documents(pa.array([1, 2]))


def test_batches_of_ids_are_decoded_like_single_documents() -> None:
    trained = train(["some words and more words, é 的"], 290)
    texts = ["some words", "", "的é\0", "x" * 40]
    ids, offsets = trained.encode_documents(texts)
    for integers in (np.uint32, np.int64, np.uint16):
        data, ends = trained.decode_documents(
            ids.astype(integers), offsets.astype(np.int32), num_threads=2
        )
        assert (data.dtype, ends.dtype) == (np.uint8, np.int64)
        assert [data[a:b].tobytes().decode() for a, b in itertools.pairwise(ends)] == texts
        assert trained.decode_bytes(ids.astype(integers)) == "".join(texts).encode()
    assert trained.decode_bytes(ids[::-1]) == trained.decode_bytes(ids[::-1].tolist())
    for wrong in (
        [0, 3],
        [1, len(ids)],
        [0, 5, 3, len(ids)],
        [0, len(ids) + 1],
        [],
        [[0, len(ids)]],
    ):
        with pytest.raises(ValueError):
            trained.decode_documents(ids, np.array(wrong, dtype=np.int64))
    for bad in (np.array([0.5]), np.array([-1]), np.array([2**32])):
        with pytest.raises(ValueError):
            trained.decode_documents(bad, [0, 1])
    with pytest.raises(ValueError, match="unknown token id: 4000"):
        trained.decode_documents(np.array([4000]), [0, 1])


def test_other_python_threads_keep_running() -> None:
    ticks, stop = itertools.count(), threading.Event()
    seen = [0]

    def tick() -> None:
        while not stop.is_set():
            seen[0] = next(ticks)

    thread = threading.Thread(target=tick)
    thread.start()
    trained, texts = rustbpe.Tokenizer(), ["words " * 1000] * 2_000
    before = seen[0]
    trained.encode_documents(texts, num_threads=1)
    after = seen[0]
    stop.set()
    thread.join()
    assert after - before > 1000


def test_tokenizer_can_be_pickled_and_copied() -> None:
    tokenizer = train(["the cat sat on the mat"] * 9, 280, pattern=GPT2_PATTERN)
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other.get_pattern() == GPT2_PATTERN
        assert other.get_mergeable_ranks() == tokenizer.get_mergeable_ranks()
        assert other.encode("the cat élan") == tokenizer.encode("the cat élan")


def test_ranks_round_trip() -> None:
    trained = train(["some words and more words"], 280)
    again = rustbpe.Tokenizer.from_ranks(trained.get_mergeable_ranks(), trained.get_pattern())
    assert again.get_mergeable_ranks() == trained.get_mergeable_ranks()
    assert again.encode("more words") == trained.encode("more words")


def test_ranks_may_have_gaps() -> None:
    """p50k_base leaves out 50256, the id of <|endoftext|>."""
    ranks = [*BYTES, (b"ab", 256), (b"abc", 258), (b"ca", 300)]
    tokenizer = rustbpe.Tokenizer.from_ranks(ranks, GPT2_PATTERN)
    for text in ("abc abcabc cab", "ca" * 30):
        ids = tokenizer.encode(text)
        assert ids == as_tiktoken(tokenizer).encode_ordinary(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.get_mergeable_ranks() == ranks
    assert tokenizer.vocab_size == 301
    for gap in (257, 299, 301):
        with pytest.raises(ValueError, match=f"unknown token id: {gap}"):
            tokenizer.decode([gap])


@functools.cache
def peers_encoders() -> list[tuple[rustbpe.Tokenizer, tiktoken.Encoding]]:
    """With the patterns as tiktoken spells them, which the crate splits by hand."""
    with mock.patch.object(openai_public, "load_tiktoken_bpe", return_value={}):
        encodings = (openai_public.cl100k_base(), openai_public.o200k_base())
    patterns = [openai_public.r50k_pat_str, *(encoding["pat_str"] for encoding in encodings)]
    tokenizers = [rustbpe.Tokenizer.from_ranks(PAIRS, pattern) for pattern in patterns]
    return [(tokenizer, as_tiktoken(tokenizer)) for tokenizer in tokenizers]


@settings(max_examples=300, deadline=None)
@given(odd_texts)
def test_peers_patterns_split_like_tiktoken(text: str) -> None:
    for tokenizer, encoding in peers_encoders():
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)


# ---- bad input: an exception that names the problem, never a panic


class Stop(Exception):
    pass


def failing() -> Iterator[str]:
    yield "text"
    raise Stop("from the iterator")


def test_exception_of_the_iterator_propagates_unchanged() -> None:
    with pytest.raises(Stop, match="from the iterator"):
        rustbpe.Tokenizer().train_from_iterator(failing(), 300)


def test_exception_of_the_progress_callback_stops_training() -> None:
    def progress(merges: int) -> None:
        raise Stop(f"after {merges}")

    with pytest.raises(Stop, match="after 0"):
        train(["hello"], 300, progress=progress)


@contextlib.contextmanager
def interrupted(at_once: bool = True) -> Iterator[Callable[[], object]]:
    """Expect Ctrl-C: a signal every 50 ms, the third of which raises.

    They begin now, or with a call of the yielded function. Signals follow each other only if they
    are handled while Rust computes.
    """
    handled = []

    def interrupt(*_: object) -> None:
        handled.append(1)
        if len(handled) == 3:
            raise KeyboardInterrupt

    def start() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            if at_once:
                start()
            yield start
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_ctrl_c_interrupts_reading() -> None:
    with interrupted():
        rustbpe.Tokenizer().train_from_iterator(itertools.repeat("endless"), 300)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_ctrl_c_interrupts_counting_one_long_document(num_threads: int) -> None:
    text = "the same words again and again " * 4_000_000  # takes seconds
    with interrupted():
        train([text], 300, pattern=SLOW_PATTERN, num_threads=num_threads)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("kind", ["list", "one text", "arrow"])
def test_ctrl_c_interrupts_encoding(kind: str, num_threads: int) -> None:
    words = "".join(random.Random(4).choices("abcdefghijklmnopqrstuvwxyz   ", k=500_000))
    tokenizer = rustbpe.Tokenizer.from_ranks(BYTES, SLOW_PATTERN)  # takes seconds
    texts: Any = pa.array([words] * 160) if kind == "arrow" else [words] * 160
    with interrupted():
        if kind == "one text":
            rustbpe.Tokenizer().encode(words * 400)
        else:
            tokenizer.encode_documents(texts, num_threads=num_threads)


@pytest.mark.parametrize("word_length", [5, 3_000_000])
def test_ctrl_c_interrupts_sorting_and_merging(word_length: int) -> None:
    """`progress` is first called after counting.

    Many words take long to sort before the first merge; a long word takes seconds to merge.
    """
    letters = "".join(random.Random(4).choices("abcdefghijklmnopqrstuvwxyz", k=3_000_000))
    text = " ".join(letters[i : i + word_length] for i in range(0, len(letters), word_length))
    with interrupted(at_once=False) as start:
        train([text], 200_000, progress=lambda merges: merges or start())


def test_failed_training_leaves_the_tokenizer_unchanged() -> None:
    trained = train(["hello hello"], 300)
    ranks = trained.get_mergeable_ranks()
    with pytest.raises(Stop):
        trained.train_from_iterator(failing(), 400)
    assert trained.get_mergeable_ranks() == ranks


@pytest.mark.parametrize("vocab_size", [0, 255, 2**32 - 1])
def test_bad_vocabulary_size(vocab_size: int) -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        train(["text"], vocab_size)


def test_bad_arguments_of_training() -> None:
    with pytest.raises(ValueError, match="pattern"):
        train(["text"], 300, pattern="(")
    with pytest.raises(ValueError, match="buffer_size"):
        train(["text"], 300, buffer_size=0)
    with pytest.raises(TypeError, match="text 1 is a bytes, not a str or an Arrow array"):
        train(["text", b"bytes"], 300)
    with pytest.raises(TypeError):
        rustbpe.Tokenizer().train_from_iterator(5, 300)
    with pytest.raises(UnicodeEncodeError):
        train(["lone \ud800 surrogate"], 300)


def test_bad_arrow_arrays() -> None:
    for array in (
        pa.array([1]),
        pa.array([b"a"]),
        pa.array(["a"]).dictionary_encode(),
        pa.chunked_array([[1.5]]),
        pa.table({"a": ["b"]}),
    ):
        with pytest.raises(TypeError, match="Arrow array of strings is needed"):
            train(["text", array], 300)

    def array_of(offsets: list[int], data: bytes) -> Any:
        return pa.Array.from_buffers(
            pa.string(),
            len(offsets) - 1,
            [None, pa.py_buffer(np.array(offsets, np.int32)), pa.py_buffer(data)],
        )

    with pytest.raises(ValueError, match="not UTF-8"):
        train([array_of([0, 1, 3], b"a\xc3b")], 300)
    with pytest.raises(ValueError, match="not UTF-8"):
        # the bytes as a whole are UTF-8, but no row is
        train([array_of([0, 1, 2], "é".encode())], 300)
    for offsets in ([0, 2, 1], [-1, 1]):
        with pytest.raises(ValueError, match="damaged|offsets"):
            train([array_of(offsets, b"abc")], 300)


class Exporter:
    """Returns the same capsules on every call, which no library should do."""

    def __init__(self, array: pa.Array, method: str) -> None:
        capsules = getattr(pa.chunked_array([array]) if "stream" in method else array, method)()
        setattr(type(self), method, lambda self: capsules)


@pytest.mark.parametrize("method", ["__arrow_c_stream__", "__arrow_c_array__"])
@pytest.mark.parametrize("use", ["train", "encode"])
def test_consumed_capsule_is_refused(method: str, use: str) -> None:
    exporter = type("Exporter", (Exporter,), {})(pa.array(["some text"] * 1000), method)
    tokenizer = rustbpe.Tokenizer()
    for refused in (False, True, True):
        with (
            pytest.raises(ValueError, match="capsule .* was read before")
            if refused
            else contextlib.nullcontext()
        ):
            if use == "train":
                tokenizer.train_from_iterator([exporter], 300)
            else:
                tokenizer.encode_documents(exporter)


def test_damaged_string_views_are_refused() -> None:
    def views(*fields: int, data: bytes = b"a text of 23 characters") -> Any:
        view = np.array(fields, np.int32).tobytes()
        return pa.Array.from_buffers(
            pa.string_view(), 1, [None, pa.py_buffer(view), pa.py_buffer(data)]
        )

    assert tokens_of(train([views(23, 0, 0, 0)], 300)) == tokens_of(
        train(["a text of 23 characters"], 300)
    )
    for fields in ((-1, 0, 0, 0), (23, 0, 1, 0), (23, 0, -1, 0), (23, 0, 0, -1), (23, 0, 0, 1)):
        with pytest.raises(ValueError, match="damaged"):
            train([views(*fields)], 300)


def test_bad_arguments_of_encoding() -> None:
    tokenizer = rustbpe.Tokenizer()
    for encode in (tokenizer.batch_encode, tokenizer.encode_documents):
        with pytest.raises(TypeError, match="text 1 is a int"):
            encode(["text", 1])
        with pytest.raises(TypeError, match="not one str"):
            encode("text")
        with pytest.raises(UnicodeEncodeError):
            encode(["lone \ud800 surrogate"])
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\udc00")
    with pytest.raises(TypeError):
        tokenizer.encode(b"bytes")


def test_bad_ids() -> None:
    tokenizer = rustbpe.Tokenizer()
    with pytest.raises(ValueError, match="unknown token id: 256"):
        tokenizer.decode([97, 256])
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode([0xC3])
    assert tokenizer.decode_bytes([0xC3]) == b"\xc3"
    for ids in ([-1], [2**32], [2**70], np.array([-1]), np.array([2**32])):
        with pytest.raises(ValueError, match="negative or above 4294967295|values of uint32"):
            tokenizer.decode(ids)
    with pytest.raises(TypeError):
        tokenizer.decode(["a"])


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [
        (BYTES[1:], "byte 0 is no token"),
        ([*BYTES, (b"ab", 255)], "255 has two tokens"),
        ([*BYTES, (b"ab", 2**21)], "2097152 is too large"),
        ([*BYTES, (b"a", 256)], "same bytes"),
        ([*BYTES, (b"", 256)], "empty"),
        ([*BYTES[:255], (b"ab", 255)], "byte 255"),
    ],
)
def test_bad_ranks(ranks: list[tuple[bytes, int]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        rustbpe.Tokenizer.from_ranks(ranks)


def test_excessive_backtracking_is_an_error() -> None:
    tokenizer = rustbpe.Tokenizer.from_ranks(BYTES, r"(?=((?:a|aa)+)$)\1b")
    with pytest.raises(ValueError, match="split pattern"):
        tokenizer.encode("a" * 200 + "!")
