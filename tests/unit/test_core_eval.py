"""CORE: against its slow twin, in batches of any size, over ranks; and what it says of a bundle
that is not whole.
"""

import csv
import json
import random
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.hub.server import Hub
from tests.reference import core_eval as slow
from tests.util import ByteTokenizer, lively_model
from zangchat import core_eval
from zangchat.config import GPTConfig
from zangchat.core_eval import CoreTask, Row
from zangchat.engine import scoring
from zangchat.errors import UserError
from zangchat.gpt import GPT
from zangchat.runtime import collectives

TOKENIZER = ByteTokenizer()
SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval_bundle"
WORDS = ["red", "green", "blue", "white", "a dog", "the sea", "two", "one more"]


@pytest.fixture(scope="module")
def model() -> GPT:
    """With a context that long prompts exceed."""
    return lively_model(
        TOKENIZER.get_vocab_size(), sequence_len=96, n_layer=2, n_embd=32, seed=3
    ).eval()


def items(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(n))

    made = []
    for i in range(count):
        if kind == "multiple_choice":
            choices = rng.sample(WORDS, 4)
            made.append(
                {
                    "query": f"Q: {words(rng.randint(1, 6))}?",
                    "choices": choices,
                    "gold": rng.randrange(4),
                }
            )
        elif kind == "schema":
            made.append(
                {
                    "context_options": [words(3), words(5)],
                    "continuation": words(2),
                    "gold": rng.randrange(2),
                }
            )
        else:
            made.append(
                {
                    "context": words(rng.randint(1, 9)) + " ",
                    "continuation": words(1),
                    "category": "ab"[i % 3 == 0],
                }
            )
    return made


def write_items(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_bundle(folder: Path) -> Path:
    """Three tasks, one of each kind, under labels of CORE."""
    kinds = {
        "copa": ("multiple_choice", 0, " "),
        "winograd": ("schema", 0, " "),
        "jeopardy": ("language_modeling", 2, "\nAnswer: "),
    }
    settings = []
    for label, (kind, shots, delimiter) in kinds.items():
        write_items(folder / "eval_data" / "some" / f"{label}.jsonl", items(kind, 12))
        entry = {
            "label": label,
            "dataset_uri": f"some/{label}.jsonl",
            "num_fewshot": [shots],
            "icl_task_type": kind,
        }
        entry |= {"continuation_delimiter": delimiter} if delimiter != " " else {}
        settings.append(entry | ({"has_categories": True} if label == "jeopardy" else {}))
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": settings}), encoding="utf-8")
    with open(folder / "eval_meta_data.csv", "w", encoding="utf-8", newline="") as file:
        rows = [
            ["Eval Task", "Random baseline"],
            ["copa", "25"],
            ["winograd", "50"],
            ["jeopardy", "0"],
        ]
        csv.writer(file).writerows(rows)
    return folder


# ---- against the twin ----------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("kind", list(core_eval.ROWS))
def test_accuracy_equals_that_of_the_slow_twin(model, tmp_path, kind, shots):
    path = write_items(tmp_path / "task.jsonl", items(kind, 30))
    for delimiter in (" ", "\nAnswer: "):
        task = CoreTask("task", kind, path, shots, delimiter)
        assert core_eval.evaluate_core_task(model, TOKENIZER, task) == slow.score_task(
            model, TOKENIZER, task
        )


def test_language_modelling_counts_only_whole_answers(model, tmp_path):
    """Continuations that the model itself would write are right; with the last token changed they
    are wrong.
    """
    rows = []
    for index in range(8):
        tokens = [
            TOKENIZER.get_bos_token_id(),
            *TOKENIZER.encode(f"item {index}"),
            *TOKENIZER.encode(" "),
        ]
        for _ in range(3):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        start = len(tokens) - 3
        rows += [Row(tokens, start), Row([*tokens[:-1], (tokens[-1] + 1) % 200], start)]
    items = [[row] for row in rows]
    assert core_eval.judge(model, "language_modeling", items, [0] * len(rows)) == [True, False] * 8


def test_categories_count_alike_whatever_their_size(model, tmp_path):
    path = write_items(tmp_path / "task.jsonl", items("language_modeling", 20))
    task = CoreTask("jeopardy", "language_modeling", path, 2, has_categories=True)
    groups = core_eval.groups_of(task, core_eval.read_items(task))
    assert sorted(map(len, groups)) == [7, 13]
    assert core_eval.evaluate_core_task(model, TOKENIZER, task) == slow.score_task(
        model, TOKENIZER, task
    )


def test_the_context_of_an_item_goes_through_the_model_once(model, tmp_path):
    path = write_items(tmp_path / "task.jsonl", items("multiple_choice", 20))
    task = CoreTask("task", "multiple_choice", path, 0)
    groups = core_eval.groups_of(task, core_eval.read_items(task))
    rows, golds = core_eval.render(task, groups, core_eval.chosen_items(groups, -1), TOKENIZER, 96)
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].numel()))
    core_eval.judge(model, "multiple_choice", rows, golds)
    hook.remove()
    assert sum(seen) < 0.7 * sum(len(row.tokens) for item in rows for row in item)


