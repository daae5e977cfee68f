"""Ten conversations of five turns with a chat model, on the screen and in the report.

    python -m dev.talk                       the finetuned model, its likeliest answers
    python -m dev.talk -i sft -t 0.8 --lang=zh

The questions stand in dev/talk.yaml. The answers are printed as they come: nothing is chosen.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from scripts.chat_cli import Chat, answer_once
from zangchat import configurator
from zangchat.config import CheckpointConfig
from zangchat.report import checkpoint_name, get_report

QUESTIONS = Path(__file__).with_suffix(".yaml")


@dataclass
class Config(CheckpointConfig):
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.0
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50  # 0 = off
    seed: int = 42
    max_tokens: int = 256  # longest answer
    lang: str = "en"  # zh: the Chinese conversations first


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, talk, argv)


def talk(config: Config) -> int:
    configurator.check_sampling(config)
    from zangchat.engine import Engine, load_for_chat

    model, tokenizer, meta = load_for_chat(config)
    engine = Engine(model, tokenizer)
    held: list[dict[str, Any]] = []
    for questions in conversations(config.lang):
        chat = Chat(engine, config.temperature, config.top_k, 1.0, config.seed, config.max_tokens)
        print()
        for question in questions:
            print(f"> {question}")
            answer_once(chat, question)
        held.append({"messages": chat.messages})
    settings = {"model": checkpoint_name(meta), "temperature": config.temperature}
    get_report().log(f"Conversations {meta['stage']}", [settings, *held])
    return 0


def conversations(lang: str) -> Iterator[list[str]]:
    """The questions of each conversation; those in the reader's language first."""
    found: list[list[str]] = yaml.safe_load(QUESTIONS.read_text(encoding="utf-8"))
    yield from sorted(found, key=lambda questions: questions[0].isascii() == lang.startswith("zh"))


if __name__ == "__main__":
    sys.exit(main())
