"""CORE: the 22 tasks of DCLM (arXiv:2406.11794), in three kinds, scored without generating
anything.

    multiple_choice     query + each choice: the choice with the least mean loss of its tokens
    schema              each context + one continuation: the context after which the continuation
                        has the least mean loss
    language_modeling   context + continuation: correct if greedy decoding gives the continuation

Prompts are those of DCLM's evaluator (llm-foundry): a line break separates examples and question,
the task's delimiter question and answer; the answer takes the context's trailing space to its
front; context and answer are tokenised separately, so that the answer's tokens are known exactly;
jeopardy is the mean over its categories. Ours only: <|bos|> in front, as in training, and few-shot
examples drawn per item, by Random(1234 + index), never the item itself. Accuracies are centred,
(accuracy - chance) / (1 - chance); CORE is their mean. With tasks missing it is another figure,
with another name.

The bundle (<base>/eval_bundle): core.yaml names tasks, files, shots, delimiters; eval_meta_data.csv
has chance; eval_data/ has the items.
"""

import csv
import os
import random
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from zangchat.engine import score
from zangchat.errors import UserError, explain
from zangchat.runtime import collectives
from zangchat.runtime.downloads import download_file_with_lock
from zangchat.runtime.files import file_lock, get_base_dir, read_jsonl
from zangchat.runtime.progress import Progress

if TYPE_CHECKING:
    from zangchat.gpt import GPT

CORE_TASKS = (
    "hellaswag_zeroshot",
    "jeopardy",
    "bigbench_qa_wikidata",
    "arc_easy",
    "arc_challenge",
    "copa",
    "commonsense_qa",
    "piqa",
    "openbook_qa",
    "lambada_openai",
    "hellaswag",
    "winograd",
    "winogrande",
    "bigbench_dyck_languages",
    "agi_eval_lsat_ar",
    "bigbench_cs_algorithms",
    "bigbench_operators",
    "bigbench_repeat_copy_logic",
    "squad",
    "coqa",
    "boolq",
    "bigbench_language_identification",
)
# ZANGCHAT_EVAL_BUNDLE_URL names a mirror
BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
MAX_BUNDLE_BYTES = 2 * 2**30  # unpacked; a zip that claims more is not the bundle
# what zipfile raises for a damaged file: the last two for offsets and names, and for flags
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError)
EXAMPLE_DELIMITER = "\n"
FEWSHOT_SEED = 1234
SUBSET_SEED = 1337
ITEMS_AT_A_TIME = 64  # rendered and scored together


@dataclass(frozen=True)
class CoreTask:
    """One line of core.yaml with its level of chance."""

    label: str
    kind: str  # multiple_choice | schema | language_modeling
    path: Path
    num_fewshot: int
    delimiter: str = " "  # between a question and its answer
    has_categories: bool = False  # examples are drawn per category; the score is the mean over them
    chance: float = 0.0  # accuracy of guessing


class Row(NamedTuple):
    """A sequence to score: the tokens from `start` on are the answer."""

    tokens: list[int]
    start: int


# ---- the bundle ----------------------------------------------------------------------------------