@pytest.mark.parametrize("kind", list(core_eval.ROWS))
def test_the_size_of_the_batches_changes_nothing(model, tmp_path, monkeypatch, kind):
    task = CoreTask("task", kind, write_items(tmp_path / "task.jsonl", items(kind, 25)), 2)
    whole = core_eval.evaluate_core_task(model, TOKENIZER, task)
    settings = [(scoring, "TOKENS_PER_BATCH", {"cpu": n}) for n in (1, 300)]
    for module, name, value in [*settings, (core_eval, "ITEMS_AT_A_TIME", 7)]:
        monkeypatch.setattr(module, name, value)
        assert core_eval.evaluate_core_task(model, TOKENIZER, task) == whole


def test_ranks_share_the_items_and_sum_to_the_whole(model, tmp_path, monkeypatch):
    task = CoreTask(
        "task",
        "multiple_choice",
        write_items(tmp_path / "task.jsonl", items("multiple_choice", 25)),
        2,
    )
    whole = core_eval.evaluate_core_task(model, TOKENIZER, task)
    parts: list[list[float]] = []
    monkeypatch.setattr(
        collectives, "sum_over_ranks", lambda values: parts.append(list(values)) or list(values)
    )
    for rank in range(3):
        monkeypatch.setattr(collectives, "world", lambda rank=rank: (rank, 3))
        core_eval.evaluate_core_task(model, TOKENIZER, task)
    assert sum(map(sum, parts)) / 25 == pytest.approx(whole)
    assert all(sum(position) <= 1 for position in zip(*parts, strict=True))


# ---- prompts -------------------------------------------------------------------------------------


def test_examples_never_hold_the_item_itself_and_are_its_own():
    for index in range(20):
        shown = core_eval.fewshot_indices(index, 20, 10)
        assert index not in shown and len(set(shown)) == 10
        assert shown == core_eval.fewshot_indices(index, 20, 10)
    assert core_eval.fewshot_indices(0, 20, 10) != core_eval.fewshot_indices(1, 20, 10)
    assert sorted(core_eval.fewshot_indices(1, 3, 10)) == [0, 2]


def test_a_prompt_reads_as_in_dclm():
    task = CoreTask("t", "multiple_choice", Path(), 1, "\nAnswer: ")
    item = {"query": "Q2", "choices": ["no", "yes"], "gold": 1}
    rows = core_eval.item_rows(
        task, item, [{"query": "Q1", "choices": ["a", "b"], "gold": 0}], TOKENIZER, 96
    )
    assert [TOKENIZER.decode(row.tokens) for row in rows] == [
        f"<|bos|>Q1\nAnswer: a\nQ2\nAnswer: {choice}" for choice in ("no", "yes")
    ]
    assert [TOKENIZER.decode(row.tokens[row.start :]) for row in rows] == [" no", " yes"]


def test_what_does_not_fit_is_cut_from_the_left():
    task = CoreTask("t", "language_modeling", Path(), 0)
    for length in range(1, 40):
        (row,) = core_eval.item_rows(
            task, {"context": "c" * length, "continuation": "answer"}, [], TOKENIZER, 20
        )
        assert len(row.tokens) - 1 <= 20 and row.tokens[0] == TOKENIZER.get_bos_token_id()
        assert TOKENIZER.decode(row.tokens[row.start :]) == " answer"
        assert row.start == 1 + min(length, 20 - len(" answer"))
    (row,) = core_eval.item_rows(
        task, {"context": "c", "continuation": "a" * 50}, [], TOKENIZER, 20
    )
    assert len(row.tokens) == 21 and row.start == 1


