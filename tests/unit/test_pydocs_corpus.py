"""The embedded corpus: the choice of texts from a Python installation, and reproducible bytes."""

import textwrap

import pytest

from zangchat.dataset import find_dataset, pydocs
from zangchat.dataset.__main__ import main
from zangchat.dataset.documents import clean_markup, from_source, looks_english

SENTENCE = "This function returns the number of items that are in the list, and it does not change the list that you give to it. "


@pytest.fixture
def roots(tmp_path):
    """Small imitations of the library folder and of a folder with installed packages."""
    library, packages = tmp_path / "lib", tmp_path / "site-packages"
    files = {
        library / "counting.py": f'"""{SENTENCE * 3}"""\n\n\ndef count(items, *, start=0):\n    '
        f'"""{SENTENCE * 2}"""\n' + BODY,
        library
        / "test"
        / "test_counting.py": f'"""{"Tests are never read, whatever they say about the things that they test. " * 5}"""\n',
        packages
        / "pack"
        / "__init__.py": f'"""{"A package that is about something else and that has its own words. " * 6}"""\n',
        packages / "pack" / "table.py": "# This file was generated from data.csv, do not edit\n"
        + f'"""{"Generated words in the file. " * 20}"""\n',
        packages
        / "pack"
        / "LICENSE.md": "Permission is hereby granted to those who read the licence of this "
        "package. " * 10,
        packages / "pack-1.0.dist-info" / "METADATA": "Metadata-Version: 2.1\nName: pack\n\n# "
        "Pack\n\n[![badge](https://x/y.svg)](https://x)\n\n" + README,
    }
    for i in range(40):
        words = f"The module number {i} is one of those that fill the corpus, and its words are its own: {'abcdefghij'[i % 10] * 3}. "
        files[packages / "pack" / f"m{i}.py"] = f'"""{words * 4}"""\n' + BODY.replace(
            "total", f"total_{i}"
        )
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [library, packages]


BODY = textwrap.dedent(
    """
        total = start
        for item in items:
            if item is not None:
                total += item
        return total


    class Counter:
        def __init__(self):
            self.total = 0

        def add(self, item):
            self.total += item
            return self.total
    """
)
README = (
    "Pack is a small package that shows how a description is read from its metadata. It is used in "
    "the tests of the corpus. " * 3
)


@pytest.fixture
def corpus(roots):
    train, validation, manifest_entries = pydocs.collect(roots, workers=1)
    return train, validation, manifest_entries


def test_docstrings_follow_the_signature_they_document(corpus):
    train, validation, _ = corpus
    (document,) = [
        text
        for text in train + validation
        if "counting.count(items, *, start=0)\n\nThis function returns" in text
    ]
    assert document.startswith("counting\n\n" + SENTENCE.strip())


def test_code_follows_its_file_name_without_docstrings(corpus):
    train, validation, _ = corpus
    (document,) = [text for text in train + validation if text.startswith("# counting.py")]
    assert (
        "def count(items, *, start=0):\n\n    total = start" in document
        and "class Counter:" in document
    )
    assert "This function" not in document


def test_readmes_lose_their_badges(corpus):
    train, validation, _ = corpus
    (document,) = [text for text in train + validation if "Pack is a small package" in text]
    assert document.startswith("# Pack\n\nPack is a small")


def test_language_reference_and_built_in_functions_are_included(corpus):
    text = "\n".join(corpus[0] + corpus[1])
    assert (
        "The `while` statement is used for repeated execution" in text
        or 'The "while" statement is used for repeated execution' in text
    )
    assert "len(obj, /)" in text and "Return the number of items in a container." in text


def test_tests_generated_files_and_licences_are_left_out(corpus):
    text = "\n".join(corpus[0] + corpus[1])
    for absent in ("Tests are never read", "Generated words", "Permission is hereby granted"):
        assert absent not in text


def test_documents_have_a_sensible_length_and_prose_comes_first(corpus):
    train, validation, manifest_entries = corpus
    assert all(200 <= len(text) <= 8000 for text in train + validation)
    assert len(set(train + validation)) == len(train) + len(validation)
    assert 0 < manifest_entries["code_bytes"] <= 0.35 / 0.65 * manifest_entries["prose_bytes"]
    assert manifest_entries["prose_bytes"] + manifest_entries["code_bytes"] == sum(
        len(text.encode()) for text in train + validation
    )


