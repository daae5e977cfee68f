"""Tasks over downloaded data and files, mixtures, the registry."""

import errno
import json
import sys
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from scripts import fetch, mid_train
from tasks import common, registry
from tasks.arc import ARC
from tasks.common import (
    MissingData,
    TableRows,
    Task,
    TaskMixture,
    TaskSequence,
    chat,
    last_number,
    render_mc,
    tool_used,
    visible_text,
)
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, answer_parts, final_number
from tasks.humaneval import HumanEval, extract_code
from tasks.mmlu import MMLU
from tasks.registry import (
    REGISTRY,
    Entry,
    build_mixture,
    held_out_conversations,
    load_task,
    parse_mixture,
    training_conversations,
)
from tasks.smoltalk import SmolTalk
from tests.hub.rows import write_rows
from tests.util import ByteTokenizer
from zangchat.dataset import hub
from zangchat.errors import UserError
from zangchat.execution import SandboxLevel, find_sandbox
from zangchat.runtime.files import PACKED

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tasks"


class Numbers(Task):
    """0, 1, 2, ..."""

    def __init__(self, count: int, **view: int) -> None:
        super().__init__(**view)
        self.count = count

    def num_examples(self) -> int:
        return self.count

    def get_example(self, index: int) -> Any:
        return chat(f"{index}", f"{index}")


def questions(task: Any) -> list[str]:
    return [task[i]["messages"][0]["content"] for i in range(len(task))]