# ---- the bundle ----------------------------------------------------------------------------------


def test_the_figure_is_named_after_what_is_missing(model, tmp_path):
    heard: list[str] = []
    result = core_eval.evaluate_core(
        model,
        TOKENIZER,
        bundle=make_bundle(tmp_path),
        on_task=lambda label, *_: heard.append(label),
    )
    assert heard == ["jeopardy", "copa", "winograd"]  # in the order of CORE
    assert (
        result["name"].startswith("CORE (3/22, no hellaswag_zeroshot, ")
        and "coqa" in result["missing"]
    )
    centred = {
        "copa": (result["results"]["copa"] - 0.25) / 0.75,
        "winograd": (result["results"]["winograd"] - 0.5) / 0.5,
    }
    for label, value in centred.items():
        assert result["centered_results"][label] == pytest.approx(value)
    assert result["core_metric"] == pytest.approx(sum(result["centered_results"].values()) / 3)
    assert core_eval.core_name([]) == "CORE"
    assert core_eval.core_name(["coqa"]) == "CORE (21/22, no coqa)"


def test_a_part_of_a_task_is_the_same_part_each_time(model, tmp_path):
    groups = [list(range(30)), list(range(20))]
    chosen = core_eval.chosen_items(groups, 10)
    assert len(set(chosen)) == 10 and chosen == core_eval.chosen_items(groups, 10)
    assert (
        core_eval.chosen_items(groups, -1)
        == core_eval.chosen_items(groups, 100)
        == [(g, i) for g in (0, 1) for i in groups[g]]
    )


def test_a_model_in_training_stays_in_training(model, tmp_path):
    model.train()
    core_eval.evaluate_core(model, TOKENIZER, bundle=make_bundle(tmp_path), max_per_task=2)
    assert model.training
    model.eval()


