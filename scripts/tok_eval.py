"""Compare the compression of the tokenizer with GPT-2's and GPT-4's: bytes of text per token,
higher is better.

python -m scripts.tok_eval
"""

import logging
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tiktoken
from rich.console import Console
from rich.table import Table

from zangchat import configurator
from zangchat.dataset import find_dataset, present_datasets
from zangchat.report import get_report
from zangchat.runtime.processes import get_dist_info
from zangchat.tokenizer import get_tokenizer

if TYPE_CHECKING:
    import tiktoken

    from zangchat.tokenizer import RustBPETokenizer

BASELINES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
SECONDS_TO_LOAD = 15.0  # tiktoken downloads missing encodings, and waits forever if nothing answers

SAMPLES = {
    "prose": (
        "The ferry left the harbour a little after six, when the fog had thinned enough to show "
        "the far bank. Two men argued quietly at "
        "the rail about the price of barley; a child counted gulls and lost her place at nineteen. "
        "Nobody asked the captain why he had "
        "waited, and he didn't explain. It was his last crossing before the bridge opened, and "
        "he'd meant to remember all of it: the "
        "smell of tar, the knock of the engine, the way the river turned from grey to green where "
        "the old mill race came in. Instead he "
        "thought about his sister's letter, which said that the house was sold, that the pear tree "
        "had been cut down, and that she was, "
        "all things considered, happier than she had been in years."
    ),
    "code": (
        "from collections import deque\n\n\n"
        "def shortest_path(graph: dict[str, list[str]], start: str, goal: str) -> list[str] | "
        "None:\n"
        '    """Breadth-first search; None where goal cannot be reached."""\n'
        "    parents: dict[str, str | None] = {start: None}\n"
        "    queue = deque([start])\n"
        "    while queue:\n"
        "        node = queue.popleft()\n"
        "        if node == goal:\n"
        "            path = []\n"
        "            while node is not None:\n"
        "                path.append(node)\n"
        "                node = parents[node]\n"
        "            return path[::-1]\n"
        "        for neighbour in graph.get(node, []):\n"
        "            if neighbour not in parents:\n"
        "                parents[neighbour] = node\n"
        "                queue.append(neighbour)\n"
        "    return None\n\n\n"
        'if __name__ == "__main__":\n'
        '    roads = {"A": ["B", "C"], "B": ["D"], "C": ["D", "E"], "D": ["F"], "E": ["F"]}\n'
        '    assert shortest_path(roads, "A", "F") == ["A", "B", "D", "F"]\n'
        '    print(f"{len(roads)} places, longest list {max(map(len, roads.values()))}")\n'
    ),
    "maths": (
        "\\begin{theorem} For every integer $n \\ge 1$ we have $\\sum_{k=1}^{n} k^3 = "
        "\\left(\\frac{n(n+1)}{2}\\right)^2$. "
        "\\end{theorem}\n\\begin{proof} For $n = 1$ both sides are $1$. Suppose that the claim "
        "holds for $n$. Then\n\\begin{align*}\n"
        "\\sum_{k=1}^{n+1} k^3 &= \\frac{n^2 (n+1)^2}{4} + (n+1)^3 \\\\\n&= \\frac{(n+1)^2 "
        "\\left(n^2 + 4n + 4\\right)}{4} \\\\\n"
        "&= \\left(\\frac{(n+1)(n+2)}{2}\\right)^2 ,\n\\end{align*}\nwhich is the claim for $n+1$. "
        "In particular the sum up to $n = 100$ "
        "is $5050^2 = 25502500$, and $\\int_0^1 x^3 \\, dx = \\lim_{n \\to \\infty} n^{-4} "
        "\\sum_{k=1}^{n} k^3 = \\tfrac14$. \\end{proof}\n"
    ),
    "Chinese": (
        "清晨的菜市场总是最热闹的。卖豆腐的老人一边招呼熟客,一边把刚出锅的豆浆倒进白瓷碗里;隔壁摊位上,年轻的夫妻正忙着给青菜洒水。"
        "我喜欢在上班之前来这里走一圈,不一定买什么,只是听听人们讨价还价的声音,看看今天又有什么新鲜的水果。母亲常说,要了解一座城市,"
        "先去看它的菜市场,再去看它的图书馆:前者告诉你人们怎样生活,后者告诉你人们怎样思考。2024年搬到南方以后,我才真正明白这句话的意思。"
    ),
    "Korean": (
        "비가 그친 뒤의 골목은 조용했다. 낡은 서점의 주인은 젖은 간판을 닦으며 오늘은 손님이 몇 명이나 올지 생각했다. "
        "어제 들어온 책들은 아직 상자 안에 그대로 있었고, 고양이 한 마리가 그 위에서 잠을 자고 있었다. 그는 서두르지 않았다. "
        "삼십 년 동안 같은 자리에서 배운 것이 있다면, 좋은 책은 언젠가 자기를 기다리는 사람을 만난다는 것이었다. "
        "오후 3시가 되자 교복을 입은 학생이 문을 열고 들어와 시집이 있느냐고 물었다."
    ),
}