def test_same_installation_gives_the_same_bytes_with_any_number_of_processes(
    roots, tmp_path, monkeypatch
):
    monkeypatch.setattr(pydocs, "library_roots", lambda: roots)
    datasets = []
    for name, workers in (("one", 1), ("two", 2)):
        assert pydocs.build(tmp_path / name, workers=workers) == 0
        datasets.append({path.name: path.read_bytes() for path in (tmp_path / name).glob("*")})
    assert datasets[0] == datasets[1] and len(datasets[0]) == 3


def test_second_build_reports_the_existing_corpus(base_dir, roots, monkeypatch, capsys):
    monkeypatch.setattr(pydocs, "library_roots", lambda: roots)
    assert main(["--source=pydocs"]) == 0
    built = capsys.readouterr().out
    assert "training and" in built and "MB of prose" in built
    dataset = find_dataset()
    assert dataset.name == "pydocs" and dataset.shards("validation") == ["shard_00001.parquet"]
    before = (dataset.folder / "shard_00000.parquet").stat().st_mtime_ns
    assert main(["--source=pydocs"]) == 0
    assert "already" in capsys.readouterr().out
    assert (dataset.folder / "shard_00000.parquet").stat().st_mtime_ns == before
    (dataset.folder / "shard_00000.parquet").write_bytes(b"damaged")
    assert main(["verify", "--repair"]) == 0
    assert find_dataset().fingerprint == dataset.fingerprint
    assert main(["verify"]) == 0
    assert [
        path.name for path in dataset.folder.parent.iterdir() if not path.name.endswith(".lock")
    ] == ["pydocs"]


def test_invalid_python_and_data_files_are_skipped():
    assert from_source("def broken(:\n", "x.py") == ([], [])
    assert from_source("x = '" + "a" * 2000 + "'\n", "x.py") == ([], [])


def test_links_to_nothing_are_skipped(roots, corpus):
    (roots[0] / "sitecustomize.py").symlink_to("/nowhere/sitecustomize.py")
    assert [job.path.name for job in pydocs.find_files(roots[:1])] == ["counting.py"]


def test_repeated_paragraphs_are_used_once():
    seen = set()
    assert pydocs.is_new(f"first\n\n{SENTENCE}", seen)
    assert not pydocs.is_new(f"second\n\n{SENTENCE.upper()}", seen), (
        "case and spacing make no difference"
    )
    assert pydocs.is_new(
        f"third\n\n{SENTENCE}\n\n"
        + "A paragraph that is new and longer than the one which was there before. " * 3,
        seen,
    )


@pytest.mark.parametrize(
    "text, english",
    [
        (SENTENCE, True),
        (
            "Ceci n'est pas une pipe, mais une phrase qui parle de beaucoup de choses pour montrer "
            "que la langue compte toujours ici.",
            False,
        ),
        ("| 1 | 2 | 3 |\n" * 30, False),
        ("这是一个中文句子。" * 20, False),
        ("short", False),
        (SENTENCE * 30, False),  # one line of thousands of characters
    ],
)
def test_only_english_text_is_prose(text, english):
    assert looks_english(text) is english


def test_markup_becomes_plain_text():
    assert clean_markup(
        "See :func:`~os.path.join` and [the docs](https://x.y/z).\n\n.. versionadded:: 3.8\n\n<p "
        "align='center'>Hi</p>  \n"
    ) == ("See `os.path.join` and the docs.\n\nHi")
    assert clean_markup("[![b](https://x/b.svg)](https://x)\n`words <https://x>`_") == "words"


def test_documents_of_one_file_stay_in_one_split():
    documents = [(f"{key}{i}", key) for i in range(4) for key in "abcdefghijklmnopqrstuvwxyz"]
    train, validation = pydocs.split_by_key(documents)
    assert sorted(train + validation) == sorted(text for text, _ in documents)
    assert {text[0] for text in train}.isdisjoint(text[0] for text in validation) and len(
        validation
    ) == 4
