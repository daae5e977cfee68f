"""Generated rows in the formats of the datasets that the defaults download."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

Row = dict[str, Any]


def smoltalk(index: int) -> Row:
    question, answer = f"What comes after {index}?", f"After {index} comes {index + 1}."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if index % 3 == 0:
        messages.insert(0, {"role": "system", "content": "You are a patient teacher."})
    if index % 4 == 0:
        messages += [
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": f"{index + 2}."},
        ]
    return {"messages": messages, "source": "smol-magpie-ultra-short"}


def mmlu(index: int) -> Row:
    return {
        "question": f"What is {index} + 1?",
        "subject": "" if index % 2 else "elementary_mathematics",  # auxiliary_train has no subjects
        "choices": [str(index + k) for k in range(4)],
        "answer": 1,
    }


def gsm8k(index: int) -> Row:
    total = 2 * (index + 1)
    return {
        "question": f"Ann has {index + 1} apples and buys as many again. How many has she?",
        "answer": f"She has {index + 1}+{index + 1}=<<{index + 1}+{index + 1}={total}>>{total} "
        f"apples.\n#### {total}",
    }


def arc(index: int) -> Row:
    labels = ["1", "2", "3", "4"] if index % 7 == 0 else ["A", "B", "C", "D"]
    texts = ["the sun", "a lamp", f"lantern {index}", "the moon"]
    return {
        "id": f"Mercury_{index}",
        "question": f"Which of these is the largest source of light on day {index}?",
        "choices": {"text": texts, "label": labels},
        "answerKey": labels[0],
    }


def humaneval(index: int) -> Row:
    name = f"add_{index}"
    doc = f'"""Add {index} to the number.\n    >>> {name}(1)\n    {index + 1}\n    """'
    tests = f"    assert candidate(1) == {index + 1}\n    assert candidate(-1) == {index - 1}\n"
    return {
        "task_id": f"HumanEval/{index}",
        "prompt": f"def {name}(number: int) -> int:\n    {doc}\n",
        "canonical_solution": f"    return number + {index}\n",
        "test": f"\n\nMETADATA = {{}}\n\n\ndef check(candidate):\n{tests}",
        "entry_point": name,
    }


class Table(NamedTuple):
    """One split of one dataset, as `tasks.common.load_rows` looks for it and as the hub has it."""

    folder: str  # below <base>/tasks
    config: str  # below the folder, and on the hub unless `hub_config` is set
    split: str
    row: Callable[[int], Row]
    hub: str
    hub_config: str = ""

    @property
    def hub_path(self) -> str:
        """The path of the file in its repository."""
        folder = self.hub_config or self.config or "data"
        return f"{folder}/{self.split}-00000-of-00001.parquet"


SMOLTALK, MMLU, GSM8K = "HuggingFaceTB/smol-smoltalk", "cais/mmlu", "openai/gsm8k"
ARC, HUMANEVAL = "allenai/ai2_arc", "openai/openai_humaneval"
TABLES = [
    *(Table("smoltalk", "", split, smoltalk, SMOLTALK) for split in ("train", "test")),
    *(
        Table("mmlu", "all", split, mmlu, MMLU)
        for split in ("auxiliary_train", "test", "validation", "dev")
    ),
    *(Table("gsm8k", "main", split, gsm8k, GSM8K) for split in ("train", "test")),
    *(
        Table("ai2_arc", subset, split, arc, ARC)
        for subset in ("ARC-Easy", "ARC-Challenge")
        for split in ("train", "test", "validation")
    ),
    Table("openai_humaneval", "", "test", humaneval, HUMANEVAL, "openai_humaneval"),
]


def words(count: int) -> list[str]:
    """Different words of five letters, a consonant and a vowel in turns."""
    pieces = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    return [f"{first}{second}{last}" for first in pieces for second in pieces for last in "nt"][
        :count
    ]


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write a .parquet or .jsonl file and create its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    return path


def write_local_copies(base: Path, count: int) -> None:
    """Write `count` rows of every table, and a list of words.

    The tables become <base>/tasks/<folder>/<config>/<split>.jsonl.
    """
    (base / "tasks" / "words").mkdir(parents=True, exist_ok=True)
    (base / "tasks" / "words" / "words.txt").write_text("\n".join(words(2000)), encoding="utf-8")
    for table in TABLES:
        write_rows(
            base / "tasks" / table.folder / table.config / f"{table.split}.jsonl",
            map(table.row, range(count)),
        )
