"""The calculator answers arithmetic and counting, and nothing else."""

import threading
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zangchat import engine
from zangchat.engine.tools import use_calculator


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("12+3", "15"),
        ("  (1 + 2) * 3 ", "9"),
        ("48/2", "24"),
        ("7/2", "3.5"),
        ("7//2", "3"),
        ("10 % 3", "1"),
        ("-5 + 2", "-3"),
        ("2**10", "1024"),
        ("0.1+0.2", "0.3"),
        ("1/3", "0.333333333333"),
        ("1,250 - 50", "1200"),
        ("1,000,000*2", "2000000"),
        ("12345678901234567890*2", "24691357802469135780"),
        ("'strawberry'.count('r')", "3"),
        ("' strawberry'.count('r')", "3"),
        ('"strawberry".count("rr")', "1"),
        ("'directory'.count('r')", "2"),
        ("'profile'.count('f')", "1"),
        ("'Reopened import eval exec'.count('e')", "6"),
        ("'a,b,c'.count(',')", "2"),
        ("'1,000'.count(',')", "1"),
        ("'été'.count('é') + 1", "3"),
    ],
)
def test_it_computes(expression: str, answer: str) -> None:
    assert use_calculator(expression) == answer


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        "1+",
        "1,2",
        "1,0000",
        "1/0",
        "0**-1",
        "5 % 0",
        "True",
        "1j",
        "(-8)**0.5",
        "1 if 1 else 2",
        "1 < 2",
        "[1]",
        "x",
        "open('x')",
        "__import__('os')",
        "().__class__",
        "'a'.upper()",
        "'a'*3",
        "'a'",
        "'a'.count",
        "'a'.count('a', 1)",
        "'abc'.count('')",
        "'a'.ljust(30000000).count('a')",
        "'a'.join('bc').count('a')",
        "f'{1}'.count('1')",
        "b'a'.count(b'a')",
        "'\\x41'.count('A')",
        "1_000",
        "0x10",
        "\x00",
        "\ud800",
        '" 0\' and signal or \', foo".count("a")+x',
    ],
)
def test_it_refuses(expression: str) -> None:
    assert use_calculator(expression) is None


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9**9",
        "2**100000",
        "10.0**400",
        "1e999",
        "2**1024*2**1024",
        "9" * 200 + "*" + "9" * 50,
        "1" * 5000,
        "(" * 100 + "1" + ")" * 100 + "+" + "(" * 100,
        "(" * 10000,
        "-" * 10000 + "1",
        "+".join(["1"] * 5000),
        "'" + "a" * 1001 + "'.count('a')",
    ],
)
def test_it_refuses_what_is_too_big(expression: str) -> None:
    assert use_calculator(expression) is None


def test_a_string_may_be_a_thousand_characters_long() -> None:
    assert use_calculator("'" + "ab" * 500 + "'.count('b')") == "500"


@given(
    st.integers(-(10**6), 10**6), st.sampled_from(["+", "-", "*", "//", "%"]), st.integers(1, 10**6)
)
def test_integers_agree_with_python(a: int, operator: str, b: int) -> None:
    assert use_calculator(f"({a}) {operator} {b}") == str(
        {"+": a + b, "-": a - b, "*": a * b, "//": a // b, "%": a % b}[operator]
    )


@given(st.one_of(st.text(max_size=80), st.text("0123456789+-*/%(). ,'\"count", max_size=80)))
@settings(max_examples=400)
def test_any_text_gives_an_answer_or_none(text: str) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        answer = use_calculator(text)
    assert answer is None or len(answer) <= 64
    assert (
        not warned
    )  # what a model wrote must not fill the terminal with complaints about its Python


def test_it_works_in_a_thread() -> None:
    answers: list[str | None] = []
    thread = threading.Thread(target=lambda: answers.append(use_calculator("6*7")))
    thread.start()
    thread.join()
    assert answers == ["42"]


def test_the_engine_offers_the_same_calculator() -> None:
    assert engine.use_calculator is use_calculator