def find_bundle(download: bool = True) -> Path:
    """The bundle's folder, downloaded first if missing and `download` is set. Raises UserError."""
    folder = get_base_dir() / "eval_bundle"
    if not (folder / "core.yaml").is_file():
        if not download:
            raise UserError(
                f"no CORE data in {folder}: run `python -m scripts.fetch`, which downloads it, or "
                "put the bundle there"
            )
        url = os.environ.get("ZANGCHAT_EVAL_BUNDLE_URL") or BUNDLE_URL

        def unpack_new(path: Path) -> None:
            try:
                unpack(path, folder)
            except UserError as error:  # it names the file, which will be gone
                raise UserError(
                    f"what {url} gave is not the zip file of CORE: check the network, or set "
                    "ZANGCHAT_EVAL_BUNDLE_URL to a mirror"
                ) from error

        archive = download_file_with_lock(url, "eval_bundle.zip", postprocess_fn=unpack_new)
        with file_lock(f"{archive}.lock"):  # several ranks may find a zip that somebody put there
            if not (folder / "core.yaml").is_file():
                unpack(archive, folder)
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the folder eval_bundle/ of a zip file as `folder`: whole or not at all.

    Raises UserError for a zip whose members would leave the folder, are links, or exceed
    MAX_BUNDLE_BYTES.
    """
    folder = folder.resolve()  # it may be a link to another disk
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".eval_bundle.") as temporary:
        damaged, remedy = f"{archive} is damaged", "delete it and run this again"
        with explain(damaged, remedy, *DAMAGE), zipfile.ZipFile(archive) as bundle:
            members = bundle.infolist()
            for member in members:
                parts = Path(member.filename.replace("\\", "/")).parts
                if (
                    Path(member.filename).is_absolute()
                    or ".." in parts
                    or stat.S_ISLNK(member.external_attr >> 16)
                ):
                    raise UserError(
                        f"{archive}: {member.filename!r} leads out of its folder; delete the "
                        "file, it is not the bundle"
                    )
            if sum(member.file_size for member in members) > MAX_BUNDLE_BYTES:
                raise UserError(
                    f"{archive} unpacks to more than {MAX_BUNDLE_BYTES >> 30} GiB: delete the "
                    "file, it is not the bundle"
                )
            bundle.extractall(temporary)
        found = [path.parent for path in sorted(Path(temporary).rglob("core.yaml"))]
        if not found:
            raise UserError(f"{archive} has no core.yaml: delete the file, it is not the bundle")
        if folder.exists():  # without a core.yaml
            shutil.rmtree(folder)
        found[0].rename(folder)


def read_tasks(bundle: Path) -> tuple[list[CoreTask], list[str]]:
    """(tasks with data, labels of missing ones), both in the order of CORE. Raises UserError."""
    try:
        settings = yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        with open(bundle / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
            chance = {
                row["Eval Task"]: float(row["Random baseline"]) / 100
                for row in csv.DictReader(file)
            }
        tasks = {
            entry["label"]: CoreTask(
                label=entry["label"],
                kind=entry["icl_task_type"],
                path=bundle / "eval_data" / entry["dataset_uri"],
                num_fewshot=int(entry["num_fewshot"][0]),
                delimiter=entry.get("continuation_delimiter", " "),
                has_categories=bool(entry.get("has_categories", False)),
                chance=chance[entry["label"]],
            )
            for entry in settings
        }
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{bundle} is no CORE bundle ({type(error).__name__}: {error}): delete it and run this "
            "again"
        ) from error
    unknown = sorted({task.kind for task in tasks.values()} - set(ROWS))
    if unknown:
        raise UserError(
            f"{bundle / 'core.yaml'} has tasks of the kind {', '.join(unknown)}: known are "
            f"{', '.join(ROWS)}"
        )
    present = [
        tasks[label] for label in CORE_TASKS if label in tasks and tasks[label].path.is_file()
    ]
    return present, [label for label in CORE_TASKS if label not in {task.label for task in present}]


def read_items(task: CoreTask) -> list[dict[str, Any]]:
    """The items of a task, their texts stripped. Raises UserError with file and line."""
    items = []
    for where, item in read_jsonl(task.path):
        missing = [field for field in FIELDS[task.kind] if field not in item]
        if missing:
            raise UserError(f"{where} has no {', '.join(missing)}: copy the bundle again")
        items.append(
            {key: value.strip() if isinstance(value, str) else value for key, value in item.items()}
        )
    if not items:
        raise UserError(f"{task.path} is empty: copy the bundle again")
    return items


# ---- items to rows -------------------------------------------------------------------------------


# item -> its (context, answer) pairs
ROWS: dict[str, Callable[[dict[str, Any]], list[tuple[str, str]]]] = {
    "multiple_choice": lambda item: [(item["query"], choice) for choice in item["choices"]],
    "schema": lambda item: [(context, item["continuation"]) for context in item["context_options"]],
    "language_modeling": lambda item: [(item["context"], item["continuation"])],
}
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}


def fewshot_indices(index: int, count: int, num_fewshot: int) -> list[int]:
    """The other items of `count` to show before item `index`; all if there are too few."""
    others = [i for i in range(count) if i != index]
    return random.Random(FEWSHOT_SEED + index).sample(others, min(num_fewshot, len(others)))


def preamble(task: CoreTask, examples: Sequence[dict[str, Any]]) -> str:
    """The solved examples in front of the question."""
    solved = (ROWS[task.kind](item)[item.get("gold", 0)] for item in examples)
    return EXAMPLE_DELIMITER.join(
        f"{context}{task.delimiter}{answer}" for context, answer in solved
    )


def item_rows(
    task: CoreTask,
    item: dict[str, Any],
    examples: Sequence[dict[str, Any]],
    tokenizer: Any,
    context_len: int,
) -> list[Row]:
    """The rows of an item: one per choice, or a single one.

    A context that does not fit is cut from the left, after <|bos|>.
    """
    before = preamble(task, examples)
    # a schema's continuation continues its context; the other kinds have a question and an answer
    delimiter = "" if task.kind == "schema" and not before else task.delimiter
    head = tokenizer.encode(before) if before else []
    rows = []
    for context, answer in ROWS[task.kind](item):
        question = f"{EXAMPLE_DELIMITER if before else ''}{context}{delimiter}".rstrip()
        answer_ids = tokenizer.encode(answer if answer.startswith(" ") else f" {answer}")
        context_ids = [*head, *tokenizer.encode(question)]
        answer_ids = answer_ids[:context_len]
        # <|bos|> needs no room: the last token is only a target
        room = context_len - len(answer_ids)
        kept = context_ids[max(0, len(context_ids) - room) :] if room else []
        rows.append(Row([tokenizer.get_bos_token_id(), *kept, *answer_ids], 1 + len(kept)))
    return rows


# ---- scoring -------------------------------------------------------------------------------------


def judge(
    model: Any, kind: str, items: Sequence[Sequence[Row]], golds: Sequence[int]
) -> list[bool]:
    """Whether each item (its rows, its gold row) is answered correctly."""
    rows = [row for item in items for row in item]
    prompts = [row.tokens[: row.start] for row in rows]
    answers = [row.tokens[row.start :] for row in rows]
    values = score(model, prompts, answers, greedy=kind == "language_modeling")
    means = iter(value / len(answer) for value, answer in zip(values, answers, strict=True))
    verdicts = []
    for item, gold in zip(items, golds, strict=True):
        own = [next(means) for _ in item]
        best = own.index(max(own))
        verdicts.append(own[0] == 0 if kind == "language_modeling" else best == gold)
    return verdicts


# ---- the whole -----------------------------------------------------------------------------------


def groups_of(task: CoreTask, items: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The items by category, in the order of first appearance; one group without categories."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        groups.setdefault(str(item.get("category", "")) if task.has_categories else "", []).append(
            item
        )
    return list(groups.values())


def chosen_items(groups: Sequence[Sequence[Any]], max_per_task: int) -> list[tuple[int, int]]:
    """(group, index) of the items to score, in order: all, or a fixed random `max_per_task`."""
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group))]
    if 0 < max_per_task < len(places):
        places = sorted(random.Random(SUBSET_SEED).sample(places, max_per_task))
    return places


def render(
    task: CoreTask,
    groups: Sequence[Sequence[dict[str, Any]]],
    places: Sequence[tuple[int, int]],
    tokenizer: Any,
    context_len: int,
) -> tuple[list[list[Row]], list[int]]:
    """(rows, gold row) of the items at `places`, each after its own few-shot examples."""
    rows, golds = [], []
    for g, i in places:
        examples = [groups[g][j] for j in fewshot_indices(i, len(groups[g]), task.num_fewshot)]
        rows.append(item_rows(task, groups[g][i], examples, tokenizer, context_len))
        golds.append(groups[g][i].get("gold", 0))
    return rows, golds


def evaluate_core_task(
    model: "GPT",
    tokenizer: Any,
    task: CoreTask,
    max_per_task: int = -1,
    show_progress: bool = False,
) -> float:
    """Accuracy of one task, 0 to 1; the ranks share the items and agree on the result."""
    rank, world_size = collectives.world()
    groups = groups_of(task, read_items(task))
    places = chosen_items(groups, max_per_task)
    verdicts = [0.0] * len(places)
    mine = list(range(rank, len(places), world_size))
    with Progress(f"CORE {task.label}", len(mine), shown=show_progress and rank == 0) as progress:
        for first in range(0, len(mine), ITEMS_AT_A_TIME):
            part = mine[first : first + ITEMS_AT_A_TIME]
            rows, golds = render(
                task,
                groups,
                [places[position] for position in part],
                tokenizer,
                model.config.sequence_len,
            )
            for position, verdict in zip(part, judge(model, task.kind, rows, golds), strict=True):
                verdicts[position] = float(verdict)
            progress.update(first + len(part), "items")
    by_group: dict[int, list[float]] = {}
    for (g, _), right in zip(places, collectives.sum_over_ranks(verdicts), strict=True):
        by_group.setdefault(g, []).append(right)
    return sum(sum(part) / len(part) for part in by_group.values()) / len(by_group)


def core_name(missing: Sequence[str]) -> str:
    """The name of the figure: "CORE", or "CORE (21/22, no coqa)"."""
    if not missing:
        return "CORE"
    return f"CORE ({len(CORE_TASKS) - len(missing)}/{len(CORE_TASKS)}, no {', '.join(missing)})"


def evaluate_core(
    model: "GPT",
    tokenizer: Any,
    bundle: Path,
    *,
    max_per_task: int = -1,
    on_task: Callable[[str, float, float], None] | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Score every CORE task in the bundle. `max_per_task` > 0 limits the items of each.

    `on_task` is called with (label, accuracy, centred). Returns {"name": core_name(missing),
    "core_metric": mean of the centred, "results": {label: accuracy}, "centered_results":
    {label: centred}, "missing": [label]}, the same on every rank. Raises UserError for a bundle
    without any of the tasks.
    """
    tasks, missing = read_tasks(bundle)
    if not tasks:
        raise UserError(f"{bundle} holds the data of no CORE task: delete it and run this again")
    was_training = model.training
    model.eval()
    results, centred = {}, {}
    for task in tasks:
        accuracy = evaluate_core_task(model, tokenizer, task, max_per_task, show_progress)
        results[task.label] = accuracy
        centred[task.label] = (accuracy - task.chance) / (1 - task.chance)
        if on_task:
            on_task(task.label, accuracy, centred[task.label])
    model.train(was_training)
    return {
        "name": core_name(missing),
        "core_metric": sum(centred.values()) / len(centred),
        "results": results,
        "centered_results": centred,
        "missing": missing,
    }