logger = logging.getLogger(__name__)


@dataclass
class Config:
    dataset: str | None = None  # the corpus to measure on; default: that of the tokenizer
    data_path: str | None = None  # a .parquet, .jsonl or .txt file, or a folder of them, instead
    skip_bad_rows: bool = False  # leave out rows of own files that cannot be read, and count them
    max_chars: int = 1_000_000  # characters taken of each split of the corpus


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, evaluate, argv)


def evaluate(config: Config) -> None:
    configurator.check_range(1, config, "max_chars")
    if get_dist_info()[1] != 0:
        return
    ours = get_tokenizer()
    baselines = {
        name: encoding
        for name, key in BASELINES.items()
        if (encoding := load_baseline(name, key)) is not None
    }
    rows = [
        compare(name, text, ours, baselines)
        for name, text in {**SAMPLES, **corpus(config, ours)}.items()
    ]
    show(
        rows,
        {"zangchat": ours.get_vocab_size()}
        | {name: encoding.n_vocab for name, encoding in baselines.items()},
    )
    get_report().log(section="Tokenizer evaluation", data=rows)


def load_baseline(name: str, key: str) -> "tiktoken.Encoding | None":
    """tiktoken's encoding; None, with a warning, if it is not cached and cannot be fetched."""
    loaded: list[Any] = []

    def load() -> None:
        try:
            loaded.append(tiktoken.get_encoding(key))
        except (
            OSError,
            ValueError,
        ) as error:  # requests' errors are OSErrors; ValueError: a damaged download
            loaded.append(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_LOAD)
    result = loaded[0] if loaded else f"no answer within {SECONDS_TO_LOAD:.0f} s"
    if isinstance(result, tiktoken.Encoding):
        return result
    reason = result if isinstance(result, str) else type(result).__name__
    logger.warning(f"no comparison with {name}: tiktoken cannot load {key} here ({reason})")
    return None


def corpus(config: Config, tokenizer: "RustBPETokenizer") -> dict[str, str]:
    """The beginning of both splits; nothing, with a message, without a corpus."""
    name = config.dataset
    if not name and not config.data_path:
        present, trained_on = present_datasets(), tokenizer.facts.get("dataset")
        name = trained_on if trained_on in present else None
        if not present:
            logger.info(
                "no corpus here: measuring only on the samples (--data_path or --dataset name one)"
            )
            return {}
    dataset = find_dataset(name, config.data_path, config.skip_bad_rows)
    return {
        f"{dataset.name}, {split}": beginning(dataset.iter_documents(split), config.max_chars)
        for split in ("train", "validation")
    }


def beginning(documents: Any, max_chars: int) -> str:
    characters, taken = 0, []
    for document in documents:
        taken.append(document[: max_chars - characters])
        characters += len(taken[-1])
        if characters >= max_chars:
            break
    return "\n".join(taken)


def compare(
    name: str, text: str, ours: "RustBPETokenizer", baselines: dict[str, Any]
) -> dict[str, Any]:
    """{"text", "bytes", tokenizer: bytes per token, "vs" ...: how many per cent fewer tokens ours
    needs (negative: more)}.
    """
    ids = ours.encode(text)
    if ours.decode(ids) != text:
        raise RuntimeError(f"{name}: decoding the ids does not give the text back")
    size = len(text.encode("utf-8"))
    row: dict[str, Any] = {
        "text": name,
        "bytes": size,
        "zangchat": round(size / max(len(ids), 1), 3),
    }
    for baseline, encoding in baselines.items():
        theirs = len(encoding.encode_ordinary(text))
        row[baseline] = round(size / max(theirs, 1), 3)
        row[f"tokens vs {baseline}, %"] = round(100 * (len(ids) - theirs) / max(theirs, 1), 1)
    return row


def show(rows: list[dict[str, Any]], vocabularies: dict[str, int]) -> None:
    caption = ", ".join(f"{name} {size:,}" for name, size in vocabularies.items())
    table = Table(title="bytes per token", caption=f"vocabularies: {caption}")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "text" else "right")
    for row in rows:
        table.add_row(
            *(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values())
        )
    Console(width=max(80, Console().width)).print(table)  # a terminal wraps lines, not numbers


if __name__ == "__main__":
    sys.exit(main())