def put(base: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    return write_rows(base / "tasks" / name, rows)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """The hub is out of reach; what the tests ask of it is kept."""
    asked: list[tuple[Any, ...]] = []

    def fetch_table(*args: str) -> Any:
        asked.append(args)
        raise ConnectionError("offline")

    monkeypatch.setattr(hub, "fetch_table", fetch_table)
    monkeypatch.setattr(hub, "unreachable", lambda url: "")
    return asked


# ---- the protocol --------------------------------------------------------------------------------


def test_a_task_is_a_sequence():
    task = Numbers(10)
    assert len(task) == 10 and questions(task) == [str(i) for i in range(10)]
    assert task[-1] == task[9]
    with pytest.raises(IndexError):
        task[10]
    assert [row["messages"][0]["content"] for row in task] == questions(task)


def test_slices_compose_like_those_of_a_list():
    plain = list(range(30))
    for start, stop, step in ((0, None, 1), (3, 20, 1), (5, 25, 4), (0, 99, 7)):
        task = (
            Numbers(30, start=start, stop=stop, step=step)
            if stop
            else Numbers(30, start=start, step=step)
        )
        expected = plain[start:stop:step]
        assert questions(task) == [str(i) for i in expected]
        assert questions(task[1:6]) == [str(i) for i in expected[1:6]]
        assert questions(task[1:6][::2]) == [str(i) for i in expected[1:6][::2]]
        assert len(task) == len(expected)  # the slice left the task as it was
    for wrong in ({"start": -1}, {"step": 0}, {"start": 4, "stop": 3}):
        with pytest.raises(ValueError, match="range"):
            Numbers(5, **wrong)


def test_a_task_needs_no_call_of_its_base_class():
    class Facts(Task):
        def __init__(self) -> None:
            self.answers = ["4", "6", "8"]

        def num_examples(self) -> int:
            return len(self.answers)

        def get_example(self, index: int) -> Any:
            return chat("what?", self.answers[index])

    task = Facts()
    assert [row["messages"][-1]["content"] for row in task] == ["4", "6", "8"]
    assert len(task[1:]) == 2 and len(TaskMixture([task])) == 3


def test_a_task_that_lacks_a_method_says_which():
    class MyTask(Task):
        def __init__(self) -> None:
            self.data: list[Any] = []

    for use in (len, lambda task: task[0]):
        with pytest.raises(
            NotImplementedError, match="MyTask must define num_examples.*get_example"
        ):
            use(MyTask())


def test_a_mixture_holds_everything_once_in_one_fixed_shuffled_order():
    parts = [Numbers(40), Numbers(25, start=5)]
    mixture = TaskMixture(parts)
    assert Counter(questions(mixture)) == Counter(questions(parts[0]) + questions(parts[1]))
    assert (
        questions(mixture) == questions(TaskMixture(parts)) != questions(TaskMixture(parts, seed=7))
    )
    assert questions(mixture)[:40] != questions(parts[0])
    assert Counter(questions(TaskMixture([parts[0], parts[0]]))) == Counter(questions(parts[0]) * 2)
    assert questions(mixture[10:20]) == questions(mixture)[10:20]


def test_a_sequence_keeps_the_order():
    assert questions(TaskSequence([Numbers(3), Numbers(0), Numbers(2)])) == [
        "0",
        "1",
        "2",
        "0",
        "1",
    ]
    with pytest.raises(IndexError):
        TaskSequence([Numbers(3)])[3]


def test_multiple_choice_has_each_letter_at_the_start_of_its_line():
    text = render_mc("Why? ", ["A", "B"], ["because", "why not"])
    assert text == "Why?\nA. because\nB. why not\nAnswer with the letter alone."
    with pytest.raises(ValueError, match="letters"):
        render_mc("Why?", ["A"], ["because", "why not"])


def test_what_counts_as_tool_use_and_as_words():
    parts = [
        {"type": "text", "text": "so "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "two"},
    ]
    assert visible_text(parts) == "so two" and tool_used(parts)
    assert not tool_used("<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>")
    assert not tool_used(parts[:2])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 3.", 3),
        ("1,234.5 of 7", 7),
        ("1,234.5", 1234.5),
        ("-4", -4),
        ("none", None),
        ("2 then 10", 10),
        ("3 apples, 4.", 4),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


# ---- registry and mixtures -----------------------------------------------------------------------


def test_names_are_found_whatever_their_case():
    for name in ("SpellingBee", "spellingbee", "spelling-bee", "SPELLING_BEE"):
        assert registry.find_name(name) == "SpellingBee"
    assert load_task("arc-easy", "test").name == "ARC-Easy"
    with pytest.raises(UserError, match="unknown task 'gsm9k': known are ARC-Easy, .*GSM8K"):
        load_task("gsm9k")


def test_every_registered_task_can_be_made_and_splits_are_checked():
    for name in REGISTRY:
        for split in ("val", "test"):
            assert isinstance(load_task(name, split), Task)
        with pytest.raises(ValueError, match="unknown split"):
            load_task(name, "dev")


def test_a_new_task_is_one_file_and_one_line(monkeypatch):
    """The example of the README."""
    module = types.ModuleType("tasks.capitals")
    source = """
from tasks.common import Task, chat, visible_text

CAPITALS = [("France", "Paris"), ("Japan", "Tokyo"), ("Egypt", "Cairo")]


class Capitals(Task):
    def __init__(self, split="train", **view):
        super().__init__(**view)
        self.rows = CAPITALS[:2] if split == "train" else CAPITALS[2:]

    def num_examples(self):
        return len(self.rows)

    def get_example(self, index):
        country, capital = self.rows[index]
        return chat(f"What is the capital of {country}?", capital)

    def evaluate(self, conversation, completion):
        return conversation["messages"][-1]["content"] in visible_text(completion)
"""
    exec(compile(source, "tasks/capitals.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "tasks.capitals", module)
    monkeypatch.setitem(REGISTRY, "Capitals", Entry("tasks.capitals", "Capitals"))
    mixture = build_mixture("capitals:2,arithmetic:3")
    assert Counter(questions(mixture))["What is the capital of France?"] == 2 and len(mixture) == 7
    test = load_task("capitals", "test")
    assert test.evaluate(test[0], "It is Cairo.") and not test.evaluate(test[0], "It is Paris.")


def test_a_mixture_is_written_as_names_and_numbers():
    assert parse_mixture("pydocs:1, identity:4,spellingbee:4000") == [
        ("pydocs", 1.0),
        ("identity", 4.0),
        ("spellingbee", 4000.0),
    ]
    assert parse_mixture("identity") == [("identity", 1.0)]
    assert parse_mixture("C:\\chats.jsonl:2") == [("C:\\chats.jsonl", 2.0)]
    for wrong in (
        "identity:x",
        "identity:0",
        "identity:-1",
        "identity:inf",
        "identity:nan",
        "spellingbee:1e15",
        "a.jsonl:",
    ):
        with pytest.raises(UserError, match="--mixture"):
            parse_mixture(wrong)
    with pytest.raises(UserError, match="empty"):
        build_mixture(" , ")


def test_numbers_are_epochs_of_finite_tasks_and_examples_of_generated_ones(base_dir):
    rows = [chat(f"q{i}", "a") for i in range(10)]
    own = put(base_dir, "own.jsonl", rows)
    mixture = build_mixture(f"{own}:2.5,arithmetic:7")
    counts = Counter(text for text in questions(mixture) if text.startswith("q"))
    assert len(mixture) == 25 + 7 and sorted(counts.values()) == [2] * 5 + [3] * 5
    held_out = build_mixture(f"{own}:2.5,arithmetic:7000", "val")
    assert len(held_out) == 10 + registry.MAX_HELDOUT
    assert questions(build_mixture("arithmetic:50")) == questions(build_mixture("arithmetic:50"))


def test_epochs_taken_for_examples_are_refused(base_dir, monkeypatch):
    monkeypatch.setattr(registry, "MAX_CONVERSATIONS", 1000)
    own = put(base_dir, "own.jsonl", [chat(f"q{i}", "a") for i in range(10)])
    assert len(build_mixture(f"{own}:100")) == 1000
    with pytest.raises(UserError, match=r"own.jsonl:500 is 500 times its 10 conversations.*:0\.5"):
        build_mixture(f"{own}:500")
    assert len(build_mixture(f"{own}:500", "val")) == 10


def test_a_file_of_ones_own_joins_the_mixture_and_is_never_held_out(base_dir):
    rows = [chat(f"q{i}", "a") for i in range(10)]
    own = str(put(base_dir, "me, myself.jsonl", rows))
    mixture = training_conversations("arithmetic:5", own, 2, tokenizer=None, seed=1)
    assert len(mixture) == 25 and Counter(questions(mixture))["q7"] == 2
    assert len(training_conversations("", own, tokenizer=None, seed=1)) == 10
    config = mid_train.Config(mixture="nowhere.jsonl:3", seed=1)
    assert held_out_conversations(config, None) is None
    config.mixture = "nowhere.jsonl:3,arithmetic:5"
    held_out = held_out_conversations(config, None)
    assert held_out is not None and len(held_out) == 5
    config.eval_every = -1
    assert held_out_conversations(config, None) is None


def test_a_mixture_never_shrinks_because_data_is_missing(base_dir):
    with pytest.raises(UserError, match="gsm8k"):
        build_mixture("arithmetic:10,gsm8k:1")
    with pytest.raises(UserError, match="no training data"):
        build_mixture("humaneval:1")


# ---- data from outside ---------------------------------------------------------------------------

ARC_ROW = {
    "id": "x",
    "question": "Which?",
    "choices": {"text": ["one", "two", "three"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
GSM_ROW = {
    "question": "How many?",
    "answer": "He has 48/2 = <<48/2=24>>24, so 24+1,000=<<24+1000=1024>>1,024.\n#### 1,024",
}


def test_local_files_are_read_before_the_hub_is_asked(base_dir, no_hub):
    put(base_dir, "gsm8k/main/train.parquet", [GSM_ROW] * 3)
    put(base_dir, "gsm8k/main/test.jsonl", [GSM_ROW] * 2)
    put(base_dir, "ai2_arc/ARC-Challenge/test.parquet", [ARC_ROW])
    put(base_dir, "openai_humaneval/test.parquet", [dict.fromkeys(HumanEval.fields, "x")])
    put(
        base_dir,
        "smoltalk/train.parquet",
        [
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ],
                "source": "x",
            }
        ],
    )
    assert [len(GSM8K(split=split)) for split in ("train", "test")] == [3, 2]
    assert len(ARC("ARC-Challenge", "test")) == len(HumanEval()) == len(SmolTalk()) == 1
    assert SmolTalk()[0] == chat("a", "b")
    assert no_hub == []


@pytest.mark.parametrize(
    ("task", "asked", "path"),
    [
        (GSM8K(split="train"), ("openai/gsm8k", "main", "train"), "gsm8k/main/train.parquet"),
        (
            MMLU(split="train"),
            ("cais/mmlu", "all", "auxiliary_train"),
            "mmlu/all/auxiliary_train.parquet",
        ),
        (MMLU(split="test"), ("cais/mmlu", "all", "test"), "mmlu/all/test.parquet"),
        (
            ARC("ARC-Easy", "train"),
            ("allenai/ai2_arc", "ARC-Easy", "train"),
            "ai2_arc/ARC-Easy/train.parquet",
        ),
        (HumanEval(), ("openai/openai_humaneval", "", "test"), "openai_humaneval/test.parquet"),
        (SmolTalk(), ("HuggingFaceTB/smol-smoltalk", "", "train"), "smoltalk/train.parquet"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_without_a_file_the_hub_is_asked_and_without_the_hub_it_is_said_what_to_download(
    base_dir, no_hub, task, asked, path
):
    with pytest.raises(MissingData) as told:
        len(task)
    assert no_hub == [asked]
    assert (
        str(base_dir / "tasks" / path) in str(told.value)
        and asked[0] in str(told.value)
        and "offline" in str(told.value)
    )


def test_a_hub_that_cannot_be_reached_is_not_asked_for_each_dataset(base_dir, no_hub, monkeypatch):
    monkeypatch.setattr(hub, "unreachable", lambda url: "it cannot be reached")
    with pytest.raises(MissingData, match="cannot be reached"):
        len(GSM8K(split="train"))
    assert no_hub == []


@pytest.mark.parametrize(
    "error", [ImportError("no socksio"), Exception("closed without an answer")]
)
def test_whatever_the_client_raises_the_dataset_is_missing(base_dir, monkeypatch, error):
    def fetch_table(*args: str) -> Any:
        raise error

    monkeypatch.setattr(hub, "fetch_table", fetch_table)
    with pytest.raises(MissingData, match=str(error)):
        len(GSM8K(split="train"))


def test_a_full_disk_is_not_blamed_on_the_hub(base_dir, monkeypatch):
    def fetch_table(*args: str) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "fetch_table", fetch_table)
    with pytest.raises(OSError, match="No space left"):
        len(GSM8K(split="train"))


def test_files_that_are_not_the_dataset_are_named(base_dir):
    path = put(base_dir, "gsm8k/main/train.jsonl", [{"question": "x"}])
    with pytest.raises(UserError, match=r"train\.jsonl has no field answer"):
        len(GSM8K(split="train"))
    path.write_text('{"question": "x", "answer": "y"}\n{"question"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.jsonl:2 is not JSON"):
        len(GSM8K(split="train"))
    path.with_suffix(".parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match=r"train\.parquet cannot be read"):
        len(GSM8K(split="train"))
    put(base_dir, "gsm8k/main/test.jsonl", [])
    with pytest.raises(UserError, match="empty"):
        len(GSM8K(split="test"))


def test_arc_keeps_the_letters_of_each_question(base_dir):
    put(base_dir, "ai2_arc/ARC-Easy/test.jsonl", [ARC_ROW])
    task = ARC("ARC-Easy", "test")
    conversation = task[0]
    assert (
        conversation["letters"] == ["1", "2", "3"] and conversation["messages"][1]["content"] == "2"
    )
    assert task.evaluate(conversation, "2") and not task.evaluate(conversation, "1")
    put(base_dir, "ai2_arc/ARC-Easy/test.jsonl", [{**ARC_ROW, "answerKey": "B"}])
    with pytest.raises(UserError, match="answerKey 'B'"):
        ARC("ARC-Easy", "test")[0]


def test_gsm8k_turns_calculator_marks_into_tool_calls():
    parts = answer_parts(GSM_ROW["answer"])
    assert [(part["type"], part["text"]) for part in parts] == [
        ("text", "He has 48/2 = "),
        ("python", "48/2"),
        ("python_output", "24"),
        ("text", "24, so 24+1,000="),
        ("python", "24+1000"),
        ("python_output", "1024"),
        ("text", "1,024.\n#### 1,024"),
    ]


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("#### 1024", True),
        ("#### 1,024", True),
        ("####1024.0", True),
        ("first #### 7 no, #### 1024", True),
        ("#### -1024", False),
        ("the answer is 1024", False),
        ("#### none", False),
        ("", False),
    ],
)
def test_gsm8k_compares_numbers_behind_the_mark(base_dir, said, right):
    put(base_dir, "gsm8k/main/test.jsonl", [GSM_ROW])
    task = GSM8K(split="test")
    assert task.evaluate(task[0], said) is right and task.reward(task[0], said) == float(right)
    assert final_number("#### -.5") == -0.5


@pytest.mark.parametrize(
    ("said", "number"),
    [
        *(
            ("#### $1,000", 1000),
            ("#### $1,000.", 1000),
            ("#### **18**", 18),
            ("#### **$18**.", 18),
            ("####\n18", 18),
            ("#### 18%", 18),
        ),
        *(
            ("#### \u22123", -3),
            ("#### -$3", -3),
            ("#### $-3", -3),
            ("#### +5", 5),
            ("#### \u20131,200.50", -1200.5),
        ),
        *(
            ("#### \\boxed{18}", 18),
            ("#### $\\boxed{1,018}$", 1018),
            ("#### \\(18\\)", 18),
            ("#### \\$18", 18),
            ("#### `18`", 18),
        ),
        *(
            ("#### 1 000", 1000),
            ("#### 1\u202f000\u202f000", 1000000),
            ("#### 18 dollars", 18),
            ("#### 18 300", 18300),
            ("#### 5.0", 5),
        ),
        *(
            ("#### １８", 18),
            ("#### 7 #### eight", 7),
            ("#### €1,000.5", 1000.5),
            ("#### 12 34", 12),
            ("#### 1,2,3", 123),
        ),
        *(
            ("18", None),
            ("#### eighteen", None),
            ("#### ", None),
            ("####", None),
            ("#### -", None),
            ("#### the answer is 18", None),
        ),
    ],
)
def test_gsm8k_reads_numbers_as_people_write_them(said, number):
    assert final_number(f"So it is 99.\n{said}") == number


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development data is not here")
def test_every_answer_of_gsm8k_is_read_in_each_of_these_ways():
    written = [
        "#### {}",
        "#### ${}.",
        "#### **{}**",
        "#### \\boxed{{{}}}",
        "#### `{}`\n",
        "####{}.0",
    ]
    for split in ("train", "test"):
        for row in TableRows(SHARED / "gsm8k" / "main" / f"{split}.parquet"):
            gold = row["answer"].split("#### ")[1]
            expected = float(gold.replace(",", ""))
            assert (
                {final_number(way.format(gold)) for way in written}
                == {expected}
                == {final_number(row["answer"])}
            )
            assert (
                final_number(f"#### {expected:,.0f}".replace(",", " ").replace("-", "\u2212"))
                == expected
            )


def test_mmlu_answers_are_letters(base_dir):
    put(
        base_dir,
        "mmlu/all/test.jsonl",
        [{"question": "Q", "subject": "s", "choices": list("wxyz"), "answer": 3}],
    )
    task = MMLU(split="test")
    assert (
        task[0]["messages"][1]["content"] == "D"
        and task.evaluate(task[0], "D")
        and not task.evaluate(task[0], "A")
    )


# ---- HumanEval -----------------------------------------------------------------------------------

PROMPT = 'import math\n\ndef half(x):\n    return x / 2\n\ndef area(r):\n    """Of a circle."""\n'
PROBLEM = {
    "task_id": "T/0",
    "prompt": PROMPT,
    "canonical_solution": "    return math.pi * r * r\n",
    "test": "def check(candidate):\n    assert abs(candidate(2) - 12.566) < 0.01\n    assert "
    "half(area(0)) == 0\n",
    "entry_point": "area",
}


def test_code_is_taken_out_of_its_fence():
    assert extract_code("Sure:\n```python\nx = 1\n```\nand\n```\ny\n```") == "x = 1\n"
    assert extract_code("```\nx = 1") == "x = 1\n"
    assert extract_code("    return 1") == "    return 1"
    assert extract_code("```python\n    return 1\n```") == "    return 1\n", (
        "a body that continues the prompt"
    )
    assert extract_code("Write ```x``` as ```y```.") == "Write ```x``` as ```y```."


AREA = "import math\n\ndef area(r):\n    text = 'a > b'\n    if r < 0:\n        return 0\n\n    return math.pi * r * r\n"
ANSWERS = {  # as models write them; CODE is the code, INDENTED the same three columns further right
    "Python": "```Python\nCODE```\nThis works because it adds one.\n",
    "python3": "Here it is:\n```python3\nCODE```\nExplanation follows.\n",
    "py": "```py\nCODE```",
    "space": "``` python\nCODE```",
    "none": "```\nCODE```\n",
    "attributes": '```python title="area.py" linenums="1"\nCODE```\nok\n',
    "braces": "```{.python .numberLines}\nCODE```\nok\n",
    "tildes": "~~~python\nCODE~~~\ndone\n",
    "longer": "````python\nCODE````\n```\nnot this\n```\n",
    "behind text": "Sure: ```python\nCODE```\n",
    "list item": "1. Write this:\n   ```python\nINDENTED   ```\n2. Run it.\n",
    "list mark": "1. ```python\nINDENTED   ```\n2. Run it.\n",
    "quote": "> ```python\nQUOTED> ```\n\nThat is all.\n",
    "pip first": "```bash\npip install numpy\n```\n```python\nCODE```\n",
    "plan first": "```\nfirst this,\nthen that\n```\nIn Python:\n```python\nCODE```\n",
    "use first": "```python\nprint(area(1))\n```\n```python\nCODE```\n",
    "use last": "```python\nCODE```\n```python\nprint(area(1))\n```\n",
    "no end": "```python\nCODE",
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_the_code_that_defines_the_function_is_found_in_any_fence(name, ends):
    def answer(code: str) -> str:
        indented = "".join(
            f"   {line}" if line.strip() else line for line in code.splitlines(keepends=True)
        )
        quoted = "".join(f"> {line}" for line in code.splitlines(keepends=True))
        text = (
            ANSWERS[name]
            .replace("INDENTED", indented)
            .replace("QUOTED", quoted)
            .replace("CODE", code)
        )
        return text.replace("\n", ends)

    assert extract_code(answer(AREA), "area") == AREA
    if SHARED.is_dir():  # and every solution of HumanEval
        for row in TableRows(SHARED / "openai_humaneval" / "test.parquet"):
            code = row["prompt"] + row["canonical_solution"]
            found = extract_code(answer(code + "\n"), row["entry_point"])
            assert [line.rstrip() for line in found.rstrip().split("\n")] == [
                line.rstrip() for line in code.rstrip().split("\n")
            ]


@pytest.mark.parametrize("line", ["~" * 20_000 + "`x`", "> " * 20_000 + "`", "1. " * 9_000 + "`"])
def test_a_degenerate_answer_is_read_in_time_that_grows_with_its_length(line):
    assert extract_code(line) == line


needs_sandbox = pytest.mark.skipif(
    find_sandbox().level < SandboxLevel.FILTERED,
    reason="the sandbox of this machine is too weak for model-written code",
)


@needs_sandbox
def test_humaneval_runs_the_tests(base_dir, monkeypatch):
    put(base_dir, "openai_humaneval/test.jsonl", [PROBLEM])
    task = HumanEval()
    conversation = task[0]
    right = [
        conversation["messages"][1]["content"],
        "    return math.pi * r * r\n",  # goes on from the prompt
        # with the prompt's import and helper
        "```python\ndef area(r):\n    return math.pi * r ** 2\n```",
    ]
    wrong = [
        "    return r\n",
        "",
        "I do not know.",
        "```python\nimport os\nos._exit(0)\n```",
        "    import sys; sys.exit(0)\n",
        "    while True: pass\n",
    ]
    assert [task.evaluate(conversation, answer) for answer in right] == [True] * 3
    monkeypatch.setattr("tasks.humaneval.TIMEOUT", 1.0)
    assert [task.evaluate(conversation, answer) for answer in wrong] == [False] * 6


@needs_sandbox
@pytest.mark.skipif(not SHARED.is_dir(), reason="the development data is not here")
def test_every_solution_of_humaneval_passes_and_no_empty_one(base_dir):
    (base_dir / "tasks").mkdir()
    (base_dir / "tasks" / "openai_humaneval").symlink_to(SHARED / "openai_humaneval")
    task = load_task("humaneval", "test")
    assert len(task) == 164

    def verdicts(conversation: Any) -> tuple[bool, bool]:
        return task.evaluate(conversation, conversation["messages"][1]["content"]), task.evaluate(
            conversation, "    return None\n"
        )

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(verdicts, task))
    assert found == [(True, False)] * 164, [
        task[i]["task_id"] for i, pair in enumerate(found) if pair != (True, False)
    ]


def test_a_small_share_of_a_task_is_one_example_at_least():
    assert len(build_mixture("identity:0.001", "val")) == 1
    assert len(build_mixture("identity:0.0001")) == 1


# ---- CustomJSON ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".gz", ".zst", ".bz2"])
@pytest.mark.parametrize("name", ["own.jsonl", "own.NDJSON", "own.json"])
def test_compressed_conversations_are_read_as_they_are_unpacked(base_dir, name, kind):
    rows = [chat("q", str(index)) for index in range(5)]
    path = base_dir / f"{name}{kind}"
    text = json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows))
    with pyarrow.output_stream(str(path), compression=PACKED[kind]) as stream:
        stream.write(text.encode())
    mixture = build_mixture(f"{path}:1")
    assert str(mixture) == "own 5"
    assert sorted(map(str, mixture)) == sorted(map(str, rows))


def test_bad_conversations_are_refused_by_default_and_else_left_out_with_a_count(base_dir, caplog):
    rows = [chat("q", str(index)) for index in range(5)]
    path = put(base_dir, "own.jsonl", [*rows[:2], {"nothing": 1}, *rows[2:]])
    path.write_text(path.read_text(encoding="utf-8") + "{half\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"own\.jsonl:3: it has nothing"):
        build_mixture(f"{path}:1")
    mixture = build_mixture(f"{path}:1", skip_bad_rows=True)
    assert len(mixture) == 5 and mixture.skipped_rows() == {"own": 2}
    assert "left out 2 rows that cannot be read, the first: " in caplog.text


def test_customjson_reads_the_common_shapes(base_dir):
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hello"}]
    rows: list[Any] = [
        {"messages": turns, "id": 3},
        turns,
        {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "hello"}]},
        {"instruction": "你好", "output": "hello"},
        {"instruction": "你好", "input": "", "output": "hello", "history": []},
        {"prompt": "你好", "completion": "hello"},
        {"prompt": turns[:1], "completion": turns[1:]},
    ]
    task = CustomJSON(put(base_dir, "own.jsonl", rows))
    assert [task[i] for i in range(len(rows))] == [{"messages": turns}] * len(rows)
    rows = [
        {
            "instruction": "Add.",
            "input": "1 2",
            "output": "3",
            "system": "Be short.",
            "history": [["Hi", "Hello"]],
        },
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "u"},
                {"from": "assistant", "value": "a"},
            ]
        },
        {
            "system": "s",
            "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}],
        },
    ]
    task = CustomJSON(put(base_dir, "more.jsonl", rows))
    assert [message["content"] for message in task[0]["messages"]] == [
        "Be short.",
        "Hi",
        "Hello",
        "Add.\n\n1 2",
        "3",
    ]
    assert task[1] == task[2] and [message["role"] for message in task[1]["messages"]] == [
        "system",
        "user",
        "assistant",
    ]
    parts = [
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "2"},
    ]
    assert CustomJSON(put(base_dir, "tools.jsonl", [chat("1+1?", parts)]))[0] == chat("1+1?", parts)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "is not JSON"),
        ("3", "is a JSON int"),
        (
            '{"text": "x"}',
            "has text: expected messages, conversations, instruction and output, or prompt",
        ),
        ('{"prompt": "x"}', "has prompt: expected"),
        ('{"prompt": "x", "completion": 3}', "message 1 (assistant) needs a string"),
        ('{"prompt": ["x"], "completion": "y"}', "message 0 (user) needs a string"),
        ('{"messages": "x"}', 'a conversation is {"messages"'),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}]}',
            "message 1 has the role 'tool'",
        ),
        ('{"messages": [3, 4]}', "message 0 has the role None"),
        (
            '{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": '
            '"x"}]}',
            "message 0 (user) needs a string as content",
        ),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": '
            '[{"type": "image"}]}]}',
            "message 1 has a part that is not",
        ),
        (
            '{"conversations": [{"from": "martian", "value": "x"}]}',
            "the sender 'martian' is not known",
        ),
        ('{"conversations": [{"who": "human"}]}', "list of {from, value} or {role, content}"),
        ('{"conversations": [{"from": ["human"], "value": "x"}]}', "the sender ['human']"),
        ('{"instruction": 3, "output": "x"}', "must be texts"),
        ('{"instruction": "x", "output": null}', "needs a string"),
        ('{"instruction": "x", "output": "y", "history": ["z"]}', "history must be"),
    ],
)
def test_customjson_names_file_and_line_of_what_it_cannot_read(base_dir, line, complaint):
    path = put(base_dir, "own.jsonl", [chat("q", "a")])
    path.write_text(path.read_text(encoding="utf-8") + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as told:
        len(CustomJSON(path))
    assert str(told.value).startswith(f"{path}:3") and complaint in str(told.value)


def test_an_instruction_may_be_its_input_only(base_dir):
    row = {"instruction": None, "input": "x", "output": "y"}
    assert list(CustomJSON(put(base_dir, "own.jsonl", [row]))) == [chat("x", "y")]


@pytest.mark.parametrize("row", [{"messages": None}, {"messages": ["x"]}, {}], ids=str)
def test_a_bad_row_in_the_place_of_a_hubs_table_is_named(base_dir, row):
    put(base_dir, "smoltalk/train.jsonl", [chat("q", "a"), row])
    with pytest.raises(UserError, match=r"tasks/smoltalk \(train\): "):
        list(SmolTalk())


def test_files_of_one_name_are_each_looked_at(base_dir, capsys):
    first = put(base_dir, "m/chats.jsonl", [chat("q", "a")])
    second = put(base_dir, "n/chats.jsonl", [chat("q", "a"), {"nothing": 1}])
    flags = [f"--mid_mixture={first}", f"--sft_mixture={second}", "--rl_task=", "--core=0"]
    assert fetch.main([*flags, "--eval_tasks=identity"]) == 2
    assert f"{second}:2: it has nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (
            '{"prompt": [{"role": "user", "content": "x"}], "completion": []}',
            "the last message must be",
        ),
        ('{"messages": []}', "no message of a user"),
        (
            '{"messages": [{"role": "user", "content": "x"}]}',
            "the last message must be the assistant's",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": '
            '"x"}]}',
            "message 0 has the role 'assistant'",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
            "message 1 has the role 'user', but it is the turn of the assistant",
        ),
        (
            '{"conversations": [{"from": "human", "value": "a"}, {"from": "system", "value": "b"}]}',
            "message 1 has the role 'system'",
        ),
    ],
)
def test_customjson_leaves_out_conversations_that_take_no_turns_and_counts_them(
    base_dir, caplog, line, complaint
):
    path = put(base_dir, "own.jsonl", [chat("q", "a")])
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{line}\n{line}\n", encoding="utf-8")
    assert list(CustomJSON(path)) == [chat("q", "a")]
    (message,) = caplog.messages
    assert message.startswith(f"{path}: left out 2 of 3 conversations, the first: {path}:3: ")
    assert complaint in message
    path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        len(CustomJSON(path))
    assert str(caught.value).startswith(f"{path}:1: ") and complaint in str(caught.value)


