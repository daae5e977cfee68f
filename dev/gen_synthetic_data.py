r"""Have another model write conversations about who the model is, through an OpenAI-compatible
endpoint.

    python -m dev.gen_synthetic_data --base_url=http://127.0.0.1:8000/v1 --num=500
    OPENAI_API_KEY=... python -m dev.gen_synthetic_data --base_url=https://api.example.com/v1 \
        --model=NAME --facts=me.txt --num=1000
    python -m scripts.mid_train --identity_data=identity.jsonl

The output is a file for --identity_data. For variety, the request for conversation i has a
language, a kind of user, a topic, a tone and a length drawn from (seed, i). The endpoint gets a
JSON schema, or, if it supports none, only the prompt; every reply is checked either way.
Conversations that open too much like an earlier one are dropped. A second run resumes the first.
"""

import json
import os
import random
import re
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.common import Conversation
from tasks.customjson import conversation_of
from zangchat import configurator
from zangchat.errors import UserError, explain
from zangchat.runtime.files import atomic_write, open_for_lines, read_jsonl
from zangchat.runtime.logs import print0
from zangchat.runtime.seeds import derive_seed

FACTS = """The assistant is called zangchat. It is a small language model, trained from nothing by open-source code of the same name:
tokenizer, pretraining, midtraining, finetuning, reinforcement learning, evaluation and this chat, in the shape of nanochat.
Anyone can read, change and run that code on their own computer. It is not ChatGPT, Claude, Gemini or any company's product.
It has a calculator for sums and for counting letters. It cannot browse the web, see pictures or remember earlier conversations.
It knows little, makes mistakes, and says so when asked."""
USERS = (
    *(
        "a curious child",
        "a student of computer science",
        "a teacher",
        "a retired engineer",
        "a journalist",
        "a sceptical programmer",
    ),
    *(
        "somebody in a hurry",
        "somebody who has never used a chatbot",
        "a researcher",
        "a tired night-shift nurse",
        "a poet",
        "a parent",
    ),
    *(
        "a user who takes it for another model",
        "a user who wants to catch it lying",
        "a user who is lonely",
        "a shop owner",
    ),
)
TOPICS = (
    *(
        "a greeting and what it is called",
        "who made it",
        "what it can do",
        "what it cannot do",
        "how it was trained",
        "its size and speed",
    ),
    *(
        "whether it is another well-known model",
        "whether it has feelings",
        "whether its code is open",
        "where its knowledge comes from",
    ),
    *(
        "whether it makes mistakes",
        "what happens to what the user tells it",
        "what its name means to it",
        "how to run or change it oneself",
    ),
    *(
        "its calculator",
        "how it differs from big models",
        "an ordinary question first, then who is answering",
        "what it is good for",
    ),
)
TONES = (
    "friendly",
    "short and dry",
    "playful",
    "formal",
    "blunt, in lower case without punctuation",
    "wordy",
    "with a typing error or two",
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "messages": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "role": {"type": "string", "enum": ["user", "assistant"]},
                    "content": {"type": "string"},
                },
                "required": ["role", "content"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["messages"],
    "additionalProperties": False,
}


@dataclass
class Config:
    base_url: str = "http://127.0.0.1:8000/v1"  # of the endpoint; the default is scripts.chat_web
    model: str = ""  # default: the first that the endpoint lists
    num: int = 500  # conversations in the file at the end
    output: str = "identity.jsonl"  # existing conversations in it count
    facts: str = ""  # a text file with facts about the assistant; default: about zangchat
    languages: str = "English:3,Chinese:1"  # NAME:WEIGHT
    max_turns: int = 3  # maximum number of questions with answers
    max_similarity: float = 0.7
    """of an opening to every earlier one: share of common letter trigrams"""
    temperature: float = 1.0
    max_tokens: int = 1024  # per conversation
    at_once: int = 4  # concurrent requests; changes only the speed
    seed: int = 42


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, generate, argv)


def generate(config: Config) -> int:
    check(config)
    languages = parse_languages(config.languages)
    facts = Path(config.facts).read_text(encoding="utf-8") if config.facts else FACTS
    output = Path(config.output)
    written = (
        [conversation_of(row, where) for where, row in read_jsonl(output)]
        if output.exists()
        else []
    )
    openings = Openings(config.max_similarity)
    for conversation in written:
        openings.add(opening(conversation))
    have, dropped = len(written), {"not a conversation": 0, "too similar": 0}
    writer = Writer(config)
    last = 3 * config.num  # give up on a model that repeats itself
    with (
        open_for_lines(output) as file,
        ThreadPoolExecutor(config.at_once) as pool,
    ):
        for first in range(progress_of(output), last, config.at_once):
            if have >= config.num:
                break
            indices = range(first, min(first + config.at_once, last))
            replies = list(
                pool.map(lambda i: writer.write(make_prompt(facts, languages, config, i)), indices)
            )
            for reply in replies:
                made = read_reply(reply)
                if made is None:
                    dropped["not a conversation"] += 1
                elif not openings.add(opening(made)):
                    dropped["too similar"] += 1
                elif have < config.num:
                    file.write(json.dumps(made, ensure_ascii=False).encode() + b"\n")
                    have += 1
            file.flush()
            atomic_write(position_file(output), str(indices.stop))
            print0(
                f"{have} of {config.num} conversations; left out: "
                + ", ".join(f"{n} {why}" for why, n in dropped.items())
            )
    if have < config.num:
        print0(
            f"{output} has {have} conversations: after {last} requests nothing new comes; raise "
            "--temperature or --max_similarity"
        )
        return 1
    following = shlex.join(["python", "-m", "scripts.mid_train", f"--identity_data={output}"])
    print0(f"{output} has {have} conversations; next: {following}")
    return 0


