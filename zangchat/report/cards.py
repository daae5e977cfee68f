"""Report cards, and the scores in them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from zangchat.config import SOURCES
from zangchat.report.curves import Curve, is_number

STAGES = tuple(source.upper() for source in SOURCES)
STAGE_WORDS = {
    "RL": {"rl", "grpo"},
    "SFT": {"sft", "finetuning"},
    "MID": {"mid", "midtraining"},
    "BASE": {"base", "core"},
}


class Card(NamedTuple):
    section: str
    time: float  # seconds since the epoch, when it was logged
    data: list[Any]  # str | dict, as the package describes


def checkpoint_name(meta: Mapping[str, Any]) -> str:
    """The name of a checkpoint in files and cards: sft_d20_000650."""
    tag = meta["user_config"].get("model_tag") or "untagged"
    return f"{meta['stage']}_{tag}_{meta['step']:06d}"


def stage_of(section: str) -> str | None:
    """The stage of a section, by its words: "Midtraining" -> MID, "Tokenizer" -> None."""
    words = set(re.findall(r"[a-z]+", section.lower()))
    return next((stage for stage, marks in STAGE_WORDS.items() if words & marks), None)


def is_evaluation(section: str) -> bool:
    return "eval" in section.lower()


def pipeline_order(card: Card) -> tuple[int, bool, str]:
    """Sort key: text and tokenizer, the stages, all others; training before evaluation."""
    stage, section = stage_of(card.section), card.section.lower()
    position = STAGES.index(stage) + 1 if stage else len(STAGES) + 1
    if not stage and ("token" in section or "data" in section):
        position = 0
    return position, is_evaluation(section) or section.endswith("loss"), card.section


def summary_table(cards: Iterable[Card], curves: Iterable[Curve]) -> dict[str, dict[str, float]]:
    """{metric: {stage: value}}.

    The last validation result and reward of each stage's run, and the scores of its evaluation
    cards.
    """
    table: dict[str, dict[str, float]] = {}
    names = {
        "val_bpb": "validation bpb",
        "val_loss": "validation loss",
        "reward": "training reward",
        "pass@1": "held-out pass@1",
    }
    for curve in curves:
        if curve.stage != "BASE":
            # of conversations: not comparable with that of texts
            names["val_bpb"] = "validation bpb, answers"
        for name in names:
            values = [row[name] for row in curve.rows if is_number(row.get(name))]
            if values:
                table.setdefault(names[name], {})[curve.stage] = values[-1]
    for card in cards:
        stage = stage_of(card.section)
        if stage is None or not is_evaluation(card.section):
            continue
        for scores in filter(is_scores, card.data):
            core = [name for name in scores if name.upper().startswith("CORE")]
            for name in core or scores:  # of CORE the mean: its tasks have their own plot
                table.setdefault(name, {})[stage] = scores[name]
    return table


def core_scores(cards: Iterable[Card]) -> dict[str, float]:
    """The centred score of each CORE task, from the card whose scores include CORE's mean."""
    for card in cards:
        for scores in filter(is_scores, card.data):
            if any(name.upper().startswith("CORE") for name in scores):
                tasks = {
                    name: float(value)
                    for name, value in scores.items()
                    if not name.upper().startswith("CORE")
                }
                if tasks:
                    return tasks
    return {}


def is_scores(item: Any) -> bool:
    return isinstance(item, dict) and bool(item) and all(map(is_number, item.values()))
