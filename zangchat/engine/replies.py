"""Tokens to text: streams, stop strings, the parts of a reply, conversations that fit the
context.
"""

import bisect
import codecs
from collections.abc import Iterable, Sequence
from typing import Any

REPLY_SHARE = 4  # a trimmed chat leaves 1/4 of the context, or max_tokens if less, to the reply


class StreamDecoder:
    """Tokens -> text; incomplete UTF-8 is held back until it is whole, or flushed as U+FFFD."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode_bytes = tokenizer.decode_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that became certain with this token; "" if it ends within a character."""
        return self._decoder.decode(self._decode_bytes([token]))

    def flush(self) -> str:
        """The rest, at the end of the stream; the decoder can be used again."""
        return self._decoder.decode(b"", final=True)


class StopFinder:
    """Watches a growing text for stop strings. Holds back text that may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False  # the text has ended before a stop string
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> str:
        """The text to show now; nothing after a stop string."""
        if self.found or not self._stops:
            return "" if self.found else text
        text = self._held + text
        places = [place for place in map(text.find, self._stops) if place >= 0]
        self.found = bool(places)
        shown = min(places) if places else len(text) - self._unsure(text)
        self._held = "" if self.found else text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """The text that was held back, at the end."""
        held, self._held = self._held, ""
        return held

    def _unsure(self, text: str) -> int:
        """The length of the longest suffix of the text that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        suffixes = range(longest, 0, -1)
        return next((n for n in suffixes if any(s.startswith(text[-n:]) for s in self._stops)), 0)


class Markup:
    """The special tokens of a reply: those that end it, and those that begin another part.

    text <|python_start|> python <|python_end|> text
    text <|output_start|> python_output <|output_end|> text
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        special = tokenizer.encode_special
        self.stop_tokens = frozenset((special("<|assistant_end|>"), special("<|bos|>")))
        self.python_start, self.python_end = special("<|python_start|>"), special("<|python_end|>")
        self.output_start, self.output_end = special("<|output_start|>"), special("<|output_end|>")
        self.kinds = {
            self.python_start: "python",
            self.python_end: "text",
            self.output_start: "python_output",
            self.output_end: "text",
        }
        self.silent = {*map(special, tokenizer.get_special_tokens())} - {*self.kinds}


class Reply:
    """The message of a reply, growing by (type, text) pieces.

    A part is {"type": "text" | "python" | "python_output", "text": str}.
    """

    def __init__(self) -> None:
        self.parts: list[dict[str, str]] = []

    def add(self, pieces: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Append pieces; returns those with text. One without text begins a part."""
        shown = []
        for kind, text in pieces:
            if not text or not self.parts or self.parts[-1]["type"] != kind:
                self.parts.append({"type": kind, "text": ""})
            if text:
                self.parts[-1]["text"] += text
                shown.append((kind, text))
        return shown

    def text(self) -> str:
        """The text, without tool calls."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    def content(self) -> str | list[dict[str, str]]:
        """The reply as a message's content: its parts if it calls a tool, else a string."""
        return self.parts if any(part["type"] != "text" for part in self.parts) else self.text()


class ReplyDecoder(Reply):
    """Tokens -> the message of a reply, up to the first of the `stop` strings in its text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        super().__init__()
        self.kind = "text"  # of the part that grows
        self._decoder = StreamDecoder(tokenizer)
        self._finder = StopFinder(stop)
        markup = Markup(tokenizer)
        self.kinds, self._silent = markup.kinds, markup.silent

    def feed(self, token: int) -> list[tuple[str, str]]:
        """The (type, text) pieces that this token adds, for Reply.add."""
        if self.stopped or token in self._silent:
            return []
        if token in self.kinds:
            pieces = self.flush()
            self.kind = self.kinds[token]
            if self.kind == "text" or self.stopped:
                return pieces
            self.add([(self.kind, "")])
            return [*pieces, (self.kind, "")]
        text = self._decoder.feed(token)
        return self._grow(self._finder.feed(text) if self.kind == "text" else text)

    def flush(self) -> list[tuple[str, str]]:
        """The pieces that were held back, at the end."""
        text = self._decoder.flush()
        if self.kind == "text":
            text = self._finder.feed(text) + self._finder.flush()
        return self._grow(text)

    def _grow(self, text: str) -> list[tuple[str, str]]:
        return self.add([(self.kind, text)] if text else [])

    def says(self, token: int) -> bool:
        """Whether this token, just fed, belongs to the text, not to a tool call or its markup."""
        return self.kind == "text" and token not in self._silent and token not in self.kinds

    @property
    def stopped(self) -> bool:
        """A stop string was found."""
        return self._finder.found


def fit_conversation(
    tokenizer: Any, messages: list[dict[str, Any]], max_prompt: int
) -> tuple[list[int], int]:
    """A chat that waits for the assistant, cut to `max_prompt` tokens.

    Returns (prompt tokens, number of oldest messages left out). The system message stays, turns go
    in pairs, and the last user message always stays: the prompt may therefore still be too long.
    """
    head = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(head) :]
    cuts = range(0, len(turns), 2)  # turns alternate: every cut leaves a user message first

    def render(cut: int) -> list[int]:
        return tokenizer.render_for_completion({"messages": [*head, *turns[cut:]]})

    def fits(cut: int) -> bool:
        return len(render(cut)) <= max_prompt

    # the fewest turns to leave out: prompts only get shorter
    cut = cuts[bisect.bisect_left(cuts, True, hi=len(cuts) - 1, key=fits)]
    return render(cut), cut