def check(config: Config) -> None:
    configurator.check_range(1, config, "num", "max_turns", "max_tokens", "at_once")
    if not 0 < config.max_similarity <= 1 or config.temperature < 0:
        raise UserError(
            f"--max_similarity={config.max_similarity:g} must lie in (0, 1], "
            f"--temperature={config.temperature:g} not below 0"
        )
    if config.facts and not Path(config.facts).is_file():
        raise UserError(
            f"--facts={config.facts}: there is no such file; write down what is true of the "
            "assistant, as plain text"
        )


def parse_languages(spec: str) -> dict[str, float]:
    found = {}
    for item in filter(None, (part.strip() for part in spec.split(","))):
        name, _, weight = item.partition(":")
        try:
            found[name] = float(weight or 1)
        except ValueError:
            found[name] = 0.0
        if found[name] <= 0:
            raise UserError(f"--languages: {item!r} is not NAME:WEIGHT with a weight above 0")
    if not found:
        raise UserError('--languages is empty: write it as "English:3,Chinese:1"')
    return found


def position_file(output: Path) -> Path:
    return output.with_name(output.name + ".position")


def progress_of(output: Path) -> int:
    """Requests made so far for the file, so that no conversation is requested twice."""
    path = position_file(output)
    return int(path.read_text(encoding="utf-8")) if output.exists() and path.exists() else 0


# ---- asking --------------------------------------------------------------------------------------


def make_prompt(facts: str, languages: dict[str, float], config: Config, index: int) -> str:
    """The request for conversation `index`; always the same for the same index."""
    rng = random.Random(derive_seed(config.seed, "synthetic", index))
    turns = rng.randint(1, config.max_turns)
    (language,) = rng.choices(list(languages), list(languages.values()))
    return f"""Write one conversation between a user and an assistant. What is true of the assistant:

{facts.strip()}

The user: {rng.choice(USERS)}. It begins with: {rng.choice(TOPICS)}. The user's tone: {rng.choice(TONES)}. Language: {language}.
{turns} question{"s" if turns > 1 else ""}, each answered in one to three sentences. The answers are true to the facts above and plain text.
Reply with nothing but JSON: {{"messages": [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]}}"""


class Writer:
    """The endpoint. Raises UserError if it cannot be reached or refuses."""

    def __init__(self, config: Config) -> None:
        with explain("the openai client is not installed", "run `pip install openai`", ImportError):
            import openai
        self.openai, self.config = openai, config
        key = os.environ.get("OPENAI_API_KEY", "none")  # your own server needs none
        self.client = openai.OpenAI(
            base_url=config.base_url, api_key=key, max_retries=4, timeout=600.0
        )
        self.has_schemas = True
        self.model = config.model or self._called(lambda: self.client.models.list().data[0].id)

    def write(self, prompt: str) -> str:
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
        }
        if self.has_schemas:
            schema = {
                "type": "json_schema",
                "json_schema": {"name": "conversation", "strict": True, "schema": SCHEMA},
            }
            try:
                return self._text({**asked, "response_format": schema})
            except self.openai.BadRequestError as error:
                if "response_format" not in str(error):
                    raise UserError(f"{self.config.base_url} refuses: {error}") from error
                if self.has_schemas:
                    print0(
                        "the endpoint does not support JSON schemas: only the prompt asks for JSON"
                    )
                self.has_schemas = False
        return self._text(asked)

    def _text(self, asked: dict[str, Any]) -> str:
        return (
            self._called(lambda: self.client.chat.completions.create(**asked))
            .choices[0]
            .message.content
            or ""
        )

    def _called(self, call: Any) -> Any:
        try:
            return call()
        except self.openai.BadRequestError:
            raise
        except (self.openai.OpenAIError, IndexError) as error:
            problem = f"--base_url={self.config.base_url} gives no answer ({error})"
            raise UserError(f"{problem}: start scripts.chat_web, or give another") from error


# ---- what came back ------------------------------------------------------------------------------


def read_reply(reply: str) -> Conversation | None:
    """The conversation in a reply, with or without text or a fence around it; None if there is
    none.
    """
    found = re.search(r"\{.*\}", reply, re.DOTALL)
    try:
        conversation = conversation_of(json.loads(found[0] if found else ""), "the reply")
    except (ValueError, UserError):
        return None
    plain = all(
        isinstance(message["content"], str) and message["content"].strip()
        for message in conversation["messages"]
    )
    return conversation if plain else None


def opening(conversation: Conversation) -> str:
    return next(
        message["content"] for message in conversation["messages"] if message["role"] == "user"
    )


class Openings:
    """First questions so far. `add` returns whether one is new: not too similar to an earlier
    one.
    """

    def __init__(self, max_similarity: float) -> None:
        self.max_similarity = max_similarity
        self.seen: list[set[str]] = []

    def add(self, text: str) -> bool:
        letters = "^" + re.sub(r"\W+", " ", text.lower()).strip() + "$"
        runs = {letters[i : i + 3] for i in range(max(1, len(letters) - 2))}
        if any(len(runs & other) >= self.max_similarity * len(runs | other) for other in self.seen):
            return False
        self.seen.append(runs)
        return True


if __name__ == "__main__":
    sys.exit(main())
