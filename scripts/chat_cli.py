"""Talk to a model in the terminal.

    python -m scripts.chat_cli                                    # a conversation; /help lists the
                                                                  commands
    python -m scripts.chat_cli -p "Why is the sky blue?"          # one answer on stdout, nothing
                                                                  else
    python -m scripts.chat_cli --demo                             # with the model in dev/demo
    echo "Summarise: ..." | python -m scripts.chat_cli -p -       # the question from stdin

Ctrl-C stops an answer and keeps the chat; Ctrl-D leaves. A pasted paragraph is one question;
Alt-Enter breaks a line. On a pipe each line is a question.
"""

import json
import logging
import re
import secrets
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from zangchat import configurator
from zangchat.config import USER_LIMITS, ChatConfig, check_demo
from zangchat.errors import UserError
from zangchat.runtime.files import expand_home, open_for_lines

if TYPE_CHECKING:
    from zangchat.engine import Engine

HELP = """\
/clear               forget the conversation
/system TEXT         instructions in front of the conversation (nothing: none)
/temperature NUMBER  0 always takes the likeliest token
/topk NUMBER         draw among the NUMBER likeliest tokens (0: all)
/seed NUMBER         the same seed gives the same answers (nothing: a new one each time)
/save FILE           write the conversation as JSON lines
/help  /quit         Ctrl-C stops an answer, Ctrl-D leaves, Alt-Enter breaks a line"""
COMMANDS = frozenset(re.findall(r"/[a-z]+", HELP)) | {"/exit"}
PLAIN_COMMANDS = {"/clear", "/help", "/quit", "/exit"}  # take nothing


@dataclass
class Config(ChatConfig):
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """answer this on stdout and leave; "-" reads it from stdin"""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.6
    """0 always takes the likeliest token"""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50  # 0 = off
    top_p: float = 1.0
    """draw among the likeliest tokens that reach this probability together; 1 = off"""
    seed: int | None = None  # default: another one for every answer
    max_tokens: int = 512  # longest answer


@dataclass
class Chat:
    """A conversation and the settings of its next answer."""

    engine: "Engine"
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    max_tokens: int
    messages: list[dict[str, Any]] = field(default_factory=list)
    system: str = ""

    def conversation(self) -> list[dict[str, Any]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages

    def answer(
        self, question: str, note: Callable[[str], None]
    ) -> Generator[tuple[str, str], None, None]:
        """Ask, and stream the answer as (type of part, text); "made_up" is a tool output of the
        model's own.

        The exchange joins the history, even if the answer is interrupted, but not without any
        answer. `note` is called with messages for the user. Raises UserError for a question that
        exceeds the context or the memory.
        """
        from zangchat.engine.replies import REPLY_SHARE, ReplyDecoder, fit_conversation

        tokenizer, context = self.engine.tokenizer, self.engine.model.config.sequence_len
        question_message = {"role": "user", "content": question}
        room = context - min(self.max_tokens, context // REPLY_SHARE)
        prompt, left_out = fit_conversation(
            tokenizer, [*self.conversation(), question_message], room
        )
        if len(prompt) >= context:
            raise UserError(
                f"the question has {len(prompt)} tokens, but the model reads {context - 1} at "
                "most: ask something shorter"
            )
        if left_out:
            note(
                f"the conversation outgrew the model's {context} tokens: its oldest {left_out} "
                "messages were left out"
            )
        decoder = ReplyDecoder(tokenizer)
        seed = secrets.randbits(32) if self.seed is None else self.seed
        try:
            for (token,), (mask,) in self.engine.generate(
                prompt, 1, self.max_tokens, self.temperature, self.top_k, self.top_p, seed
            ):
                for kind, text in decoder.feed(token):
                    yield "made_up" if mask and kind == "python_output" else kind, text
            yield from decoder.flush()
        finally:
            decoder.flush()
            if answer := decoder.content():
                self.messages += [question_message, {"role": "assistant", "content": answer}]


def chat(config: Config) -> int:
    check(config)
    question = sys.stdin.read() if config.prompt == "-" else config.prompt
    if question is not None and not question.strip():
        raise UserError('--prompt is empty: ask something, as in -p "Why is the sky blue?"')

    from zangchat.hf.demo import open_engine

    if question is not None:
        logging.getLogger("zangchat").setLevel(logging.WARNING)  # one answer, and problems
    session = Chat(
        open_engine(config),
        config.temperature,
        config.top_k,
        config.top_p,
        config.seed,
        config.max_tokens,
    )
    return answer_once(session, question) if question is not None else converse(session)


def check(config: Config) -> None:
    configurator.check_sampling(config)
    check_demo(config)


def answer_once(session: Chat, question: str) -> int:
    """Stream the answer's printable text to stdout, without tool calls."""
    for kind, text in session.answer(
        question.strip(), note=lambda message: print(message, file=sys.stderr)
    ):
        if kind == "text":
            sys.stdout.write(printable(text))
            sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


# ---- the conversation on a terminal --------------------------------------------------------------


class Screen:
    """Prints text plainly, tool calls in brackets, notes dimmed; no styles unless on a terminal."""

    STYLES = {"text": "", "python": "cyan", "python_output": "bold cyan", "made_up": "red"}
    BEFORE = {"text": "", "python": "[", "python_output": " = ", "made_up": "[made up: "}

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.kind = "text"

    def write(self, kind: str, text: str) -> None:
        if kind != self.kind:
            self._close(kind)
            self.console.print(self.BEFORE[kind], style=self.STYLES[kind], end="")
            self.kind = kind
        piece = Segment(printable(text), Style.parse(self.STYLES[kind]))
        self.console.print(Segments([piece]), end="")  # as it is: a string's tabs are expanded

    def end(self) -> None:
        self._close("text")
        self.kind = "text"
        self.console.print()

    def _close(self, following: str) -> None:
        """A call and its result stand in one pair of brackets."""
        if self.kind != "text" and following != "python_output":
            self.console.print("]", style=self.STYLES["python"], end="")

    def note(self, text: str) -> None:
        self.console.print(text, style="dim")


def printable(text: str) -> str:
    """Without control characters: a model may have learnt escape sequences of terminals."""
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160))