def test_customjson_reads_what_public_sets_hold(base_dir):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    system = {"role": "system", "content": "s"}
    parts = [{"type": "text", "text": text} for text in ("q", "")]
    rows: list[Any] = [
        {"conversations": turns},
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [{"role": "user", "content": parts}, turns[1]]},
        {"prompt": parts, "completion": "a"},
    ]
    assert list(CustomJSON(put(base_dir, "own.jsonl", rows))) == [{"messages": turns}] * len(rows)
    rows = [
        {"messages": [{"role": "developer", "content": "s"}, *turns]},
        {"conversations": [{"role": "system", "content": parts[1:], "extra": 1}, *turns]},
        {"messages": [{**turns[0], "weight": None}, {**turns[1], "weight": 1}]},
    ]
    rows[1]["conversations"][0]["content"] = [{"type": "text", "text": "s"}]
    found = [
        conversation["messages"] for conversation in CustomJSON(put(base_dir, "own.jsonl", rows))
    ]
    assert found == [[system, *turns], [system, *turns], [turns[0], {**turns[1], "weight": 1}]]


def test_customjson_reads_a_json_array_and_lines_in_a_json_file(base_dir):
    rows = [chat("q", "a"), chat("r", "b")]
    path = base_dir / "array.json"
    path.write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
    assert list(load_task(str(path))) == rows and len(build_mixture(f"{path}:2")) == 4
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert list(load_task(str(path))) == rows
    path.write_text(json.dumps([*rows, 3]), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"array\.json, item 3: it is a JSON int: expected messages"
    ):
        len(load_task(str(path)))
    assert list(load_task(str(put(base_dir, "own.JSONL", rows)))) == rows
    array = put(base_dir, "array.jsonl", [])
    array.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    with pytest.raises(UserError, match=r"array\.jsonl:1 is not JSON .*of a JSON array, each item"):
        len(load_task(str(array)))
    array.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"array\.jsonl:1: it is an array of rows: put each on a line"
    ):
        len(load_task(str(array)))