def test_what_is_wrong_with_a_bundle_is_said(model, tmp_path, base_dir):
    with pytest.raises(UserError, match="scripts.fetch"):
        core_eval.find_bundle(download=False)
    bundle = make_bundle(tmp_path / "a")
    (bundle / "eval_data" / "some" / "copa.jsonl").write_text('{"query": "q"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"copa\.jsonl:1 has no choices, gold"):
        core_eval.evaluate_core(model, TOKENIZER, bundle=bundle)
    (bundle / "eval_data" / "some" / "copa.jsonl").write_text("{}\n{oops\n", encoding="utf-8")
    with pytest.raises(UserError, match="copy the bundle again"):
        core_eval.evaluate_core(model, TOKENIZER, bundle=bundle)
    (bundle / "core.yaml").write_text("icl_tasks: 3", encoding="utf-8")
    with pytest.raises(UserError, match="no CORE bundle"):
        core_eval.evaluate_core(model, TOKENIZER, bundle=bundle)


def zipped(path: Path, members: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def test_a_bundle_is_unpacked_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "eval_bundle"
    core_eval.unpack(
        zipped(
            tmp_path / "a.zip", {"eval_bundle/core.yaml": "x", "eval_bundle/eval_data/t.jsonl": "y"}
        ),
        folder,
    )
    assert (folder / "core.yaml").read_text() == "x" and (
        folder / "eval_data" / "t.jsonl"
    ).read_text() == "y"
    bad = {
        "../core.yaml": "leads out",
        "/core.yaml": "leads out",
        "eval_bundle/readme": "no core.yaml",
    }
    for number, (member, message) in enumerate(bad.items()):
        target = tmp_path / f"target{number}"
        with pytest.raises(UserError, match=message):
            core_eval.unpack(zipped(tmp_path / f"{number}.zip", {member: "x"}), target)
        assert not target.exists()
    (tmp_path / "cut.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:-30])
    with pytest.raises(UserError, match="damaged"):
        core_eval.unpack(tmp_path / "cut.zip", tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_bundle_may_be_a_link_to_another_disk(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"eval_bundle/core.yaml": "x"})
    (tmp_path / "empty").mkdir()
    for name in ("empty", "not there yet"):
        (link := tmp_path / f"link to {name}").symlink_to(tmp_path / name)
        core_eval.unpack(archive, link)
        assert link.is_symlink() and (tmp_path / name / "core.yaml").read_text() == "x"


def test_a_page_in_place_of_the_bundle_is_named_by_its_address(base_dir, monkeypatch):
    with Hub([], {"ZANGCHAT_EVAL_BUNDLE_URL": ("/a.zip", b"<html>log in first</html>")}) as hub:
        url = hub.variables["ZANGCHAT_EVAL_BUNDLE_URL"]
        monkeypatch.setenv("ZANGCHAT_EVAL_BUNDLE_URL", url)
        with pytest.raises(UserError) as told:
            core_eval.find_bundle()
    assert f"what {url} gave is not the zip file" in str(told.value)
    assert ".part" not in str(told.value) and not list(base_dir.glob("*.zip"))


def test_a_damaged_bundle_is_told_wherever_the_damage_is(tmp_path):
    text = "".join(random.Random(0).choices("abc\n", k=3000))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("core.yaml", text)
    intact = (tmp_path / "a.zip").read_bytes()
    directory = intact.index(b"PK\1\2")  # the archive's entry of its only member
    for damage in (
        {60: 0xFF, 61: 0xFF},  # the contents
        {directory + 8: 1},  # encrypted
        {directory + 9: 8, directory + 46: 0xFF},  # no UTF-8 in a name that is said to be
        {directory + 10: 99},  # no method of packing
        {directory + 10: 0, directory + 21: 0xFF, directory + 25: 0xFF},  # longer than the file
        {directory + 42: 0xFF},  # where the member begins
    ):
        damaged = bytearray(intact)
        for place, byte in damage.items():
            damaged[place] = byte
        (tmp_path / "b.zip").write_bytes(damaged)
        with pytest.raises(UserError, match=r"b\.zip is damaged \(.+\): delete it and run"):
            core_eval.unpack(tmp_path / "b.zip", tmp_path / "target")


def test_a_zip_that_somebody_put_there_is_unpacked_by_one_of_the_ranks(base_dir, monkeypatch):
    zipped(base_dir / "eval_bundle.zip", {"eval_bundle/core.yaml": "x"})
    unpack, unpacked = core_eval.unpack, []

    def slowly(archive: Path, folder: Path) -> None:
        unpacked.append(archive)
        time.sleep(0.05)
        unpack(archive, folder)

    monkeypatch.setattr(core_eval, "unpack", slowly)
    with ThreadPoolExecutor(8) as ranks:
        assert set(ranks.map(lambda _: core_eval.find_bundle(), range(8))) == {
            base_dir / "eval_bundle"
        }
    assert len(unpacked) == 1 and (base_dir / "eval_bundle" / "core.yaml").read_text() == "x"


def test_a_link_in_the_zip_is_refused(tmp_path):
    link = zipfile.ZipInfo("eval_bundle/core.yaml")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="leads out"):
        core_eval.unpack(tmp_path / "a.zip", tmp_path / "target")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development data is not here")
def test_the_real_bundle(model):
    tasks, missing = core_eval.read_tasks(SHARED)
    assert core_eval.core_name(missing) == "CORE (21/22, no coqa)" and len(tasks) == 21
    wide = GPT(
        GPTConfig(
            sequence_len=512,
            vocab_size=TOKENIZER.get_vocab_size(),
            n_layer=1,
            n_head=2,
            n_kv_head=2,
            n_embd=32,
        )
    )
    wide.load_state_dict(
        {name: value for name, value in model.state_dict().items() if ".h.1." not in name}
    )
    wide.eval()
    for task in tasks:
        rows = core_eval.read_items(task)
        assert all(
            0 <= item.get("gold", 0) < len(core_eval.ROWS[task.kind](item)) for item in rows
        ), task.label
        groups = core_eval.groups_of(task, rows)
        assert len(groups) == (5 if task.label == "jeopardy" else 1)
        sample = groups[0][:3]
        ours = [
            core_eval.item_rows(
                task, item, [sample[i] for i in core_eval.fewshot_indices(j, 3, 2)], TOKENIZER, 512
            )
            for j, item in enumerate(sample)
        ]
        verdicts = core_eval.judge(wide, task.kind, ours, [item.get("gold", 0) for item in sample])
        two_shots = CoreTask(task.label, task.kind, task.path, 2, task.delimiter)
        assert verdicts == [
            slow.answered_rightly(wide, TOKENIZER, two_shots, sample, j) for j in range(3)
        ], task.label
