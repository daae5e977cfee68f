"""Everything that the defaults download (hub repositories, CORE's bundle), generated here.

The formats are the datasets' own. Sizes are the smallest with which the default mixtures draw from
every dataset: SFT takes 0.0217 of SmolTalk.
"""

import csv
import io
import json
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

from tests.hub.rows import HUMANEVAL, MMLU, SMOLTALK, TABLES, Row, Table
from tests.hub.server import Hub, Repo
from zangchat.core_eval import CORE_TASKS
from zangchat.dataset.hub import HUB_REPOS
from zangchat.dataset.shards import write_shard

BUNDLE_PATH = "/eval_bundle.zip"
SHARDS = 7  # of each corpus, including the one for validation
ROWS = {SMOLTALK: 600, MMLU: 60, HUMANEVAL: 12}
OTHER_ROWS = 60


def stand_in(port: int = 0, count: int = SHARDS) -> Hub:
    """The hub for the defaults: `count` shards of each corpus, the tasks, and CORE's bundle."""
    return Hub(
        repositories(count), {"ZANGCHAT_EVAL_BUNDLE_URL": (BUNDLE_PATH, core_bundle())}, port
    )


def repositories(count: int = SHARDS) -> list[Repo]:
    corpora = [
        Repo(name, shards(seed, 1 if source == "tinystories" else count))
        for seed, (source, name) in enumerate(HUB_REPOS.items())
    ]
    return corpora + [
        Repo(name, tables(name)) for name in dict.fromkeys(table.hub for table in TABLES)
    ]


# ---- the pretraining text ------------------------------------------------------------------------


def documents() -> list[str]:
    """The language reference that comes with Python, in documents of about 1,500 characters."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs, pieces = text.split("\n\n"), [""]
    for paragraph in paragraphs:
        if len(pieces[-1]) > 1500:
            pieces.append("")
        pieces[-1] += paragraph + "\n\n"
    return [piece.strip() for piece in pieces if piece.strip()]


def shards(seed: int, count: int = SHARDS) -> dict[str, bytes]:
    """The files of a corpus: shard_00000.parquet ..., with the documents rotated by `seed`."""
    texts = documents()
    texts = texts[seed * 10 :] + texts[: seed * 10]
    files = {"README.md": b"---\nlicense: mit\n---\nText in shards, shuffled.\n"}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            path = Path(folder) / (f"shard_{number:05d}.parquet" if count > 1 else "lone.parquet")
            write_shard(path, texts[number::count])
            files[path.name] = path.read_bytes()
    return files


# ---- the datasets of the tasks -------------------------------------------------------------------


def tables(name: str) -> dict[str, bytes]:
    """The files of a task's dataset: a parquet file per configuration and split, and a card."""
    matching = [table for table in TABLES if table.hub == name]
    count = ROWS.get(name, OTHER_ROWS)
    # each file gets different rows: the hub's client fetches equal files only once
    files = {
        table.hub_path: parquet(map(table.row, range(i * count, (i + 1) * count)))
        for i, table in enumerate(matching)
    }
    configs: dict[str, list[Table]] = {}
    for table in matching:
        configs.setdefault(table.hub_config or table.config or "default", []).append(table)
    card = {
        "configs": [
            {
                "config_name": config,
                "data_files": [
                    {
                        "split": table.split,
                        "path": table.hub_path.replace("-00000-of-00001.parquet", "-*"),
                    }
                    for table in split
                ],
            }
            for config, split in configs.items()
        ],
        "dataset_info": [
            {
                "config_name": config,
                "splits": [
                    {
                        "name": table.split,
                        "num_bytes": len(files[table.hub_path]),
                        "num_examples": count,
                    }
                    for table in split
                ],
            }
            for config, split in configs.items()
        ],
    }
    return files | {"README.md": f"---\n{yaml.safe_dump(card)}---\n# {name}\n".encode()}


def parquet(rows: Iterable[Row]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


# ---- CORE ----------------------------------------------------------------------------------------

SCHEMAS = ("winograd", "winogrande")
COMPLETIONS = (  # tasks with a text as the answer, not a choice
    *(
        "jeopardy",
        "bigbench_qa_wikidata",
        "lambada_openai",
        "bigbench_dyck_languages",
        "bigbench_cs_algorithms",
    ),
    *("bigbench_operators", "bigbench_repeat_copy_logic", "squad", "coqa"),
)
SHOTS = {
    "hellaswag_zeroshot": 0,
    "copa": 0,
    "openbook_qa": 0,
    "lambada_openai": 0,
    "winograd": 0,
    "winogrande": 0,
    "coqa": 0,
}
SHOTS["agi_eval_lsat_ar"] = 3
# tasks that put the answer on its own line
ANSWERS = ("jeopardy", "arc_easy", "arc_challenge", "piqa", "boolq")
ITEMS = 12


def core_item(kind: str, index: int) -> dict[str, Any]:
    if kind == "multiple_choice":
        return {
            "query": f"Question: What is {index} + 1?",
            "choices": [str(index + 1), str(index + 2)],
            "gold": index % 2,
        }
    if kind == "schema":
        contexts = [
            f"The cup did not fit into bag {index} because the cup",
            f"The cup did not fit into bag {index} because the bag",
        ]
        return {"context_options": contexts, "continuation": "was too big.", "gold": 0}
    return {
        "context": f"NUMBERS: What follows {index}",
        "continuation": str(index + 1),
        "category": f"part_{index % 3}",
    }


def core_bundle() -> bytes:
    """eval_bundle.zip: all tasks of CORE with a few items each."""
    settings, chances, items = (
        [],
        [["Eval Task", "Task Category", "Task Type", "#shots", "#datapoints", "Random baseline"]],
        {},
    )
    for label in CORE_TASKS:
        kind = (
            "schema"
            if label in SCHEMAS
            else "language_modeling"
            if label in COMPLETIONS
            else "multiple_choice"
        )
        uri = f"all_kinds/{label}.jsonl"
        shots = SHOTS.get(label, 10)
        setting: dict[str, Any] = {
            "label": label,
            "dataset_uri": uri,
            "num_fewshot": [shots],
            "icl_task_type": kind,
        }
        if label in ANSWERS:
            setting["continuation_delimiter"] = "\nAnswer: "
        if label == "jeopardy":
            setting["has_categories"] = True
        settings.append(setting)
        chance = "0" if kind == "language_modeling" else "50"
        chances.append([label, "all kinds", kind.replace("_", " "), str(shots), str(ITEMS), chance])
        items[uri] = [core_item(kind, index) for index in range(ITEMS)]
    table = io.StringIO()
    csv.writer(table).writerows(chances)
    files = {
        "core.yaml": yaml.safe_dump({"icl_tasks": settings}),
        "eval_meta_data.csv": table.getvalue(),
    }
    files |= {
        f"eval_data/{uri}": "".join(json.dumps(item) + "\n" for item in rows)
        for uri, rows in items.items()
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, text in files.items():
            bundle.writestr(f"eval_bundle/{name}", text)
    return buffer.getvalue()