def test_customjson_names_a_file_that_is_not_there(base_dir):
    with pytest.raises(UserError, match=r"no file .*nowhere\.jsonl"):
        build_mixture("nowhere.jsonl:1")
    with pytest.raises(UserError, match="is empty"):
        len(CustomJSON(put(base_dir, "own.jsonl", [])))
    (base_dir / "latin.jsonl").write_bytes(b'{"messages": "\xe9"}')
    with pytest.raises(UserError, match="UTF-8"):
        len(CustomJSON(base_dir / "latin.jsonl"))


# ---- the real thing ------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development data is not here")
def test_the_real_data(base_dir):
    (base_dir / "tasks").mkdir()
    for folder in SHARED.iterdir():
        (base_dir / "tasks" / folder.name.removesuffix("_like")).symlink_to(folder)
    sizes = {
        ("gsm8k", "train"): 7173,
        ("gsm8k", "test"): 1319,
        ("mmlu", "test"): 14042,
        ("arc-easy", "test"): 2376,
        ("arc-challenge", "test"): 1172,
    }
    for (name, split), count in {
        **sizes,
        ("humaneval", "test"): 164,
        ("smoltalk", "train"): 20041,
    }.items():
        task = load_task(name, split)
        assert len(task) == count, name
        for conversation in task[:: max(1, count // 50)]:
            common.check_conversation(conversation["messages"], name)
            gold = conversation["messages"][-1]["content"]
            if name not in ("smoltalk", "humaneval"):
                assert task.evaluate(conversation, gold), name
    train, test = (set(questions(load_task("gsm8k", split))) for split in ("train", "test"))
    assert not train & test


def test_a_message_of_weight_0_is_context(base_dir):
    tokenizer = ByteTokenizer()
    rows = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "BAD", "weight": 0},
        {"role": "user", "content": "r", "weight": None},
        {"role": "assistant", "content": [{"type": "text", "text": "good"}], "weight": 1},
    ]
    path = put(base_dir, "own.jsonl", [{"messages": rows}])
    ids, mask = tokenizer.render_conversation(CustomJSON(path)[0])
    assert (
        tokenizer.decode([token for token, learn in zip(ids, mask, strict=True) if learn])
        == "good<|assistant_end|>"
    )
    assert "BAD" in tokenizer.decode(ids)
    tool = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    ids, mask = tokenizer.render_conversation(
        {"messages": [rows[0], {"role": "assistant", "content": tool, "weight": 0}]}
    )
    assert not any(mask)
    put(base_dir, "own.jsonl", [{"messages": rows[:2]}])
    with pytest.raises(
        UserError, match=r"own\.jsonl:1: each of the assistant's messages has weight 0"
    ):
        len(CustomJSON(path))
    put(base_dir, "own.jsonl", [{"messages": [rows[0], {**rows[1], "weight": 0.5}]}])
    with pytest.raises(
        UserError,
        match=r"own\.jsonl:1: message 1 has the weight 0\.5: 0 \(context\) and 1 \(learned\) are "
        r"possible",
    ):
        len(CustomJSON(path))


def test_a_file_in_a_mixture_needs_no_number_on_windows_either():
    assert parse_mixture(r"C:\data\chats.jsonl,C:\b.jsonl:2,identity") == [
        (r"C:\data\chats.jsonl", 1),
        (r"C:\b.jsonl", 2),
        ("identity", 1),
    ]