def converse(session: Chat) -> int:
    screen, ask = Screen(), question_reader()
    screen.note("Ask anything. /help shows the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            question = ask().strip()
            if is_command(question):
                if not obey(session, question, screen.note):
                    return 0
            elif question:
                reply(session, question, screen)
        except EOFError:
            screen.console.print()
            return 0
        except KeyboardInterrupt:
            screen.note("(Ctrl-D or /quit leaves)")


def question_reader() -> Callable[[], str]:
    """Asks for a question: in a terminal with editing and history, and a paste is one question."""
    prompt = "\n> "
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return lambda: input(prompt)
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    for enter in ("enter", "c-j"):  # a key pressed before the prompt is up arrives as Ctrl-J
        keys.add("escape", enter)(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(prompt, key_bindings=keys)
    return session.prompt


def is_command(text: str) -> bool:
    """Whether it is a /command, or one word that looks like one; else it is a question."""
    name, *rest = text.split(maxsplit=1)[:2] or [""]
    if rest:
        return name in COMMANDS - PLAIN_COMMANDS
    return re.fullmatch(r"/[a-z]+", name) is not None


def reply(session: Chat, question: str, screen: Screen) -> None:
    """Stream one answer; Ctrl-C ends it and keeps its beginning."""
    with closing(session.answer(question, screen.note)) as pieces:
        try:
            for kind, text in pieces:
                screen.write(kind, text)
            screen.end()
        except KeyboardInterrupt:
            screen.end()
            screen.note("(stopped)")
        except UserError as error:
            screen.note(str(error))


def obey(session: Chat, line: str, note: Callable[[str], None]) -> bool:
    """Carry out a /command; False to leave."""
    command, argument = (*line.strip().split(maxsplit=1), "")[:2]
    try:
        if command in ("/quit", "/exit"):
            return False
        elif command == "/help":
            note(HELP)
        elif command == "/clear":
            session.messages.clear()
            note("the conversation is forgotten")
        elif command == "/system":
            session.system = argument
            note("the instructions are set" if argument else "there are no instructions")
        elif command == "/temperature":
            session.temperature = number(
                float, argument, "/temperature 0.6", USER_LIMITS["temperature"].allow
            )
            note(f"temperature {session.temperature:g}")
        elif command == "/topk":
            session.top_k = number(int, argument, "/topk 50", USER_LIMITS["top_k"].allow)
            note(f"top_k {session.top_k or 'off'}")
        elif command == "/seed":
            session.seed = number(int, argument, "/seed 42", lambda _: True) if argument else None
            note("a new seed for each answer" if session.seed is None else f"seed {session.seed}")
        elif command == "/save":
            save(session, argument, note)
        else:
            note(f"there is no command {command}; /help lists them")
    except UserError as error:
        note(str(error))
    return True


def number(
    kind: Callable[[str], Any], text: str, example: str, valid: Callable[[Any], bool]
) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not valid(value):
        raise UserError(f"that takes a number, as in {example}")
    return value


def save(session: Chat, name: str, note: Callable[[str], None]) -> None:
    """Append the conversation as one JSON line, the format that --identity_data and CustomJSON
    read.
    """
    if not name:
        raise UserError("name a file, as in /save chat.jsonl")
    if not session.messages:
        raise UserError("there is nothing to save yet")
    path = expand_home(name)
    try:
        with open_for_lines(path) as file:
            record = json.dumps({"messages": session.conversation()}, ensure_ascii=False)
            file.write(record.encode() + b"\n")
    except (OSError, ValueError) as error:  # a name that cannot be one
        raise UserError(
            f"{name} cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from None
    note(f"{len(session.messages)} messages added to {path}")


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, chat, argv)


if __name__ == "__main__":
    sys.exit(main())
